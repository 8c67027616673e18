"""The table of tensors: rows on demand, the columns that stages ask for, and its way to another process."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from tierewrite.source.table import TensorEntry, Tensors

ENTRIES = [
    TensorEntry("a.q.weight", "BF16", (2, 2), 0, 8, 16),
    TensorEntry("a.q.bias", "BF16", (2,), 0, 16, 20),
    TensorEntry("weight", "F32", (), 1, 8, 12),
    TensorEntry(".weight", "BF16", (2, 2), 1, 12, 20),
    TensorEntry("a.k.weight", "BF16", (2, 2), 1, 20, 28),
    TensorEntry("a..weight", "U8", (), 1, 28, 29),
    TensorEntry("a.q.", "U8", (0,), 1, 29, 29),
    TensorEntry("", "U8", (0,), 1, 29, 29),
]


def test_a_table_gives_the_entries_it_was_made_of() -> None:
    table = Tensors.of(ENTRIES)
    assert list(table.values()) == ENTRIES
    assert [table[entry.name] for entry in ENTRIES] == ENTRIES
    assert table.nbytes.tolist() == [entry.nbytes for entry in ENTRIES]
    assert table.kinds == (("BF16", (2, 2)), ("BF16", (2,)), ("F32", ()), ("U8", ()), ("U8", (0,)))
    assert "a.k" not in table
    with pytest.raises(KeyError):
        table["a.k"]


def test_a_name_is_its_module_and_its_leaf() -> None:
    table = Tensors.of(ENTRIES)
    modules = list(table.modules)
    halves = [(modules[module], table.leaves[leaf]) for module, leaf in zip(table.module, table.leaf, strict=True)]
    assert halves == [
        ("a.q", "weight"), ("a.q", "bias"), ("", "weight"), ("", ".weight"), ("a.k", "weight"), ("a.", "weight"),
        ("a.q", ""), ("", ""),
    ]  # fmt: skip
    assert [f"{module}.{leaf}" if module else leaf for module, leaf in halves] == table.names
    assert list(table.modules.values()) == list(range(len(modules)))
    assert (table.module.dtype, table.leaf.dtype) == (np.int32, np.int32)


def test_a_table_goes_to_another_process() -> None:
    table = Tensors.of(ENTRIES)
    assert len(table.modules) == 4
    other = pickle.loads(pickle.dumps(table))
    assert list(other.values()) == ENTRIES
    assert other.modules == table.modules
    assert np.array_equal(other.leaf, table.leaf)
