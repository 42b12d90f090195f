"""layout.py: small layouts against places worked by hand.

Shapes: K tasks, D elements in weights of linear layers.
"""

import pytest

from kernels.layout import MATRIX, WORDS, ParamRow, make_layout

ENCODER_ROWS = [  # not in the order of the buffer
    ParamRow("encoder.layer.0.dense.weight", (2, 3), True, MATRIX),
    ParamRow("encoder.layer.0.dense.bias", (2,), False),
    ParamRow("embeddings.position.weight", (4, 3), True),
    ParamRow("embeddings.word.weight", (5, 3), True, WORDS),
    ParamRow("embeddings.norm.weight", (3,), False),
    ParamRow("encoder.layer.10.dense.weight", (4, 2), True, MATRIX),
    ParamRow("encoder.layer.10.dense.bias", (4,), False),
]
HEAD_ROWS = {
    "first": [ParamRow("bias", (2,), False), ParamRow("weight", (2, 3), True)],
    "second": [ParamRow("weight", (1, 3), True)],
}


def test_layout_by_hand():
    """15 words, 12 of a table, 6 + 8 of matrices, 2 + 3 + 4 that do not decay; the heads have 6 + 2 and 3."""
    layout = make_layout(ENCODER_ROWS, HEAD_ROWS)
    assert list(layout.places.items()) == [
        (("shared", "embeddings.word.weight"), slice(0, 15)),
        (("shared", "embeddings.position.weight"), slice(15, 27)),
        (("shared", "encoder.layer.0.dense.weight"), slice(27, 33)),
        (("shared", "encoder.layer.10.dense.weight"), slice(33, 41)),
        (("shared", "encoder.layer.0.dense.bias"), slice(41, 43)),
        (("shared", "embeddings.norm.weight"), slice(43, 46)),
        (("shared", "encoder.layer.10.dense.bias"), slice(46, 50)),
        (("first", "weight"), slice(50, 56)),
        (("first", "bias"), slice(56, 58)),
        (("second", "weight"), slice(58, 61)),
    ]
    assert layout.blocks == {
        ("shared", True): slice(0, 41),
        ("shared", False): slice(41, 50),
        ("first", True): slice(50, 56),
        ("first", False): slice(56, 58),
        ("second", True): slice(58, 61),
        ("second", False): slice(61, 61),
    }
    assert (layout.num_shared, layout.num_matrix, layout.size) == (50, 14, 61)
    assert layout.words == slice(0, 15) and layout.matrices == slice(27, 41)
    assert layout.sections == [slice(0, 15), slice(15, 27), slice(27, 41), slice(41, 50)]
    ranges = {where.start: factor for where, factor in layout.layer_factors(0.5)}
    assert ranges == {0: 2**-11, 15: 2**-11, 43: 2**-11, 27: 2**-10, 41: 2**-10, 33: 1, 46: 1}
    # Neighbours of a group are one range, but not across a section's border: words and table stay apart.
    assert layout.layer_groups == {
        "embeddings": [slice(0, 15), slice(15, 27), slice(43, 46)],
        "layer.0": [slice(27, 33), slice(41, 43)],
        "layer.10": [slice(33, 41), slice(46, 50)],
    }


def test_columns_of_the_task_gradients_by_hand():
    layout = make_layout(ENCODER_ROWS, HEAD_ROWS)
    expected = {
        (0, 15): (False, slice(0, 15)),
        (15, 27): (False, slice(15, 27)),
        (27, 33): (True, slice(0, 6)),
        (33, 41): (True, slice(6, 14)),
        (41, 43): (False, slice(27, 29)),  # 14 columns stand in the other matrix
        (46, 50): (False, slice(32, 36)),
    }
    for where, found in expected.items():
        assert (layout.is_matrix(slice(*where)), layout.columns(slice(*where))) == found


@pytest.mark.parametrize("missing", ["word", "position", "weight", "bias", "everything"])
def test_layout_without_a_kind(missing):
    """What is frozen leaves no gap: the sections that remain cover the shared part."""
    rows = [row for row in ENCODER_ROWS if missing != "everything" and missing not in row.name.split(".")]
    layout = make_layout(rows, HEAD_ROWS)
    edges = [0] + [section.stop for section in layout.sections]
    assert edges[:-1] == [section.start for section in layout.sections]
    assert edges[-1] == layout.num_shared == layout.size - 11
    ranges = sorted((where.start, where.stop) for group in layout.layer_groups.values() for where in group)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges)][: len(ranges)]
