"""Step times beside what people use today, at each peer's own peak."""

from __future__ import annotations

from collections import Counter

from experiments.measured.kept import DEEP, MODELS, Kept, Row, mean
from experiments.peers.verdict import LOSS, TIE, WIN, at_its_peak
from experiments.results import markdown_table

PEERS = {
    "torch per block": "`torch.utils.checkpoint` on every block",
    "Hugging Face's switch": "Hugging Face's `gradient_checkpointing`",
    "sqrt(n) segments": "`checkpoint_sequential`, √n segments",
    "SAC, all products": "selective: products and attention saved",
    "SAC, every second": "selective: every second product saved",
    "compile, budget 1.0": "`torch.compile`, aot_eager, budget 1.0",
    "compile, budget 0.8": "the same, budget 0.8",
    "compile, budget 0.5": "the same, budget 0.5",
    "compile, budget 0.3": "the same, budget 0.3",
    "compile, budget 0.1": "the same, budget 0.1",
    "compile, budget 0.0": "the same, budget 0.0",
    "sac_ilp, 0.8": "torch's integer program, 0.8",
    "sac_ilp, 0.65": "torch's integer program, 0.65",
    "ckptplan, 0.7": "ckptplan, 0.7",
    "ckptplan, 0.5": "ckptplan, 0.5",
}


def _ratio(row: Row) -> float:
    ratio: float = row["ours_at_its_peak"]["over_peer"]["median"]
    return ratio


def _measured(kept: Kept, peer: str, models: dict[str, str] = MODELS) -> dict[str, Row]:
    return {
        row["model"]: row
        for row in kept.rows
        if row["peer"] == peer and row["status"] == "measured" and row["model"] in models
    }


def by_model(kept: Kept) -> str:
    """Every peer x every model, our step time over the peer's."""
    lines = []
    for peer, label in PEERS.items():
        of = _measured(kept, peer)
        cells = [f"{_ratio(of[model]):.2f}" if model in of else "–" for model in MODELS]
        lines.append([label, mean([*map(_ratio, of.values())]), *cells])
    return markdown_table(["our time / the peer's", "mean", *MODELS.values()], lines)


def deep(kept: Kept) -> str:
    """Eager checkpointing x deep models: our step time at its peak, our peak at its time."""
    peers = {peer: PEERS[peer] for peer in list(PEERS)[:3]}
    peers["sqrt(n) segments, and blocks"] = "the same, and every block in them: two levels"
    lines = []
    for peer, label in peers.items():
        of = _measured(kept, peer, DEEP)
        peaks = {
            m: row["ours_at_its_time"]["peak_bytes"] / row["peak_bytes"] for m, row in of.items()
        }
        cells = [f"{_ratio(of[m]):.2f} / {peaks[m]:.2f}" if m in of else "–" for m in DEEP]
        both = f"{mean([*map(_ratio, of.values())])} / {mean([*peaks.values()])}"
        lines.append([label, both, *cells])
    return markdown_table(["time / peak", "mean", *DEEP.values()], lines)


def means(kept: Kept) -> str:
    """README's table: one row a peer, over all models."""
    shown = {
        "torch per block": "`torch.utils.checkpoint` on every block",
        "Hugging Face's switch": "Hugging Face's `gradient_checkpointing`",
        "sqrt(n) segments": "`checkpoint_sequential`, √n segments",
        "SAC, all products": "selective checkpointing (torch)",
        "compile, budget 0.5": "`torch.compile`, memory budget 0.5 (aot_eager)",
    }
    lines = []
    for peer, label in shown.items():
        of = _measured(kept, peer)
        ratios = [*map(_ratio, of.values())]
        lines.append([label, f"× {mean(ratios)}", f"{len(of)}"])
    return markdown_table(["at the peer's own peak", "our step time", "models"], lines)


def verdicts(kept: Kept) -> str:
    """How many comparisons are won, tied and lost."""
    sentences = []
    for title, chosen in (
        ("With `torch.compile`", [p for p in PEERS if p.startswith("compile")]),
        ("With the others", [p for p in PEERS if not p.startswith("compile")]),
    ):
        found = Counter(
            at_its_peak(row) for peer in chosen for row in _measured(kept, peer).values()
        )
        sentences.append(
            f"{title}: {found[WIN]} of {sum(found.values())} won, {found[TIE]} tied (no further "
            f"apart than an untouched model is from itself), {found[LOSS]} lost."
        )
    return " ".join(sentences)
