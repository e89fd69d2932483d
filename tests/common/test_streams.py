import threading
import time
from unittest.mock import Mock

import pytest
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


@pytest.mark.parametrize("count", [1, 3, 9])
def test_drawn_ahead_the_numbers_are_the_same(count):
    alone, ahead = SampleStreams(1, range(count)), SampleStreams(1, range(count))
    x = torch.zeros(count, 3, 5, 7)
    assert torch.equal(alone.randn(x.shape[1:], "cpu"), ahead.randn(x.shape[1:], "cpu"))  # where a solve starts
    with ahead.ahead() as randn_like:
        drawn = [randn_like(x) for _ in range(20)]  # each in memory of its own
    assert all(torch.equal(noise, alone.randn_like(x)) for noise in drawn)


def test_the_next_draw_is_made_while_the_caller_works(monkeypatch):
    """A draw that takes 0.05 s, eight times: waited for once, not eight times more beside work of as long."""
    streams, normal, waited = SampleStreams(0, range(1)), torch.Tensor.normal_, 0.0
    monkeypatch.setattr(torch.Tensor, "normal_", lambda *args, **kwargs: (time.sleep(0.05), normal(*args, **kwargs))[1])
    with streams.ahead() as randn_like:
        for _ in range(8):
            started = time.perf_counter()
            randn_like(torch.zeros(1, 3))
            waited += time.perf_counter() - started
            time.sleep(0.06)
    assert 0.05 <= waited < 0.2


def test_a_draw_that_fails_is_told_and_leaves_no_thread(monkeypatch):
    streams, threads = SampleStreams(0, range(4)), threading.active_count()
    monkeypatch.setattr(torch.Tensor, "normal_", Mock(side_effect=MemoryError("no memory")))
    with pytest.raises(MemoryError, match="no memory"), streams.ahead() as randn_like:
        randn_like(torch.zeros(4, 3))
    assert threading.active_count() == threads
