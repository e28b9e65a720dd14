"""Settings of Sphinx for `make docs`: pages, notebooks as they were run, the theme of scverse, no network."""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference  # noqa: E402

import perturbgene  # noqa: E402

reference.write(HERE / "reference")

project = "perturbgene"
author = "The perturbgene authors"
version = release = perturbgene.__version__
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
exclude_patterns = ["_build"]
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
html_theme = "sphinx_book_theme"
html_title = "perturbgene"
html_use_index = False
html_theme_options = {"use_download_button": False, "navbar_persistent": []}
html_static_path = ["style"]
html_css_files = ["site.css"]


def setup(app: Any) -> None:
    """Lead links to the pages outside docs, which work in the repository, to their copies in the site."""

    def inside(app: Any, page: str, source: list[str]) -> None:
        for here, there in reference.OUTSIDE.items():
            source[0] = source[0].replace(f"](../{there}", f"](reference/{here}.md")

    app.connect("source-read", inside)
