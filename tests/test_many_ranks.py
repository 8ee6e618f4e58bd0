"""Runs of many ranks: every rank saves its share, and any world reads it back, bit by bit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import MANIFEST
from actckpt.checkpoint.reading import read_checkpoint
from actckpt.checkpoint.verification import read_manifest, verify_files
from actckpt.sharded.loading import ShareReading
from tests.ranked import ENVIRONMENT, ROOT, digests, launch


def test_what_two_ranks_saved_any_world_reads_back(tmp_path: Path) -> None:
    ranks = launch(tmp_path, "tests.ranked_runs", "resharded", 4)
    saved = ranks[0]["saved"]
    assert ranks[1]["saved"] == saved
    # in the same world it goes on as if nothing had been
    for rank in ranks[:2]:
        assert rank["came again"] == rank["went on"] == ranks[0]["went on"]
        assert rank["drew again"] == rank["drew"]
        assert rank["compared"] == [2, True]  # each with a journal of its own
        assert not any("processes" in reason for reason in rank["inexact 2"])
    assert ranks[0]["drew"] != ranks[1]["drew"]
    # in any other all that is of the model and the optimizer is the same, and it is said what not
    for world in (1, 2, 3, 4):
        for rank in ranks[:world]:
            assert rank[f"loaded {world}"] == saved, world
            assert rank[f"tied {world}"]
            if world != 2:
                assert any(
                    reason.startswith(f"processes were 2, are {world}: ")
                    for reason in rank[f"inexact {world}"]
                )
    # a process on its own reads what ranks wrote, and ranks what it wrote
    assert ranks[0]["loaded 0"] == saved
    for rank in ranks[:3]:
        assert rank["loaded from one"] == ranks[0]["saved by one"] != saved
    # without the objects: the whole tensors
    checkpoint, items = read_checkpoint(Files(), tmp_path / "run")
    checkpoint.verify()
    assert [checkpoint.step, checkpoint.size_bytes] == ranks[0]["metrics"]
    files = [path for path in checkpoint.path.iterdir() if path.name != "manifest.json"]
    assert checkpoint.size_bytes == sum(path.stat().st_size for path in files)
    whole = digests(items["model"])
    assert whole == {k: v for k, v in saved.items() if k.startswith("0/")}
    actckpt.export(tmp_path / "run", tmp_path / "weights", format="safetensors")
    weights = load_file(tmp_path / "weights" / "model.safetensors")
    assert all(whole[f"0/{name}"] == digests(x)["0"] for name, x in weights.items())


def test_a_rank_that_is_killed_or_stopped_costs_one_save() -> None:
    """`make faults` does it before every system call and every message."""
    command = [sys.executable, "-m", "tests.faults.ranks", "--few"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "5 faults, 0 violations" in done.stdout


def test_replicas_keep_what_is_their_own(tmp_path: Path) -> None:
    first, second, third, fourth = launch(tmp_path, "tests.ranked_runs", "replicated", 4)
    pair = first, second
    norm = "0/norm.running_mean"
    assert first["went on"][norm] != second["went on"][norm]
    for rank in pair:
        assert rank["exact"]
        assert rank["seen again"] == rank["seen"][5:]
        assert rank["came again"] == rank["went on"]
        assert rank["untouched"]
        assert "is in group 1 of the optimizer, saved was group 0" in rank["refused"]
    assert first["refused"].startswith("rank 1: ")
    for rank in pair:
        steps, verdict = rank["clock"]
        assert len(steps) > 1
        assert verdict == "committed"
        status, at, saved = rank["ended"]
        assert status == 143
        assert saved == at > 2
        # the rank that reads it names it, and all take the older one
        step, reason = rank["turned"]
        assert step == 0
        assert reason.startswith("rank 1: ")
        assert "random-00001.safetensors is damaged" in reason
    assert first["clock"] == second["clock"]
    assert first["ended"] == second["ended"]
    # in another world, all together see the same samples in each step
    together = [set(a + b) for a, b in zip(first["seen"], second["seen"], strict=True)][5:]
    assert [set(batch) for batch in first["seen 1"]] == together
    apart = zip(*(rank["seen 4"] for rank in (first, second, third, fourth)), strict=True)
    assert [{n for batch in batches for n in batch} for batches in apart] == together
    for reasons in (first["inexact 1"], fourth["inexact 4"]):
        assert any("ranks had model/norm.running_mean" in reason for reason in reasons)
        assert any("of the same samples" in reason for reason in reasons)
    # ranks that there were not draw from streams of their own
    assert len({rank["drew 4"] for rank in (first, second, third, fourth)}) == 4


def test_every_way_to_cut_a_model_reads_every_other(tmp_path: Path) -> None:
    ranks = launch(tmp_path, "tests.ranked_runs", "meshes", 4)
    whole = ranks[0]["fsdp"]
    assert len(whole) == 6 + 3 * 6
    for kind in ("fsdp", "fsdp x tp", "hsdp", "tp", "plain"):
        assert all(rank[kind] == whole for rank in ranks), kind
    # each stage has its own, together all
    stages = [rank["pipeline"] for rank in ranks]
    assert stages[0] == stages[1]
    assert stages[2] == stages[3]
    assert stages[0] | stages[2] == whole
    assert not stages[0].keys() & stages[2].keys()
    _turn_every_region(tmp_path / "hsdp" / "step-00000000")
    for kind in ("fsdp", "fsdp x tp", "hsdp", "tp", "pipeline", "plain"):
        _, items = read_checkpoint(Files(), tmp_path / kind)
        assert digests(items["model"]).items() <= whole.items(), kind
        # by the names that torch's own functions give
        names = [{n for rank in ranks for n in rank[f"names {kind}"][which]} for which in (0, 1)]
        assert [set(items["model"]), set(items["optimizer"]["state"])] == names


def _turn_every_region(checkpoint: Path) -> None:
    """A bit in each part of each file: `verify` finds it, and so does the rank that reads it."""
    files = Files()
    manifest = read_manifest(files, str(checkpoint))

    def read(rank: int) -> dict[str, str]:
        reading = ShareReading(
            files, str(checkpoint), manifest, rank=rank, like=lambda item, name, shape: None
        )
        return digests(reading.items())

    sound = [read(rank) for rank in range(4)]
    said: list[tuple[str, str]] = []
    for path in sorted(checkpoint.iterdir()):
        data = path.read_bytes()
        for at in {0, 8, 9, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
            with pytest.raises(actckpt.CheckpointFormatError, match=re.escape(path.name)):
                verify_files(files, str(checkpoint))
            if path.name != MANIFEST:
                for rank in range(4):
                    try:
                        assert read(rank) == sound[rank], path.name  # of another rank's own
                    except actckpt.CheckpointFormatError as error:
                        said.append((path.name, str(error)))
        path.write_bytes(data)
    assert len(said) > 100
    assert all(name in text for name, text in said)
