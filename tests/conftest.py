"""Fixtures of the whole suite, and how several processes share it (`pytest -n 2`)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from actckpt.graph import Graph
from actckpt.profile import Cost, Profile
from tests.suite import CASES

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling


def pytest_configure() -> None:
    """Gives each of several processes its share of the threads."""
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


@pytest.fixture
def flat_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """`actckpt.optimize` without measuring: every operation takes a microsecond."""

    def build(graph: Graph, **_: Any) -> Profile:
        return Profile(graph.device, tuple(Cost(1e-6) for _ in graph.signatures))

    monkeypatch.setattr("actckpt.planning.build_profile", build)
