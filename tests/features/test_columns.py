"""Arrow strings that behave like a list of them."""

import operator

import pyarrow as pa
import pytest

from diffusion_sae.features.columns import StringColumn

WORDS = ["a", "bb", "", "dé", "e"]


@pytest.fixture
def column():
    return StringColumn(pa.chunked_array([WORDS[:2], WORDS[2:2], WORDS[2:]], pa.string()))


def test_it_is_a_sequence(column):
    assert len(column) == 5
    assert list(column) == WORDS
    assert [column[i] for i in range(-5, 5)] == WORDS * 2
    assert column.index("dé") == 3
    assert "bb" in column
    assert "x" not in column
    with pytest.raises(IndexError):
        column[5]


@pytest.mark.parametrize(
    "part", [slice(None), slice(1, 4), slice(None, None, 2), slice(-2, None), slice(None, None, -1), slice(4, 1)]
)
def test_slices(column, part):
    assert list(column[part]) == WORDS[part]


def test_equality(column):
    assert column == WORDS
    assert operator.eq(WORDS, column)
    assert column == tuple(WORDS)
    assert column == StringColumn.of(WORDS)
    assert column != WORDS[:-1]
    assert column != [*WORDS[:-1], "x"]
    assert column != "abbdée"
    assert (column, 1) == (WORDS, 1)


def test_numbers():
    assert StringColumn.numbers(12) == [str(i) for i in range(12)]
    assert StringColumn.numbers(0) == []


def test_repr(column):
    assert repr(column) == "StringColumn(['a', 'bb', '', …], 5 strings)"
