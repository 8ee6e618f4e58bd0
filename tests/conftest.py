"""Fixtures of the whole suite, and how several processes share it (`pytest -n 2`)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from actckpt.data.graph import Graph
from actckpt.data.profile import Cost, Profile
from tests.quick import (
    note_slow,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
)
from tests.suite import CASES

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling


# hooks of this file, too
__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_runtest_makereport",
    "pytest_runtest_protocol",
]


def pytest_configure(config: pytest.Config) -> None:
    """Gives each of several processes its share of the threads."""
    note_slow(config)
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Keeps in one process what shares traces and plans: a model of the suite, else a file.

    `--dist loadgroup` would do, but xdist 3.8 loses the groups under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModel(LoadScopeScheduling):  # type: ignore[misc] # untyped
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return next((word for word in re.findall(r"\w+", test) if word in CASES), file)

    return ByModel(config, log)


@pytest.fixture(scope="session", autouse=True)
def _own_costs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs that this process measured: another's could replace them between two plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTCKPT_CACHE", str(tmp_path_factory.mktemp("costs")))
        yield


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No word about models that other tests of this process have left behind."""
    if request.node.path.stem != "test_other_models":
        monkeypatch.setattr("actckpt.session.surroundings.neighbours", lambda model: [])


@pytest.fixture
def flat_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """`actckpt.optimize` without measuring: every operation takes a microsecond."""

    def build(graph: Graph, **_: Any) -> Profile:
        return Profile(graph.device, tuple(Cost(1e-6) for _ in graph.signatures))

    monkeypatch.setattr("actckpt.planning.making.build_profile", build)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """No state of accelerate's is left to other tests."""
    yield
    import accelerate.state

    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
