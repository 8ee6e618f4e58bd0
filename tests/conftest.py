"""Fixtures of the whole suite."""

from __future__ import annotations

from typing import Any

import pytest

from actckpt.graph import Graph
from actckpt.profile import Cost, Profile


@pytest.fixture
def flat_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """`actckpt.optimize` without measuring: every operation takes a microsecond."""

    def build(graph: Graph, **_: Any) -> Profile:
        return Profile(graph.device, tuple(Cost(1e-6) for _ in graph.signatures))

    monkeypatch.setattr("actckpt.planning.build_profile", build)
