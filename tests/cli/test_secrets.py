"""What a URL holds besides its path (tokens, signatures, passwords) is in no file that is kept, and in no log."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perturbgene.corpus.prepare import prepare
from perturbgene.errors import InputError
from perturbgene.main import main
from tests.web_server import Handler, Web, serving

SECRET = "s3cret"
STEPS = "--model_arch tiny --num_hidden_layers 1 --no_bf16 --max_steps 1 --per_device_train_batch_size 4"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(Handler) as running:
        yield running


@pytest.fixture
def signed(web: Web, make_adata: Any, write_h5ad: Any) -> list[str]:
    """Addresses of two small files, with a token and with a password."""
    for name in "ab":
        values_ng = np.random.default_rng(ord(name)).poisson(2.0, (24, 4)) + 1.0
        obs = {"sex": ["female", "male"] * 12, "donor_id": [f"{name}{i % 3}" for i in range(24)]}
        cells = make_adata(values_ng.astype(np.float32), obs=obs)
        cells.obs_names = [f"{name}{i}" for i in range(24)]
        web.files[f"{name}.h5ad"] = Path(write_h5ad(cells, name=f"{name}.h5ad")).read_bytes()
    host = web.url.removeprefix("http://")
    return [f"http://{host}/good/a.h5ad?token={SECRET}", f"http://ann:{SECRET}@{host}/private/b.h5ad"]


def files_with_secret(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_a_corpus_says_where_it_came_from_without_secrets(
    signed: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = prepare(signed, tmp_path / "corpus", phenotypes=["sex"])
    text = (made / "manifest.json").read_text()
    assert "/good/a.h5ad?***" in text and "***@" in text
    assert not files_with_secret(made)
    assert SECRET not in caplog.text


def test_a_run_on_signed_urls_keeps_no_secret_and_is_evaluated_and_resumed_when_they_are_given_again(
    signed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "vocab.json").write_text('{"sex": ["female", "male"]}')
    run, data = tmp_path / "run", ["--train_data_paths", signed[0], "--eval_data_paths", signed[1]]
    settings = f"--output_dir {run} --vocab_path {tmp_path}/vocab.json --bin_edges 1 2 {STEPS}"
    assert main(["mlm", *data, *settings.split()]) == 0
    assert not files_with_secret(run)

    assert main(["evaluate", str(run)]) == 2
    assert "/private/b.h5ad is a URL as it is shown" in capsys.readouterr().err
    assert main(["evaluate", str(run), *data]) == 0

    again = ["mlm", "--config", str(run / "run.yaml"), "--resume_from_checkpoint", "--max_steps", "2"]
    assert main(again) == 2
    assert "/good/a.h5ad?*** is a URL as it is shown" in capsys.readouterr().err
    assert main([*again, *data]) == 0
    assert not files_with_secret(run)
    assert SECRET not in caplog.text + "".join(capsys.readouterr())


def test_a_masked_url_is_not_asked_for(web: Web) -> None:
    with pytest.raises(InputError, match="is a URL as it is shown and stored"):
        prepare(f"{web.url}/good/a.h5ad?***", "nowhere")
    assert not web.seen
