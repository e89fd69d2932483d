import numpy as np

from inference.chunked import Labels


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
