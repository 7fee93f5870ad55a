"""The report page: whole, self-contained, escaped and reproducible."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from ssnas.report.page import write_html
from tests.report.runs import NASTY, write_run


class Page(HTMLParser):
    """Texts, attributes and balance of an HTML page."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.texts, self.links, self.tags, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.slow
def test_report_is_whole_self_contained_escaped_and_reproducible(run_folder, tmp_path):
    out = tmp_path / "deep" / "report.html"
    write_html(run_folder, run_folder / "genotype.svg", out)
    write_html(run_folder, run_folder / "genotype.svg", tmp_path / "again.html")
    assert out.read_bytes() == (tmp_path / "again.html").read_bytes()
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"b", "script", "link"} & set(page.tags)
    assert NASTY in page.texts  # the class name, read back by a parser
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert all(link.startswith("data:image/") for link in page.links)
    assert page.tags.count("img") == 6
    for expected in ("12.34 %", "43.21 %", "90.12 %", "c0ffee1", "2.9.9", "0123456789abcdef" * 4):
        assert expected in page.texts, expected
    embedded = [base64.b64decode(link.split(",", 1)[1]) for link in page.links]
    assert embedded[0] == (run_folder / "genotype.svg").read_bytes()
    for content in embedded[1:]:
        with Image.open(io.BytesIO(content)) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # not blank


def test_report_of_multi_label_data_leaves_out_what_was_not_run(tmp_path):
    write_run(tmp_path, multi_label=True)
    for name in ("search.csv", "alpha.csv", "transfer.json", "search.cost.json"):
        (tmp_path / name).unlink()
    write_html(tmp_path, tmp_path / "genotype.svg", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == 4  # cells, counts, per label, fine-tuning curves
    assert "binary accuracy" in page.texts
    assert "0.876" in page.texts
    assert page.texts.count("not run") == 2  # the transfer and the time of the search


def test_report_of_a_run_without_epochs_has_no_curves(tmp_path):
    write_run(tmp_path, multi_label=True)
    for name in ("search.csv", "finetune.csv", "alpha.csv"):
        (tmp_path / name).write_text("\n", encoding="utf-8")
    write_html(tmp_path, tmp_path / "genotype.svg", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == 3  # cells, counts, per label
