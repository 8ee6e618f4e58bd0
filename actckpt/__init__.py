"""Train a PyTorch model inside a memory budget, with the same gradients to the last bit."""

from typing import TYPE_CHECKING, Any

from actckpt.api import find_max_batch, measure, optimize, report, revert, trace
from actckpt.batch_search import BatchSearch, BatchTried
from actckpt.errors import (
    ActckptError,
    BudgetError,
    CheckpointDifferenceError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    CheckpointSaveError,
    PlanError,
    ReplayError,
    ReportError,
    TargetError,
    TraceError,
)
from actckpt.graph import Graph
from actckpt.plan import Burst, Plan, Region, SavedOp
from actckpt.policies import POLICIES
from actckpt.policies.bound import Bound, lower_bound
from actckpt.policies.exhaustive import exhaustive
from actckpt.policies.selective import Selective
from actckpt.pricing.price import Price
from actckpt.pricing.simulate import price
from actckpt.profile import Profile
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Report
from actckpt.tracing.call import Call
from actckpt.versions import package_version

if TYPE_CHECKING:
    from actckpt.checkpoint.discovery import Checkpoint
    from actckpt.checkpoint.export import export_weights
    from actckpt.resuming.checkpointer import Checkpointer
    from actckpt.resuming.resumed import Resumed
    from actckpt.resuming.seeded_samples import SeededSamples

__version__ = package_version()

__all__ = [
    "POLICIES",
    "ActckptError",
    "BatchSearch",
    "BatchTried",
    "Bound",
    "BudgetError",
    "Burst",
    "Call",
    "Checkpoint",
    "CheckpointDifferenceError",
    "CheckpointError",
    "CheckpointFormatError",
    "CheckpointMismatchError",
    "CheckpointSaveError",
    "Checkpointer",
    "Graph",
    "Measurement",
    "Plan",
    "PlanError",
    "Price",
    "Profile",
    "Region",
    "ReplayError",
    "Report",
    "ReportError",
    "Resumed",
    "SavedOp",
    "SeededSamples",
    "Selective",
    "TargetError",
    "TraceError",
    "exhaustive",
    "export_weights",
    "find_max_batch",
    "lower_bound",
    "measure",
    "optimize",
    "price",
    "report",
    "revert",
    "trace",
]

# only who saves to disk pays for importing it
_LAZY = {
    "Checkpoint": "actckpt.checkpoint.discovery",
    "Checkpointer": "actckpt.resuming.checkpointer",
    "Resumed": "actckpt.resuming.resumed",
    "SeededSamples": "actckpt.resuming.seeded_samples",
    "export_weights": "actckpt.checkpoint.export",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value
