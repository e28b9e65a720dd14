"""Every command and snippet of the README and of the page about training, the scripts and the demo run as written."""

import json
import re
import shlex
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from perturbgene.configs import parse_args
from perturbgene.corpus.manifest import Corpus
from perturbgene.corpus.prepare import prepare
from perturbgene.data_utils.labels import token_text
from perturbgene.demo import commands
from perturbgene.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")

#: Appended to commands that take long: the text is what is tested, not the patience.
SHORT = "--max_steps 1 --max_length 60 --no_bf16 --report_to none --eval_strategy no"
LESS = {
    "mlm": f"{SHORT} --num_hidden_layers 1",
    "cls": SHORT,
    "counterfactual": "--num_null 5",
    "perturb": "--top_k 4 --num_controls 4",
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def perturbgene_commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("bash", README + TRAINING) for line in block.splitlines()]
    return list(dict.fromkeys(line.removeprefix("perturbgene ") for line in lines if line.startswith("perturbgene ")))


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    """PBMC cells as a reader of the README might have them: donors, tissue, cell type, log values in X."""
    import scanpy as sc

    whole = sc.datasets.pbmc68k_reduced()
    adata = ad.AnnData(whole.raw.X.copy(), var=whole.raw.var[[]].copy())
    adata.obs_names = whole.obs_names
    names = {"CD19+ B": "B cell", "CD8+ Cytotoxic T": "T cell"}
    adata.obs["cell_type"] = whole.obs["bulk_labels"].astype(str).replace(names).to_numpy()
    adata.obs["tissue"] = np.where(np.arange(adata.n_obs) % 2, "lung", "blood")
    adata.obs["donor_id"] = [f"D{number % 5}" for number in range(adata.n_obs)]
    return adata[:300].copy()


@pytest.fixture(scope="module")
def folder(cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    cells.write_h5ad(folder / "cells.h5ad")
    cells[:150].write_h5ad(folder / "mine.h5ad")
    unlabelled = cells.copy()
    del unlabelled.obs["cell_type"]
    unlabelled.write_h5ad(folder / "new_cells.h5ad")
    vocabulary = {"cell_type": sorted(map(token_text, cells.obs["cell_type"].unique()))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    prepare(cells, folder / "made", phenotypes=["cell_type"], split_by="cell", shard_size=80)
    (folder / "shards").mkdir()
    shards = [
        entry["file"] for split in ("train", "eval") for entry in Corpus.open(folder / "made").manifest["shards"][split]
    ]
    for number, shard in enumerate(shards[:3]):
        (folder / "made" / shard).rename(folder / "shards" / f"shard_{number}.h5ad")
    return folder


def test_every_command_of_the_readme_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ran = []
    for command in perturbgene_commands():
        if "URL" in command or "-h" in shlex.split(command):
            continue
        less = LESS.get(command.split()[0], "")
        if "--pretrained_model_path" in command:  # the model has its own size
            less = less.replace("--num_hidden_layers 1", "")
        code = main(shlex.split(command) + less.split())
        assert code == 0, command
        ran.append(command)
    assert len(ran) >= 20
    snippet(folder)


def snippet(folder: Path) -> None:
    """Run the Python block of the README on what its commands made."""
    names: dict[str, object] = {}
    exec(blocks("python")[0], names)
    assert "predicted_cell_type" in names["adata"].obs  # type: ignore[attr-defined]


def test_the_readme_opens_with_the_two_commands() -> None:
    first = blocks("bash")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]


@pytest.mark.parametrize("script", ["train_mlm.sh", "train_cls.sh"])
def test_every_flag_of_the_example_scripts_exists(script: str, tmp_path: Path) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    for name, body in re.findall(r"^ *(prepare|mlm|cls)=\(\n(.*?)^ *\)", text, flags=re.S | re.M):
        lines = [re.split(r"\s{2,}#|\s#", line)[0] for line in body.splitlines()]
        words = shlex.split(" ".join(lines).replace("$work", str(tmp_path)))
        (tmp_path / "mlm").mkdir(exist_ok=True)
        assert parse_args([name, *words]).verb == name


def test_every_command_of_the_demo_is_understood(tmp_path: Path) -> None:
    (tmp_path / "mlm").mkdir()
    verbs = [parse_args(command.split()).verb for command in commands(tmp_path)]
    assert verbs == ["prepare", "mlm", "evaluate", "cls", "evaluate", "predict", "predict"]
