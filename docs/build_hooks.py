"""What mkdocs is told beside mkdocs.yml: the pages of results, drawings in a scheme's colours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
RESULTS = "experiments/results"
FIGURE = re.compile(r"^!\[(?P<says>[^\]]*)\]\((?P<path>figures/[\w-]+\.svg)\)$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """The results lie beside the experiments, and are pages of the site all the same."""
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that hold in the checkout, made to hold on the site; drawings written into the page.

    A drawing that is part of the page takes the colours of the scheme that the reader has chosen.
    """
    markdown = markdown.replace(f"../{RESULTS}/", "results/")
    folder = Path(page.file.abs_src_path).parent

    def drawn(found: re.Match[str]) -> str:
        svg = (folder / found["path"]).read_text(encoding="utf-8")
        return f'<figure class="drawing" aria-label="{found["says"]}">\n{svg}\n</figure>'

    return FIGURE.sub(drawn, markdown)
