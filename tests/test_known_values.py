"""What a forward asks of masks, lengths and labels is answered; of activations it is supposed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.errors import TraceError
from actckpt.tracing.call import Call
from tests.burst_plans import each_alone, everything
from tests.exact import (
    Body,
    assert_exact,
    differences,
    enforce,
    outcome,
    plan,
    region,
    scalar_loss,
)
from tests.models.blocks import WIDTH, rows
from tests.suite import generator, seeded

FRAMES, LABELS, KINDS = 20, 6, 5


class Asked(nn.Module):
    """Goes on by ``tanh`` where all of a mask is set, by ``sin`` where not."""

    def __init__(self, mask: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.mask = nn.Linear(WIDTH, WIDTH), mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x)
        out: torch.Tensor = hidden.tanh() if bool(self.mask(hidden).all()) else hidden.sin()
        return out


def runs(model: nn.Module, batch: Any) -> set[str]:
    """The operations of the traced forward."""
    graph = actckpt.trace(model, batch, loss_fn=scalar_loss)
    return {op.name.split(".")[1] for op in graph.ops}


def is_supposed(model: nn.Module, batch: Any) -> bool:
    """Whether what the forward asks was not known, and answered as if no guard fires."""
    return bool(actckpt.trace(model, batch, loss_fn=scalar_loss).supposed)


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (lambda h: torch.ones(h.shape[0], 64), "tanh"),  # as Hugging Face's models make it
        (lambda h: torch.zeros(h.shape[0], 64), "sin"),
        (lambda h: torch.ones_like(h), "tanh"),
        (lambda h: h.new_full(h.shape, 2.0) > 1, "tanh"),
        (lambda h: torch.arange(h.numel()).float().view_as(h).cos() < 2, "tanh"),
    ],
)
def test_masks_made_of_constants_are_known(
    mask: Callable[[torch.Tensor], torch.Tensor], name: str
) -> None:
    assert name in runs(Asked(mask), rows())
    assert not is_supposed(Asked(mask), rows())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("through", [lambda m: m[:, :3], lambda m: m.view(-1)[:9], lambda m: m])
def test_what_activations_are_written_into_is_not_known(
    dtype: torch.dtype, through: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def mask(hidden: torch.Tensor) -> torch.Tensor:
        found = torch.ones(hidden.shape, dtype=dtype)
        window = through(found)
        window.copy_((hidden.flatten()[: window.numel()] > 0).view(window.shape))
        return found

    assert is_supposed(Asked(mask), rows())


def test_running_statistics_are_not_known_once_moved() -> None:
    norm = nn.BatchNorm1d(WIDTH)

    def mask(hidden: torch.Tensor) -> torch.Tensor:
        norm(hidden)
        assert norm.running_mean is not None
        return norm.running_mean != 0

    model = Asked(mask)
    model.norm = norm
    assert is_supposed(model, rows())


@pytest.mark.parametrize(
    "mask",
    [
        lambda h: torch.rand(h.shape[0], 64) < 0.9,
        lambda h: torch.ones(h.shape[0], 64).bernoulli_(0.5),
    ],
)
def test_drawn_masks_are_not_known(mask: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert is_supposed(Asked(mask), rows())


class Speech(nn.Module):
    """Connectionist temporal classification of padded labels: their number gives shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, KINDS))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.body(x).log_softmax(-1)
        lengths = torch.ones_like(x[..., 0]).sum(-1).long()
        known = labels >= 0
        flat = labels.masked_select(known)
        loss = nn.functional.ctc_loss(found.transpose(0, 1), flat, lengths, known.sum(-1))
        return {"loss": loss}


def speech() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(1, KINDS, (3, LABELS), generator=generator())
    labels[0, 4:] = labels[2, 2:] = -100
    return torch.randn(3, FRAMES, 8, generator=generator()), labels


def test_labels_of_known_number_give_shapes() -> None:
    graph = actckpt.trace(Speech(), speech())
    shapes = {tuple(v.shape) for v in graph.values}
    assert (12,) in shapes  # the labels that are none of the padding
    assert (3, FRAMES, 2 * LABELS + 1) in shapes  # of each step and label, and blanks between
    assert_exact(Speech, speech, everything, loss_fn=lambda out: out["loss"])


def others_later() -> Body:
    """Steps whose labels are fewer from the second on."""
    steps = itertools.count()

    def run(model: nn.Module, call: Call) -> Any:
        x, labels = call.args
        if next(steps):
            labels = labels.clone()
            labels[:, 3:] = -100
        out = model(x, labels)
        out["loss"].backward()
        return out

    return run


@pytest.mark.parametrize("wanted", [everything, each_alone, plan(region("body"))])
def test_labels_of_another_number_in_a_later_step(wanted: Any) -> None:
    make = seeded(Speech)
    expected = outcome(make(), speech(), others_later(), steps=3)
    model = make()
    enforce(model, speech(), wanted, loss_fn=lambda out: out["loss"])
    assert not differences(expected, outcome(model, speech(), others_later(), steps=3))


class Picking(nn.Module):
    """Predicts those labels that are none of the padding."""

    def __init__(self, pick: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.pick = pick
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, KINDS))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        known = labels >= 0
        picked = self.pick(self.body(x)[:, :LABELS], known)
        return {"loss": nn.functional.cross_entropy(self.head(picked), labels[known])}


def written(hidden: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The mask is asked in backward, too, for the gradient of what was written."""
    hidden = hidden.clone()
    hidden[known] = hidden[0, 0] * 2
    return hidden[known]


PICKS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "index": lambda hidden, known: hidden[known],
    "select": lambda hidden, known: hidden.masked_select(known.unsqueeze(-1)).view(-1, 32),
    "nonzero": lambda hidden, known: hidden.flatten(0, 1)[known.flatten().nonzero().squeeze(1)],
    "repeat": lambda hidden, known: hidden[:, 0].repeat_interleave(known.sum(1), 0),
    "written": written,
}
each_pick = pytest.mark.parametrize("pick", PICKS.values(), ids=PICKS)


@each_pick
def test_rows_that_a_known_mask_picks_give_shapes(pick: Any) -> None:
    graph = actckpt.trace(Picking(pick), speech())
    assert graph.shaped_by_values
    assert (12, 32) in {tuple(v.shape) for v in graph.values}
    assert_exact(lambda: Picking(pick), speech, everything, loss_fn=lambda out: out["loss"])


@each_pick
@pytest.mark.parametrize("wanted", [everything, each_alone, plan(region("body"), region("head"))])
def test_a_mask_that_picks_others_in_a_later_step(wanted: Any, pick: Any) -> None:
    make = seeded(lambda: Picking(pick))
    expected = outcome(make(), speech(), others_later(), steps=3)
    model = make()
    enforce(model, speech(), wanted, loss_fn=lambda out: out["loss"])
    assert not differences(expected, outcome(model, speech(), others_later(), steps=3))


@pytest.mark.usefixtures("flat_profile")
def test_the_report_says_that_values_give_shapes() -> None:
    def notes(model: nn.Module, batch: Any) -> str:
        actckpt.optimize(model, None, batch=batch, policy="full")
        return " ".join(actckpt.report(model).notes)

    assert "a shape depends on values" in notes(Picking(PICKS["index"]), speech())
    assert "a shape depends on values" not in notes(nn.Linear(WIDTH, 1), rows())


@pytest.mark.parametrize("pick", [PICKS["index"], PICKS["select"]])
def test_masks_of_activations_give_no_shapes(pick: Any) -> None:
    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.linear(x)
            out: torch.Tensor = pick(hidden, hidden[..., 0] > 0)
            return out

    with pytest.raises(TraceError, match="values of activations"):
        actckpt.trace(Positive(), torch.ones(3, FRAMES, 8), loss_fn=lambda out: out.sum())


class Guarded(nn.Module):
    """Clamps what has overflowed, as Hugging Face's models do in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
            if not torch.isfinite(x).all():
                x = x.nan_to_num().clamp(-10, 10)
        return x


CHECKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "isnan": lambda h: h.isnan().any(),
    "isfinite": lambda h: not torch.isfinite(h).all(),
    "either": lambda h: (h.isnan() | h.isinf()).any(),
    "a part": lambda h: h.isnan().flatten()[1:].any(),
    "how many": lambda h: h.isinf().float().sum() > 0,
    "where": lambda h: h.isnan().nonzero().numel(),
    "distribution": lambda h: torch.distributions.Normal(h, h.exp()).rsample().isnan().any(),
    "not itself": lambda h: (h != h).any(),
}


few_and_many = pytest.mark.parametrize("count", [5, (1 << 20) // WIDTH + 1], ids=["few", "many"])


def changed(hidden: torch.Tensor) -> torch.Tensor:
    """A mask that is written into after it was made, through a window, too."""
    mask = hidden.isnan()
    mask |= hidden.isinf()
    mask[:2] = hidden[:2] > 0
    return mask.any()


@few_and_many
def test_masks_that_activations_change_are_not_known(count: int) -> None:
    class Checked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = super().forward(x)
            return hidden.sin() if changed(hidden) else hidden.tanh()

    assert is_supposed(Checked(WIDTH, WIDTH), rows(count))


@few_and_many
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_activations_are_taken_for_finite(check: Callable[[torch.Tensor], Any], count: int) -> None:
    class Checked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = super().forward(x)
            return hidden.sin() if check(hidden) else hidden.tanh()

    names = runs(Checked(WIDTH, WIDTH), rows(count))
    assert "tanh" in names
    assert "sin" not in names


def test_known_numbers_are_not_taken_for_finite() -> None:
    class Masked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.full((4, 4), -torch.inf).triu(1)
            hidden = super().forward(x)
            return hidden.sin() if mask.isinf().any() else hidden.tanh()

    assert "sin" in runs(Masked(WIDTH, WIDTH), rows())


def overflows_later() -> Body:
    """Steps of which the second overflows."""
    steps = itertools.count()

    def run(model: nn.Module, call: Call) -> Any:
        x = call.args[0]
        out = model(torch.full_like(x, 3.3e38) if next(steps) == 1 else x)
        scalar_loss(out).backward()
        return out

    return run


@pytest.mark.parametrize("wanted", [everything, each_alone, plan("layers.1"), plan("")])
def test_a_step_that_is_not_finite_goes_its_own_way(wanted: Any) -> None:
    make = seeded(Guarded)
    expected = outcome(make(), rows(), overflows_later(), steps=3)
    model = make()
    enforce(model, rows(), wanted)
    assert not differences(expected, outcome(model, rows(), overflows_later(), steps=3))
