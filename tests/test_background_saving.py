"""Saves that a thread writes: the state of their step, whatever training does meanwhile."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.resuming.staging import _taken_bytes
from tests.small_run import advance, names, objects
from tests.system_calls import Call, Watched, before

# nobody waits so long but where something hangs, or on a machine with many others at work
LONG_S = 600


def every_layout() -> dict[str, torch.Tensor]:
    """Tensors that lie in memory in every way."""
    torch.manual_seed(5)
    return {
        "bfloat16": torch.randn(3, 4).bfloat16(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).t(),
        "gaps": torch.randn(4, 6)[:, ::2],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
    }


class Gate:
    """System calls that stop before the first directory of a save is made, until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.files = Files(Watched(before(self._stop)))

    def _stop(self, call: Call) -> None:
        if call.name == "mkdir" and ".saving" in call.args[0]:
            self.reached.set()
            assert self.opened.wait(LONG_S)


@pytest.fixture
def gate() -> Iterator[Gate]:
    found = Gate()
    yield found
    found.opened.set()


class Layouts:
    """A state of tensors of every layout, changed in place."""

    def __init__(self) -> None:
        self.tensors = every_layout()

    def state_dict(self) -> dict[str, Any]:
        return {**self.tensors, "again": self.tensors["bfloat16"], "list": [1, {"a": 2.5}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("these tests only save")


def trained(directory: Path, **more: Any) -> tuple[actckpt.Checkpointer, dict[str, Any]]:
    """A run after three steps of which the last saved, or began to."""
    made = objects()
    layouts = Layouts()
    made["extra"] = {"layouts": layouts}
    run = actckpt.Checkpointer(directory, **made, every=3, **more)
    advance(run, made, 3, loss=1.0)
    return run, {**made, "layouts": layouts}


def test_bitwise_what_a_synchronous_save_writes(tmp_path: Path, gate: Gate) -> None:
    run, _ = trained(tmp_path / "at once", background=False)
    run.close()
    run, made = trained(tmp_path / "behind", files=gate.files)
    # nothing was read for writing yet, and all of it changes
    with torch.no_grad():
        for p in made["model"].parameters():
            p.add_(1)
        for b in made["model"].buffers():
            b.add_(1)
        for state in made["optimizer"].state.values():
            for value in state.values():
                value.add_(1)
        for t in made["layouts"].tensors.values():
            t.untyped_storage().fill_(1)
    torch.rand(3)
    made["optimizer"].param_groups[0]["lr"] = 7.0
    assert gate.reached.wait(LONG_S)
    gate.opened.set()
    run.close()
    files = sorted(path.name for path in (tmp_path / "at once" / "step-00000003").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "behind" / "step-00000003").iterdir())
    assert len(files) >= 5
    for file in set(files) - {"manifest.json"}:  # which has the time
        first, second = (tmp_path / d / "step-00000003" / file for d in ("at once", "behind"))
        assert first.read_bytes() == second.read_bytes(), file


def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: Gate) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, files=gate.files) as run:
        advance(run, made, 1)
        threading.Timer(0.2, gate.opened.set).start()
        advance(run, made, 1)
        # it had to be written before its staging memory could be filled again
        assert (tmp_path / "step-00000001").exists()
        assert names(run) == ["step-00000002", "step-00000001"]


def test_two_staging_sets_hold_two_saves(tmp_path: Path, gate: Gate) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, files=gate.files, staging_sets=2) as run:
        advance(run, made, 1)
        one = run.staging_bytes
        advance(run, made, 1)
        assert run.staging_bytes == 2 * one
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
        threading.Timer(0.2, gate.opened.set).start()
        advance(run, made, 1)
        assert (tmp_path / "step-00000001").exists()
        assert names(run) == [f"step-{n:08d}" for n in (3, 2, 1)]
        assert [c.manifest.serial for c in run.list()] == [3, 2, 1]


def test_staging_memory_is_counted_and_bounded(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        advance(run, made, 1)
        run.save()
        assert run.staging_bytes == 0  # nothing is copied for a save that is waited for
        run.save(tag="a", wait=False)
        saved_bytes = sum(
            path.stat().st_size for path in (run.list()[1].path).glob("*.safetensors")
        )
        tensors = len(run.list()[0].manifest.tensors)
        # with what alignment adds, and without the files' headers
        assert saved_bytes / 2 < run.staging_bytes < saved_bytes + 64 * tensors
    made = objects()
    run = actckpt.Checkpointer(tmp_path / "b", **made, every=1, staging_gb=1e-7)
    with pytest.raises(
        actckpt.CheckpointSaveError, match=r"staging_gb allows 0\.000000100\. .*background="
    ):
        advance(run, made, 1)
    assert run.step_count == 1
    assert run.save().step == 1
    run.close()


def test_a_state_larger_than_the_memory_is_refused_and_the_next_is_saved(tmp_path: Path) -> None:
    made = objects()
    made["extra"] = {"layouts": (layouts := Layouts())}
    run = actckpt.Checkpointer(tmp_path, **made, every=None)
    run.save(tag="before")
    small = layouts.tensors["bool"]
    layouts.tensors["bool"] = torch.zeros(1).expand(1 << 46)
    with pytest.raises(
        actckpt.CheckpointSaveError, match=r"281474\.\d+ GB .*cannot be had.*background="
    ):
        run.save(tag="large", wait=False)
    layouts.tensors["bool"] = small
    run.save(tag="after", wait=False)
    run.close()
    assert [c.tag for c in run.list()] == ["after", "before"]


def test_without_a_thread_to_be_had_nothing_is_saved_and_the_next_save_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 1)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none_left)
            with pytest.raises(actckpt.CheckpointSaveError, match=r"thread.*background=False"):
                advance(run, made, 1)
        assert names(run) == ["step-00000001"]
        assert run.save(wait=False) is None
        advance(run, made, 1)
        assert names(run) == ["step-00000003", "step-00000002", "step-00000001"]


def test_the_same_memory_from_save_to_save(tmp_path: Path) -> None:
    made = objects()
    places = set()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        for _ in range(4):
            advance(run, made, 1)
            buffer = run._saver._staging.sets[0].buffer
            assert buffer is not None
            places.add(buffer.data_ptr())
        assert len(places) == 1


# failures


class Disk:
    """What a disk with room, or without, says."""

    full = False

    def __call__(self, call: Call) -> None:
        if self.full and call.name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(directory: Path, **more: Any) -> tuple[actckpt.Checkpointer, dict[str, Any], Any]:
    """A run that saves after step 2, and cannot; nothing of that was raised yet."""
    disk = Disk()
    calls = Watched(before(disk))
    made = objects()
    run = actckpt.Checkpointer(directory, **made, every=4, files=Files(calls), **more)
    run.save()
    advance(run, made, 2)
    disk.full = True
    run.save(wait=False)
    run._saver._under_way[0][0].wait()
    disk.full = False
    return run, made, calls


def test_a_failure_is_raised_by_the_next_step_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, made, _ = broken(tmp_path)
    assert "No space left" in caplog.text  # said at once, for the process may end
    with pytest.raises(actckpt.CheckpointSaveError, match=r"step 2 could not be saved.*No space"):
        advance(run, made, 1)
    assert run.step_count == 3
    advance(run, made, 2)
    run.close()
    run.close()
    assert names(run) == ["step-00000004", "step-00000000"]


def test_a_failure_is_raised_by_close_once(tmp_path: Path) -> None:
    run, _, _ = broken(tmp_path)
    with pytest.raises(actckpt.CheckpointSaveError, match="step 2"):
        run.close()
    run.close()
    with actckpt.Checkpointer(tmp_path, **objects()) as other:
        other.resume()
        other.save(tag="mine")  # it did let others write


def test_a_failure_is_raised_by_a_save_of_that_state_which_can_be_saved_again(
    tmp_path: Path,
) -> None:
    run, _, _ = broken(tmp_path)
    with pytest.raises(actckpt.CheckpointSaveError, match="step 2"):
        run.save()
    assert run.save().step == 2
    run.close()


def test_what_a_warning_was_enough_for_is_saved_anew_when_asked_for(tmp_path: Path) -> None:
    run, _, _ = broken(tmp_path, on_failed="warn")
    assert run.save().step == 2
    run.close()


def test_a_failure_is_raised_by_another_save_which_was_made(tmp_path: Path) -> None:
    run, _, _ = broken(tmp_path)
    with pytest.raises(actckpt.CheckpointSaveError, match="step 2") as caught:
        run.save(tag="end")
    assert "step-00000002 is saved" in caught.value.__notes__[0]
    assert run.save(tag="end").tag == "end"
    run.close()


def test_an_error_of_the_loop_is_not_hidden_by_that_of_a_save(tmp_path: Path) -> None:
    run, _, _ = broken(tmp_path)
    with pytest.raises(KeyError, match="mine") as caught, run:
        raise KeyError("mine")
    assert "No space left" in caught.value.__notes__[0]


def test_a_save_of_a_state_that_is_being_saved_waits_for_that(tmp_path: Path, gate: Gate) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, files=gate.files) as run:
        advance(run, made, 1)
        run.save(wait=False)
        threading.Timer(0.1, gate.opened.set).start()
        assert run.save().path.name == "step-00000001"
        assert names(run) == ["step-00000001"]


def test_a_state_that_no_checkpoint_can_hold_is_refused_at_its_step(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> Any:
            return object()

    with actckpt.Checkpointer(tmp_path, model=Odd(), every=1) as run:
        with pytest.raises(actckpt.CheckpointSaveError, match="_extra_state"):
            run.step()
        assert run.list() == []


def test_a_forked_child_has_neither_the_writer_nor_its_memory(tmp_path: Path, gate: Gate) -> None:
    made = objects()
    run = actckpt.Checkpointer(tmp_path, **made, every=1, files=gate.files)
    advance(run, made, 1)
    assert gate.reached.wait(LONG_S)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert run.list() == []  # waits for nothing
            with pytest.raises(actckpt.CheckpointError, match="another Checkpointer"):
                run.save(tag="child", wait=False)
            status = run.staging_bytes
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    gate.opened.set()
    run.close()
    assert names(run) == ["step-00000001"]


def test_pinned_memory_counts_as_what_torch_takes() -> None:
    sizes = {n: _taken_bytes(n, pinned=True) for n in (0, 1, 4096, 4097, 3 << 30)}
    assert sizes == {0: 0, 1: 1, 4096: 4096, 4097: 8192, 3 << 30: 4 << 30}
    assert _taken_bytes(4097, pinned=False) == 4097
