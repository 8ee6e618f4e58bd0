"""The public surface, the direction of imports, and what the distribution contains."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import actckpt
from actckpt import errors

ROOT = Path(__file__).parent.parent
# folder -> the package it is installed as
FOLDERS = {
    ROOT / "actckpt": "actckpt",
    ROOT / "policies": "actckpt.policies",
    ROOT / "profiler": "actckpt.profiler",
}

FUNCTIONS = {
    "exhaustive",
    "export_weights",
    "find_max_batch",
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
    "Graph",
    "Measurement",
    "Plan",
    "Price",
    "Profile",
    "Region",
    "Report",
    "Resumed",
    "SavedOp",
    "SeededSamples",
    "Selective",
}
ERRORS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.ActckptError)
}

# module or package -> what it may import; every arrow points down this list or sideways to itself
MAY_IMPORT: dict[str, set[str]] = {}
MAY_IMPORT["errors"] = set()
MAY_IMPORT["units"] = set()
MAY_IMPORT["versions"] = set()
MAY_IMPORT["graph"] = {"errors"}
MAY_IMPORT["profile"] = {"errors"}
MAY_IMPORT["plan"] = {"errors", "graph", "profile"}
MAY_IMPORT["signature"] = {"errors"}
MAY_IMPORT["regions"] = {"plan", *MAY_IMPORT["plan"]}
MAY_IMPORT["recomputation"] = {"errors", "graph"}
MAY_IMPORT["bursts"] = {"plan", "recomputation", *MAY_IMPORT["plan"]}
MAY_IMPORT["windows"] = {"graph"}
MAY_IMPORT["stretches"] = {"bursts", "windows", *MAY_IMPORT["bursts"]}
MAY_IMPORT["pricing"] = {"regions", "stretches", *MAY_IMPORT["regions"], *MAY_IMPORT["stretches"]}
MAY_IMPORT["policies"] = {"pricing", *MAY_IMPORT["pricing"]}
MAY_IMPORT["own_generators"] = set()
MAY_IMPORT["tracing"] = {"errors", "graph", "own_generators", "plan", "signature", "versions"}
MAY_IMPORT["profiler"] = {"errors", "graph", "plan", "profile", "signature", "tracing", "versions"}
MAY_IMPORT["rewriting"] = {
    "bursts",
    "recomputation",
    "regions",
    "signature",
    "stretches",
    "tracing",
    "windows",
    *MAY_IMPORT["regions"],
}
MAY_IMPORT["dry_run"] = {"profiler", "rewriting", *MAY_IMPORT["profiler"], *MAY_IMPORT["rewriting"]}
MAY_IMPORT["plan_key"] = {"graph"}
MAY_IMPORT["margin"] = set()
MAY_IMPORT["several_backwards"] = {"dry_run", "graph", "pricing", "profile", "tracing"}
MAY_IMPORT["room"] = {"dry_run", "graph"}
MAY_IMPORT["planning"] = {
    "dry_run",
    "margin",
    "plan_key",
    "policies",
    "room",
    "several_backwards",
    "units",
    *MAY_IMPORT["dry_run"],
    *MAY_IMPORT["policies"],
}
MAY_IMPORT["reporting"] = {"planning", "versions", *MAY_IMPORT["planning"]}
MAY_IMPORT["measuring"] = {"graph", "profiler", "reporting", "tracing", "units"}
MAY_IMPORT["batch_search"] = set()
MAY_IMPORT["batch_key"] = {"rewriting", "signature", "tracing"}
MAY_IMPORT["backward_watch"] = {"rewriting", "tracing"}
MAY_IMPORT["in_use"] = {"errors", "rewriting", "tracing"}
MAY_IMPORT["optimizer_listeners"] = {"tracing"}
MAY_IMPORT["optimizer_watch"] = {"graph", "optimizer_listeners", "profiler", "tracing"}
MAY_IMPORT["company"] = {"batch_key", "graph", "planning", "profiler", "room", "tracing"}
MAY_IMPORT["needs"] = {"company", "errors", "margin", "planning", "profiler", "room", "units"}
MAY_IMPORT["planned_batch"] = {
    "batch_key",
    "optimizer_watch",
    "plan_key",
    "planning",
    "reporting",
    "room",
    "tracing",
}
MAY_IMPORT["forward_changes"] = {"batch_key", "errors", "planned_batch", "planning", "rewriting"}
MAY_IMPORT["participant"] = {
    "batch_key",
    "company",
    "errors",
    "needs",
    "optimizer_watch",
    "planned_batch",
    "planning",
    "room",
}
MAY_IMPORT["kept_plans"] = {"errors", "plan", "planning", "profile", "tracing"}
MAY_IMPORT["surroundings"] = {"tracing"}
MAY_IMPORT["session"] = {
    "backward_watch",
    "batch_key",
    "company",
    "forward_changes",
    "in_use",
    "kept_plans",
    "needs",
    "optimizer_listeners",
    "optimizer_watch",
    "participant",
    "planned_batch",
    "reporting",
    "surroundings",
    *MAY_IMPORT["reporting"],
}
# what lies on disk knows nothing of a live run
MAY_IMPORT["checkpoint"] = {"errors", "units"}
MAY_IMPORT["resuming"] = {
    "checkpoint",
    "errors",
    "own_generators",
    "session",
    "units",
    "versions",
}
LIBRARY = set(MAY_IMPORT)
MAY_IMPORT["api"] = LIBRARY
MAY_IMPORT["targets"] = {"errors"}
MAY_IMPORT["demo"] = {"", "reporting"}
MAY_IMPORT["commands"] = {"api", "demo", "targets", *LIBRARY}
MAY_IMPORT["cli"] = {"commands", "errors", "versions"}
MAY_IMPORT[""] = {"api", *LIBRARY}

# plain data: to be read without torch
PLAIN = (
    "bursts",
    "errors",
    "graph",
    "plan",
    "profile",
    "recomputation",
    "regions",
    "reporting",
    "policies",
    "stretches",
    "windows",
)


def sources() -> Iterator[tuple[str, Path]]:
    """(module name, file) of every module of the package."""
    for folder, package in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            # Python 3.11 and 3.12 differ in whether rglob follows the symbolic links
            if folder.name == "actckpt" and parts[0] in ("policies", "profiler"):
                continue
            yield ".".join([package, *(p for p in parts if p != "__init__")]), path


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere in it, other than for types alone."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            assert node.module is not None
            yield node.module
            # `from actckpt import plan` may name a module or an object
            if node.module == "actckpt":
                yield from (f"actckpt.{alias.name}" for alias in node.names)


def part(module: str) -> str:
    """The top-level part of actckpt that a module belongs to, "" for the package itself."""
    return (*module.split("."), "")[1]


PARTS = {part(module) for module, _ in sources()}


def test_public_surface() -> None:
    assert set(actckpt.__all__) == FUNCTIONS | DATA | ERRORS
    for name in actckpt.__all__:
        assert getattr(actckpt, name) is not None
    assert {"none", "full", "sqrt", "log", "selective", "auto"} <= set(actckpt.POLICIES)


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
        if own == "demo" and other not in PARTS:
            continue  # `from actckpt import optimize`: the public surface
        assert other == own or other in MAY_IMPORT[own], f"{module} imports {name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").rglob("*.py")), ids=lambda path: path.name
)
def test_experiments_use_the_public_surface_only(path: Path) -> None:
    for name in imported(path):
        if name.split(".")[0] == "actckpt" and name != "actckpt":
            assert name.removeprefix("actckpt.") in actckpt.__all__, f"{path.name} imports {name}"


def loaded_after(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of ``names`` a fresh process has imported after ``statement``."""
    code = f"import sys\n{statement}\nprint(*(n for n in {names!r} if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.split()


def test_importing_actckpt_imports_no_optional_dependency() -> None:
    optional = ("matplotlib", "peft", "transformers", "pytest")
    assert loaded_after("import actckpt", optional) == []


def test_checkpoints_are_imported_by_whoever_uses_them() -> None:
    lazy = ("actckpt.checkpoint", "actckpt.resuming", "xxhash")
    assert loaded_after("import actckpt", lazy) == []
    assert loaded_after("import actckpt; actckpt.Checkpointer", lazy) == list(lazy)


def test_nothing_on_disk_is_a_pickle() -> None:
    for module, path in sources():
        if part(module) in ("checkpoint", "resuming"):
            text = path.read_text(encoding="utf-8")
            assert not {"pickle", "dill", "shelve"} & {n.split(".")[0] for n in imported(path)}
            assert "torch.load" not in text, module
            assert "torch.save" not in text, module


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
