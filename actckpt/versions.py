"""What a result depends on besides the model: versions and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from functools import cache
from pathlib import Path

import torch


@cache
def package_version() -> str:
    """The installed version of actckpt, or that of the source tree it is imported from."""
    try:
        return importlib.metadata.version("actckpt")
    except importlib.metadata.PackageNotFoundError:
        return "0.1.0"


@cache
def processor_name() -> str:
    """The processor's own name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions and machine, to be kept beside every result.

    ``transformers`` is listed only if it was imported: nothing is imported to answer.
    """
    found = {
        "actckpt": package_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        # torch's kernels are others with other instructions, and so may the bits be
        "processor": f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    if "transformers" in sys.modules:
        found["transformers"] = str(getattr(sys.modules["transformers"], "__version__", "unknown"))
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    else:
        found["device"] = "cpu"
    return found
