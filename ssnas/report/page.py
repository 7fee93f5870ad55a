"""The report of one run as a single HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import BinaryIO

import pandas as pd

from ssnas.errors import InputError
from ssnas.report.files import MAKE, has_rows
from ssnas.report.pictures import (
    alpha_picture,
    class_counts_picture,
    confusion_picture,
    curves_picture,
    per_class_picture,
)
from ssnas.report.run import Run, duration, ops_in_words, provenance, show

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2933;--muted:#5b6472;--line:#d9dee5;--paper:#fff;
--card:#f7f9fb;--accent:#0072b2}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaef;--muted:#9aa5b4;--line:#36404d;
--paper:#14181d;--card:#1d232b;--accent:#6bb8e6}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.5rem 0 .6rem}
p{margin:.4rem 0}.muted{color:var(--muted)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .7rem;border-bottom:1px solid var(--line);text-align:right;
vertical-align:top}
th:first-child,td:first-child{text-align:left}
thead th{color:var(--muted);font-weight:600}
td.ours{font-weight:700;color:var(--accent)}
.facts td{text-align:left;overflow-wrap:anywhere}
.facts td:first-child{color:var(--muted);width:12rem}
figure{margin:.8rem 0;padding:.6rem;background:#fff;border:1px solid var(--line);
border-radius:12px}
figure img{display:block;width:100%;height:auto}
figure.narrow img{max-width:40rem;margin:0 auto}
summary{cursor:pointer;color:var(--accent)}
""".strip()

_LIMITS = (
    "“Linear” is a linear classifier, “constant” gives every image the training frequencies; "
    "a figure near theirs says little. One seed: differences of a few tenths of a "
    "per cent between runs may be chance."
)


def write_html(folder: Path, out: Path) -> None:
    """Write the report of the run in `folder` to `out`: one file, no script, nothing fetched.

    Raises:
        InputError: if a file that every run has is missing; the message names the command that
            makes it.
    """
    run = Run.read(folder)
    if not (folder / "genotype.svg").is_file():
        raise InputError(f"{folder / 'genotype.svg'}: no such file; {MAKE}")
    title = f"{run.dataset}: the architecture found and what it achieves"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="muted">{"<br>".join(map(escape, _introduction(run)))}</p>',
        _section("Figures on the test images", _figures(run), f'<p class="muted">{_LIMITS}</p>'),
        _section("The cells found", *_cells(run)),
        *_pictures(folder),
        _section("Per class", _per_class(run)),
        _section("Transfer", *_transfer(run)),
        _section("Cost", _costs(run)),
        _section("Provenance", _facts(_provenance(run))),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _introduction(run: Run) -> list[str]:
    lines = (run.sampling(), run.split_sizes(), run.origin(), run.conditions())
    return [line for line in lines if line]


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], bold: int | None = None) -> str:
    def cell(place: int, text: str) -> str:
        opening = '<td class="ours">' if place == bold else "<td>"
        return f"{opening}{escape(text)}</td>"

    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = ["".join(cell(*item) for item in enumerate(row)) for row in rows]
    return (
        f'<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(f"<tr>{line}</tr>" for line in lines)
        + "\n</tbody>\n</table></div>"
    )


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = "\n".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts)
    return f'<div class="scroll"><table class="facts">\n{rows}\n</table></div>'


def _image(content: bytes, mime: str, alt: str, narrow: bool = False) -> str:
    data = base64.b64encode(content).decode("ascii")
    opening = '<figure class="narrow">' if narrow else "<figure>"
    return f'{opening}<img alt="{escape(alt)}" src="data:{mime};base64,{data}"></figure>'


def _figures(run: Run) -> str:
    head = ("figure", "this network", "linear", "constant")
    return _table(head, run.figure_rows(), bold=1)


def _cells(run: Run) -> list[str]:
    drawing = (run.folder / "genotype.svg").read_bytes()
    normal, reduction = map(ops_in_words, (run.genotype.normal, run.genotype.reduce))
    alt = f"Normal cell: {normal}. Reduction cell: {reduction}."
    return [
        f"<p>{escape(run.network())}</p>",
        _image(drawing, "image/svg+xml", alt),
        f'<p class="muted">{escape(alt)}</p>',
    ]


def _pictures(folder: Path) -> list[str]:
    """A section for every picture whose numbers the folder has."""
    search, finetune = folder / "search.csv", folder / "finetune.csv"
    halves = tuple(path if has_rows(path) else None for path in (search, finetune))
    pictures: list[tuple[str, bool, Callable[[BinaryIO], None], bool]] = [
        ("Images per class", (folder / "class_counts.csv").exists(),
         partial(class_counts_picture, folder / "class_counts.csv"), False),
        ("Recall or AUC by frequency", True,
         partial(per_class_picture, folder / "per_class.csv"), False),
        ("Confusion", (folder / "confusion.csv").exists(),
         partial(confusion_picture, folder / "confusion.csv"), True),
        ("Curves", any(halves), partial(curves_picture, *halves), False),
        ("Architecture weights", has_rows(folder / "alpha.csv"),
         partial(alpha_picture, folder / "alpha.csv"), False),
    ]  # fmt: skip
    sections = []
    for title, present, draw, narrow in pictures:
        if present:
            buffer = io.BytesIO()
            draw(buffer)
            sections.append(_section(title, _image(buffer.getvalue(), "image/png", title, narrow)))
    return sections


def _per_class(run: Run) -> str:
    rows = [
        (
            str(row["name"]),
            f"{row['train_images']:,}",
            "–" if pd.isna(row.get("test_images")) else f"{row['test_images']:,}",
            show(row[run.class_figure], percent=False),
        )
        for row in run.per_class.to_dict("records")
    ]
    head = ("class", "training images", "test images", run.class_figure.replace("auc", "AUC"))
    return f"<details><summary>Numbers per class</summary>\n{_table(head, rows)}\n</details>"


def _transfer(run: Run) -> list[str]:
    facts = [fact for fact in provenance(run.transfer) if fact[0] not in ("dataset", "folds")]
    return [f"<p>{escape(run.transferred())}</p>", *([_facts(facts)] if facts else [])]


def _costs(run: Run) -> str:
    def number(cost: dict, key: str, form: str) -> str:
        return form.format(cost[key]) if cost.get(key) is not None else "–"

    rows = [
        (
            name,
            duration(cost.get("seconds")),
            number(cost, "images_per_second", "{:,.0f}"),
            number(cost, "peak_memory_mb", "{:,.0f} MB"),
            number(cost, "latency_ms_per_image", "{:.2f} ms"),
            number(cost, "device", "{}"),
        )
        for name, cost in (("search", run.search_cost), ("fine-tuning", run.finetune_cost))
    ]
    head = ("stage", "time", "images/s", "peak memory", "latency per image", "device")
    return _table(head, rows)


def _provenance(run: Run) -> list[tuple[str, str]]:
    cost = run.finetune_cost or run.search_cost
    own = {
        "scale": run.finetune.get("scale"),
        "seed": run.finetune.get("seed"),
        "commit": run.finetune.get("commit"),
        "device": cost.get("device"),
        "threads": cost.get("threads"),
        "torch": cost.get("torch"),
    }
    facts = [(f"data: {key}", value) for key, value in provenance(run.data)]
    return facts + [(key, str(value)) for key, value in own.items() if value is not None]
