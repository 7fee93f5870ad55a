"""The DARTS search space as data (Liu, Simonyan, Yang 2019, *DARTS*, arXiv 1806.09055).

A cell reads the outputs of the two cells before it (states 0 and 1), computes four nodes
(states 2 to 5) and returns their concatenation. Every pair (earlier state, node) is an edge, and
every edge carries one or more of the operations of `networks.operations`.
"""

NUM_INPUTS = 2
NUM_NODES = 4
NUM_STATES = NUM_INPUTS + NUM_NODES
CELL_KINDS = ("normal", "reduce")

EDGES = tuple(
    (source, target) for target in range(NUM_INPUTS, NUM_STATES) for source in range(target)
)
"""All (source state, target state) pairs, ordered by target and then by source: 14 edges."""


def reduction_positions(num_cells: int) -> tuple[int, ...]:
    """Compute the indices of the reduction cells: ⌊L/3⌋ and ⌊2L/3⌋ of L cells.

    Example:
        >>> reduction_positions(3), reduction_positions(20)
        ((1, 2), (6, 13))
    """
    return tuple(sorted({num_cells // 3, 2 * num_cells // 3}))


def cell_kinds(num_cells: int) -> tuple[str, ...]:
    """Name the kind of each of `num_cells` cells, from the stem to the head.

    Example:
        >>> cell_kinds(3)
        ('normal', 'reduce', 'reduce')
    """
    positions = reduction_positions(num_cells)
    return tuple("reduce" if index in positions else "normal" for index in range(num_cells))
