"""One path's samples by another path's network: through the library and on command lines."""

import json

import numpy as np
import pytest
import torch

from cli import call, one_line
from inference import ODE, SDE, Guidance, Pipeline

TIGHT = dict(atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def pipe(trained):
    return Pipeline.load(trained)


def test_the_ode_is_the_same_flow_guided_in_an_interval_or_not(pipe):
    """Both ends of Linear and GVP are the same, and guidance begins at the network's time."""
    for guidance in (Guidance(), Guidance(2.0, None, 0.25, 0.6)):
        ways = [pipe.draw([3, 7], solver=ODE(path=path, **TIGHT), guidance=guidance)[-1] for path in (None, "GVP")]
        torch.testing.assert_close(*ways, rtol=0, atol=2e-4)


def test_encoding_and_likelihood_are_the_same(pipe):
    images = pipe.sample([3, 7], solver=ODE("heun", num_steps=5))
    ways = [pipe.encode(images, [3, 7], solver=ODE(path=path, **TIGHT)) for path in (None, "GVP")]
    torch.testing.assert_close(*ways, rtol=0, atol=5e-4)
    nats = [pipe.likelihood(images, [3, 7], solver=ODE(path=path, **TIGHT))[0] for path in (None, "GVP")]
    np.testing.assert_allclose(*nats, rtol=1e-4)


def test_the_networks_own_path_changes_no_bit(pipe):
    for kind in (ODE, SDE):
        method = "heun" if kind is ODE else "Euler"
        plain, named = (pipe.draw([3], solver=kind(method, num_steps=5, path=path))[-1] for path in (None, "Linear"))
        assert torch.equal(plain, named)


def test_a_number_says_its_path(trained, tmp_path, capsys):
    flags = ["--ckpt", trained, "--num-fid-samples", 2, "--no-png", "--sample-dir", tmp_path, "--num-sampling-steps", 4]
    for more in ([], ["--sampling-path", "VP"], ["--time-shift", 3]):
        assert call(capsys, "sample_ddp", "SDE", *flags, *more).code == 0
    records = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(records) == 3 and len(list(tmp_path.glob("*.npz"))) == 3
    assert sorted(str(record["settings"]["sampling_path"]) for record in records) == ["None", "None", "VP"]
    assert sorted(record["recipe"]["transport"]["time_shift"] for record in records) == [1.0, 1.0, 3.0]


def test_bad_paths_are_one_line(trained, tmp_path, capsys):
    sample = ("sample", "SDE", "--ckpt", trained, "--out", tmp_path / "a.png")
    assert call(capsys, *sample, "--sampling-path", "linear").code == 2
    one_line(call(capsys, *sample, "--time-shift", 0.5), 2, "time_shift", "at least 1")
    adams = ("sample", "ODE", "--ckpt", trained, "--out", tmp_path / "a.png", "--sampling-method", "explicit_adams")
    one_line(call(capsys, *adams, "--time-shift", 2), 2, "explicit_adams takes equal steps alone")
    with pytest.raises(ValueError, match="choose from Linear, GVP, VP"):
        ODE(path="linear")
