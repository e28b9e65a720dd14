"""The code keeps to its floor plan: rooms import leftwards, seams hold, nothing unsafe runs, no function is endless."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "perturbgene"
MOST_LINES = 60
#: From left to right: a room imports only from itself and from rooms to its left. Single modules of the package's own
#: folder stand at their place in this order, or belong to a room.
ROOMS = [
    "errors",
    "faq",
    "forms",
    "files",
    "urls",
    "hub",
    "devices",
    "heap",
    "cli",
    "configs",
    "plots",
    "data_utils",
    "model",
    "corpus",
    "training",
    "inference",
    "embedding",
    "perturbation",
    "counterfactuals",
    "reports",
    "functions",
    "main",
    "demo",
]
ROOM_OF_MODULE = {"sharded_trainer": "training", "eval_utils": "training", "auto": "model"}
# Library -> the only modules that may import it.
SEAMS = {
    "h5py": {
        "data_utils.opening",
        "data_utils.sources",
        "data_utils.untrusted",
        "data_utils.guard",
        "data_utils.h5ad_writing",
    },
    "zarr": {"data_utils.sources", "data_utils.h5ad_writing"},
    "fsspec": {"data_utils.remote"},
    "matplotlib": {"plots"},
    "jinja2": {"reports.page"},
    "cellxgene_ontology_guide": {"inference.ontology"},
    "seaborn": set(),
    "pickle": set(),
    "cloudpickle": set(),
    "dill": set(),
    "joblib": set(),
    "shelve": set(),
    "marshal": set(),
}
UNSAFE_ARGUMENTS = {"weights_only": False, "allow_pickle": True, "trust_remote_code": True, "shell": True}
UNSAFE_CALLS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "eval", "exec"}


def module_paths() -> dict[str, Path]:
    """Map `data_utils.read` and its like to their files; the packages' `__init__` are left out."""
    paths = {path: path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(name.parts): path for path, name in paths.items() if name.name != "__init__"}


MODULES = module_paths()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
every_module = pytest.mark.parametrize("module", MODULES)


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of everything a module imports, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Give the modules of the package that a module imports."""
    own = {
        name.removeprefix("perturbgene.") for name in imported_names(TREES[module]) if name.startswith("perturbgene.")
    }
    return {name if name in MODULES else name.rpartition(".")[0] for name in own} - {""}


def imports_at_start(module: str) -> Iterator[str]:
    """Yield what importing a module imports at once: what stands in no function and under no `if TYPE_CHECKING`."""
    for node in TREES[module].body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported_names(node)


def imported_at_start(module: str) -> set[str]:
    """Give the libraries that importing a module and what it imports brings in."""
    libraries, waiting, seen = set[str](), [module], set[str]()
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            names = [name.removeprefix("perturbgene.") for name in imports_at_start(one)]
            own = {name if name in MODULES else name.rpartition(".")[0] for name in names}
            waiting += own & set(MODULES)
            libraries |= {name.partition(".")[0] for name in names}
    return libraries


def dotted_name(node: ast.expr) -> str:
    """Give `yaml.load` for the expression `yaml.load`, and an empty string for what is no plain name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    """Yield what is called unsafely, with its line."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted_name(call.func)
        given = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
        if name in UNSAFE_CALLS or (name == "torch.load" and given.get("weights_only") is not True):
            yield f"line {call.lineno}: {name}"
        for argument, value in UNSAFE_ARGUMENTS.items():
            if given.get(argument) is value:
                yield f"line {call.lineno}: {argument}={value}"


def room_of(module: str) -> str:
    """Name the room of a module, or the module itself at the door."""
    return ROOM_OF_MODULE.get(module, module.partition(".")[0])


@every_module
def test_rooms_import_only_from_rooms_to_their_left(module: str) -> None:
    allowed = ROOMS[: ROOMS.index(room_of(module)) + 1]
    wrong = {name for name in own_imports(module) if room_of(name) not in allowed}
    assert not wrong, f"{module} imports from rooms to its right: {sorted(wrong)}"


@every_module
def test_imports_name_the_module_itself_and_not_the_package_around_it(module: str) -> None:
    unknown = own_imports(module) - set(MODULES) - {"model"}  # which re-exports its parts
    assert not unknown, f"{module} imports {sorted(unknown)}; import from the module that owns the name"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: own_imports(module) - {module} for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}; a smaller module beneath them is missing")


@every_module
def test_only_model_and_training_import_transformers(module: str) -> None:
    """Besides, `cli.training` turns flags into `TrainingArguments`."""
    is_user = "transformers" in {name.partition(".")[0] for name in imported_names(TREES[module])}
    assert not is_user or room_of(module) in ("model", "training") or module == "cli.training"


@every_module
def test_only_the_owner_of_a_seam_imports_its_library(module: str) -> None:
    libraries = {name.partition(".")[0] for name in imported_names(TREES[module])}
    strangers = {library for library in libraries if module not in SEAMS.get(library, {module})}
    assert not strangers, f"{module} may not import {sorted(strangers)}"


@every_module
def test_nothing_runs_foreign_code(module: str) -> None:
    assert not list(unsafe_calls(TREES[module]))


@pytest.mark.parametrize("module", ["inference.check", "corpus.prepare", "data_utils.download", "main"])
def test_what_needs_no_model_starts_without_torch(module: str) -> None:
    assert not imported_at_start(module) & {"torch", "transformers", "sklearn", "matplotlib"}
    assert "torch" in imported_at_start("inference.run")  # so the search finds it


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function's docstring, which explain and do not add to what must be followed."""
    if ast.get_docstring(node) is None:
        return 0
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1


@every_module
def test_no_function_is_longer_than_sixty_lines(module: str) -> None:
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {
        node.name: (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node) for node in functions
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


@every_module
def test_every_module_opens_with_what_it_owns(module: str) -> None:
    assert ast.get_docstring(TREES[module]), f"{module} has no docstring"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_packages_only_re_export(path: Path) -> None:
    allowed = ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
    body = ast.parse(path.read_text(encoding="utf-8")).body
    others = [node for node in body if not isinstance(node, allowed) and not isinstance(node, ast.Expr)]
    others = [node for node in others if getattr(node, "name", "") not in ("__getattr__", "__dir__")]
    assert not others, f"{path} does more than re-export in line {others[0].lineno}"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "yaml.load(text)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
    ],
)
def test_the_search_for_unsafe_calls_finds(line: str) -> None:
    assert list(unsafe_calls(ast.parse(line)))


def test_the_search_for_unsafe_calls_lets_safe_ones_pass() -> None:
    assert not list(unsafe_calls(ast.parse("torch.load(p, weights_only=True); yaml.safe_load(t); model.eval()")))
