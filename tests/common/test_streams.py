import torch

from common.streams import SampleStreams, generator, stream_seed


def test_streams_are_named_by_their_key():
    draw = lambda *key: torch.randn(4, generator=generator("cpu", *key))  # noqa: E731
    assert torch.equal(draw(0, "step", 3), draw(0, "step", 3))
    different = [draw(0, "step", 3), draw(1, "step", 3), draw(0, "step", 4), draw(0, "order", 3)]
    assert len({tuple(d.tolist()) for d in different}) == 4
    assert stream_seed(0, "step", 3) == 3292878916991017424  # fixed for ever: checkpoints rely on it


def test_a_sample_does_not_depend_on_its_batch():
    whole, part = SampleStreams(5, range(4)), SampleStreams(5, [2])
    x = torch.zeros(4, 3, 2, 2)
    for _ in range(3):  # also after several draws
        assert torch.equal(whole.randn_like(x)[2], part.randn_like(x[:1])[0])
    signs = whole.rademacher(x, 5)
    assert signs.shape == (5, 4, 3, 2, 2) and torch.equal(signs[:, 2], part.rademacher(x[:1], 5)[:, 0])
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}


def test_draws_are_standard():
    draws = SampleStreams(0, range(2000)).randn((8,), "cpu")
    assert abs(draws.mean()) < 0.03 and abs(draws.std() - 1) < 0.03
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 0.1 and abs(torch.corrcoef(draws[:8])[0, 1]) < 0.9
