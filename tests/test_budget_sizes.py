"""What `budget_gb` may be, and how much of what a device has a share of it is."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import actckpt
from actckpt.budget import budget_bytes
from actckpt.cli import main
from actckpt.profiler.memory_size import limits_bytes, memory_bytes
from actckpt.units import parse_bytes
from tests.exact import scalar_loss
from tests.models.blocks import chain, rows
from tests.suite import seeded

SIZES = [
    ("16", 16 * 10**9),
    ("0.5", 5 * 10**8),
    ("8GiB", 8 * 2**30),
    ("8GB", 8 * 10**9),
    ("8 gb", 8 * 10**9),
    ("500MB", 500 * 10**6),
    (" 1.5 MiB ", 3 * 2**19),
    ("0.1GB", 10**8),
    (".5TB", 5 * 10**11),
    ("12KiB", 12 * 1024),
    ("4096B", 4096),
]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    assert budget_bytes(text, lambda: 1) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "8XB", "-1", "nan", "inf", "1e3", "8 GB 2", "8G", "1/2"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.1B"])
def test_budgets_are_positive(text: str) -> None:
    with pytest.raises(ValueError, match="less than one byte"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "share"),
    [("80%", Fraction(4, 5)), (" 12.5 % ", Fraction(1, 8)), ("100%", Fraction(1))],
)
def test_shares_of_what_the_device_has(text: str, share: Fraction) -> None:
    assert budget_bytes(text, lambda: 8 * 10**9) == share * 8 * 10**9


def test_every_form_asks_for_the_same() -> None:
    model = seeded(chain(3, 0.0))()
    asked = []
    for budget in ("4MB", 0.004, "0.004", f"{100 * 4e6 / memory_bytes('cpu'):.20f}%"):
        actckpt.optimize(model, budget, batch=rows(), loss_fn=scalar_loss)
        asked.append(actckpt.report(model).budget_bytes)
    assert asked[:3] == [4 * 10**6] * 3
    assert asked[3] in (4 * 10**6, 4 * 10**6 - 1)
    actckpt.revert(model)
    found = actckpt.find_max_batch(model, "4MB", rows, loss_fn=scalar_loss, start=2, limit=2)
    assert found.largest == 2


def test_a_share_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"--set={kv}" for kv in ("n_layer=1", "n_embd=32", "n_head=2", "vocab_size=64")]
    target = ["plan", "gpt2", "--batch-size=1", "--seq-len=8", *settings]
    assert main([*target, "--budget-gb", "50%"]) == 0
    share = actckpt.units.format_bytes(memory_bytes("cpu") // 2)
    assert f"budget {share}" in capsys.readouterr().out
    assert main([*target, "--budget-gb", "50%", "--device", "h100"]) == 0
    assert "budget 40.0 GB" in capsys.readouterr().out


# how much there is

V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "35 31 0:32 {at} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
)
V2 = "30 23 0:26 {at} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
NO_LIMIT = "9223372036854771712"

# (the process's groups, mounts, limits by group folder) -> what is found, from the leaf upwards
TREES = {
    "v2, the parent is the tighter": (
        "0::/user.slice/job\n",
        V2.format(at="/"),
        {"user.slice/job/memory.max": "4000", "user.slice/memory.max": "3000"},
        [4000, 3000],
    ),
    "v2, unlimited": ("0::/job\n", V2.format(at="/"), {"job/memory.max": "max"}, []),
    "v2, a container's own namespace": (
        "0::/\n", V2.format(at="/"), {"memory.max": "5000"}, [5000],
    ),
    "v2, outside of its namespace": (
        "0::/../other\n", V2.format(at="/"), {"memory.max": "6000"}, [6000],
    ),
    "v1, what is mounted is the container's own group": (
        "4:cpu,memory:/docker/abc/in\n0::/\n",
        V1.format(at="/docker/abc"),
        {"memory/in/memory.limit_in_bytes": NO_LIMIT, "memory/memory.limit_in_bytes": "7000"},
        [int(NO_LIMIT), 7000],
    ),
    "v1, nested": (
        "4:memory:/a/b\n",
        V1.format(at="/"),
        {
            "memory/a/b/memory.limit_in_bytes": "8000",
            "memory/a/memory.limit_in_bytes": "2000",
            "memory/memory.limit_in_bytes": NO_LIMIT,
        },
        [8000, 2000, int(NO_LIMIT)],
    ),
    "both, and the memory is controlled by v1": (
        "4:memory:/job\n0::/\n",
        V1.format(at="/") + V2.format(at="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
        {"memory/job/memory.limit_in_bytes": "9000"},
        [9000],
    ),
    "a mount point with a blank": (
        "0::/\n",
        V2.format(at="/").replace("/sys/fs/cgroup", "/sys/fs/c\\040g"),
        {"../c g/memory.max": "1000"},
        [1000],
    ),
    "no Linux": (None, "", {}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_limits_of_control_groups(name: str, tmp_path: Path) -> None:
    groups, mounts, limits, found = TREES[name]
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        (tmp_path / "proc/self/mountinfo").write_text(mounts)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for path, limit in limits.items():
        file = tmp_path / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit + "\n")
    assert list(limits_bytes(tmp_path)) == found


def test_a_cpu_has_its_limit_or_the_machine() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_bytes("cpu") == min([physical, *limits_bytes()])
    with pytest.raises(actckpt.BudgetError, match=r"meta has is not known .* in GB"):
        memory_bytes("meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_has_its_memory() -> None:
    assert memory_bytes("cuda") == torch.cuda.get_device_properties("cuda").total_memory
