"""Train a PyTorch model inside a memory budget, with the same gradients to the last bit."""

from typing import TYPE_CHECKING, Any

from actckpt.api import find_max_batch, measure, optimize, report, revert, trace
from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.data.plan import Burst, Plan, Region, SavedOp
from actckpt.data.profile import Profile
from actckpt.errors import (
    ActckptError,
    ArgumentError,
    CheckpointDifferenceError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    CheckpointSaveError,
    CheckpointUnknownError,
    ExportError,
    PlanError,
    ReplayError,
    ReportError,
    TargetError,
    TraceError,
    WeightsExportError,
)
from actckpt.planning.batch_search import BatchSearch, BatchTried
from actckpt.policies import POLICIES
from actckpt.policies.exhaustive import exhaustive
from actckpt.policies.selective import Selective
from actckpt.policies.solver.bound import Bound, lower_bound
from actckpt.policies.solver.prepared import kept_tables
from actckpt.pricing.price import Price
from actckpt.pricing.simulate import price
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Report
from actckpt.tracing.call import Call
from actckpt.versions import package_version

if TYPE_CHECKING:
    from actckpt.checkpoint.discovery import Checkpoint
    from actckpt.checkpoint.export import export_weights
    from actckpt.exporting.export import export
    from actckpt.exporting.prepared import Exported
    from actckpt.importing.averaging import average_weights
    from actckpt.importing.loaded_weights import LoadedWeights
    from actckpt.importing.loading import load_weights
    from actckpt.resuming.checkpointer import Checkpointer
    from actckpt.resuming.last_save import SaveOutcome
    from actckpt.resuming.resumed import Resumed
    from actckpt.resuming.seeded_samples import SeededSamples
    from actckpt.resuming.tier import Tier

__version__ = package_version()

__all__ = [
    "POLICIES",
    "ActckptError",
    "ArgumentError",
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
    "CheckpointUnknownError",
    "Checkpointer",
    "ExportError",
    "Exported",
    "Graph",
    "LoadedWeights",
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
    "SaveOutcome",
    "SavedOp",
    "SeededSamples",
    "Selective",
    "TargetError",
    "Tier",
    "TraceError",
    "WeightsExportError",
    "average_weights",
    "exhaustive",
    "export",
    "export_weights",
    "find_max_batch",
    "kept_tables",
    "load_weights",
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
    "Exported": "actckpt.exporting.prepared",
    "LoadedWeights": "actckpt.importing.loaded_weights",
    "Resumed": "actckpt.resuming.resumed",
    "SaveOutcome": "actckpt.resuming.last_save",
    "SeededSamples": "actckpt.resuming.seeded_samples",
    "Tier": "actckpt.resuming.tier",
    "average_weights": "actckpt.importing.averaging",
    "export": "actckpt.exporting.export",
    "export_weights": "actckpt.checkpoint.export",
    "load_weights": "actckpt.importing.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value
