"""How good plans are: beside the optimum, beside what was predicted, and how long they take."""

from __future__ import annotations

from statistics import median

from experiments.measured.kept import MODELS, Kept, Row, between
from experiments.results import markdown_table

SHARES = (0.75, 0.5, 0.35, 0.25)


def optimality(kept: Kept) -> str:
    """Points above the bound of the plan's kind, in brackets above that of either kind."""

    def cell(row: Row | None) -> str:
        if row is None or row["bound"] is None:
            return "none can fit"
        return f"{100 * row['gap_of_kind']:.1f} ({100 * row['gap']:.1f})"

    found = {
        (row["model"], row["share"]): row
        for row in kept.rows
        if "layers" not in row and "optimum" not in row
    }
    lines = [
        [f"{100 * share:.0f} %", *(cell(found.get((model, share))) for model in MODELS)]
        for share in SHARES
    ]
    return markdown_table(["of the activations", *MODELS.values()], lines)


def optima(kept: Kept) -> str:
    """What came of graphs that are small enough to try every plan."""
    tried = [row for row in kept.rows if "optimum" in row]
    worst = max(100 * (row["overhead"] - row["optimum"]) for row in tried)
    return (
        f"On graphs small enough to try every plan ({len(tried)} cells), the planner's is at most "
        f"{worst:.1f} points above the best."
    )


def small_operations(kept: Kept) -> str:
    """Gaps of a model whose operations are too small to be recomputed for less."""
    of = [row for row in kept.rows if "layers" in row]
    kind, either = ([100 * row[name] for row in of] for name in ("gap_of_kind", "gap"))
    return (
        f"The operations of a GPT-2 of width 128 are too small to recompute for less. It is "
        f"{between(kind)} points above the bound of plans by operations, and {between(either, 0)} "
        f"above that of either kind. What following costs is in the first bound alone."
    )


def solving(kept: Kept) -> str:
    """Seconds of the solver and of the bound."""
    models = [r for r in kept.rows if "layers" not in r and "optimum" not in r and r["bound"]]
    slowest = sorted(models, key=lambda row: -float(row["solve_s"]))[:2]
    named = " and ".join(
        f"{MODELS[row['model']]} at {100 * row['share']:.0f} % ({row['solve_s']:.0f} s)"
        for row in slowest
    )
    bound_s = max(row["bound_s"] for row in models)
    return f"Slowest to plan: {named}. The bound takes up to {bound_s:.0f} s; only reports ask."


def prediction(kept: Kept) -> str:
    """Predicted and measured overhead at each share, over all models."""
    lines = []
    for share in SHARES:
        of = [row for row in kept.rows if row.get("share") == share and "measured" in row]
        off = [100 * (row["measured"] - row["predicted"]) for row in of]
        worst = max(off, key=abs)
        lines.append(
            [
                f"{100 * share:.0f} %",
                str(len(of)),
                f"{median(map(abs, off)):.1f}",
                f"{worst:+.1f}",
                f"{max(row['used'] for row in of):.3f}",
                "equal" if all(r["gradients"] == r["buffers"] == 0 for r in of) else "NOT EQUAL",
            ]
        )
    columns = [
        "of the activations", "models", "off, median", "off, worst", "peak / budget", "bits",
    ]  # fmt: skip
    return markdown_table(columns, lines)


def prediction_summary(kept: Kept) -> str:
    """Over all cells."""
    of = [row for row in kept.rows if "measured" in row]
    off = [100 * (row["measured"] - row["predicted"]) for row in of]
    within = sum(1 for points in off if abs(points) <= 2)
    return (
        f"Over all {len(of)}: {median(map(abs, off)):.1f} points off in the median, {within} of "
        f"them within 2, measured less predicted {median(off):+.1f} in the median."
    )


def plan_time(kept: Kept) -> str:
    """Where the seconds of planning go."""
    lines = [
        [
            f"{row['layers']} layers, {row['policy']}",
            f"{row['ops']:,}",
            f"{row['before_s']:.1f} s",
            f"{row['solve_s']:.1f} s",
            f"{row['dry_run_s']:.1f} s",
            f"{row['total_s']:.1f} s",
            f"{row['steps']:.1f}",
        ]
        for row in kept.rows
    ]
    columns = [
        "GPT-2", "operations", "trace and profile", "solve", "dry run", "total", "in its own steps",
    ]  # fmt: skip
    return markdown_table(columns, lines)


def max_batch(kept: Kept) -> str:
    """What find_max_batch found, and whether one sample more fits."""
    lines = [
        [
            MODELS[row["model"]],
            str(row["usual"]),
            str(row["largest"]),
            f"{100 * row['peak_bytes'] / row['budget_bytes']:.1f} %",
            f"{100 * row['more_bytes'] / row['budget_bytes']:.1f} %",
            f"{row['tried']} in {row['search_s']:.0f} s",
        ]
        for row in kept.rows
    ]
    columns = ["", "usual batch", "largest", "takes", "one more takes", "plans made"]
    return markdown_table(columns, lines)


def absent_gaps(kept: Kept) -> str:
    """Points above the bound on devices that are not here."""
    of = [row for row in kept.rows if "share" in row]
    names = dict.fromkeys((row["model"], row["device"]) for row in of)
    found = {(row["model"], row["device"], row["share"]): row for row in of}

    def cell(row: Row) -> str:
        if not row["fits"]:
            return "none fits"
        return f"{100 * (row['overhead'] - row['lower_bound']):.1f}"

    lines = [
        [f"{model}, {device}", *(cell(found[model, device, share]) for share in SHARES)]
        for model, device in names
    ]
    return markdown_table(["points above the bound", *(f"{100 * s:.0f} %" for s in SHARES)], lines)


def absent_budgets(kept: Kept) -> str:
    """One model at several budgets on the whole step."""
    of = [
        row
        for row in kept.rows
        if row["model"] == "Llama 8B" and row["optimizer"] == "none" and "share" not in row
    ]
    lines = [
        [
            f"{row['budget_gb']:.0f} GB of {row['baseline_bytes'] / 1e9:.1f}",
            f"{100 * row['overhead']:.1f} %",
            f"{100 * row['lower_bound']:.1f} %",
        ]
        for row in of
        if row["fits"]
    ]
    return markdown_table(["Llama 8B, H100, no optimizer", "slower by", "no plan below"], lines)


def absent_planning(kept: Kept) -> str:
    """How long the two Llamas take to plan, and in how much memory."""
    sentences = []
    for model in ("Llama 8B", "Llama 70B"):
        of = [row for row in kept.rows if row["model"] == model]
        sentences.append(
            f"{model}: planned in {between([r['processor_s'] for r in of], 0)} processor seconds "
            f"and {max(r['resident_bytes'] for r in of) / 1e9:.1f} GB of resident memory."
        )
    return " ".join(sentences)
