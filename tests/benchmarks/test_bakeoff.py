"""The bake-off in its quick form: two data sets, two seeds, and the page of its rows."""

import csv

import pytest

from benchmarks import bakeoff, bakeoff_page
from ssnas.report.papers.readme import END, START

pytestmark = pytest.mark.slow

QUICK = ["faces, ρ = 3", "digits-LT, ρ = 10"]
SYSTEMS = [name for name in bakeoff.SYSTEMS if name != "ResNet-18"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("bakeoff") / "rows.csv"
    arguments = ["run", "--out", str(out), "--tasks", *QUICK, "--systems", *SYSTEMS]
    bakeoff.main([*arguments, "--seeds", "0", "1", "--shares", "1", "--seconds", "1"])
    return out


def test_every_system_has_its_figures(results):
    rows = bakeoff.read(results)
    assert len(rows) == len(QUICK) * 2 * len(SYSTEMS)
    for row in rows:
        assert 0 <= float(row["balanced_accuracy"]) <= 1
        assert 0 <= float(row["macro_auc"]) <= 1
        assert float(row["log_loss"]) > 0
        assert row["commit"]
    by_system = {
        (row["data"], row["system"]): int(row["parameters"]) for row in rows if row["parameters"]
    }
    for data in QUICK:
        fixed, drawn = (
            by_system[data, name] for name in ("ours, fixed genotype", "random genotypes")
        )
        assert abs(fixed - drawn) < 0.2 * fixed


def test_rows_that_are_there_are_not_measured_again(results, monkeypatch):
    before = results.read_text()
    monkeypatch.setattr(bakeoff, "measure", lambda *arguments: pytest.fail("measured again"))
    arguments = ["run", "--out", str(results), "--tasks", QUICK[0], "--systems", SYSTEMS[0]]
    bakeoff.main([*arguments, "--seeds", "0", "1", "--shares", "1", "--seconds", "1"])
    assert results.read_text() == before


def test_data_without_images_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bakeoff, "RAW", tmp_path)
    assert bakeoff.available(["CIFAR-10-LT, ρ = 10", *QUICK]) == QUICK
    assert "CIFAR-10-LT, ρ = 10: left out" in capsys.readouterr().out


def test_the_page_has_a_table_for_each_data_set_and_a_plot(results, tmp_path):
    page, plot = tmp_path / "page.md", tmp_path / "plot.svg"
    page.write_text(f"before {START} old {END} after")
    arguments = ["page", "--results", str(results), "--page", str(page), "--plot", str(plot)]
    bakeoff.main(arguments)
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after")
    assert " old " not in text
    assert all(f"### {data}" in text for data in QUICK)
    assert "**ours, fixed genotype**" in text
    assert plot.stat().st_size > 10_000
    bakeoff.main(arguments)
    assert page.read_text() == text


@pytest.fixture
def made_up(tmp_path):
    """Ours is one point behind in every seed, or behind by chance."""
    rows = []
    for seed in range(3):
        for system, figure in (("ours", 0.9), ("better", 0.91), ("noisy", 0.86 + 0.05 * seed)):
            row = {"data": "d", "seed": seed, "system": system, "budget": 2.0, "seconds": 2}
            row |= {"balanced_accuracy": figure + 0.01 * seed, "macro_auc": "", "log_loss": 1.0}
            row |= {"parameters": 5, "latency_ms": "", "train_images": 4, "test_images": 6}
            rows.append({key: str(value) for key, value in row.items()})
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return bakeoff_page.Results(bakeoff.read(path), "ours")


def test_what_is_beyond_the_noise_is_said(made_up):
    assert "| d | balanced accuracy (%) | behind better |" in bakeoff_page.verdicts(made_up)
    table = bakeoff_page.tables(made_up)
    assert "**+1.0 ± 0.0**" in table
    assert "| noisy | 92.0 ± 6.0 | +1.0 ± 12.4 |" in table
    assert "| **ours** | 91.0 ± 1.0 | – | 1.000 | 5 | – | 2 |" in table
