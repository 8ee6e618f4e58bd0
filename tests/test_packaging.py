"""The public surface, the direction of imports, and what the distribution contains."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

import actckpt
from actckpt import errors
from actckpt.data import budget_error
from actckpt.reporting.report import SUFFIXES
from tests.quick import slow_tests

ROOT = Path(__file__).parent.parent
# folder -> the package it is installed as
FOLDERS = {
    ROOT / "actckpt": "actckpt",
    ROOT / "policies": "actckpt.policies",
    ROOT / "profiler": "actckpt.profiler",
}

FUNCTIONS = {
    "exhaustive",
    "export",
    "export_weights",
    "find_max_batch",
    "kept_tables",
    "average_weights",
    "load_weights",
    "lower_bound",
    "measure",
    "optimize",
    "price",
    "report",
    "revert",
    "trace",
}
DATA = {
    "POLICIES",
    "BatchSearch",
    "BatchTried",
    "Bound",
    "Burst",
    "Call",
    "Checkpoint",
    "Checkpointer",
    "Exported",
    "Graph",
    "LoadedWeights",
    "Measurement",
    "Plan",
    "Price",
    "Profile",
    "Region",
    "Report",
    "Resumed",
    "SaveOutcome",
    "SavedOp",
    "SeededSamples",
    "Selective",
    "Tier",
}
ERRORS = {
    name
    for module in (errors, budget_error)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, errors.ActckptError)
}

# a user imports from these
PUBLIC_MODULES = {
    "actckpt",
    "actckpt.demo.model",
    "actckpt.exporting.drift",
    "actckpt.integrations.accelerate",
    "actckpt.integrations.lightning",
    "actckpt.integrations.transformers",
}

# module or package -> what it may import; every arrow points down this list or sideways to itself
MAY_IMPORT: dict[str, set[str]] = {}
MAY_IMPORT["errors"] = set()
MAY_IMPORT["units"] = set()
MAY_IMPORT["progress"] = set()
MAY_IMPORT["versions"] = set()
MAY_IMPORT["object_walk"] = set()
MAY_IMPORT["own_generators"] = set()
MAY_IMPORT["pages"] = {"units"}
MAY_IMPORT["data"] = {"errors", "pages"}
MAY_IMPORT["interpreting"] = {"data", "errors"}
MAY_IMPORT["pricing"] = {"data", "errors", "interpreting"}
MAY_IMPORT["policies"] = {"data", "errors", "interpreting", "pricing", "units"}
MAY_IMPORT["tracing"] = {"data", "errors", "object_walk", "own_generators", "versions"}
MAY_IMPORT["profiler"] = {"data", "errors", "progress", "tracing", "versions"}
MAY_IMPORT["rewriting"] = {"data", "errors", "interpreting", "tracing"}
MAY_IMPORT["planning"] = {
    "data",
    "errors",
    "policies",
    "pricing",
    "profiler",
    "progress",
    "rewriting",
    "tracing",
    "units",
}
MAY_IMPORT["reporting"] = {"interpreting", "pages", "planning", "versions", *MAY_IMPORT["planning"]}
MAY_IMPORT["measuring"] = {"data", "profiler", "reporting", "tracing", "units"}
MAY_IMPORT["budget"] = {"data", "errors", "units"}
MAY_IMPORT["asked"] = {"budget", "data", "errors", "planning", "policies", "units"}
MAY_IMPORT["refusals"] = {"errors", "rewriting", "tracing"}
MAY_IMPORT["session"] = {
    "data",
    "errors",
    "object_walk",
    "planning",
    "profiler",
    "reporting",
    "rewriting",
    "tracing",
    "units",
}
# what lies on disk knows nothing of a live run
MAY_IMPORT["checkpoint"] = {"errors", "units"}
MAY_IMPORT["foreign"] = {"checkpoint", "errors"}
MAY_IMPORT["importing"] = {"checkpoint", "errors", "foreign"}
MAY_IMPORT["sharded"] = {"checkpoint", "errors"}
MAY_IMPORT["resuming"] = {
    "checkpoint",
    "errors",
    "importing",
    "object_walk",
    "own_generators",
    "session",
    "sharded",
    "units",
    "versions",
}
MAY_IMPORT["exporting"] = {
    "checkpoint",
    "errors",
    "foreign",
    "progress",
    "resuming",
    "session",
    "units",
    "versions",
}
LIBRARY = set(MAY_IMPORT)
MAY_IMPORT["api"] = LIBRARY
MAY_IMPORT["demo"] = {"", "reporting"}
# what a user of the library would call, and how a run is kept
MAY_IMPORT["integrations"] = {
    "",
    "asked",
    "budget",
    "checkpoint",
    "errors",
    "planning",
    "profiler",
    "resuming",
    "session",
    "tracing",
    "units",
}
MAY_IMPORT["commands"] = {"api", "demo", *LIBRARY}
MAY_IMPORT["cli"] = {"commands", "errors", "versions"}
MAY_IMPORT["__main__"] = {"cli"}
MAY_IMPORT[""] = {"api", *LIBRARY}

# plain data: to be read without torch
PLAIN = ("data", "errors", "interpreting", "pages", "policies", "reporting")


def sources() -> Iterator[tuple[str, Path]]:
    """(module name, file) of every module of the package."""
    for folder, package in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            # Python 3.11 and 3.12 differ in whether rglob follows the symbolic links
            if folder.name == "actckpt" and parts[0] in ("policies", "profiler"):
                continue
            yield ".".join([package, *(p for p in parts if p != "__init__")]), path


MODULES = {module for module, _ in sources()}


def imported(path: Path, *, for_types: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere in it.

    Args:
        for_types: also those that it imports for annotations alone.
    """
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if for_types or not guarded:
            nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            assert node.module is not None
            yield node.module
            # `from actckpt.planning import margin` may name a module or an object
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names if node.module == "actckpt" else names & MODULES


def part(module: str) -> str:
    """The top-level part of actckpt that a module belongs to, "" for the package itself."""
    return (*module.split("."), "")[1]


PARTS = {part(module) for module, _ in sources()}


def test_public_surface() -> None:
    assert set(actckpt.__all__) == FUNCTIONS | DATA | ERRORS
    for name in actckpt.__all__:
        assert getattr(actckpt, name) is not None
    assert {"none", "full", "sqrt", "log", "selective", "auto"} <= set(actckpt.POLICIES)


def test_what_a_report_and_a_graph_can_do() -> None:
    def methods(kind: type) -> set[str]:
        return {n for n, v in vars(kind).items() if callable(v) or isinstance(v, classmethod)}

    shown = {"from_json", "to_json", "_repr_html_"}
    assert methods(actckpt.Report) >= {*shown, "save", "plot", "scalars"}
    assert methods(actckpt.Graph) >= shown
    assert set(SUFFIXES) == {".html", ".json", ".png", ".txt"}


def test_public_errors_have_one_root() -> None:
    assert all(issubclass(getattr(actckpt, name), actckpt.ActckptError) for name in ERRORS)


def test_no_public_function_shares_its_name_with_a_module() -> None:
    modules = {module.rpartition(".")[2] for module, _ in sources() if module.count(".") == 1}
    assert not modules & FUNCTIONS


@pytest.mark.parametrize(("module", "path"), [pytest.param(*s, id=s[0]) for s in sources()])
def test_imports_point_one_way(module: str, path: Path) -> None:
    own = part(module)
    assert own in MAY_IMPORT, f"say in MAY_IMPORT what {own} may import"
    for name in imported(path):
        if name.split(".")[0] != "actckpt":
            assert name.split(".")[0] not in ("experiments", "tests", "policies", "profiler")
            continue
        other = part(name)
        if own in ("demo", "integrations") and other not in PARTS:
            continue  # `from actckpt import optimize`: the public surface
        assert other == own or other in MAY_IMPORT[own], f"{module} imports {name}"


def test_no_modules_import_each_other() -> None:
    """Not round about, not inside a function, and not for annotations either."""
    files = dict(sources())
    arrows = networkx.DiGraph(
        (module, name)
        for module, path in files.items()
        for name in imported(path, for_types=True)
        # a package gathers what its modules define
        if name in files and name != module and files[name].name != "__init__.py"
    )
    assert [c for c in networkx.strongly_connected_components(arrows) if len(c) > 1] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").rglob("*.py")), ids=lambda path: path.name
)
def test_experiments_use_the_public_surface_only(path: Path) -> None:
    for name in imported(path):
        if name.split(".")[0] == "actckpt" and name not in PUBLIC_MODULES:
            assert name.removeprefix("actckpt.") in actckpt.__all__, f"{path.name} imports {name}"


def loaded_after(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of ``names`` a fresh process has imported after ``statement``."""
    code = f"import sys\n{statement}\nprint(*(n for n in {names!r} if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.split()


def test_importing_actckpt_imports_no_optional_dependency() -> None:
    optional = ("actckpt.integrations", "matplotlib", "peft", "transformers", "pytest")
    assert loaded_after("import actckpt", optional) == []


def test_checkpoints_are_imported_by_whoever_uses_them() -> None:
    lazy = ("actckpt.checkpoint", "actckpt.resuming", "xxhash")
    assert loaded_after("import actckpt", lazy) == []
    assert loaded_after("import actckpt; actckpt.Checkpointer", lazy) == list(lazy)


# the room for what others have written -> what of pickle its modules may use
OF_PICKLE = {
    "actckpt.foreign.restricted_pickle": {"_Unpickler", "UnpicklingError"},
    "actckpt.foreign.torch_file": {"UnpicklingError"},
}


def test_nothing_is_a_pickle() -> None:
    """But in one room, which reads those of others by a list of names."""
    for module, path in sources():
        names = {n.split(".")[0] for n in imported(path)}
        assert not {"dill", "shelve", "joblib", "cloudpickle"} & names, module
        assert "pickle" not in names or module in OF_PICKLE, module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr in OF_PICKLE[module], f"{module}: pickle.{node.attr}"
            if not isinstance(node, ast.Call):
                continue
            assert ast.unparse(node.func) != "torch.save" or part(module) == "exporting", module
            if ast.unparse(node.func) == "torch.load":
                assert module == "actckpt.foreign.torch_file" or part(module) == "exporting", module
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert options["weights_only"] == "True"


def test_plain_data_imports_no_torch() -> None:
    for module, path in sources():
        if part(module) in PLAIN:
            assert "torch" not in {name.split(".")[0] for name in imported(path)}, module


def test_every_package_is_in_the_distribution() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = setup["tool"]["setuptools"]
    packages = {m for m, path in sources() if path.name == "__init__.py"}
    folders = {m if p.name == "__init__.py" else m.rpartition(".")[0] for m, p in sources()}
    assert folders == packages, "a folder of modules without __init__.py"
    assert set(setuptools["packages"]) == packages
    assert setuptools["package-dir"] == {
        "actckpt.policies": "policies",
        "actckpt.profiler": "profiler",
    }


def test_folders_are_linked_for_tools_without_import_hooks() -> None:
    for name in ("policies", "profiler"):
        link = ROOT / "actckpt" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)


def test_tests_that_are_called_slow_exist() -> None:
    for name in slow_tests():
        file, _, test = name.partition("::")
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_versions_agree() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = setup["project"]["version"]
    assert "## [Unreleased]" in changelog or f"## [{version}]" in changelog
    pins = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    wanted = [
        *setup["project"]["dependencies"],
        *(name for extra in setup["project"]["optional-dependencies"].values() for name in extra),
    ]
    assert {name.split(">")[0].lower() for name in wanted} <= pins
