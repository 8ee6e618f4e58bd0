"""The meter of `experiments.peers`, on steps whose peaks are known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from experiments.peers.meter import Peak, measured_peak, peak_of

KB = 1000
FLOATS = 250  # one tensor is 1000 bytes


def test_a_log_without_gradients_has_its_highest_level() -> None:
    assert peak_of([(1, 10), (2, 5), (1, -10), (3, 4)], set()) == Peak(15, 15, 0)


def test_what_ends_as_a_gradient_never_counts() -> None:
    # address 1 is handed out twice: only the second block is the gradient
    log = [(1, 10), (1, -10), (1, 7), (2, 5), (2, -5)]
    assert peak_of(log, {1}) == Peak(10, 12, 7)


def test_a_release_that_was_not_seen_ends_with_the_next_use_of_the_address() -> None:
    assert peak_of([(1, 10), (1, 6), (2, 3), (9, -100)], set()) == Peak(10, 10, 0)


def test_a_gradient_from_before_the_log_is_refused() -> None:
    with pytest.raises(ValueError, match="1 gradients"):
        peak_of([(1, 10)], {2})


def test_a_chain_of_three_operations() -> None:
    w = nn.Parameter(torch.ones(FLOATS))

    def step() -> None:
        out = w.exp().exp().sin()
        out.backward(torch.ones(FLOATS))

    step()
    # the two exponentials, which are saved, the output and the ones; then the sine's backward makes
    # the cosine and a product. Only the last product of all is the gradient, when little is left
    assert measured_peak(step, [w]) == Peak(6 * KB, 6 * KB, KB)


def test_gradients_that_come_early_do_not_count_while_the_rest_runs() -> None:
    weights = [nn.Parameter(torch.ones(FLOATS)) for _ in range(8)]

    def step() -> None:
        # adding saves nothing: each weight's gradient is there at once, and stays
        total = torch.zeros(FLOATS)
        for w in weights:
            total = total + w
        total.backward(torch.ones(FLOATS))

    step()
    found = measured_peak(step, weights)
    assert found.gradient_bytes == 8 * KB
    assert found.whole_bytes > 8 * KB
    assert found.activation_bytes <= 4 * KB


def test_recomputation_lowers_what_it_measures() -> None:
    w = nn.Parameter(torch.ones(FLOATS))

    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = x.exp()
        return x

    def plain() -> None:
        deep(deep(w)).backward(torch.ones(FLOATS))

    def recomputed() -> None:
        half = checkpoint(deep, w, use_reentrant=False, preserve_rng_state=False)
        out = checkpoint(deep, half, use_reentrant=False, preserve_rng_state=False)
        out.backward(torch.ones(FLOATS))

    for step in (plain, recomputed):
        step()
    high, low = (measured_peak(step, [w]).activation_bytes for step in (plain, recomputed))
    # all exponentials, the ones, and two gradients of activations at a time; recomputed: the ten of
    # one half, its input and the output, which the call of backward holds
    assert (high, low) == (23 * KB, 15 * KB)
