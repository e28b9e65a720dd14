"""The package offers every verb without importing torch."""

import doctest
import subprocess
import sys

import pytest

import perturbgene
from perturbgene.inference.predict import predict


def test_verbs_are_functions_of_the_package() -> None:
    assert perturbgene.predict.__wrapped__ is predict
    assert perturbgene.predict is perturbgene.predict


@pytest.mark.parametrize("name", [*(name for name in perturbgene.VERBS if name != "download"), "load_run"])
def test_every_verb_has_an_example_that_runs_as_a_doctest(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(getattr(perturbgene, name).__doc__)
    assert any(f"pg.{name}(" in example.source and not example.options for example in examples)


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'predikt'. Did you mean 'predict'"):
        _ = perturbgene.predikt


def test_importing_the_package_imports_no_torch() -> None:
    line = "import sys, perturbgene; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], check=False).returncode == 0


def test_the_names_of_the_package_are_listed() -> None:
    names = {"prepare", "mlm", "cls", "download", "predict", "load_run", "InputError", "GeneTokenizer", "GeneBertModel"}
    assert names <= set(dir(perturbgene))
    assert not [name for name in dir(perturbgene) if not hasattr(perturbgene, name)]
