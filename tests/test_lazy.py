"""The package offers every verb without importing torch."""

import subprocess
import sys

import pytest

import perturbgene
from perturbgene.inference import predict


def test_verbs_are_functions_of_the_package() -> None:
    assert perturbgene.predict is predict


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'predikt'"):
        _ = perturbgene.predikt


def test_importing_the_package_imports_no_torch() -> None:
    line = "import sys, perturbgene; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], check=False).returncode == 0
