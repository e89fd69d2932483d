from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.chunks import ChunkStore
from inference.chunked import Labels, make_chunk


def test_label_rules():
    def labels(count, seed=0, **more):
        return [Labels(10, seed, **more).of(i) for i in range(count)]

    assert labels(7, classes=[5, 2]) == [5, 2, 5, 2, 5, 2, 5]
    balanced = labels(1000, rule="balanced")
    assert np.bincount(balanced).tolist() == [100] * 10
    assert sorted(balanced[:10]) == list(range(10)) and balanced[:10] != balanced[10:20]
    drawn = np.bincount(labels(1000))
    assert drawn.min() > 60 and drawn.max() < 140 and len(set(drawn)) > 1
    assert labels(20) == labels(20) != labels(20, seed=1)


class Work:
    """Item i is the number i; keeps how many it was asked for at once."""

    def __init__(self, compile):
        self.pipeline, self.asked = SimpleNamespace(compile=compile), []

    def make(self, indices):
        self.asked.append(len(indices))
        return dict(images=torch.tensor(indices), labels=np.array(indices), calls=5)


@pytest.mark.parametrize("compile, asked", [(True, [4, 4, 4]), (False, [4, 4, 2])])
def test_a_compiled_network_sees_one_size_of_batch(tmp_path, compile, asked):
    work, store = Work(compile), ChunkStore(tmp_path, 10, 4)
    chunks = [make_chunk(work, store, chunk) for chunk in range(3)]
    assert work.asked == asked
    for name in ("images", "labels"):
        assert [int(i) for chunk in chunks for i in chunk[name]] == list(range(10))
    assert [chunk["calls"] for chunk in chunks] == [5, 5, 5]


def test_a_single_small_chunk_is_not_filled_up(tmp_path):
    work = Work(True)
    make_chunk(work, ChunkStore(tmp_path, 3, 100), 0)
    assert work.asked == [3]
