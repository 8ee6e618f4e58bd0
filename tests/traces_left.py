"""What a call leaves behind: one comparison of the process and of everything that was passed.

Objects are compared by identity and contents, as far as they can be walked; tensors by identity,
bits, gradient and autograd history.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

DEVICES = ("cpu", "cuda", "meta")
_PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.dtype)
# the attributes in which a plan lies on a module
OURS = ("forward", "_actckpt_forward")

Found = dict[str, Any]


@contextmanager
def no_traces(**objects: Any) -> Iterator[None]:
    """Fails with a list of what is otherwise on exit than on entry, but for a plan on a model.

    Args:
        objects: by the names that their paths begin with.
    """
    process, walked = process_state(), walk(objects)
    yield
    found = [*_differences(process, process_state()), *_differences(walked, walk(objects))]
    assert not found, "left behind:\n" + "\n".join(found[:20])


def process_state() -> Found:
    """Everything global that code may leave changed."""
    found: Found = {
        f"autocast {d}": (torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d)))
        for d in DEVICES[:2]
    }
    # the depth can only be read by changing it
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    numpy: Any = np.random.get_state()
    return found | {
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast depth": depth,
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "multithreaded backward": torch._C._is_multithreading_enabled(),
        "view replay": torch._C._is_view_replay_enabled(),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "matmul precision": torch.get_float32_matmul_precision(),
        "function modes": [id(m) for m in _get_current_function_mode_stack()],
        "dispatch modes": [id(m) for m in _get_current_dispatch_mode_stack()],
        "saved-tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "torch function": torch._C._is_torch_function_enabled(),
        "functorch": torch._C._functorch.peek_interpreter_stack() is not None,
        "python random": random.getstate(),
        "numpy random": (numpy[1].tobytes(), *numpy[2:]),
        "torch random": torch.get_rng_state().numpy().tobytes(),
        "warnings": [*map(str, warnings.filters), warnings.showwarning],
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "python threads": sorted(t.name for t in threading.enumerate()),
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "module hooks": [
            list(getattr(module_hooks, name, {}).values())
            for name in ("_global_forward_hooks", "_global_forward_pre_hooks",
                         "_global_backward_hooks", "_global_backward_pre_hooks")
        ],
        "optimizer hooks": list(optimizer_hooks._global_optimizer_pre_hooks.values()),
        "stance": _stance(),
        "excepthook": sys.excepthook,
    }  # fmt: skip


def _stance() -> str:
    frame: Any = sys.modules.get("torch._dynamo.eval_frame")
    return "" if frame is None else repr(getattr(frame, "_stance", None))


def walk(objects: Mapping[str, Any]) -> Found:
    """Path -> what lies there: identity, and contents where that can be told."""
    found: Found = {}
    seen: dict[int, str] = {}
    todo = [(name, value) for name, value in objects.items()]
    while todo:
        path, x = todo.pop()
        if isinstance(x, _PLAIN):
            found[path] = x if isinstance(x, (*_PLAIN[:5], torch.dtype)) else id(x)
            continue
        if id(x) in seen:
            found[path] = ("as", seen[id(x)])
            continue
        seen[id(x)] = path
        record, parts = _open(x)
        found[path] = (type(x), id(x), record)
        todo.extend((f"{path}.{name}", part) for name, part in parts)
    return found


def _open(x: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """What is compared of an object itself, and what is inside it."""
    if isinstance(x, torch.Tensor):
        inside = [("grad", x.grad)] if x.is_leaf else []
        hooks = list((x._backward_hooks or {}).values())
        state = (_bits(x), x.requires_grad, x.is_leaf, id(x.grad_fn), hooks, x.dtype, x.device)
        return state, [*inside, *((f"__dict__.{k}", v) for k, v in vars(x).items())]
    if isinstance(x, Mapping):
        keys = list(x)
        named = [k if isinstance(k, (str, int)) else f"#{n}" for n, k in enumerate(keys)]
        return [k if isinstance(k, (str, int)) else id(k) for k in keys], [
            (str(name), x[k]) for name, k in zip(named, keys, strict=True)
        ]
    if isinstance(x, (list, tuple)):
        return len(x), [(str(n), v) for n, v in enumerate(x)]
    if isinstance(x, (set, frozenset)):
        return sorted(map(id, x)), []
    if isinstance(x, types.FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or () if c != types.CellType()]
        return None, [(f"<{n}>", v) for n, v in enumerate(cells)]
    if isinstance(x, types.MethodType):
        return None, [("__self__", x.__self__)]
    if isinstance(x, torch.Generator):
        return x.get_state().numpy().tobytes(), []
    if isinstance(x, random.Random):
        return x.getstate(), []
    if isinstance(x, np.random.Generator):
        return repr(x.bit_generator.state), []
    if isinstance(x, np.random.RandomState):
        return repr(x.get_state()), []
    inside = list(vars(x).items()) if hasattr(x, "__dict__") else []
    if isinstance(x, nn.Module):
        inside = [(name, value) for name, value in inside if name not in OURS]
        return [name for name, _ in inside], inside
    return sorted(name for name, _ in inside), inside


def _bits(t: torch.Tensor) -> Any:
    if t.layout != torch.strided or t.device.type == "meta":
        return (t.layout, tuple(t.shape))
    raw = t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
    return (tuple(t.shape), t.stride(), blake2b(raw.numpy().tobytes(), digest_size=8).digest())


def _differences(before: Found, after: Found) -> Iterator[str]:
    for path in dict.fromkeys([*before, *after]):
        if path not in after:
            yield f"{path}: is gone"
        elif path not in before:
            yield f"{path}: is new, {str(after[path])[:100]}"
        elif before[path] != after[path]:
            yield f"{path}: was {str(before[path])[:100]}, is {str(after[path])[:100]}"
