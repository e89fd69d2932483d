"""The library: what scripts, a notebook and a test use alike."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from cli import call
from common.checkpoint import load_checkpoint
from common.errors import UsageError, UserError
from common.streams import SampleStreams
from inference import ODE, SDE, Guidance, Pipeline
from inference.pictures import Layout

FEW = ODE("heun", num_steps=4)


@pytest.fixture(scope="module")
def pipe(trained):
    return Pipeline.load(trained)


def changed(trained, path, change):
    """A copy of the checkpoint with change(content) made to it."""
    content = load_checkpoint(trained)
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("mode, flags, solver", [
    ("ODE", ["--sampling-method", "heun"], ODE("heun", num_steps=6)),
    ("SDE", ["--diffusion-form", "linear"], SDE(form="linear", num_steps=6)),
])  # fmt: skip
def test_sample_i_is_picture_i_of_sample_py(pipe, trained, tmp_path, capsys, mode, flags, solver):
    flags = [
        *flags,
        "--num-sampling-steps",
        6,
        "--cfg-scale",
        2,
        "--cfg-channels",
        "all",
        "--seed",
        5,
        "--class-labels",
        "3,3,7",
    ]
    assert call(capsys, "sample", mode, "--ckpt", trained, *flags, "--out", tmp_path / "s.png").code == 0
    images = pipe.sample([3, 3, 7], seed=5, solver=solver, guidance=Guidance(2.0, channels=None))
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8
    with Image.open(tmp_path / "s.png") as picture:
        assert (Layout(3, 32, 32, 3, named=True).cut(picture) == images).all()


def test_a_trajectory_begins_with_the_noise_and_ends_with_the_sample(pipe):
    frames = pipe.sample([3, 1], seed=2, solver=FEW, trajectory=True)
    assert len(frames) == 4 and (frames[-1] == pipe.sample([3, 1], seed=2, solver=FEW)).all()
    noise = SampleStreams(2, range(2)).randn(pipe.latent_shape, "cpu")
    assert (frames[0] == pipe.decode(noise)).all()
    assert (pipe.sample([3, 1], noise=noise, solver=FEW) == frames[-1]).all()


def test_calls_are_counted(trained):
    pipe = Pipeline.load(trained)
    pipe.sample([1], solver=FEW)
    pipe.sample([1], solver=FEW, guidance=Guidance(2.0, weak=Pipeline.load(trained, weights="model")))
    assert pipe.calls == 6 + 12


def test_images_to_noise_and_back(pipe):
    images = pipe.sample([3, 1], solver=ODE(rtol=1e-5))
    z = pipe.encode(images, [3, 1], solver=ODE(rtol=1e-5))
    assert z.shape == (2, *pipe.latent_shape)
    back = pipe.sample([3, 1], noise=z.numpy(), solver=ODE(rtol=1e-5))  # an array, as sample.py --reverse saves it
    assert np.abs(back.astype(int) - images).max() <= 2
    assert torch.equal(pipe.encode(images, solver=FEW), pipe.encode(images, [10, 10], solver=FEW))  # the null class
    x = pipe.to_latents(images)
    assert (pipe.decode(x) == images).all()


def test_the_likelihood_refuses_guidance_and_the_sde(pipe):
    images = pipe.sample([3], solver=FEW)
    nats, bits = pipe.likelihood(images, [3], solver=FEW, num_probes=2)
    assert nats.shape == bits.shape == (1,) and np.allclose(nats, -bits * 3 * 32 * 32 * np.log(2))
    with pytest.raises(UsageError, match="a guided flow has no density"):
        pipe.likelihood(images, [3], guidance=Guidance(2.0))
    with pytest.raises(UsageError, match="is that of the ODE"):
        pipe.likelihood(images, [3], solver=SDE())


def test_bad_numbers_name_the_checkpoint(trained, tmp_path):
    path = changed(trained, tmp_path / "nan.pt", lambda content: content["ema"]["final_layer.linear.bias"].fill_(torch.nan))
    pipe = Pipeline.load(path)
    for solver in (ODE("euler", num_steps=3), SDE(num_steps=3)):
        with pytest.raises(UserError, match=r"nan\.pt: its samples are not finite"):
            pipe.sample([3], solver=solver)
    with pytest.raises(UserError, match=r"nan\.pt: dopri5 failed .*output is not a finite number"):
        pipe.sample([3])
    with pytest.raises(UserError, match=r"nan\.pt: dopri5 failed"):
        pipe.likelihood(np.zeros((1, 32, 32, 3), np.uint8), [3])
    with pytest.raises(UserError, match=r"nan\.pt: its likelihoods are not finite"):
        pipe.likelihood(np.zeros((1, 32, 32, 3), np.uint8), [3], solver=ODE("euler", num_steps=3))


SETTINGS = {
    "unknown solver": (lambda pipe: ODE("leapfrog"), "unknown ODE solver 'leapfrog'"),
    "too few points": (lambda pipe: SDE(num_steps=1), "num_steps"),
    "unknown form": (lambda pipe: SDE(form="cubic"), "unknown diffusion form 'cubic'"),
    "no time left": (
        lambda pipe: pipe.sample([1], solver=SDE(form="SBDM", last_step_size=0.9999)),
        "no time for the SDE",
    ),
    "SDE to noise": (lambda pipe: pipe.encode(np.zeros((1, 32, 32, 3), np.uint8), [1], solver=SDE()), "give an ODE"),
    "no labels": (lambda pipe: pipe.sample([]), "one class id or more"),
    "one label bare": (lambda pipe: pipe.sample(3), "one class id or more"),
    "fractions": (lambda pipe: pipe.sample([0.9]), "one class id or more"),
    "a label for two": (lambda pipe: pipe.likelihood(np.zeros((2, 32, 32, 3), np.uint8), [3]), "1 labels for 2 images"),
    "noise for two": (lambda pipe: pipe.sample([3], noise=torch.zeros(2, 3, 32, 32)), "noise must be floats of shape"),
    "indices for two": (lambda pipe: pipe.sample([3], indices=[0, 1]), "2 indices for 1 labels"),
    "half a step": (lambda pipe: ODE(num_steps=2.5), "whole number"),
    "tolerance": (lambda pipe: ODE(atol=-1), "--atol -1"),
    "channels": (lambda pipe: Guidance(2.0, channels="all"), "--cfg-channels all"),
    "size": (lambda pipe: Pipeline.load(pipe.path, image_size="big"), "256x384"),
    "heads": (lambda pipe: Pipeline.load(pipe.path, num_heads=99), "--num-heads 99 contradicts .*, which has 4"),
    "unknown class": (lambda pipe: pipe.sample([11]), "the classes 0 to 9"),
    "images of another size": (lambda pipe: pipe.likelihood(np.zeros((1, 8, 8, 3), np.uint8), [1]), "uint8 of shape"),
    "floats": (lambda pipe: pipe.encode(np.zeros((1, 32, 32, 3)), [1]), "not float64"),
    "dequantize": (lambda pipe: pipe.likelihood(np.zeros((1, 32, 32, 3), np.uint8), [1], dequantize="yes"), "--dequantize yes"),
    "unknown keyword": (lambda pipe: Pipeline.load(pipe.path, heads=3), "knows no heads"),
    "unknown kind": (lambda pipe: Pipeline.load(pipe.path, kind="gan"), "--kind gan"),
    "unknown precision": (lambda pipe: Pipeline.load(pipe.path, precision="fp8"), "--precision fp8"),
    "unknown weights": (
        lambda pipe: Pipeline.load(pipe.path, weights="ema-0.5"),
        "has no weights 'ema-0.5'; it has model, ema",
    ),
    "contradiction": (lambda pipe: Pipeline.load(pipe.path, prediction="score"), "--prediction score contradicts"),
    "decoding pixels": (lambda pipe: Pipeline.load(pipe.path, decoding=dict(tiling=True)), "--vae-tiling"),
}


@pytest.mark.parametrize("call, words", SETTINGS.values(), ids=SETTINGS)
def test_bad_settings_are_a_value_error_of_one_line(pipe, call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call(pipe)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_bare_file_is_told_what_it_cannot_say(trained, tmp_path):
    bare = tmp_path / "bare.pt"
    torch.save(load_checkpoint(trained)["ema"], bare)
    told = Pipeline.load(bare, vae="none", image_size=32, path_type="GVP", prediction="noise", sample_eps=0.02)
    assert told.recipe.transport.path_type == "GVP" and told.transport.ode_interval == (0.02, 0.98)
    plain = Pipeline.load(bare, vae="none", image_size=32)
    assert (plain.sample([3], solver=FEW) == Pipeline.load(trained).sample([3], solver=FEW)).all()
    assert Pipeline.load(bare, vae="none").recipe.image_size == 32  # the latents' times the autoencoder's factor
    assert Pipeline.load(bare, vae="none").recipe.prediction == "velocity"
    with pytest.raises(UsageError, match="makes latents of"):
        Pipeline.load(bare, vae="none", image_size=64)


def test_a_model_without_a_null_class_is_not_guided(trained, tmp_path):
    def without(content):
        content["recipe"]["model_args"]["class_dropout_prob"] = 0.0
        table = "y_embedder.embedding_table.weight"
        content["ema"][table] = content["ema"][table][:10].clone()

    pipe = Pipeline.load(changed(trained, tmp_path / "plain.pt", without))
    with pytest.raises(UsageError, match="trained without a null class"):
        pipe.sample([3], guidance=Guidance(2.0), solver=FEW)
    with pytest.raises(UsageError, match="give the images' labels"):
        pipe.encode(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(UsageError, match="the classes 0 to 9"):
        pipe.sample([10], solver=FEW)


def test_a_weaker_model_must_be_of_the_same_kind(pipe, trained, tmp_path):
    def other(content):
        content["recipe"]["transport"]["path_type"] = "GVP"

    weak = Pipeline.load(changed(trained, tmp_path / "gvp.pt", other))
    with pytest.raises(UsageError, match=r"gvp\.pt has transport \('GVP', 'velocity'\)"):
        pipe.sample([3], guidance=Guidance(2.0, weak=weak), solver=FEW)


def test_bf16_samples_with_a_float32_time(trained):
    model = Pipeline.load(trained, precision="bf16").model
    assert {p.dtype for p in model.t_embedder.parameters()} == {torch.float32}
    assert model.pos_embed.dtype == model.y_embedder.embedding_table.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_compiled_pipeline_samples_and_scores(pipe, trained):
    compiled = Pipeline.load(trained, compile=True)
    images = pipe.sample([3, 1], solver=FEW)
    assert np.abs(compiled.sample([3, 1], solver=FEW).astype(int) - images).max() <= 1
    ours, theirs = (each.likelihood(images, [3, 1], solver=FEW)[0] for each in (compiled, pipe))
    assert np.allclose(ours, theirs, rtol=1e-3)
    assert np.abs(compiled.sample([3, 1], solver=FEW).astype(int) - images).max() <= 1


def test_pixels_that_are_no_numbers_name_the_autoencoder(pipe, monkeypatch):
    monkeypatch.setattr(pipe.autoencoder, "decode", lambda latents, **_: latents * float("nan"))
    with pytest.raises(UserError, match="--vae none: its pixels are not finite numbers"):
        pipe.sample([1], solver=ODE("euler", 3))


@pytest.mark.parametrize("said", ["told", "args", "nothing"])
def test_a_label_table_without_a_null_row(trained, tmp_path, said):
    """A bare file does not say whether its last row is the null class: a flag, or its args, may; else a line tells."""
    state = dict(load_checkpoint(trained)["ema"])
    state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][:10].clone()
    args = argparse.Namespace(num_classes=10, image_size=32) if said == "args" else argparse.Namespace(image_size=32)
    torch.save({"ema": state, "args": args}, tmp_path / "bare.pt")
    pipe = Pipeline.load(tmp_path / "bare.pt", vae="none", **(dict(num_classes=10) if said == "told" else {}))
    if said == "nothing":
        assert pipe.recipe.num_classes == 9 and "its 10 labels are taken as 9 classes and the null class" in pipe.note
    else:
        assert pipe.recipe.num_classes == 10 and pipe.recipe.null_class is None and pipe.note is None
