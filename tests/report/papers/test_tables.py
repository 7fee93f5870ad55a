"""The papers' tables from made-up runs, the comparison of systems, and their page."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from scipy.stats import ttest_1samp

from ssnas.config.load import read_yaml
from ssnas.config.systems import SYSTEMS
from ssnas.errors import InputError
from ssnas.report.papers.compare import Comparison, paired
from ssnas.report.papers.declared import TABLES, read_tables
from ssnas.report.papers.readme import replace_block, results
from ssnas.report.papers.records import Records
from ssnas.report.papers.tables import compact, plus_minus, table_cells, write_table, write_tables
from stages.readme import readme

ERRORS = {"ours": {0: 0.10, 1: 0.12, 2: 0.11}, "plain": {0: 0.20, 1: 0.24}}
DECLARED = {
    "t1": {
        "title": "T1: toys",
        "figures": ["error_rate", "macro_auc"],
        "ours": "ours",
        "rows": [
            {"method": "ours", "system": "ours", "reported": {"error_rate": 10.91}},
            {"method": "plain", "system": "plain"},
            {"method": "net", "kind": "baselines", "system": "net", "source": "a paper"},
            {"method": "quoted", "reported": {"error_rate": 9.5, "parameters": 0.81}},
            {"method": "constant", "system": "ours", "prefix": "constant_"},
        ],
    },
    "t3": {
        "title": "T3: folds",
        "figures": ["accuracy"],
        "rows": [{"method": "moved", "kind": "transfers", "system": "moved", "ours": "moved"}],
    },
}


def write(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def rows_document():
    """Three seeds of each system, and one transfer, at two scales."""
    document = {kind: {} for kind in ("datasets", "searches", "rows", "baselines", "transfers")}

    def add(kind, name, scale, system, seed=0, **entry):
        identity = {"name": name, "system": system, "scale": scale, "seed": seed}
        document[kind][f"{scale}-{name}"] = identity | entry

    for scale in ("small", "paper"):
        add("datasets", "toys", scale, "toys", dataset="digits")
        add("searches", "find", scale, "find", dataset="toys")
        for seed in range(3):
            for system in ("ours", "plain"):
                add("rows", f"{system}-{seed}", scale, system, seed, search="find")
            add("baselines", f"net-{seed}", scale, "net", seed, dataset="toys")
        add("transfers", "moved", scale, "moved", row="ours-0", size=28)
    return document


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder: at scale small, ours ran on three seeds, plain on two, net on none."""
    monkeypatch.chdir(tmp_path)
    small = Path("papers/metrics/small")
    for system, errors in ERRORS.items():
        for seed, error in errors.items():
            folder = small / "rows" / f"{system}-{seed}"
            figures = {"error_rate": error, "macro_auc": 0.75, "constant_error_rate": 0.9}
            write(folder / "evaluate.json", figures)
            write(folder / "finetune.json", {"parameters": 56346, "multiply_adds": 10947840})
            cost = {"seconds": 100 + 10 * seed, "device": "abacus", "threads": 1}
            write(folder / "finetune.cost.json", cost)
    write(small / "searches/find/search.cost.json", {"seconds": 1316.7})
    data = {"source": "toys", "note": "drawn", "images": {"train": 1916}, "image_size": [8, 8, 3]}
    write(small / "datasets/toys/data.json", data)
    figures = {"accuracy": 0.8, "accuracy_std": 0.05, "folds": 5, "image_size": 28}
    write(small / "transfers/moved/transfer.json", figures)
    Path("papers").mkdir(exist_ok=True)
    Path("papers/rows.yaml").write_text(
        yaml.safe_dump(rows_document(), sort_keys=False), encoding="utf-8"
    )
    declare(DECLARED)
    return tmp_path


def declare(tables):
    TABLES.write_text(yaml.safe_dump(tables, sort_keys=False), encoding="utf-8")


def read():
    records = Records.read()
    return read_tables(TABLES, records), records


def cells(table="t1", scale="small"):
    """Rows of a table by method."""
    tables, records = read()
    return {row["method"]: row for row in table_cells(tables[table], scale, records)}


# --- the comparison


def test_paired_interval_is_that_of_the_t_test():
    ours, other = {0: 1.0, 1: 2.0, 2: 4.0, 7: 9.0}, {2: 4.5, 1: 3.0, 0: 1.2, 5: 0.0}
    comparison = paired(ours, other)
    low, high = ttest_1samp([0.2, 1.0, 0.5], 0).confidence_interval(0.95)
    assert comparison.n == 3
    assert comparison.mean - comparison.half_width == pytest.approx(low)
    assert comparison.mean + comparison.half_width == pytest.approx(high)


def test_paired_of_two_seeds_by_hand():
    """Differences 1 and 3: s = √2, so the half width is t_{0.975, 1} = 12.7062."""
    comparison = paired({0: 0.0, 1: 0.0}, {0: 1.0, 1: 3.0})
    assert comparison.mean == 2
    assert comparison.half_width == pytest.approx(12.7062, abs=1e-4)


def test_one_common_seed_says_nothing_of_the_noise():
    comparison = paired({0: 1.0, 1: 2.0}, {1: 502.0, 7: 3.0})
    assert (comparison.mean, comparison.n) == (500, 1)
    assert not comparison.beyond_noise


def test_no_common_seed_compares_nothing():
    assert paired({0: 1.0, 1: 2.0}, {2: 3.0}) is None


@pytest.mark.parametrize(
    ("comparison", "text"),
    [
        (Comparison(-2.357, 1.1, 5), "−2.36 ± 1.10 (beyond the noise, n = 5)"),
        (Comparison(0.12, 0.9, 5), "+0.12 ± 0.90 (within the noise, n = 5)"),
        (Comparison(0.0, 0.0, 2), "+0.00 ± 0.00 (within the noise, n = 2)"),
        (Comparison(2.7, math.inf, 1), "+2.70 (noise unknown, n = 1)"),
    ],
)
def test_comparison_in_words(comparison, text):
    assert comparison.text() == text


# --- cells


def test_cells_of_systems_that_ran(project):
    rows = cells()
    ours, plain = rows["ours"], rows["plain"]
    assert ours["error (%)"] == "11.00 ± 1.00 (3)"
    assert ours["error (%), reported"] == "10.91"
    assert ours["macro AUC"] == "0.750 ± 0.000 (3)"
    assert ours["parameters (M)"] == "0.056"
    assert ours["parameters (M), reported"] == "–"
    assert ours["multiply-adds (M)"] == "10.9"
    assert (ours["seeds"], plain["seeds"]) == ("3 of 3", "2 of 3")
    assert (ours["search (s)"], ours["training (s)"]) == ("1317", "110")
    assert ours["data"] == "toys (drawn; 1,916 training images; 8 × 8 pixels)"
    assert ours["device"] == "abacus, 1 thread"
    assert plain["error (%), reported"] == "–"
    assert rows["net"]["source"] == "a paper"


def test_difference_is_paired_by_seed_in_percentage_points(project):
    """Over seeds 0 and 1 the differences are 10 and 12: 11 ± 12.7062."""
    rows = cells()
    column = "error (%), difference to ours"
    assert rows["plain"][column] == "+11.00 ± 12.71 (within the noise, n = 2)"
    assert rows["ours"][column] == "–"
    assert rows["constant"][column].endswith("(beyond the noise, n = 3)")


def test_one_common_seed_or_none_is_said(project):
    column = "error (%), difference to ours"
    Path("papers/metrics/small/rows/plain-0/evaluate.json").unlink()
    assert cells()["plain"][column] == "+12.00 (noise unknown, n = 1)"
    Path("papers/metrics/small/rows/ours-1/evaluate.json").unlink()
    assert cells()["plain"][column] == "no common seed"


def test_what_ran_is_compared_with_nothing_where_ours_has_not_run(project):
    for seed in range(3):
        Path(f"papers/metrics/small/rows/ours-{seed}/evaluate.json").unlink()
    rows = cells()
    assert rows["plain"]["error (%), difference to ours"] == "ours: not run"
    assert rows["ours"]["error (%), difference to ours"] == "not run"


@pytest.mark.parametrize(("method", "scale"), [("net", "small"), ("ours", "paper")])
def test_a_system_that_has_not_run_borrows_nothing(project, method, scale):
    """Neither its data set's and search's figures, nor those of the other scale."""
    row = cells(scale=scale)[method]
    named = {"method", "system", "seeds", "scale", "source", "note"}
    measured = {k: v for k, v in row.items() if k not in named and "reported" not in k}
    assert set(measured.values()) == {"not run"}
    assert row["seeds"] == "0 of 3"


def test_a_row_without_a_system_is_only_quoted(project):
    row = cells()["quoted"]
    assert row["error (%), reported"] == "9.50"
    assert row["parameters (M), reported"] == "0.81"
    assert row["error (%)"] == row["seeds"] == row["device"] == "reported only"


def test_a_reference_predictor_has_no_network(project):
    row = cells()["constant"]
    assert row["error (%)"] == "90.00 ± 0.00 (3)"
    assert row["macro AUC"] == "not recorded"
    assert row["parameters (M)"] == row["training (s)"] == row["device"] == "–"
    assert row["seeds"] == "3 of 3"


def test_data_and_devices_that_differ_between_seeds_are_all_named(project):
    folder = Path("papers/metrics/small/rows")
    write(folder / "ours-1/finetune.cost.json", {"device": "slate", "threads": 2})
    write(folder / "plain-0/finetune.cost.json", {"device": "slate", "threads": 2})
    assert cells()["ours"]["device"] == "abacus, 1 thread + slate, 2 threads"
    tables, records = read()
    write_tables(tables, records, Path("papers/tables"))
    text = results(tables, records.scales, Path("papers/tables"))
    assert "Device: abacus, 1 thread; slate, 2 threads." in text


def test_parameters_that_differ_between_seeds_show_it(project):
    write(Path("papers/metrics/small/rows/ours-1/finetune.json"), {"parameters": 58346})
    assert cells()["ours"]["parameters (M)"] == "0.057 ± 0.001 (3)"


def test_cross_validated_figures_are_over_folds(project):
    row = cells("t3")["moved"]
    assert row["accuracy (%), over folds"] == "80.00 ± 5.00 (5)"
    assert row["image size"] == "28"
    assert row["search (s)"] == "1317"
    assert row["training (s)"] == "not recorded"


def test_folds_of_two_seeds_are_pooled(project):
    """Folds 1, 3 (mean 2, s = √2) and 5, 7: together mean 4 and s = √(20/3)."""
    document = rows_document()
    document["transfers"]["small-moved-1"] = document["transfers"]["small-moved"] | {
        "name": "moved-1",
        "seed": 1,
    }
    Path("papers/rows.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    for name, mean in (("moved", 2), ("moved-1", 6)):
        figures = {"accuracy": mean, "accuracy_std": math.sqrt(2), "folds": 2}
        write(Path(f"papers/metrics/small/transfers/{name}/transfer.json"), figures)
    expected = f"400.00 ± {100 * math.sqrt(20 / 3):.2f} (4)"
    assert cells("t3")["moved"]["accuracy (%), over folds"] == expected


@pytest.mark.parametrize(
    "content",
    [b"{", b"[1]", b"\xff\xfe", b'{"error_rate": "low"}', b'{"error_rate": NaN}'],
    ids=["truncated", "a list", "binary", "text", "NaN"],
)
def test_a_malformed_file_costs_only_its_own_row_its_figures(project, caplog, content):
    path = Path("papers/metrics/small/rows/plain-1/evaluate.json")
    path.write_bytes(content)
    rows = cells()
    assert rows["plain"]["error (%)"] == "unreadable"
    assert rows["plain"]["parameters (M)"] == "0.056"
    assert rows["ours"]["error (%)"] == "11.00 ± 1.00 (3)"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == 1
    assert str(path) in messages[0]


# --- tables.yaml


def changed(part, **changes):
    """The declared tables with keys of table t1, or of one of its rows, changed."""
    tables = json.loads(json.dumps(DECLARED))
    (tables["t1"] if part is None else tables["t1"]["rows"][part]).update(changes)
    return tables


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (changed(0, system="oars"), ["t1.rows.0.system", "'oars'", "ours, plain"]),
        (changed(0, kind="row"), ["t1.rows.0.kind", "'row'", "baselines"]),
        (changed(None, figures=["eror"]), ["t1.figures", "'eror'", "error_rate"]),
        (changed(0, reported={"accuracy": 1.0}), ["'accuracy'", "error_rate, macro_auc, param"]),
        (changed(0, reported={"error_rate": "low"}), ["reported.error_rate", "'low'", "number"]),
        (changed(0, prefix="best_"), ["t1.rows.0.prefix", "'best_'", "constant_, linear_"]),
        (changed(0, sistem="ours"), ["t1.rows.0.sistem", "unknown key", "system"]),
        (changed(None, ours="moved"), ["t1.ours", "'moved'", "ours, plain, net"]),
        (changed(None, rows=[]), ["t1.rows", "[]"]),
        (changed(None, rows=["ours"]), ["t1.rows.0", "'ours'", "mapping"]),
        (changed(1, kind="transfers", system="moved"), ["t1.rows", "cross-validated"]),
        ({"t1": {"figures": ["accuracy"], "rows": [{"method": "x"}]}}, ["'title'", "missing"]),
        ({"t1": {"title": "x", "figures": ["accuracy"], "rows": [{}]}}, ["'method'", "missing"]),
    ],
)
def test_a_wrong_declaration_is_named_with_the_choices(project, tables, words):
    declare(tables)
    with pytest.raises(InputError) as raised:
        read()
    for word in ("papers/tables.yaml", *words):
        assert word in str(raised.value)


def test_an_entry_without_a_system_is_named(project):
    document = rows_document()
    del document["rows"]["small-ours-0"]["system"]
    with pytest.raises(InputError, match=r"rows\.small-ours-0: the key 'system' is missing"):
        Records(document, Path())


def test_every_system_stands_in_a_table_and_the_other_way_round(tmp_path, monkeypatch):
    """Nothing else is read of the entries than papers/systems.yaml, which they are made from."""
    shutil.copytree(Path(__file__).parents[3] / "papers", tmp_path / "papers")
    monkeypatch.chdir(tmp_path)
    tables, _ = read()
    shown = {(r.kind, r.system) for table in tables.values() for r in table.rows if r.system}
    systems = read_yaml(SYSTEMS)
    kinds = ("rows", "baselines", "transfers", "crossvalidations")
    assert shown == {(kind, system) for kind in kinds for system in systems[kind]}


def test_the_papers_tables_quote_what_the_papers_print():
    """Every reported number names its source; every comparison is with a row of the table."""
    tables = yaml.safe_load((Path(__file__).parents[3] / TABLES).read_text(encoding="utf-8"))
    rows = [row for table in tables.values() for row in table["rows"]]
    assert all("source" in row for row in rows if row.get("reported"))
    assert all(row.get("reported") for row in rows if "system" not in row)


# --- the files and the page of results


def test_table_cells(tmp_path):
    rows = [{"method": "a|b", "error": "1.0"}, {"method": "paper\nonly", "error": "not run"}]
    write_table(rows, tmp_path / "v1.5", "A heading")
    with (tmp_path / "v1.5.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == rows
    assert (tmp_path / "v1.5.md").read_text(encoding="utf-8") == (
        "A heading\n\n"
        "| method     | error   |\n"
        "| ---------- | ------- |\n"
        "| a\\|b       | 1.0     |\n"
        "| paper only | not run |\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((10.914, 0.126, 3), "10.91 ± 0.13 (3)"),
        ((10.914, 0.126, 3, 1), "10.9 ± 0.1 (3)"),
        ((10.914, 0.0, 1), "10.91 (1)"),
        ((10.914, None, 2), "10.91 (2)"),
    ],
)
def test_plus_minus(arguments, text):
    assert plus_minus(*arguments) == text


def test_files_and_print_of_the_scales_that_have_results(project):
    tables, records = read()
    text = write_tables(tables, records, Path("papers/tables"))
    assert "T1: toys, scale small" in text
    assert "scale paper" not in text
    for scale in ("small", "paper"):
        for table in ("t1", "t3"):
            with Path(f"papers/tables/{scale}/{table}.csv").open(encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            assert rows == table_cells(tables[table], scale, records)
            markdown = Path(f"papers/tables/{scale}/{table}.md").read_text(encoding="utf-8")
            assert markdown.startswith(f"**{tables[table].title}**, scale `{scale}`\n\n| method")


def lines_of(markdown):
    """The cells of a Markdown table's lines, the rule left out."""
    lines = [line.strip("|").split("|") for line in markdown.splitlines()]
    return [[cell.strip() for cell in line] for line in (lines[0], *lines[2:])]


def test_compact_form_keeps_figures_and_drops_how_they_came_about(project):
    lines = lines_of(compact(list(cells().values())))
    assert lines[0] == [
        "method",
        "parameters (M)",
        "parameters (M), reported",
        "error (%)",
        "error (%), reported",
        "macro AUC",
        "error (%), difference to ours",
    ]
    assert ["net", "not run", "–", "not run", "–", "not run", "not run"] in lines
    only = "reported only"
    assert ["quoted", only, "0.81", only, "9.50", only, only] in lines


def test_compact_form_shows_the_image_size_where_rows_differ_in_it(project):
    for system, size in (("ours", 28), ("plain", 64)):
        write(Path(f"papers/metrics/small/rows/{system}-0/finetune.json"), {"image_size": size})
    lines = lines_of(compact(list(cells().values())))
    place = lines[0].index("image size")
    sizes = {line[0]: line[place] for line in lines}
    assert (sizes["ours"], sizes["plain"], sizes["net"]) == ("28", "64", "not run")


def test_results_show_what_ran_and_say_what_did_not(project):
    tables = changed(2, note="not ours")
    tables["t1"]["note"] = "Toys"
    declare(tables)
    for scale in ("small", "paper"):
        write(Path(f"papers/metrics/{scale}/transfers/moved/transfer.json"), {"accuracy": 0.5})
    Path("papers/metrics/small/transfers/moved/transfer.json").unlink()
    tables, records = read()
    write_tables(tables, records, Path("papers/tables"))
    text = results(tables, records.scales, Path("papers/tables"))
    assert text.count("**T1: toys**") == 1
    assert (
        "Data: toys (drawn; 1,916 training images; 8 × 8 pixels). Scale: `small`. "
        "Device: abacus, 1 thread. Seconds a seed: search 1,317, training 105 to 110. "
        "Not run: 1 of 4 rows.\n- Toys.\n- net: not ours."
    ) in text
    assert text.endswith("Not run at scale `small`: T3. Not run at scale `paper`: T1.")


def test_a_scale_without_results_is_said_in_one_word(project):
    tables, records = read()
    write_tables(tables, records, Path("papers/tables"))
    text = results(tables, records.scales, Path("papers/tables"))
    assert text.endswith("Not run at scale `paper`: all.")


def test_results_need_the_tables(project):
    tables, records = read()
    with pytest.raises(InputError, match=r"t1\.csv: no such file; make it with"):
        results(tables, records.scales, Path("papers/tables"))


def test_block_is_replaced_and_the_rest_kept():
    text = "before\n<!-- results -->\nold\n<!-- /results -->\nafter\n"
    new = replace_block(text, "new")
    assert new == "before\n<!-- results -->\nnew\n<!-- /results -->\nafter\n"
    assert replace_block(new, "new") == new


@pytest.mark.parametrize(
    "text",
    ["", "<!-- results -->", "<!-- /results --><!-- results -->", 2 * "<!-- results -->"],
)
def test_block_needs_its_markers(text):
    with pytest.raises(InputError, match="markers"):
        replace_block(text, "new")


def test_check_fails_until_the_page_is_up_to_date(project):
    tables, records = read()
    write_tables(tables, records, Path("papers/tables"))
    page = Path("docs/results.md")
    page.parent.mkdir()
    page.write_text("# x\n<!-- results -->\n<!-- /results -->\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="not up to date"):
        readme(check=True)
    assert "11.00" not in page.read_text(encoding="utf-8")
    readme(check=False)
    assert "11.00 ± 1.00 (3)" in page.read_text(encoding="utf-8")
    readme(check=True)
