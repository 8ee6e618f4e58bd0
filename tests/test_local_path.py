"""Where a run's folder may be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from actckpt.checkpoint.local_path import refuse_file


def test_a_folder_that_another_rank_makes_meanwhile_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, look = tmp_path / "run", os.stat
    made: list[Path] = []

    def late(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        try:
            return look(path, *args, **kwargs)
        finally:
            if path == folder and not made:
                made.append(folder)
                os.mkdir(folder)

    monkeypatch.setattr(os, "stat", late)
    refuse_file(folder)
    monkeypatch.undo()
    assert folder.is_dir()
