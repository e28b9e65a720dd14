"""What tests of pages share: corpora with planted faults, one browser, and maps that are laid out in few rounds."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from perturbgene.corpus.prepare import prepare
from tests.corpus.test_prepare import cells, counts


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Corpora with nothing to find, with cells that were split one by one, and with copies and a phenotype = donor."""
    folder, values_ng = tmp_path_factory.mktemp("corpora"), counts(50)
    made = {"clean": prepare(cells(values_ng), folder / "clean", phenotypes=["cell_type"])}
    made["by cell"] = prepare(cells(values_ng), folder / "by_cell", phenotypes=["cell_type"], split_by="cell")
    values_ng[[1, 2, 3, 8]] = values_ng[0]  # of donors a, b, c and, held out, d twice
    planted = cells(values_ng)
    planted.obs["batch"] = "run " + planted.obs["donor_id"].astype(str)
    planted.obs["sex"] = planted.obs["donor_id"].map({"a": "f", "b": "m", "c": "m", "d": "f", "e": "f"})
    options = {"phenotypes": ["cell_type", "batch", "sex"], "eval_donors": ["d", "e"]}
    return made | {"planted": prepare(planted, folder / "planted", **options)}


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


@pytest.fixture(autouse=True, scope="module")
def _maps_are_laid_out_in_few_rounds(request: pytest.FixtureRequest) -> Iterator[None]:
    """Place cells coarsely where no test asks where they are."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_layout":
            patch.setattr("perturbgene.reports.layout.NUM_ROUNDS", 5)
        yield


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, started once; tests are skipped without it."""
    if not CHROMIUM:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def shown(browser: Any) -> Callable[[Path], AbstractContextManager[Any]]:
    """Return a context that shows a page, and then asserts that it had no errors and asked for nothing but itself."""

    @contextmanager
    def show(path: Path, **options: Any) -> Iterator[Any]:
        problems, requests = list[str](), list[str]()
        page = browser.new_page(**options)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        yield page
        page.close()
        assert not problems and requests == [path.as_uri()]

    return show
