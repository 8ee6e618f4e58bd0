"""Pieces of HTML: tables whose cells know by what they are sorted, and whole documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

# what a browser is to refuse: anything that is not in the file
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell shows, and the number by which its column is sorted (None: by the text)."""

    text: str
    value: float | None = None


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell | str]], *, words: int = 1, name: str = ""
) -> str:
    """A table.

    Args:
        words: how many of the first columns hold words, which are flush left.
        name: of a table that can be sorted by a click on a column; "" for one that cannot.
    """
    kinds = ["word" if i < words else "number" for i in range(len(columns))]
    head = "".join(
        f'<th class="{kind}">{f"<button>{escape(text)}</button>" if name else escape(text)}</th>'
        for kind, text in zip(kinds, columns, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(_cell(kind, cell) for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    which = f' class="sortable" id="{escape(name)}"' if name else ""
    return (
        f'<div class="scroll"><table{which}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(kind: str, cell: Cell | str) -> str:
    if isinstance(cell, str):
        cell = Cell(cell)
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    return f'<td class="{kind}"{value}>{escape(cell.text)}</td>'


def embedded(name: str, data: Mapping[str, Any]) -> str:
    """``data`` as JSON inside a document, which scripts of the document find by ``name``."""
    # "</script>" or "<!--" inside a text would end it
    text = json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def fragment(*parts: str) -> str:
    """``parts`` for a notebook, whose colours they take."""
    return "\n".join(
        [f"<style>{_file('page.css')}</style>", '<div class="actckpt">', *parts, "</div>"]
    )


def document(title: str, *parts: str) -> str:
    """A whole page of ``parts`` that fetches nothing, light or dark as the reader has it."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_file('page.css')}</style></head>",
            '<body class="actckpt page"><main>',
            *parts,
            f"</main><script>{_file('page.js')}</script></body></html>",
            "",
        ]
    )


def _file(name: str) -> str:
    return files("actckpt.pages").joinpath(name).read_text(encoding="utf-8")
