"""New fake tensors of one mode, made without asking torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_make_subclass: Any = torch.Tensor._make_subclass


class NewFakes:
    """Makes fakes by shape, inside a dispatch mode: what is beneath sees no operation.

    The first of a device is made by torch. The others are given what it says of itself, which is
    the same for all that are new, and takes torch most of the time.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._said: dict[torch.device, dict[str, Any]] = {}

    def fresh(
        self,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """A fake on a storage of its own."""
        guard = torch._C._DisableTorchDispatch()
        try:
            elem = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        finally:
            del guard
        return self._fake(elem, device)

    def window(
        self,
        storage: torch.UntypedStorage,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """A fake on the storage of another one."""
        guard = torch._C._DisableTorchDispatch()
        try:
            elem = torch.empty_strided((0,), (1,), dtype=dtype, device="meta")
            elem.set_(storage, offset, shape, stride)
        finally:
            del guard
        return self._fake(elem, device)

    def _fake(self, elem: torch.Tensor, device: torch.device) -> torch.Tensor:
        said = self._said.get(device)
        if said is None:
            made = FakeTensor(self._mode, elem, device)
            self._said[device] = dict(made.__dict__)
            return made
        fake: torch.Tensor = _make_subclass(
            FakeTensor, elem, False, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_throw_on_mutable_data_ptr(fake)
        fake.__dict__.update(said)
        return fake
