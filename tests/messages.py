"""What an error says, and that nothing was touched before it was raised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import nn

from actckpt.rewriting.installing import installed

MOST_LINES = 10


def said(
    kind: type[Exception],
    parts: Sequence[str],
    refused: Callable[[], Any],
    model: nn.Module | None = None,
) -> str:
    """The message that ``refused`` raises; the model's modules are afterwards as before.

    Args:
        parts: what it says, in this order.
        model: None where somebody else than us touches it.
    """
    modules = [] if model is None else list(model.modules())
    before = [dict(m.__dict__) for m in modules]
    rewrite = None if model is None else installed(model)
    with pytest.raises(kind) as caught:
        refused()
    text = str(caught.value)
    found = [text.find(part) for part in parts]
    assert -1 not in found, f"{parts[found.index(-1)]!r} is not in {text!r}"
    assert found == sorted(found), f"{parts} stand in another order in {text!r}"
    assert len(text.splitlines()) <= MOST_LINES
    assert rewrite is None or model is None or installed(model) is rewrite
    for module, attributes in zip(modules, before, strict=True):
        assert list(module.__dict__) == list(attributes)
        changed = [n for n, value in attributes.items() if module.__dict__[n] is not value]
        assert not [n for n in changed if rewrite is None or n != "forward"], changed
    return text
