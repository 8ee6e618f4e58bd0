"""The kept table of `experiments.trainers`: every row, to the last bit and within its budget."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lightning")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from experiments.results import FOLDER
from experiments.trainers.__main__ import COLUMNS, cases


def test_the_kept_table_has_every_row_and_no_miss() -> None:
    lines = (FOLDER / "trainers.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    cells = [json.loads(line)["cells"] for line in lines]
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in cells}
    assert rows.keys() == cases().keys()
    for row in rows.values():
        assert row["bitwise"] == "yes"
        assert row["peak within budget, of it"].startswith("yes, ")
        assert row["killed and resumed"].startswith("at step ")
        assert row["said of it"]
