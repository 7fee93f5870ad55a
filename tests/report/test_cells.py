"""The drawing of the cells."""

import re
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from ssnas.networks.operations import OPERATIONS
from ssnas.report.cells import HALF_SIZE, PANEL, PLACES, WIDTH, arrange, draw_genotype
from ssnas.report.style import KINDS, op_style
from tests.report.runs import ARGMAX, GENOTYPES, THRESHOLD

OPS = tuple(OPERATIONS)


@pytest.mark.parametrize("cell", ["normal", "reduce"])
@pytest.mark.parametrize("genotype", GENOTYPES.values(), ids=GENOTYPES)
def test_labels_of_a_cell_overlap_neither_each_other_nor_a_state(genotype, cell):
    edges = getattr(genotype, cell)
    labels = [arrow for arrow in arrange(edges) if arrow.op is not None]
    assert [(label.source, label.target, label.op) for label in labels] == list(edges)
    boxes = [(label.label_place, label.label_size) for label in labels]
    for place, size in boxes:
        assert (place - size >= 0).all()
        assert (place + size <= (WIDTH, PANEL)).all()
    states = list(zip(PLACES, HALF_SIZE, strict=True))
    pairs = [*combinations(boxes, 2), *((box, state) for box in boxes for state in states)]
    for (place, size), (other, other_size) in pairs:
        assert (np.abs(place - other) >= size + other_size).any()


def test_two_ops_on_one_edge_take_two_ways():
    bends = {}
    for arrow in arrange(THRESHOLD.normal):
        bends.setdefault((arrow.source, arrow.target), []).append(arrow.bend)
    doubled = [pair for pair in bends.values() if len(pair) == 2]
    assert len(doubled) == 4
    assert all(abs(a - b) > 0.15 for a, b in doubled)


def test_drawing_shows_every_op_and_state_and_is_reproducible(tmp_path):
    files = [(tmp_path / f"{i}.png", tmp_path / f"{i}.svg") for i in range(2)]
    for png, svg in files:
        draw_genotype(ARGMAX, png, svg)
    assert files[0][0].read_bytes() == files[1][0].read_bytes()
    assert files[0][1].read_bytes() == files[1][1].read_bytes()
    words = re.findall(r"<text[^>]*>([^<]+)</text>", files[0][1].read_text(encoding="utf-8"))
    for op in OPS[1:]:
        expected = sum(edge.op == op for edge in (*ARGMAX.normal, *ARGMAX.reduce))
        assert words.count(op) == expected
    for state in ("cₖ₋₂", "cₖ₋₁", "cₖ", "0", "1", "2", "3"):
        assert words.count(state) == 2
    assert {"Normal cell", "Reduction cell", "pooling"} <= set(words)
    with Image.open(files[0][0]) as image:
        assert image.width == 1800
        assert "Software" not in image.info


def test_every_op_of_the_space_has_a_style():
    styles = [op_style(op) for op in OPS]
    assert len(set(styles)) == len(OPS)
    assert {kind for kind, _ in styles} == set(KINDS) - {"other operation"}
    assert op_style("sep_conv_7x7") not in styles
    assert op_style("sep_conv_7x7")[0] == "separable convolution"
    assert op_style("attention")[0] in KINDS


@pytest.mark.parametrize("colour", KINDS.values(), ids=KINDS)
def test_white_text_on_an_op_colour_is_readable(colour):
    """Contrast ratio of WCAG 2.1, 1.4.3; "none" never stands in a genotype, large text there."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    ratio = 1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05)
    assert ratio >= (3 if colour == KINDS["none"] else 4.5)
