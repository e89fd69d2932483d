"""Models handed on: to diffusers without this repository, to the published code, to the Hub, and back."""

import base64
import json
import os
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from cli import DIGITS, ENV, ROOT, call, launch, one_line
from common.checkpoint import load_checkpoint
from common.recipe import Recipe
from download import find_model
from inference import ODE, SDE, Guidance, Pipeline
from models import SiT, model_config
from small_hub import small_hub
from transport import TransportSettings

LABELS = [3, 1, 4]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A checkpoint of latents, whose SiT is small enough for a test."""
    folder = tmp_path_factory.mktemp("latents")
    flags = [*DIGITS, "--vae", "assets/digits-vae", "--model", "SiT-T/4", "--max-steps", 3, "--global-batch-size", 8]
    flags += ["--num-workers", 0, "--lr", 1e-2, "--ema-decay", 0.5, "--results-dir", folder]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, flags)], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*/checkpoints/*.pt"))


@pytest.fixture(scope="module", params=["pixels", "latents"])
def checkpoint(request):
    return request.getfixturevalue({"pixels": "trained"}.get(request.param, request.param))


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """An exported folder, by the real command, away from this repository."""
    path = tmp_path_factory.mktemp("export") / "model"
    command = [sys.executable, str(ROOT / "export.py"), str(checkpoint), "--out", str(path), "--samples", "2"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'DiffusionPipeline.from_pretrained("{path}", trust_remote_code=True)' in done.stdout
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]
    return path


ELSEWHERE = """
import sys
for package in ("torchdiffeq", "accelerate", "scipy", "matplotlib", "pyarrow", "wandb"):
    sys.modules[package] = None  # as where it is not installed
import numpy as np
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
labels = [3, 1, 4]
guided = dict(guidance_scale=3.0, guidance_channels=None, guidance_interval=(0.2, 0.9))
latent = lambda *args, **more: pipe(*args, output_type="latent", **more).images.numpy()
results = dict(
    ode=latent(labels, method="heun", num_inference_steps=6, seed=7),
    guided=latent(labels, method="euler", num_inference_steps=6, **guided),
    sde=latent(labels, method="Heun", num_inference_steps=6, diffusion_form="linear"),
    images=pipe(["3", 1, "4"], num_inference_steps=6, seed=7, output_type="np").images,
)
ones = torch.ones(results["ode"].shape, dtype=torch.float16)
results["again"] = latent(labels, num_inference_steps=6, latents=ones)
first, second = (latent("3", num_inference_steps=3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
assert (first == second).all() and (first != latent("3", num_inference_steps=3)).any()
(one,) = pipe(labels[:1], num_inference_steps=3, return_dict=False)
assert one[0].size == (32, 32) and pipe(3, num_inference_steps=3, output_type="pt").images.shape == (1, 3, 32, 32)
for wrong in ("cat", 10, -1, 2.5, True):
    try:
        pipe([wrong])
    except ValueError as error:
        assert f"unknown class {wrong!r}: this model knows 0 to 9, or 0, 1, 2, 3, 4, ..." == str(error)
    else:
        raise AssertionError(wrong)
for more in (dict(output_type="foo"), dict(method="magic"), dict(diffusion_form="magic", method="Euler")):
    try:
        pipe(labels, **more)
    except ValueError:
        continue
    raise AssertionError(more)
half = pipe.to(torch.bfloat16)
assert half.transformer.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
halves = half(labels, num_inference_steps=6, seed=7, output_type="np").images
assert np.abs(halves.astype(int) - results["images"]).mean() < 4
assert half.transformer.t_embedder.mlp[0].weight.dtype == torch.float32
ours = [name for name in sys.modules if name.split(".")[0] in ("models", "transport", "common", "inference", "data")]
assert not ours, ours
np.savez(sys.argv[2], **results)
"""


def test_diffusers_draws_the_same_images_without_this_repository(folder, checkpoint, tmp_path):
    env = {key: value for key, value in ENV.items() if key != "PYTHONPATH"} | dict(HF_HOME=str(tmp_path / "cache"))
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / "r.npz")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs, pipe = np.load(tmp_path / "r.npz"), Pipeline.load(checkpoint)
    guidance = Guidance(3.0, channels=None, low=0.2, high=0.9)
    for name, ours in {
        "ode": pipe.draw(LABELS, seed=7, solver=ODE("heun", num_steps=6)),
        "guided": pipe.draw(LABELS, solver=ODE("euler", num_steps=6), guidance=guidance),
        "sde": pipe.draw(LABELS, solver=SDE("Heun", form="linear", num_steps=6)),
        "again": pipe.draw(LABELS, noise=torch.ones(3, *pipe.latent_shape), solver=ODE("heun", num_steps=6)),
    }.items():
        assert np.abs(theirs[name] - ours[-1].numpy()).max() < 1e-5, name
    images = pipe.sample(LABELS, seed=7, solver=ODE("heun", num_steps=6))
    assert np.abs(theirs["images"].astype(int) - images).max() <= 1


def test_a_folder_is_read_back_bit_for_bit(folder, checkpoint, tmp_path, capsys):
    ours, before = Pipeline.load(folder), Pipeline.load(checkpoint)
    assert ours.model.state_dict().keys() == before.model.state_dict().keys()
    assert all(torch.equal(value, before.model.state_dict()[key]) for key, value in ours.model.state_dict().items())
    assert ours.recipe.classes == before.recipe.classes and ours.recipe.transport == before.recipe.transport
    few = ODE("heun", num_steps=4)
    assert np.array_equal(ours.sample(LABELS, solver=few), before.sample(LABELS, solver=few))
    flags = ["ODE", "--ckpt", folder, "--num-fid-samples", 2, "--sampling-method", "euler", "--num-sampling-steps", 3]
    assert call(capsys, "sample_ddp", *flags, "--sample-dir", tmp_path).code == 0  # which hashes what it samples from


def test_the_card_tells_what_it_is_and_how_its_samples_were_made(folder, checkpoint):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "# SiT-T/" in card and checkpoint.name in card
    assert "Classes 0, 1, by `pipe([0, 1], seed=0, guidance_scale=4" in card and (folder / "samples.png").stat().st_size > 200
    assert "9. 9" in card and "| prediction | velocity |" in card
    config = json.loads((folder / "transformer" / "config.json").read_text())
    wanted = (
        "input_size patch_size in_channels hidden_size depth num_heads mlp_ratio class_dropout_prob num_classes learn_sigma"
    )
    assert set(wanted.split()) <= config.keys() and config["num_heads"] == 4


def test_what_the_published_code_loads(latents, tmp_path, capsys):
    """A bare state dict of its model, whose head is doubled."""
    result = call(capsys, "export", latents, "--out", tmp_path / "p.pt", "--to", "published")
    assert result.code == 0, result.err
    published = SiT(input_size=8, patch_size=4, hidden_size=128, depth=6, num_heads=4, num_classes=10, learn_sigma=True)
    published.load_state_dict(find_model(str(tmp_path / "p.pt")), strict=True)
    ours = Pipeline.load(latents)
    torch.manual_seed(0)
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([1, 2, 10])
    with torch.no_grad():
        assert torch.allclose(published.eval()(x, t, y), ours.model(x, t, y), atol=1e-6)
    assert load_checkpoint(tmp_path / "p.pt").keys() == published.state_dict().keys()


FROM_THE_HUB = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("me/mine", trust_remote_code=True)
np.savez(sys.argv[1], images=pipe([3, 1, 4], num_inference_steps=3, output_type="np").images)
half = DiffusionPipeline.from_pretrained("me/mine", trust_remote_code=True, torch_dtype=torch.float16)
assert half.transformer.blocks[0].mlp.fc1.weight.dtype == half.vae.dtype == torch.float16
assert half(3, num_inference_steps=3, output_type="np").images.shape == (1, 32, 32, 3)
"""


@pytest.mark.slow
def test_push_uploads_the_folder_and_its_failure_leaves_it(latents, tmp_path):
    """By huggingface_hub's own client, to a Hub on this machine."""
    with small_hub() as hub:
        settings = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
        push = lambda folder, token: launch(  # noqa: E731
            "export", latents, "--out", folder, "--samples", 0, "--push", "me/mine", HF_TOKEN=token, **settings
        )
        result = push(tmp_path / "a", "hf_good")
        assert result.code == 0 and f"{hub.url}/me/mine has it" in result.out, result.err
        assert not (tmp_path / "a" / "samples.png").exists()
        files = {value["path"]: base64.b64decode(value["content"]) for kind, value in hub.commits if kind == "file"}
        files |= {value["path"]: hub.large[value["oid"]] for kind, value in hub.commits if kind == "lfsFile"}
        here = [file for file in (tmp_path / "a").rglob("*") if file.is_file()]
        assert files == {str(file.relative_to(tmp_path / "a")): file.read_bytes() for file in here}
        assert len(hub.large) == 1 + (tmp_path / "a" / "vae").exists()
        one_line(
            push(tmp_path / "b", "hf_bad"),
            1,
            "--push me/mine",
            "401",
            f"`hf auth login`, then `hf upload me/mine {tmp_path / 'b'}`",
        )
        assert (tmp_path / "b" / "model_index.json").exists() and len(hub.commits) == len(files) + 1


def test_wrong_input_is_one_line_and_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    wide, dit = tmp_path / "wide.pt", tmp_path / "dit.pt"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    shape = dict(depth=1, hidden_size=16, num_heads=2, num_classes=3)
    arguments = model_config("SiT-S/2", **shape, input_size=(4, 8), class_dropout_prob=0.0, learn_sigma=False)
    odd = Recipe("SiT", arguments, "32x64", transport=TransportSettings(prediction="data"))
    torch.save({"ema": odd.build().state_dict(), "recipe": odd.to_dict()}, wide)
    torch.save(SiT(input_size=8, hidden_size=128, depth=6, num_heads=4, num_classes=3).state_dict(), dit)
    for argv, code, words in (
        ([trained, "--out", tmp_path / "full"], 2, [tmp_path / "full", "there already"]),
        ([trained, "--out", tmp_path / "x", "--to", "published"], 2, ["--out", ".pt"]),
        ([trained, "--out", tmp_path / "x.pt", "--to", "published", "--push", "a/b"], 2, ["--push goes with --to diffusers"]),
        ([trained, "--out", trained, "--to", "published"], 2, [trained, "there already"]),
        ([trained, "--out", tmp_path / "x", "--push", "mine"], 2, ["--push mine", "OWNER/NAME"]),
        (
            [wide, "--out", tmp_path / "x.pt", "--to", "published"],
            1,
            ["no null class and images that are not square and"],
        ),
        ([dit, "--kind", "dit", "--out", tmp_path / "x.pt", "--to", "published"], 1, ["this model has times of its own, for"]),
        ([tmp_path / "no.pt", "--out", tmp_path / "x"], 1, [tmp_path / "no.pt"]),
        ([trained, "--out", tmp_path / "x", "--kind", "repa"], 2, ["--kind repa contradicts"]),
    ):
        one_line(call(capsys, "export", *argv), code, *words)
    monkeypatch.setattr("inference.export.card", Mock(side_effect=OSError(28, "No space left on device")))
    one_line(call(capsys, "export", trained, "--out", tmp_path / "x", "--samples", 0), 1, tmp_path / "x", "No space left")
    assert sorted(os.listdir(tmp_path)) == ["dit.pt", "full", "wide.pt"]
