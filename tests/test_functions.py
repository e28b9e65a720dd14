"""Verbs as functions: keywords of the command line, one name for a list of one, mistakes of the function called."""

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import perturbgene as pg
from perturbgene.configs import CONFIGS
from perturbgene.errors import InputError
from perturbgene.functions import as_function
from tests.small_run import three_types


def keywords_of(verb, **kwargs):
    """Return the keywords that reach the function behind a verb."""

    def function(adata, model, *, ask=(), given=None, top_k=3, **reading):
        return {"ask": ask, "given": given, "top_k": top_k, **reading}

    return as_function(function, verb)("cells.h5ad", "runs/mlm", **kwargs)


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_verb_is_a_function(verb):
    assert callable(getattr(pg, verb))


@pytest.mark.parametrize(
    ("name", "wrong", "nearest"),
    [
        ("predict", "asks", "ask"),
        ("embed", "layers", "layer"),
        ("perturb", "toward", "towards"),
        ("attribute", "num_cells", "num_check_cells"),
        ("counterfactual", "group_by", "groupby"),
        ("evaluate", "calibrated", "calibrate"),
        ("prepare", "num_genes", "num_top_genes"),
        ("mlm", "num_epochs", "num_train_epochs"),
        ("cls", "num_train_epoch", "num_train_epochs"),
        ("download", "output", "output_dir"),
        ("gene_embeddings", "group", "groupby"),
    ],
)
def test_an_unknown_keyword_is_a_type_error_of_the_function_that_was_called(name, wrong, nearest):
    message = rf"^{name}\(\) got an unexpected keyword argument '{wrong}'. Did you mean '{nearest}'"
    with pytest.raises(TypeError, match=message):
        getattr(pg, name)(**{wrong: 1})


def test_a_keyword_like_no_other_lists_the_known_ones():
    with pytest.raises(TypeError, match="'soft'. Known: .*'ask'"):
        keywords_of("predict", soft=True)


@pytest.mark.parametrize(
    "ask", ["sex", ["sex"], ("sex",), {"sex"}, np.array(["sex"]), pd.Index(["sex"])],
    ids=["text", "list", "tuple", "set", "array", "index"],
)  # fmt: skip
def test_one_name_may_be_given_in_any_form(ask):
    assert keywords_of("predict", ask=ask)["ask"] == ["sex"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sex", {"sex": None}),
        (["sex", "tissue=lung"], {"sex": None, "tissue": "lung"}),
        ({"tissue": "lung"}, {"tissue": "lung"}),
        (None, None),
    ],
)
def test_labels_may_be_given_as_on_the_command_line_or_as_a_mapping(given, expected):
    assert keywords_of("predict", given=given)["given"] == expected


def test_the_names_of_the_command_line_are_known():
    """What is positional in a function has the name of the command line too."""
    called = as_function(lambda adata, model: (adata, model), "predict")
    assert called(input="cells.h5ad", run="runs/mlm") == ("cells.h5ad", "runs/mlm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"top_k is 0, but it must be in \[1, inf\)"),
        ({"top_k": "three"}, "top_k was given 'three', which is not a number. Give --top_k INTEGER"),
        ({"top_k": 2.5}, "top_k was given 2.5, which is not a whole number"),
        ({"top_k": [1, 2]}, "top_k was given 1, 2, but it takes one value"),
        ({"normalization": "log1p"}, "normalization was given 'log1p', which .*did you mean 'log1p_cp10k'"),
    ],
)
def test_a_value_that_an_option_does_not_allow_is_refused_before_any_file_is_opened(options, message):
    with pytest.raises(InputError, match=message):
        keywords_of("predict", **options)


def test_the_signature_shows_all_options_of_reading():
    parameters = inspect.signature(pg.predict).parameters
    assert {"ask", "layer", "normalization", "min_gene_coverage", "batch_size"} <= parameters.keys()
    assert "reading" not in parameters


def test_training_functions_take_options_and_training_arguments():
    parameters = inspect.signature(pg.mlm).parameters
    assert {"corpus", "output_dir", "gene_mask_prob", "settings"} <= parameters.keys()
    with pytest.raises(InputError, match="adam_epsilon was given 'tiny', which is not a number"):
        pg.mlm(corpus=".", output_dir="r", adam_epsilon="tiny")


def test_a_mapping_renames_columns_that_become_phenotypes(tmp_path: Path):
    corpus = pg.prepare(
        three_types(), tmp_path / "c", phenotypes={"type": "cell_type", "tissue": None}, num_top_genes=9
    )
    assert list(pg.GeneTokenizer.from_pretrained(corpus).phenotypes) == ["tissue", "type"]


def test_one_phenotype_may_be_text(tmp_path: Path):
    corpus = pg.prepare(three_types(), tmp_path / "c", phenotypes="cell_type", num_top_genes=9)
    assert list(pg.GeneTokenizer.from_pretrained(corpus).phenotypes) == ["cell_type"]


@pytest.mark.parametrize("way", ["a script", "standard input"])
def test_a_script_without_a_main_guard_may_use_several_processes(small_folder: Path, tmp_path: Path, way: str):
    arguments = {"phenotypes": "cell_type", "num_top_genes": 9, "num_processes": 2}
    code = f"import perturbgene as pg\npg.prepare({str(small_folder / 'cells.h5ad')!r}, 'made', **{arguments})\n"
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, "script.py"] if way == "a script" else [sys.executable, "-"]
    subprocess.run(command, input=code, text=True, cwd=tmp_path, check=True)
    assert (tmp_path / "made/manifest.json").exists()


@pytest.mark.parametrize("value", [3, 3.0, "3", np.int64(3), [3]], ids=["int", "float", "text", "numpy", "list of one"])
def test_a_number_may_be_given_in_any_form(value):
    assert keywords_of("predict", top_k=value)["top_k"] == 3


def test_settings_of_training_may_be_paths_loaded_runs_and_a_bare_flag():
    called = as_function(lambda **settings: settings, "mlm")
    run = SimpleNamespace(path=Path("runs/mlm"))
    given = {"output_dir": Path("new"), "train_data_paths": [Path("a.h5ad")], "pretrained_model_path": run}
    assert called(**given, resume_from_checkpoint=True, adam_beta2="0.9") == {
        "output_dir": "new", "train_data_paths": ["a.h5ad"], "pretrained_model_path": "runs/mlm",
        "resume_from_checkpoint": "latest", "adam_beta2": 0.9,
    }  # fmt: skip


def test_a_label_that_is_set_needs_its_name_and_value():
    called = as_function(lambda adata, model, *, set: set, "counterfactual")
    assert called("cells.h5ad", "runs/mlm", set="tissue=lung") == {"tissue": "lung"}
    with pytest.raises(InputError, match="set was given 'tissue', which is no NAME=LABEL"):
        called("cells.h5ad", "runs/mlm", set="tissue")


@pytest.mark.parametrize("model", [None, 3, ("model", "tokenizer"), three_types])
def test_what_is_no_run_is_refused_in_one_line(model):
    with pytest.raises(InputError, match="is no run. Give the folder of an mlm or cls run"):
        pg.load_run(model)
