import numpy as np
import torch

from experiments.judge import Judge, diversity, train_judge
from experiments.measuring import as_many_of_each
from experiments.page import agreement, table, verdict


def stripes(count, seed):
    """Images (N, 3, 16, 16) of stripes, lying for class 0 and standing for class 1."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    waves = np.sin(np.arange(16) * 1.5 + rng.uniform(0, 6, (count, 1)))[:, None, :, None]  # along the rows
    waves = np.where(labels[:, None, None, None] == 0, waves, waves.swapaxes(2, 3))
    pixels = 128 + 90 * waves + rng.normal(0, 10, (count, 3, 16, 16))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def test_it_learns_what_it_is_shown_and_the_same_again():
    images, labels = stripes(256, 0)
    judge = train_judge(images, labels, classes=2, mirrors=True)
    others, right = stripes(100, 1)
    features, seen = judge.see(others)
    assert features.shape == (100, 64) and (seen == right).float().mean() > 0.95
    again = train_judge(images, labels, classes=2, mirrors=True)
    assert torch.equal(again.see(others)[0], features)


def test_features_of_an_image_do_not_depend_on_the_others():
    images, _ = stripes(9, 2)
    judge = Judge(2)
    assert torch.allclose(judge.see(images)[0][3:5], judge.see(images[3:5])[0], atol=1e-6)


def test_large_images_are_seen_at_64_pixels():
    judge, seen = Judge(2).eval(), []
    judge.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[-2:])))
    for size in ((256, 256), (64, 128), (32, 48)):
        judge.see(torch.zeros(1, 3, *size, dtype=torch.uint8))
    assert seen == [(64, 64), (32, 64), (32, 48)]


def test_diversity_is_the_mean_distance_within_classes():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0], [10.0, 1.0], [7.0, 7.0]])
    assert diversity(features, np.array([0, 0, 1, 1, 2])) == (5 + 1) / 2


def test_a_verdict_is_by_students_t():
    assert verdict(-1.0, 0.2, True, 3) == "better: agrees" and verdict(-1.0, 0.2, False, 3) == "better: does not agree"
    assert verdict(1.0, 0.2, True, 3) == "worse: does not agree" and verdict(1.0, 0.2, False, 3) == "worse: does not agree"
    assert verdict(-1.0, 0.3, True, 3) == "cannot be told" and verdict(-1.0, 0.3, True, 10) == "better: agrees"
    assert verdict(-1.0, None, True, 1) == "cannot be told"


def test_the_count_of_verdicts():
    rows = [[verdict(-1.0, error, better, 3)] for error, better in ((0.2, True), (0.2, False), (0.2, True), (0.9, True))]
    assert agreement(rows) == "Of 4 findings, at this scale, 2 agree, 1 do not agree, 1 cannot be told."


def test_the_floor_has_as_many_of_each_class():
    labels = np.array([0] * 50 + [1] * 20 + [2] * 30)
    some = as_many_of_each(labels, 31, torch.Generator().manual_seed(0))
    assert len(set(some)) == 30 and np.bincount(labels[some]).tolist() == [10, 10, 10]


def test_a_table_has_a_row_for_each():
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |"
