"""What a result depends on besides the model: versions and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from functools import cache

import torch


@cache
def package_version() -> str:
    """The installed version of actckpt, or that of the source tree it is imported from."""
    try:
        return importlib.metadata.version("actckpt")
    except importlib.metadata.PackageNotFoundError:
        return "0.1.0"


def versions() -> dict[str, str]:
    """Versions and machine, to be kept beside every result.

    ``transformers`` is listed only if it was imported: nothing is imported to answer.
    """
    found = {
        "actckpt": package_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    if "transformers" in sys.modules:
        found["transformers"] = str(getattr(sys.modules["transformers"], "__version__", "unknown"))
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    else:
        found["device"] = "cpu"
    return found
