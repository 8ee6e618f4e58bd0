"""Accelerators that a plan can be made for without having one: rates and sizes of data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from actckpt.errors import PlanError
from actckpt.tracing.stand_in import StandIn

# What programs reach of a data sheet's peak. Large products run at 65 to 80 % of the dense tensor
# peak (power and clocks, not the kernel, are the limit at the top end), streaming kernels at 80 to
# 92 % of the memory's. Overheads are ratios: what matters is the balance between the two, and at
# full peaks products would look cheaper beside element-wise work than they are.
FLOPS_SHARE = 0.7
BANDWIDTH_SHARE = 0.85

# What is kept free where no budget is given: the context and the libraries' workspaces (about a
# gigabyte), and a share for what the caching allocator splits off and for memory that error
# correction takes (6 % of GDDR6), which data sheets do not subtract.
RESERVE_BYTES = 10**9
RESERVE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator as its data sheet describes it.

    Attributes:
        name: as it is printed.
        capability: what ``torch.cuda.get_device_capability`` says there.
        flops: dense peak FLOP/s by dtype name; "tfloat32" is float32 on tensor cores. A dtype that
            is missing has no arithmetic of its own.
        bandwidth: peak bytes/s to and from memory.
        capacity_bytes: of memory, in the data sheet's decimal gigabytes.
        launch_s: least seconds of an operation: the host's eager dispatch of one kernel.
        rocm: AMD's.
    """

    name: str
    capability: tuple[int, int]
    flops: Mapping[str, float]
    bandwidth: float
    capacity_bytes: int
    launch_s: float = 5e-6
    rocm: bool = False

    @property
    def stand_in(self) -> StandIn:
        """What tracing must know of it."""
        return StandIn(self.name, self.capability, self.rocm)

    @property
    def reserve_bytes(self) -> int:
        """What `default_budget_bytes` leaves free."""
        return RESERVE_BYTES + round(RESERVE_SHARE * self.capacity_bytes)

    @property
    def default_budget_bytes(self) -> int:
        """The budget where none is given."""
        return self.capacity_bytes - self.reserve_bytes


def _device(
    name: str,
    capability: tuple[int, int],
    tera: tuple[float, float | None, float | None, float],
    bandwidth: float,
    gigabytes: int,
    *,
    rocm: bool = False,
) -> Device:
    """``tera``: 10^12 FLOP/s in fp32, tf32, bf16 and fp16."""
    names = ("float32", "tfloat32", "bfloat16", "float16")
    flops = {n: t * 1e12 for n, t in zip(names, tera, strict=True) if t is not None}
    return Device(name, capability, flops, bandwidth, gigabytes * 10**9, rocm=rocm)


# Dense rates throughout: where a sheet prints them "with sparsity" they are halved. GeForce rates
# are those with float32 accumulation, which is how PyTorch multiplies.
DEVICES: dict[str, Device] = {
    # NVIDIA V100 data sheet (SXM2)
    "v100-16gb": _device("V100 SXM2 16 GB", (7, 0), (15.7, None, None, 125), 0.900e12, 16),
    "v100-32gb": _device("V100 SXM2 32 GB", (7, 0), (15.7, None, None, 125), 0.900e12, 32),
    # NVIDIA T4 data sheet; bandwidth of its 256 bits of GDDR6 at 10 Gb/s
    "t4": _device("T4", (7, 5), (8.1, None, None, 65), 0.320e12, 16),
    # NVIDIA A100 data sheet (SXM4)
    "a100-40gb": _device("A100 SXM 40 GB", (8, 0), (19.5, 156, 312, 312), 1.555e12, 40),
    "a100-80gb": _device("A100 SXM 80 GB", (8, 0), (19.5, 156, 312, 312), 2.039e12, 80),
    # NVIDIA A10 data sheet
    "a10": _device("A10", (8, 6), (31.2, 62.5, 125, 125), 0.600e12, 24),
    # NVIDIA A10G data sheet (the A10 of AWS G5)
    "a10g": _device("A10G", (8, 6), (35, 35, 70, 70), 0.600e12, 24),
    # NVIDIA Ampere GA102 white paper, appendix
    "rtx-3090": _device("RTX 3090", (8, 6), (35.6, 35.6, 71, 71), 0.936e12, 24),
    # NVIDIA Ada GPU architecture white paper, appendix
    "rtx-4090": _device("RTX 4090", (8, 9), (82.6, 82.6, 165.2, 165.2), 1.008e12, 24),
    # NVIDIA L4 data sheet
    "l4": _device("L4", (8, 9), (30.3, 60, 121, 121), 0.300e12, 24),
    # NVIDIA L40 data sheet
    "l40": _device("L40", (8, 9), (90.5, 90.5, 181, 181), 0.864e12, 48),
    # NVIDIA H100 data sheet
    "h100-80gb": _device("H100 SXM 80 GB", (9, 0), (67, 494.5, 989.5, 989.5), 3.35e12, 80),
    "h100-pcie-80gb": _device("H100 PCIe 80 GB", (9, 0), (51, 378, 756.5, 756.5), 2.0e12, 80),
    # NVIDIA H200 data sheet (SXM)
    "h200": _device("H200 SXM 141 GB", (9, 0), (67, 494.5, 989.5, 989.5), 4.8e12, 141),
    # NVIDIA DGX B200 data sheet, an eighth of it; fp32 from the HGX B200 page
    "b200": _device("B200 180 GB", (10, 0), (75, 1125, 2250, 2250), 8.0e12, 180),
    # AMD Instinct MI300X data sheet
    "mi300x": _device(
        "MI300X 192 GB", (9, 4), (163.4, 653.7, 1307.4, 1307.4), 5.3e12, 192, rocm=True
    ),
}

_ALIASES = {"v100": "v100-32gb", "a100": "a100-80gb", "h100": "h100-80gb"}


def find_device(name: str) -> Device | None:
    """The device with that key in `DEVICES` (in any case, with spaces), or of that printed name."""
    key = name.lower().replace(" ", "-").replace("_", "-")
    printed = next((d for d in DEVICES.values() if d.name == name), None)
    return DEVICES.get(_ALIASES.get(key, key), printed)


def refuse_dtypes(device: Device, dtypes: Mapping[str, str]) -> None:
    """Refuses a dtype that the device would only emulate.

    Args:
        dtypes: dtype name -> what has it, such as a parameter's name.

    Raises:
        PlanError: there is one.
    """
    for dtype, owner in dtypes.items():
        if dtype in ("bfloat16", "float16") and dtype not in device.flops:
            known = ", ".join(d for d in device.flops if d != "tfloat32")
            raise PlanError(
                f"{device.name} has no {dtype} arithmetic, and {owner} is {dtype}; "
                f"it has {known}: pass --dtype fp16 or fp32"
            )
