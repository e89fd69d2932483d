"""Names of many files, compact."""

import pickle
import sys

import pytest

from data.names import Names


def test_names_are_a_list_of_texts():
    texts = ["a.png", "", "sub/ü.png", "\udcfe.png"]  # the last is a byte that is no UTF-8
    names = Names(texts[:1])
    names.extend(texts[1:])
    assert len(names) == 4 and [names[i] for i in range(4)] == texts == list(names) and names[-1] == texts[-1]
    assert list(pickle.loads(pickle.dumps(names))) == texts
    with pytest.raises(IndexError):
        names[4]


def test_a_name_takes_its_bytes_and_eight():
    names = Names(f"n01440764_{i}.JPEG" for i in range(100_000))
    size = sys.getsizeof(names.text) + sys.getsizeof(names.ends)
    assert size < 1.2 * 100_000 * (20 + 8)
