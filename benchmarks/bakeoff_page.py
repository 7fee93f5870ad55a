"""The page of the bake-off: tables and a plot from its rows of figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssnas.report.papers.compare import Comparison, paired
from ssnas.report.style import ACCENT, DARK, save, styled

Row = Mapping[str, str]
NEGATIVE = re.compile(r"^(\*\*)?-")
FIGURES = {"balanced_accuracy": ("balanced accuracy (%)", 100, 1), "macro_auc": ("AUC", 1, 3)}


class Results:
    """Rows of figures, by data set, budget and system.

    Args:
        rows: as `benchmarks.bakeoff` writes them.
        reference: the system that the others are compared with.
    """

    def __init__(self, rows: Sequence[Row], reference: str) -> None:
        self.rows, self.reference = rows, reference
        self.data = list(dict.fromkeys(row["data"] for row in rows))

    def budgets(self, data: str) -> list[float]:
        """The seconds that systems had on a data set, from the shortest."""
        return sorted({float(row["budget"]) for row in self.rows if row["data"] == data})

    def systems(self, data: str, budget: float) -> list[str]:
        """The systems that were run, in the order of the file."""
        return list(dict.fromkeys(row["system"] for row in self._of(data, budget)))

    def by_seed(self, data: str, budget: float, system: str, key: str) -> dict[int, float]:
        """A figure of a system by seed; empty where it is not defined."""
        return {
            int(row["seed"]): float(row[key])
            for row in self._of(data, budget)
            if row["system"] == system and row[key] not in ("", "nan")
        }

    def compared(self, data: str, budget: float, system: str, key: str) -> Comparison | None:
        """The system's figure less the reference's, over their common seeds."""
        ours = self.by_seed(data, budget, self.reference, key)
        return paired(ours, self.by_seed(data, budget, system, key))

    def _of(self, data: str, budget: float) -> list[Row]:
        return [row for row in self.rows if row["data"] == data and float(row["budget"]) == budget]


def tables(results: Results) -> str:
    """Write one Markdown table a data set, at its largest budget."""
    parts = []
    for data in results.data:
        budget = results.budgets(data)[-1]
        systems = results.systems(data, budget)
        some = next(row for row in results.rows if row["data"] == data)
        keys = [
            key
            for key in FIGURES
            if any(results.by_seed(data, budget, system, key) for system in systems)
        ]
        head = ["system", *(cell for key in keys for cell in (FIGURES[key][0], "less ours"))]
        head += ["log-loss", "parameters", "ms an image", "seconds"]
        lines = [_line(head), _line(["---"] * len(head))]
        lines += [_line(_cells(results, data, budget, system, keys)) for system in systems]
        about = (
            f"{some['train_images']} training and {some['test_images']} test images, "
            f"{budget:g} s of training, {_seeds(results, data, budget)}."
        )
        parts.append(f"### {data}\n\n{about}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _seeds(results: Results, data: str, budget: float) -> str:
    counts = {
        len(results.by_seed(data, budget, system, "macro_auc"))
        for system in results.systems(data, budget)
    }
    low, high = min(counts), max(counts)
    return f"{high} seeds" if low == high else f"{low} to {high} seeds"


def _cells(
    results: Results, data: str, budget: float, system: str, keys: Sequence[str]
) -> list[str]:
    cells = [f"**{system}**" if system == results.reference else system]
    for key in keys:
        _, factor, decimals = FIGURES[key]
        values = [factor * v for v in results.by_seed(data, budget, system, key).values()]
        cells.append(mean_std(values, decimals))
        compared = results.compared(data, budget, system, key)
        if system == results.reference or compared is None:
            cells.append("–")
        else:
            scaled = Comparison(factor * compared.mean, factor * compared.half_width, compared.n)
            text = f"{scaled.mean:+.{decimals}f} ± {scaled.half_width:.{decimals}f}"
            cells.append(f"**{text}**" if scaled.beyond_noise else text)
    for key, decimals in (("log_loss", 3), ("parameters", 0), ("latency_ms", 2), ("seconds", 0)):
        values = list(results.by_seed(data, budget, system, key).values())
        cells.append(f"{statistics.fmean(values):,.{decimals}f}" if values else "–")
    return [NEGATIVE.sub(lambda match: (match[1] or "") + "−", cell) for cell in cells]


def mean_std(values: Sequence[float], decimals: int) -> str:
    """Write mean ± sample standard deviation.

    >>> mean_std([1.0, 3.0], 1), mean_std([2.0], 1), mean_std([], 1)
    ('2.0 ± 1.4', '2.0', '–')
    """
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def verdicts(results: Results) -> str:
    """Say for each data set and figure whether the reference is first, or within its noise."""
    lines = []
    for data in results.data:
        budget = results.budgets(data)[-1]
        for key, (title, factor, decimals) in FIGURES.items():
            better = []
            for system in results.systems(data, budget):
                compared = results.compared(data, budget, system, key)
                if system != results.reference and compared and compared.mean > 0:
                    better.append((compared, system))
            beyond = [system for compared, system in better if compared.beyond_noise]
            if not results.by_seed(data, budget, results.reference, key):
                continue
            verdict = "first"
            if beyond:
                verdict = f"behind {', '.join(beyond)}"
            elif better:
                best, name = max(better, key=lambda pair: pair[0].mean)
                gap = f"{factor * best.mean:.{decimals}f}"
                verdict = f"within the noise of the first ({name}, {gap} above)"
            lines.append(_line([data, title, verdict]))
    return "\n".join([_line(["data", "figure", "ours"]), _line(["---"] * 3), *lines])


def plot(results: Results, path: Path) -> None:
    """Draw the mean figure of each system with its deviation over the seeds, a panel a data set.

    A system has a dot for each budget, in small for the shorter ones.
    """
    columns = 2
    rows = -(-len(results.data) // columns)
    systems = list(dict.fromkeys(row["system"] for row in results.rows))[::-1]
    with styled():
        figure = Figure(figsize=(9.5, 0.27 * (len(systems) + 2) * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for panel in panels[len(results.data) :]:
            panel.axis("off")
        for panel, data in zip(panels, results.data, strict=False):
            _draw_panel(panel, results, data, systems)
        save(figure, path, "svg")


def _draw_panel(panel: Axes, results: Results, data: str, systems: Sequence[str]) -> None:
    key = "balanced_accuracy" if "Chest" not in data else "macro_auc"
    title, factor, _ = FIGURES[key]
    budgets = results.budgets(data)
    for place, system in enumerate(systems):
        for budget in budgets:
            values = [factor * v for v in results.by_seed(data, budget, system, key).values()]
            if not values:
                continue
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            panel.errorbar(
                statistics.fmean(values),
                place,
                xerr=spread,
                color=ACCENT if system == results.reference else DARK,
                marker="o",
                ms=6 if budget == budgets[-1] else 3,
                capsize=2,
            )
    panel.set_yticks(range(len(systems)), systems)
    panel.set_title(f"{data}, {budgets[-1]:g} s")
    panel.set_xlabel(title)
    panel.grid(True, axis="x")
