"""The card of a model: what it was made from, what it can do, and what it cannot."""

from __future__ import annotations

import re
from pathlib import Path

from ssnas.report.run import Run
from ssnas.report.template import template


def write_card(folder: Path, out: Path) -> None:
    """Write the card, in Markdown, of the model of the run whose figures are in `folder`.

    Raises:
        InputError: if a file that every run has is missing.
    """
    run = Run.read(folder)
    sizes = run.data.get("images") or {}
    height, width, channels = run.data.get("image_size") or (None, None, None)
    temperature = run.figures.get("temperature")
    text = template("card.md", autoescape=False, md=_escaped).render(
        run=run,
        sizes={split: f"{sizes.get(split, 0):,}" for split in ("train", "test")},
        image=f"{height} x {width} pixels, {'grey' if channels == 1 else 'colour'}",
        temperature=None if temperature is None else f"{temperature:.2f}",
        figure={"auc": "AUC", "recall": "recall"}[run.class_figure],
        latencies=[
            [
                batch,
                *(f"{run.export_cost[f'{n}_ms_at_batch_{batch}']:.2f}" for n in ("torch", "onnx")),
            ]
            for batch in (1, 64)
            if f"torch_ms_at_batch_{batch}" in run.export_cost
        ],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")


def _escaped(text: object) -> str:
    """Escape what Markdown would take for a table or markup."""
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", " ".join(str(text).split()))
