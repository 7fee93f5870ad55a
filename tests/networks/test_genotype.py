"""The genotype: its text, its checks, and the derivation rules on tables with known answers."""

import numpy as np
import pytest
import torch

from ssnas.errors import InputError
from ssnas.networks.genotype import Edge, Genotype, derive
from ssnas.networks.operations import OPERATIONS
from ssnas.networks.space import EDGES

OPS = tuple(OPERATIONS)

SIGMOID_OPS = OPS[1:]
SKIPS = tuple(Edge(0, node, "skip_connect") for node in (2, 3, 4, 5))

TEXT = """\
{
  "normal": [
    {"from": 0, "to": 2, "op": "skip_connect"},
    {"from": 1, "to": 3, "op": "avg_pool_3x3"},
    {"from": 1, "to": 3, "op": "sep_conv_3x3"},
    {"from": 0, "to": 4, "op": "dil_conv_5x5"},
    {"from": 4, "to": 5, "op": "max_pool_3x3"}
  ],
  "reduce": [
    {"from": 1, "to": 2, "op": "sep_conv_5x5"},
    {"from": 2, "to": 3, "op": "dil_conv_3x3"},
    {"from": 3, "to": 4, "op": "skip_connect"},
    {"from": 0, "to": 5, "op": "skip_connect"}
  ]
}
"""
GENOTYPE = Genotype(
    normal=(
        Edge(4, 5, "max_pool_3x3"),
        Edge(0, 4, "dil_conv_5x5"),
        Edge(1, 3, "sep_conv_3x3"),
        Edge(1, 3, "avg_pool_3x3"),
        Edge(0, 2, "skip_connect"),
    ),
    reduce=(
        Edge(1, 2, "sep_conv_5x5"),
        Edge(2, 3, "dil_conv_3x3"),
        Edge(3, 4, "skip_connect"),
        Edge(0, 5, "skip_connect"),
    ),
)


def table(entries, ops=SIGMOID_OPS, background=0.0):
    """Weights (14, ops), `background` everywhere but at {(source, target): {op: weight}}."""
    weights = np.full((len(EDGES), len(ops)), background)
    for edge, row in entries.items():
        for op, weight in row.items():
            weights[EDGES.index(edge), ops.index(op)] = weight
    return weights


def derive_normal(weights, *args):
    return set(derive({"normal": weights, "reduce": weights}, *args).normal)


def test_edges_are_ordered_by_target_then_source():
    assert list(EDGES) == [
        *((0, 2), (1, 2)),
        *((0, 3), (1, 3), (2, 3)),
        *((0, 4), (1, 4), (2, 4), (3, 4)),
        *((0, 5), (1, 5), (2, 5), (3, 5), (4, 5)),
    ]


# Text and checks


def test_json_is_the_hand_written_text():
    assert GENOTYPE.to_json() == TEXT
    assert Genotype.from_json(TEXT) == GENOTYPE
    assert Genotype.from_json(GENOTYPE.to_json()).to_json() == TEXT


def test_order_of_edges_does_not_matter():
    turned = Genotype(GENOTYPE.normal[::-1], GENOTYPE.reduce[::-1])
    assert turned == GENOTYPE
    assert hash(turned) == hash(GENOTYPE)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ((*SKIPS, Edge(1, 2, "conv")), r"reduce cell: unknown op 'conv'; choose from max_pool_3x3"),
        ((*SKIPS, Edge(1, 2, "none")), r"reduce cell: unknown op 'none'"),
        ((*SKIPS, Edge(2, 2, "skip_connect")), r"reduce cell: no edge 2 -> 2; .* nodes 2\.\.5"),
        ((*SKIPS, Edge(3, 2, "skip_connect")), r"no edge 3 -> 2"),
        ((*SKIPS, Edge(0, 1, "skip_connect")), r"no edge 0 -> 1"),
        ((*SKIPS, Edge(0, 6, "skip_connect")), r"no edge 0 -> 6"),
        ((*SKIPS, Edge(-1, 2, "skip_connect")), r"no edge -1 -> 2"),
        ((*SKIPS, SKIPS[1]), r"reduce cell: an edge is listed twice with the same op"),
        (SKIPS[::2], r"reduce cell: nothing feeds node\(s\) \[3, 5\]"),
        ((), r"reduce cell: nothing feeds node\(s\) \[2, 3, 4, 5\]"),
    ],
)
def test_invalid_cells_are_refused(edges, message):
    with pytest.raises(InputError, match=message):
        Genotype(normal=SKIPS, reduce=edges)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'normal'"),
        ('{"normal": []}', "KeyError: 'reduce'"),
        ('{"normal": 3, "reduce": []}', "TypeError"),
        ('{"normal": [[0, 2, "skip_connect"]], "reduce": []}', "TypeError"),
        (TEXT.replace('"from": 4', '"source": 4'), "KeyError: 'from'"),
        (TEXT.replace('"from": 4', '"from": null'), "TypeError"),
        (TEXT.replace('"from": 4', '"from": "x"'), "Error: "),
        (TEXT.replace('"from": 4', '"from": 4.5'), "Error: "),
        (TEXT.replace('"from": 4', '"from": Infinity'), "Error: "),
    ],
)
def test_unreadable_text_is_refused(text, found):
    with pytest.raises(InputError, match="genotype: cannot be read") as error:
        Genotype.from_json(text)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_invalid_cell_in_text_is_refused():
    with pytest.raises(InputError, match="normal cell: no edge 5 -> 5"):
        Genotype.from_json(TEXT.replace('"from": 4', '"from": 5'))


# Derivation: argmax


def test_argmax_keeps_the_best_op_of_every_edge():
    normal = {edge: {"skip_connect": 0.2, "sep_conv_3x3": 0.3} for edge in EDGES}
    normal[0, 2] = {"max_pool_3x3": 0.9, "dil_conv_5x5": 0.8}
    normal[3, 5] = {"dil_conv_5x5": 0.1}
    reduce = {edge: {"avg_pool_3x3": -1.0} for edge in EDGES}
    genotype = derive({"normal": table(normal), "reduce": table(reduce, background=-2.0)}, "argmax")
    expected = {Edge(*edge, "sep_conv_3x3") for edge in EDGES if edge not in ((0, 2), (3, 5))}
    expected |= {Edge(0, 2, "max_pool_3x3"), Edge(3, 5, "dil_conv_5x5")}
    assert set(genotype.normal) == expected
    assert set(genotype.reduce) == {Edge(*edge, "avg_pool_3x3") for edge in EDGES}


def test_argmax_is_the_default():
    weights = table({edge: {"sep_conv_5x5": 1.0} for edge in EDGES})
    assert derive_normal(weights) == {Edge(*edge, "sep_conv_5x5") for edge in EDGES}


def test_argmax_leaves_out_edges_whose_best_op_is_none():
    rows = {edge: {"none": 0.6, "skip_connect": 0.4} for edge in EDGES}
    for node in (2, 3, 4, 5):
        rows[1, node] = {"none": 0.1, "dil_conv_3x3": 0.2}
    expected = {Edge(1, node, "dil_conv_3x3") for node in (2, 3, 4, 5)}
    assert derive_normal(table(rows, OPS), "argmax") == expected


def test_argmax_refuses_a_node_that_none_cuts_off():
    rows = {edge: {"none": 0.6 if edge[1] == 4 else 0.1, "skip_connect": 0.4} for edge in EDGES}
    with pytest.raises(InputError, match=r"normal cell: nothing feeds node\(s\) \[4\].*darts"):
        derive_normal(table(rows, OPS), "argmax")


# Derivation: darts


def test_darts_keeps_the_two_strongest_edges_of_each_node_and_ignores_none():
    rows = {
        **{edge: {"none": 0.9, "skip_connect": 0.1} for edge in EDGES},
        (0, 3): {"none": 0.99, "max_pool_3x3": 0.3, "sep_conv_3x3": 0.29},
        (2, 3): {"none": 0.0, "avg_pool_3x3": 0.2},
        (1, 4): {"sep_conv_5x5": 0.5, "dil_conv_3x3": 0.4},
        (3, 4): {"dil_conv_5x5": 0.3},
        (2, 5): {"skip_connect": 0.4},
        (4, 5): {"sep_conv_3x3": 0.5},
    }
    assert derive_normal(table(rows, OPS), "darts") == {
        Edge(0, 2, "skip_connect"),
        Edge(1, 2, "skip_connect"),
        Edge(0, 3, "max_pool_3x3"),
        Edge(2, 3, "avg_pool_3x3"),
        Edge(1, 4, "sep_conv_5x5"),  # and not its 0.4: an edge carries one op
        Edge(3, 4, "dil_conv_5x5"),
        Edge(2, 5, "skip_connect"),
        Edge(4, 5, "sep_conv_3x3"),
    }


# Derivation: threshold


def test_threshold_keeps_at_most_two_ops_above_it_and_falls_back_to_the_strongest():
    rows = {
        # Two ops of one edge are both kept, and beat a third above the threshold.
        (0, 2): {"sep_conv_3x3": 0.99, "skip_connect": 0.95},
        (1, 2): {"max_pool_3x3": 0.9},
        # One above: the second strongest stays out.
        (1, 3): {"dil_conv_3x3": 0.86},
        (2, 3): {"dil_conv_3x3": 0.84},
        # None above: the single strongest. The threshold itself is not above.
        (2, 4): {"avg_pool_3x3": 0.85},
        (3, 4): {"avg_pool_3x3": 0.85},
        # Two edges.
        (0, 5): {"sep_conv_5x5": 0.9},
        (4, 5): {"dil_conv_5x5": 0.9},
    }
    assert derive_normal(table(rows, background=0.5), "threshold", 0.85) == {
        Edge(0, 2, "sep_conv_3x3"),
        Edge(0, 2, "skip_connect"),
        Edge(1, 3, "dil_conv_3x3"),
        Edge(2, 4, "avg_pool_3x3"),
        Edge(0, 5, "sep_conv_5x5"),
        Edge(4, 5, "dil_conv_5x5"),
    }


@pytest.mark.parametrize(("threshold", "kept"), [(0.5, 8), (0.7, 4)])
def test_threshold_is_a_parameter(threshold, kept):
    rows = {(source, node): {"skip_connect": 0.6} for source in (0, 1) for node in (2, 3, 4, 5)}
    assert len(derive_normal(table(rows), "threshold", threshold)) == kept


def test_threshold_ignores_none():
    rows = {edge: {"none": 0.99, "skip_connect": 0.9} for edge in EDGES}
    expected = {Edge(s, node, "skip_connect") for s in (0, 1) for node in (2, 3, 4, 5)}
    assert derive_normal(table(rows, OPS), "threshold", 0.85) == expected


# Derivation: what the rules share


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("argmax", {Edge(*edge, "max_pool_3x3") for edge in EDGES}),
        ("darts", {Edge(s, node, "max_pool_3x3") for s in (0, 1) for node in (2, 3, 4, 5)}),
        (
            "threshold",
            {Edge(0, n, op) for n in (2, 3, 4, 5) for op in ("max_pool_3x3", "avg_pool_3x3")},
        ),
    ],
)
def test_ties_go_to_the_first(rule, expected):
    assert derive_normal(table({}, background=0.9), rule) == expected


@pytest.mark.parametrize("ops", [OPS, SIGMOID_OPS])
@pytest.mark.parametrize("rule", ["argmax", "darts", "threshold"])
def test_ops_are_the_last_columns(rule, ops):
    weights = np.zeros((len(EDGES), len(ops)))
    weights[:, -7] = 0.9
    assert {edge.op for edge in derive_normal(weights, rule)} == {"max_pool_3x3"}


def test_tensors_are_accepted():
    weights = torch.zeros(14, 7)
    weights[:, 3] = 1
    assert {edge.op for edge in derive_normal(weights)} == {"sep_conv_3x3"}


def test_unknown_rule():
    with pytest.raises(InputError, match=r"unknown rule 'best'; choose from argmax, darts, thresh"):
        derive_normal(table({}), "best")


@pytest.mark.parametrize("rule", ["argmax", "darts", "threshold"])
def test_nan_weights(rule):
    weights = {"normal": table({}), "reduce": table({(0, 2): {"skip_connect": np.nan}})}
    with pytest.raises(InputError, match="reduce cell's weights contain NaN"):
        derive(weights, rule)


@pytest.mark.parametrize("shape", [(13, 7), (14, 9), (14, 1), (14,), (7, 14), (2, 14, 7)])
def test_wrong_shapes(shape):
    with pytest.raises(InputError, match=r"reduce weights have shape .*accepted is \(14, 7 or 8\)"):
        derive({"normal": table({}), "reduce": np.zeros(shape)})
