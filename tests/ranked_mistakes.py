"""Disks of one rank that fail, a rank that stops, and folders that are not what two ranks need.

Scenarios of `tests.ranked_faults`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import actckpt
from actckpt.checkpoint.digest import Digest
from actckpt.checkpoint.documents import sealed
from actckpt.checkpoint.files import Files
from actckpt.errors import CheckpointError
from actckpt.sharded import committing, share_writing
from tests.ranked import digests
from tests.ranked_steps import begun, step, steps, verdict
from tests.system_calls import Call, Watched, before


def disks(folder: Path, rank: int) -> dict[str, Any]:
    """The disk of one rank is full, or read-only, for one save."""
    found: dict[str, Any] = {}
    for name, victim, code in (
        ("full", 1, errno.ENOSPC),
        ("full of the first", 0, errno.ENOSPC),
        ("read-only", 1, errno.EROFS),
        ("read-only of the first", 0, errno.EROFS),
    ):
        disk = Disk(code)
        run = begun(folder / name, files=Files(Watched(before(disk))))
        step(run)
        disk.is_bad = rank == victim
        step(run)
        here = [verdict(run), run.last_save.reason]
        disk.is_bad = False
        step(run)
        found[name] = [*here, verdict(run), run.step_count]
        run.close()
        dist.barrier()
        found[name].append(steps(folder / name))
    return found


class Disk:
    """Gives an error to whatever makes or changes a file, while it is bad."""

    def __init__(self, code: int) -> None:
        self._code = code
        self.is_bad = False

    def __call__(self, call: Call) -> None:
        changes = call.name != "open" or call.args[1] & (os.O_WRONLY | os.O_RDWR)
        if self.is_bad and changes and call.name in ("open", "write", "mkdir"):
            raise OSError(self._code, os.strerror(self._code))


def stopped(folder: Path, rank: int) -> dict[str, Any]:
    """A rank is stopped while it writes, until the other has its verdict; then both go on.

    On a machine that stands still for as long, other saves fail likewise: they are made again.
    """
    run = begun(folder / "run", rank_silence="2s")
    pid = torch.tensor([os.getpid()])
    dist.broadcast(pid, 1)
    write_share = share_writing.write_share

    def stopping(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
        return write_share(*args, **kwargs)

    def until_committed() -> list[Any]:
        for _ in range(20):
            step(run)
            said = torch.tensor([verdict(run)[1] == "committed"])
            dist.all_reduce(said, dist.ReduceOp.MIN)
            if said:
                break
        return verdict(run)

    first = until_committed()
    if rank:
        committing.write_share = stopping  # type: ignore[attr-defined]
    run.step()
    if not rank:
        run._saver.wait()
        os.kill(int(pid), signal.SIGCONT)
    run._saver.wait()
    committing.write_share = write_share  # type: ignore[attr-defined]
    dist.barrier()
    during = [*verdict(run), run.last_save.reason]
    last = until_committed()
    run.close()
    dist.barrier()
    return {"first": first, "during": during, "last": last, "steps": steps(folder / "run")}


def in_other_calls(folder: Path, rank: int) -> dict[str, Any]:
    """What only one rank calls, or another than the others."""
    found: dict[str, Any] = {}
    run = begun(folder / "run")
    step(run)
    step(run)
    if not rank:
        run.pin(1)
    found["restored"] = run.restore(2).step
    run.pin(2)
    try:
        if rank:
            run.restore(1)
        else:
            run.resume()
    except CheckpointError as error:
        found["apart"] = str(error)
    found["again"] = run.restore().step
    dist.barrier()
    found["pinned"] = sorted(p.name[-8:] for p in (folder / "run").glob(".pinned-*"))
    run.close()
    run = begun(folder / "every", every=3 if rank else 2)
    for _ in range(6):
        run.step()
    run._saver.wait()
    found["saved"] = [*verdict(run), run.last_save.reason]
    dist.barrier()
    found["then"] = run.save().step
    run.close()
    return found


# ---- folders


def folders(folder: Path, rank: int) -> dict[str, Any]:
    """Two checkpoints of two ranks, with something wrong about the newer one, or both."""
    for run_of in ("base", "other"):
        run = begun(folder / run_of)
        step(run)
        step(run)
        run.close()
    dist.barrier()
    found = {}
    for name, change in MISTAKES.items():
        for which, of in (("newer", ["step-00000002"]), ("both", ["step-00000001"])):
            at = folder / f"{name} {which}"
            if not rank:
                newer = folder / f"{name} newer"
                shutil.copytree(newer if which == "both" else folder / "base", at)
                for checkpoint in of:
                    change(at / checkpoint, folder)
            dist.barrier()
            found[f"{name} {which}"] = tried(at, at)
    # one rank has another directory, with checkpoints of the same names
    mine = folder / ("other" if rank else "base")
    found["another run"] = tried(mine, folder)
    found["no such run"] = tried(folder / "none" if rank else folder / "base", folder)
    dist.barrier()
    found["another model"] = tried(folder / "base", folder, nn.Linear(3, 3 + rank))
    run = begun(folder / ("here" if rank else "there"))
    step(run)
    found["saved apart"] = [*verdict(run), run.last_save.reason]
    run.close()
    return found


def tried(at: Path, whole: Path, model: nn.Module | None = None) -> list[Any]:
    """What `resume` makes of a folder: the step and why newer ones were not taken, or the error.

    Args:
        whole: where nothing may change where it fails.
    """
    model = nn.Linear(3, 3) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weights, files = digests(model.state_dict()), contents(whole)
    dist.barrier()
    run = actckpt.Checkpointer(
        at, model=model, optimizer=optimizer, on_sigterm=None, rank_timeout="40s"
    )
    try:
        resumed = run.resume()
        assert resumed is not None
        return [resumed.step, *(s.reason for s in resumed.skipped)]
    except CheckpointError as error:
        dist.barrier()
        untouched = weights == digests(model.state_dict()) and files == contents(whole)
        return [type(error).__name__, str(error), untouched]
    finally:
        dist.barrier()
        run.close()


def contents(folder: Path) -> dict[str, str]:
    """Every file of a run; whose turn it is to write is in a file as well."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def without_files(checkpoint: Path, _: Path) -> None:
    """The disk of rank 1 is not here."""
    for path in checkpoint.glob("*-00001.*"):
        path.unlink()


def from_another_save(checkpoint: Path, folder: Path) -> None:
    """The share of rank 1 is that of another run's checkpoint of this step."""
    for path in (folder / "other" / checkpoint.name).glob("*-00001.*"):
        shutil.copy(path, checkpoint)


def vouched_for(checkpoint: Path, folder: Path) -> None:
    """Likewise, and the root says that it is so."""
    from_another_save(checkpoint, folder)
    vouch(checkpoint)


def rewritten(file: str, kind: str, version: int, checkpoint: Path, _: Path) -> None:
    """A manifest of another version."""
    path = checkpoint / file
    data = json.loads(path.read_bytes())
    fields = {k: v for k, v in data.items() if k not in ("format", "format_version", "checksum")}
    path.write_bytes(sealed(kind, version, fields))
    if kind == "rank":
        vouch(checkpoint)


def vouch(checkpoint: Path) -> None:
    """The root has the size and the checksum of what rank 1's manifest is now."""
    content = (checkpoint / "rank-00001.json").read_bytes()
    digest = Digest()
    digest.update(memoryview(content))
    root = json.loads((checkpoint / "manifest.json").read_bytes())
    root["files"]["rank-00001.json"] = {
        "size_bytes": len(content),
        "checksum": digest.checksum,
    }
    fields = {k: v for k, v in root.items() if k not in ("format", "format_version", "checksum")}
    (checkpoint / "manifest.json").write_bytes(sealed("manifest", root["format_version"], fields))


def foreign(checkpoint: Path, _: Path) -> None:
    """What another library calls a checkpoint."""
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / ".metadata").write_bytes(b"\x80\x04N.")
    (checkpoint / "__0_0.distcp").write_bytes(b"PK\x03\x04")


MISTAKES: dict[str, Callable[[Path, Path], None]] = {
    "no files of rank 1": without_files,
    "share of another save": from_another_save,
    "vouched for": vouched_for,
    "newer root": partial(rewritten, "manifest.json", "manifest", 99),
    "newer share": partial(rewritten, "rank-00001.json", "rank", 99),
    "older share": partial(rewritten, "rank-00001.json", "rank", 0),
    "foreign": foreign,
}
