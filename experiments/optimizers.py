"""Does every optimizer keep its bits and a budget? Those of torch and of three libraries, in turn.

    python -m experiments.optimizers [--only adam,muon] [--minutes 4] [--fresh]

Each trains the same small model, untouched and planned, for some steps, with a budget of nine
tenths of the untouched step's peak. Asked are: the same bits after every step; the peak of a
further step, by the allocator, within the budget; what of the optimizer was planned for; and that
nothing ends in an error, the optimizer given to `optimize` or learned from the loop. Where an
optimizer does not train the untouched model in the usual loop, other ways of stepping it are
tried; one that works in none, or gives other bits from run to run, says nothing and is listed.

Results go to ``results/optimizers.jsonl``, a line per optimizer as soon as it is known; those that
are there already are not run again (``--fresh`` forgets them). ``results/optimizers.md`` is the
table. Optimizers of libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import nn

import actckpt
from experiments.progress import progress
from experiments.results import FOLDER, circumstances, markdown_table, write_markdown
from tests.loop_peaks import loop_peak, other_bits, weights

RESULTS = FOLDER / "optimizers.jsonl"
ROWS, WIDTH, DEPTH, STEPS, SHARE = 512, 64, 5, 4, 0.9
# for those that change nothing in their first steps
MORE_STEPS = 8

LEFT_OUT = "left out, and said"

Make = Callable[[nn.Module], Any]
Advance = Callable[[nn.Module, Any, int], None]
Row = dict[str, Any]


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return out


def model() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(DEPTH)))


def batch(seed: int) -> torch.Tensor:
    """The rows of one step."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss(out: torch.Tensor) -> torch.Tensor:
    """A scalar."""
    return out.square().mean()


# ---- the optimizers


def zoo() -> dict[str, Make]:
    """Name -> how it is made of a model."""
    found: dict[str, Make] = {}

    def add(name: str, kind: Any, **options: Any) -> None:
        found[name] = lambda m: kind(m.parameters(), **{"lr": 1e-3, **options})

    for name, kind in sorted(vars(torch.optim).items()):
        # SparseAdam is for sparse gradients alone
        if inspect.isclass(kind) and name not in ("Optimizer", "SparseAdam"):
            add(f"torch.{name}", kind)
    add("torch.AdamW, fused", torch.optim.AdamW, fused=True)
    add("torch.AdamW, foreach", torch.optim.AdamW, foreach=True)
    add("torch.AdamW, amsgrad", torch.optim.AdamW, amsgrad=True)
    add("torch.AdamW, lr a tensor", torch.optim.AdamW, lr=torch.tensor(1e-3), foreach=False)
    found["torch.Muon beside AdamW"] = _muon_beside_adamw
    po = _library("pytorch_optimizer")
    for name in po.get_supported_optimizers() if po else ():
        # one that looks back ten steps would not begin here; one is too slow on a processor
        needs: dict[str, dict[str, Any]] = {
            "adashift": {"keep_num": 2},
            "bsam": {"num_data": 1000},
            "ranger21": {"num_iterations": 100},
            "kron": {"max_size_triangular": 16},
        }
        add(f"pytorch_optimizer.{name}", _loaded(po, name), **needs.get(name, {}))
    for name in ("Lookahead", "TRAC", "OrthoGrad", "ScheduleFreeWrapper") if po else ():
        found[f"pytorch_optimizer.{name}(AdamW)"] = _wrapped(getattr(po, name))
    if po:
        found["pytorch_optimizer.SAM(SGD)"] = lambda m: po.SAM(
            m.parameters(), torch.optim.SGD, lr=1e-3, momentum=0.9
        )
    schedulefree = _library("schedulefree")
    for name in ("AdamW", "SGD", "RAdam") if schedulefree else ():
        add(f"schedulefree.{name}", getattr(schedulefree, f"{name}ScheduleFree"))
    if schedulefree:
        found["schedulefree.Wrapper(SGD)"] = lambda m: schedulefree.ScheduleFreeWrapper(
            torch.optim.SGD(m.parameters(), 1e-3), momentum=0.9
        )
    bnb = _library("bitsandbytes")
    for name in ("AdamW8bit", "Lion8bit", "PagedAdamW8bit", "AdEMAMix8bit") if bnb else ():
        add(f"bitsandbytes.{name}", getattr(bnb.optim, name))
    return found


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _loaded(library: Any, name: str) -> Any:
    return lambda *args, **options: library.load_optimizer(name)(*args, **options)


def _wrapped(kind: Any) -> Make:
    return lambda m: kind(torch.optim.AdamW(m.parameters(), 1e-3))


def _muon_beside_adamw(m: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in m.parameters() if p.ndim == 2]
    others = [p for p in m.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, 1e-3)]


def _several(optimizer: Any) -> list[Any]:
    return optimizer if isinstance(optimizer, list) else [optimizer]


# ---- ways to step them


def usual(m: nn.Module, optimizer: Any, seed: int) -> None:
    """Forward, backward, step."""
    loss(m(batch(seed))).backward()
    for o in _several(optimizer):
        o.step()
        o.zero_grad()


def twice_differentiable(m: nn.Module, optimizer: Any, seed: int) -> None:
    """For optimizers that ask for products with the Hessian."""
    loss(m(batch(seed))).backward(create_graph=True)
    optimizer.step()
    m.zero_grad()


def with_closure(m: nn.Module, optimizer: Any, seed: int) -> None:
    """For optimizers that run the model themselves."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        found = loss(m(batch(seed)))
        found.backward()
        return found

    optimizer.step(closure)
    optimizer.zero_grad()


def in_two_passes(m: nn.Module, optimizer: Any, seed: int) -> None:
    """For sharpness-aware ones."""
    loss(m(batch(seed))).backward()
    optimizer.first_step(zero_grad=True)
    loss(m(batch(seed))).backward()
    optimizer.second_step(zero_grad=True)


def told_the_loss(m: nn.Module, optimizer: Any, seed: int) -> None:
    """For optimizers that look at the loss."""
    found = loss(m(batch(seed)))
    found.backward()
    optimizer.step(lambda: found.detach())
    optimizer.zero_grad()


def fused_backward(m: nn.Module, optimizer: Any, seed: int) -> None:
    """For optimizers that step inside their own backward."""
    optimizer.fused_backward(loss(m(batch(seed))), lr=1e-3)


def matrices_apart(make: Make) -> Make:
    """Parameter groups that say which are for Muon."""

    class Grouped:
        def __init__(self, m: nn.Module) -> None:
            self.m = m

        def parameters(self) -> list[dict[str, Any]]:
            own = list(self.m.parameters())
            return [
                {"params": [p for p in own if p.ndim == 2], "use_muon": True},
                {"params": [p for p in own if p.ndim != 2], "use_muon": False},
            ]

    return lambda m: make(Grouped(m))  # type: ignore[arg-type]


def matrices_alone(make: Make) -> Make:
    """The others stay as they are."""

    class Grouped:
        def __init__(self, m: nn.Module) -> None:
            self.m = m

        def parameters(self) -> list[nn.Parameter]:
            return [p for p in self.m.parameters() if p.ndim == 2]

    return lambda m: make(Grouped(m))  # type: ignore[arg-type]


def of_the_model(make: Make) -> Make:
    """It takes the model in place of its parameters."""

    class Itself:
        def __init__(self, m: nn.Module) -> None:
            self.m = m

        def parameters(self) -> nn.Module:
            return self.m

    return lambda m: make(Itself(m))  # type: ignore[arg-type]


def as_made(make: Make) -> Make:
    """No other groups."""
    return make


WAYS: dict[str, tuple[Callable[[Make], Make], Advance]] = {
    "usual": (as_made, usual),
    "of the model": (of_the_model, usual),
    "fused backward": (of_the_model, fused_backward),
    "two passes": (as_made, in_two_passes),
    "told the loss": (as_made, told_the_loss),
    "matrices apart": (matrices_apart, usual),
    "matrices alone": (matrices_alone, usual),
    "create_graph": (as_made, twice_differentiable),
    "closure": (as_made, with_closure),
}


# ---- one optimizer


class Trial:
    """A model and its optimizer, stepped one way."""

    def __init__(self, make: Make, advance: Advance) -> None:
        self.model = model()
        self.optimizer = make(self.model)
        self.advance = advance
        for o in _several(self.optimizer):
            if callable(getattr(o, "train", None)):
                o.train()

    def step(self, seed: int) -> None:
        """One step of the loop; what draws random numbers draws the same each time."""
        torch.manual_seed(seed)
        self.advance(self.model, self.optimizer, seed)

    def run(self, steps: int) -> list[dict[str, torch.Tensor]]:
        """Weights after each step."""
        found = []
        for seed in range(steps):
            self.step(seed)
            found.append(weights([self.model]))
        return found

    def peak_bytes(self) -> int:
        """Of a further step, by the allocator."""
        held = [vars(o) for o in _several(self.optimizer)]
        return loop_peak(lambda: self.step(STEPS), self.model, *held)


def run(name: str, make: Make) -> Row:
    """What became of one optimizer."""
    row: Row = {"name": name}
    reasons = []
    for way, (grouped, advance) in WAYS.items():
        grouped_make = grouped(make)
        try:
            untouched = Trial(grouped_make, advance)
            expected = untouched.run(STEPS)
            if not _moves(expected):
                untouched = Trial(grouped_make, advance)
                expected = untouched.run(MORE_STEPS)
        except Exception as error:  # anybody's code, stepped in a way that it may not be meant for
            reasons.append(f"{way}: {_one_line(error)}")
            continue
        if not _moves(expected):
            reasons.append(f"{way}: nothing is trained")
            continue
        if not all(t.isfinite().all() for t in expected[-1].values()):
            reasons.append(f"{way}: not finite")
            continue
        if any(map(other_bits, expected, Trial(grouped_make, advance).run(len(expected)))):
            reasons.append(f"{way}: other bits in a second run")
            continue
        row["way"] = way
        row["untouched_bytes"] = untouched.peak_bytes()
        row |= _planned(grouped_make, advance, expected, row["untouched_bytes"])
        if advance is usual:
            row["given"] = _given(grouped_make, row["budget_bytes"])
        return row
    return row | {"outcome": "no trial", "reason": "; ".join(dict.fromkeys(reasons))[:300]}


def _moves(found: Sequence[dict[str, torch.Tensor]]) -> bool:
    """Whether any of the steps changes the weights."""
    return any(other_bits(a, b) for a, b in itertools.pairwise(found))


def _planned(
    make: Make, advance: Advance, expected: list[dict[str, torch.Tensor]], untouched_bytes: int
) -> Row:
    """The optimizer learned from the loop, under a budget that can be met."""
    budget = int(SHARE * untouched_bytes)
    row: Row = {}
    for _ in range(3):
        trial = Trial(make, advance)
        row["budget_bytes"] = budget
        with _log() as said:
            try:
                actckpt.optimize(trial.model, budget / 1e9)
                found = trial.run(len(expected))
                row["peak_bytes"] = trial.peak_bytes()
            except actckpt.BudgetError as error:
                row["least_bytes"] = budget = error.smallest_bytes or untouched_bytes
                continue
            except Exception as error:  # what this experiment looks for
                return row | {"outcome": "error", "reason": _one_line(error)}
        bitwise = not any(map(other_bits, expected, found))
        report = actckpt.report(trial.model)
        row["bitwise"] = bitwise
        row["said"] = [line for line in said if "planning again" not in line]
        row["planned"] = _how(row["said"])
        row["recomputes"] = bool(report.plan.regions or report.plan.bursts)
        row["outcome"] = "trained"
        return row
    return row | {"outcome": "error", "reason": "no budget is enough"}


def _given(make: Make, budget_bytes: int) -> str:
    """Nothing if the optimizer can be given before its first step, or its budget is refused."""
    trial = Trial(make, usual)
    try:
        with _log():
            actckpt.optimize(
                trial.model,
                1.5 * budget_bytes / 1e9,
                batch=batch(0),
                loss_fn=loss,
                optimizer=trial.optimizer,
            )
        trial.step(0)
        trial.step(1)
    except Exception as error:  # what this experiment looks for
        return _one_line(error)
    return ""


def _how(said: Sequence[str]) -> str:
    """What was planned for, as the log says."""
    if any("not bounded" in line for line in said):
        return LEFT_OUT
    return "measured" if any("cannot be planned ahead" in line for line in said) else "traced"


@contextmanager
def _log() -> Iterator[list[str]]:
    """The lines that actckpt logs meanwhile, in place of printing them."""
    lines: list[str] = []

    class Listed(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("actckpt"), Listed()
    level, passed = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passed


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.160}"


# ---- the run


def violations(row: Row) -> list[str]:
    """What must not be."""
    if row["outcome"] == "no trial":
        return []
    if row["outcome"] == "error":
        return [row["reason"]]
    found = []
    if not row["bitwise"]:
        found.append("other bits")
    if row["peak_bytes"] > row["budget_bytes"] and row["planned"] != LEFT_OUT:
        found.append(f"peak is {row['peak_bytes'] / row['budget_bytes']:.3f} of the budget")
    if row.get("given"):
        found.append(f"given: {row['given']}")
    return found


def read() -> list[Row]:
    """The optimizers of earlier runs."""
    if not RESULTS.exists():
        return []
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "about" not in line]


def table(rows: Sequence[Row]) -> str:
    """One line per optimizer that was tried."""
    lines = [
        (
            row["name"],
            row["way"],
            row.get("planned", "-"),
            f"{row['budget_bytes'] / row['untouched_bytes']:.3f}",
            f"{row['peak_bytes'] / row['budget_bytes']:.3f}" if "peak_bytes" in row else "-",
            "yes" if row.get("bitwise") else "NO",
            "; ".join(violations(row)) or "-",
        )
        for row in rows
        if row["outcome"] != "no trial"
    ]
    columns = ("optimizer", "stepped", "its step was", "budget / untouched", "peak / budget",
               "same bits", "violations")  # fmt: skip
    return markdown_table(columns, lines)


def summary(rows: Sequence[Row]) -> list[str]:
    """The counts."""
    tried = [row for row in rows if row["outcome"] != "no trial"]
    bad = [row for row in tried if violations(row)]
    how = [row.get("planned") for row in tried]
    kept = [r for r in tried if "peak_bytes" in r and r["planned"] != LEFT_OUT]
    peaks = [r["peak_bytes"] / r["budget_bytes"] for r in kept]
    raised = sum("least_bytes" in row for row in tried)
    return [
        f"Optimizers: {len(rows)}, {len(tried)} tried, {len(rows) - len(tried)} train nothing here "
        "by themselves, or no two runs alike.",
        f"Violations: {len(bad)}.",
        f"Traced: {how.count('traced')}; measured at a real step: {how.count('measured')}; left "
        f"out, and said: {how.count('left out, and said')}.",
        f"Worst peak / budget, but for those: {max(peaks, default=0):.4f}. Of {raised} the step "
        "itself needs more than nine tenths: `BudgetError` says how much, and that is the budget "
        "here.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """0 if nothing was violated, else 1."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    kinds = zoo()
    rows = [] if args.fresh else read()
    done = {row["name"] for row in rows}
    todo = [n for n in kinds if n not in done and any(w in n for w in args.only)]
    libraries = ("pytorch_optimizer", "schedulefree", "bitsandbytes")
    versions = {n: metadata.version(n) for n in libraries if _library(n)}
    about = circumstances(_versions() | versions, seed=0, threads_per_process=1)
    if not rows:
        RESULTS.write_text(json.dumps({"about": about}) + "\n", encoding="utf-8")
    with progress(len(todo), "optimizers") as tick:
        for name in todo:
            if time.perf_counter() - begin > 60 * args.minutes:
                break
            row = run(name, kinds[name])
            rows.append(row)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            found = "; ".join(violations(row)) or row.get("reason") or row.get("planned", "")
            tick(f"{name}: {found}")
    order = {name: n for n, name in enumerate(kinds)}
    rows.sort(key=lambda row: order.get(row["name"], len(order)))
    lines = summary(rows)
    apart = [f"- {row['name']}: {row['reason']}" for row in rows if row["outcome"] == "no trial"]
    write_markdown(
        "optimizers", about, "# Optimizers", "\n".join(f"- {x}" for x in lines), table(rows),
        "## Not tried", "\n".join(apart) or "None.",
    )  # fmt: skip
    print("\n".join(lines))
    return any(violations(row) for row in rows)


def _versions() -> dict[str, str]:
    net = nn.Linear(1, 1)
    actckpt.optimize(net, None, batch=torch.ones(1, 1), policy="none")
    return actckpt.report(net).versions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.optimizers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--only",
        type=lambda text: tuple(text.split(",")),
        default=("",),
        metavar="W,W",
        help="those with one of these in their names",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="begins none after that long")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
