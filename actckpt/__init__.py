"""Train a PyTorch model inside a memory budget, with the same gradients to the last bit."""

from actckpt.api import find_max_batch, measure, optimize, report, revert, trace
from actckpt.batch_search import BatchSearch, BatchTried
from actckpt.errors import (
    ActckptError,
    BudgetError,
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
    "SavedOp",
    "Selective",
    "TargetError",
    "TraceError",
    "exhaustive",
    "find_max_batch",
    "lower_bound",
    "measure",
    "optimize",
    "price",
    "report",
    "revert",
    "trace",
]
