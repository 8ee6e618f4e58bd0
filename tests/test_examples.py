"""Every example runs, in a small size, and shows what it says."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import notebooks

FOLDER = Path(__file__).parent.parent / "examples"
NOTEBOOK = FOLDER / "look_at_a_plan.ipynb"
MAX_LINES = 80
# example -> a small size
SMALL: dict[str, dict[str, Any]] = {
    "own_gpt_loop": {"layers": 2, "width": 32, "steps": 3},
    "trainer_lora": {"layers": 2, "width": 32, "steps": 3, "budget": "18MB"},
    "lightning_fit": {"layers": 2, "width": 32, "budget": "5MB"},
    "diffusion_unet_ema": {"size": 16, "width": 8, "steps": 2, "share": 0.9},
    "largest_batch": {"layers": 1, "width": 32, "budget": "30MB", "limit": 16},
    "absent_gpu": {"layers": 2, "width": 512, "length": 256},
    "killed_and_resumed": {},
    "ranks_killed_and_resumed": {},
    "hubconf": {},
}
# what its output has to say
SAYS = {
    "own_gpt_loop": "losses equal to the last bit: True",
    "trainer_lora": "of it used",
    "lightning_fit": "kept for it",
    "diffusion_unet_ema": "within the budget: True",
    "largest_batch": r"recomputation fits a batch \d+\.\d times as large",
    "absent_gpu": r"policy auto of LlamaForCausalLM on RTX 4090, estimated",
    "killed_and_resumed": "24 steps, losses equal to the last bit: True",
    "ranks_killed_and_resumed": "12 steps of 2 ranks, losses equal to the last bit: True",
    "hubconf": "outputs equal to the last bit: True",
}


def main_of(name: str) -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[..., None] = module.main
    return main


def test_there_are_no_others() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_an_example_is_short_and_says_how_it_is_run(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_LINES
    assert f"python examples/{name}.py" in text
    assert "Shows: " in text


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_an_example_shows_what_it_says(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    main_of(name)(**SMALL[name])
    out = capfd.readouterr().out
    assert re.search(SAYS[name], out), out
    assert "EXCEEDED" not in out


def test_the_notebook_runs_and_shows_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = notebooks.run(NOTEBOOK)
    kept = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    figures = [
        output["data"]["text/html"].count("<svg")
        for cell in outputs
        for output in cell
        if "text/html" in output.get("data", {})
    ]
    assert figures == [1, 2]
    assert (tmp_path / "report.html").exists()
    # what is committed has the outputs of these very cells
    assert [len(cell.get("outputs", ())) for cell in kept["cells"]] == [
        len(cell.get("outputs", ())) for cell in notebook["cells"]
    ]
    scalars = outputs[-1][-1]["data"]["text/plain"]
    assert "'actckpt/budget_used': 0.9" in scalars
