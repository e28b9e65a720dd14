"""Files for other installers and for citing agree with the package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from perturbgene import __version__
from perturbgene.configs import CONFIGS

ROOT = Path(__file__).parents[1]
OTHER_NAMES = {"torch": "pytorch", "isal": "python-isal", "matplotlib": "matplotlib-base"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_versions_agree() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == __version__
    assert f'set version = "{__version__}"' in read("recipe/meta.yaml")


def test_the_recipe_needs_what_the_package_needs() -> None:
    declared = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    needed = dict(re.match(r"([\w.-]+)(?:\[\w+\])?(>=[\w.]+)", line).groups() for line in declared)
    recipe = re.sub(r"\{\{.*?\}\}", "x", re.sub(r"\{%.*?%\}", "", read("recipe/meta.yaml")))
    run = yaml.safe_load(recipe)["requirements"]["run"]
    listed = dict(line.split(" ") for line in run)
    assert listed == {OTHER_NAMES.get(name, name): bound for name, bound in needed.items()} | {
        "python": ">=3.11",
        "aiohttp": ">=3.9",  # what fsspec[http] brings
    }


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def"])
def test_an_image_copies_what_setuptools_reads(name: str) -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    for needed in ("pyproject.toml", "constraints.txt", "perturbgene", project["readme"], *project["license-files"]):
        assert re.search(rf"^(COPY|\s).*{re.escape(needed)}", read(name), re.MULTILINE), needed


def test_the_overview_for_language_models_names_every_verb_and_no_missing_page() -> None:
    text = read("llms.txt")
    assert all(re.search(rf"[ `]{verb}[ `]", text) for verb in CONFIGS)
    pages = re.findall(r"\]\(([^)]+)\)", text)
    assert len(pages) > 8 and all((ROOT / page).is_file() for page in pages)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()), ids=lambda path: path.name)
def test_issue_forms_are_whole(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    assert all(field["type"] in ("textarea", "input") and field["attributes"]["label"] for field in form["body"])
