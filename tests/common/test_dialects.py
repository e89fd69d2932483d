"""SiT's siblings: the published code's numbers through our own path, and files as people have them."""

import argparse
import contextlib
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cli import ROOT, call, one_line
from common.checkpoint import load_checkpoint, weights_of
from common.dialects import open_checkpoint
from common.errors import UsageError, UserError
from common.recipe import build_with, recipe_of
from common.streams import SampleStreams
from data.autoencoder import LatentSpace, load_autoencoder
from data.images import DigitsDataset, to_pixels
from inference import ODE, SDE, Guidance, Pipeline
from models import SiT_models, sincos_pos_embed
from transport import create_transport

NUMBERS = np.load(ROOT / "tests" / "data" / "dialects.npz", allow_pickle=False)
VAE = str(ROOT / "assets" / "digits-vae")  # four channels, as these networks have
TOLD = dict(num_heads=4, image_size=32)
GUIDED = Guidance(1.8, channels=None, low=0.3, high=1.0)


def weights(kind):
    """The state dict behind the numbers."""
    state = {}
    for key, shape in json.loads(str(NUMBERS[f"{kind}/shapes"])).items():
        draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape) * 0.08
        state[key] = torch.from_numpy(draw).float()
    return state | {"pos_embed": sincos_pos_embed(48, 4, 4)[None]}


def numbers(kind, *names):
    return [torch.from_numpy(NUMBERS[f"{kind}/{name}"]) for name in names]


@pytest.fixture(scope="module", params=["repa", "dit"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{kind: a bare file of it}"""
    folder = tmp_path_factory.mktemp("files")
    for kind in ("repa", "dit"):
        torch.save(weights(kind), folder / f"{kind}.pt")
    return {kind: folder / f"{kind}.pt" for kind in ("repa", "dit")}


@pytest.fixture(scope="module")
def repa(files):
    return Pipeline.load(files["repa"], vae=VAE, **TOLD)


def test_dit_s_noise_and_velocity_at_its_steps_and_between_them(files):
    pipe = Pipeline.load(files["dit"], kind="dit", vae=VAE, **TOLD)
    x, t, y, noise, velocity = numbers("dit", "x", "t", "y", "noise", "velocity")
    with torch.no_grad():
        assert (pipe.model(x, t, y) - noise).abs().max() < 1e-5
        ours = pipe.transport.predict_velocity(pipe.model, x, t, dict(y=y))
    assert ((ours - velocity).abs() / velocity.abs().clamp(min=1)).max() < 1e-5
    assert (pipe.transport.settings.path_type, pipe.transport.settings.prediction) == ("VP", "noise")


def test_the_time_map_is_the_published_schedule_and_stays_exact(files):
    network = Pipeline.load(files["dit"], kind="dit", vae=VAE, precision="bf16", **TOLD).model.t_embedder.time_map
    t, k, products = numbers("dit", "t", "k", "alphas_cumprod")
    assert (network(t) - k).abs().max() < 1e-9
    assert torch.allclose(network.log_products.exp(), products, rtol=1e-12)
    ends = network(torch.tensor([0.0, 1 - 1e-3, 1.0]))  # of the interval, and beyond the last step
    assert ends.tolist() == pytest.approx([995.64, 0.0829, 0.0], abs=5e-3)


def test_repa_s_outputs(repa):
    x, t, y, out = numbers("repa", "x", "t", "y", "out")
    with torch.no_grad():
        assert (repa.model(x, 1 - t, y) + out).abs().max() < 1e-5
    assert "projectors" not in " ".join(repa.model.state_dict())


def test_repa_s_ode_with_its_guidance_interval(repa):
    z, classes, ode = numbers("repa", "z", "classes", "ode")
    ours = repa.draw(classes.tolist(), noise=z, solver=ODE("euler", num_steps=21), guidance=GUIDED)[-1]
    assert (ours - ode).abs().max() < 1e-5


def test_repa_s_euler_maruyama(repa):
    """Its noise is drawn of its state, in double precision, from torch's own generator."""
    z, classes, sde = numbers("repa", "z", "classes", "sde")
    solver = SDE(num_steps=20)  # form sigma, norm 1 and a last step Mean of 0.04
    torch.manual_seed(5)
    sample = solver.sampling(repa, torch.randn_like)
    assert (sample(z.double(), repa.network(GUIDED), y=classes)[-1] - sde).abs().max() < 1e-6


def in_folder(state, folder, **config):
    """A state dict as a folder in diffusers' layout."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(num_heads=4) | config))
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "diffusion_pytorch_model.safetensors")
    return folder


@contextlib.contextmanager
def repa_s_noise(streams):
    """In the place of a sample's own: drawn of a state in double precision, from torch's generator."""
    torch.manual_seed(5)
    yield lambda x: torch.randn_like(x, dtype=torch.float64).float()


@pytest.mark.parametrize("mode", ["ode", "sde"])
def test_repa_s_file_through_sample_py(mode, repa, tmp_path, capsys, monkeypatch):
    """REPA's own result, from its noise: what is decoded."""
    z, classes, theirs = numbers("repa", "z", "classes", mode)
    monkeypatch.setattr("common.streams.SampleStreams.randn", lambda self, shape, device: z)
    monkeypatch.setattr("common.streams.SampleStreams.ahead", repa_s_noise)
    drawn, decode = [], LatentSpace.decode
    monkeypatch.setattr(LatentSpace, "decode", lambda self, x, **more: drawn.append(x) or decode(self, x, **more))
    file = in_folder(weights("repa"), tmp_path / "repa" / "transformer", num_classes=1000).parent
    solver = ["--sampling-method", "euler", "--num-sampling-steps", 21] if mode == "ode" else ["--num-sampling-steps", 20]
    flags = [mode.upper(), "--ckpt", file, "--vae", VAE, "--image-size", 32, *solver]
    flags += ["--cfg-scale", 1.8, "--cfg-channels", "all", "--guidance-low", 0.3, "--class-labels", *classes.tolist()]
    result = call(capsys, "sample", *flags, "--out", tmp_path / "s.png")
    assert result.code == 0, result.err
    assert (drawn[-1] - theirs).abs().max() < 1e-5


# Files as people have them: the kind, the weights and their meaning must come out the same.


def wrapped(kind, how):
    state = weights(kind)
    prefixed = {f"module._orig_mod.{key}": value for key, value in state.items()}
    args = argparse.Namespace(model="SiT-XL/2" if kind == "repa" else "DiT-XL/2", num_classes=1000 if kind == "repa" else 10)
    args.lr, args.data, args.seed = np.float64(1e-4), Path("/data"), np.int64(3)
    if kind == "repa":
        args.path_type, args.enc_type, args.prediction = "linear", "dinov2-vit-b", "v"
    training = {"model": state, "ema": state, "opt": {"state": {}}, "args": args, "steps": 5}
    return {
        "bare": state,
        "prefixed": prefixed,
        "state_dict": {"state_dict": prefixed, "epoch": 3},
        "model_state_dict": {"model_state_dict": state},
        "model_ema": {"model_ema": prefixed, "model": {"nothing": torch.zeros(1)}},
        "net": {"net": state},
        "training": training,
    }[how]


@pytest.mark.parametrize("how", ["bare", "prefixed", "state_dict", "model_state_dict", "model_ema", "net", "training"])
def test_what_weights_are_wrapped_in_is_seen_through(kind, how, tmp_path):
    torch.save(wrapped(kind, how), tmp_path / "w.pt")
    content = open_checkpoint(tmp_path / "w.pt", "auto" if kind == "repa" or how == "training" else kind, **TOLD)
    recipe, state = recipe_of(content, weights_of(content)), weights_of(content)
    assert recipe.time_map == {"repa": None, "dit": "ddpm"}[kind]
    assert recipe.transport.path_type == {"repa": "Linear", "dit": "VP"}[kind]
    model = build_with(recipe, state).eval()
    inputs = 1 - numbers("repa", "t")[0] if kind == "repa" else numbers("dit", "t")[0]
    x, y, out = numbers(kind, "x", "y", "out" if kind == "repa" else "noise")
    with torch.no_grad():
        assert (model(x, inputs, y) - (-out if kind == "repa" else out)).abs().max() < 1e-5
    assert "opt" not in content and str(tmp_path / "w.pt") in content["translated"]
    assert ("optimizer" in content["translated"]) == (how == "training" and kind == "repa")


@pytest.mark.parametrize("layout", ["file", "folder", "transformer"])
def test_safetensors_and_folders(layout, tmp_path):
    path = tmp_path / "w.safetensors"
    if layout == "file":
        save_file({key: value.contiguous() for key, value in weights("repa").items()}, path)
    else:
        path = tmp_path / "w"
        in_folder(weights("repa"), path / "transformer" if layout == "transformer" else path)
    content = open_checkpoint(path, **(TOLD if layout == "file" else {}))
    assert recipe_of(content, weights_of(content)).model_args["num_heads"] == 4


def test_the_first_version_of_repa_named_its_later_blocks_otherwise(tmp_path):
    state = weights("repa")
    old = {key.replace("blocks.2.", "decoder_blocks.0."): value for key, value in state.items() if "projectors" not in key}
    torch.save(old, tmp_path / "old.pt")
    torch.save(state, tmp_path / "new.pt")
    old, new = (weights_of(open_checkpoint(tmp_path / f"{name}.pt", **TOLD)) for name in ("old", "new"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in new)


def test_a_file_that_may_be_sit_s_or_dit_s_is_asked_about(files, trained, tmp_path, capsys):
    flags = ["--vae", VAE, "--image-size", 32, "--out", tmp_path / "s.png"]
    with pytest.raises(UsageError, match="give --kind sit, with its --prediction, or --kind dit"):
        Pipeline.load(files["dit"], vae=VAE, **TOLD)
    for given, path in (("sit", "VP"), ("dit", "VP"), ("sit", "Linear")):
        more = dict(path_type=path) if given == "sit" else {}
        assert Pipeline.load(files["dit"], kind=given, vae=VAE, **TOLD, **more).transport.settings.path_type == path
    assert Pipeline.load(files["dit"], vae=VAE, prediction="noise", **TOLD).recipe.time_map is None  # SiT's own word
    one_line(call(capsys, "sample", "ODE", "--ckpt", trained, "--kind", "dit", *flags), 2, "--kind dit contradicts", trained)
    one_line(call(capsys, "sample", "ODE", "--kind", "edm"), 2, "--kind")
    one_line(call(capsys, "sample", "ODE", "--kind", "dit"), 2, "--kind dit: give the file as --ckpt")
    with pytest.raises(UsageError, match=r"--kind dit contradicts .* twice as many channels"):
        bare = {key: value for key, value in weights("repa").items() if "projectors" not in key}
        torch.save(bare, tmp_path / "bare.pt")
        open_checkpoint(tmp_path / "bare.pt", "dit", **TOLD)


def test_published_weights_are_known_by_their_size(files, monkeypatch):
    monkeypatch.setattr("common.dialects.KNOWN_SIT", {files["dit"].stat().st_size})
    assert "recipe" not in open_checkpoint(files["dit"], **TOLD)  # not asked about: it is SiT's
    with pytest.raises(UsageError, match="--kind dit contradicts"):
        open_checkpoint(files["dit"], "dit", **TOLD)


def test_what_models_py_has_not_is_one_line(tmp_path):
    state = weights("repa") | {"blocks.0.attn.q_norm.weight": torch.ones(12)}
    torch.save(state, tmp_path / "normed.pt")
    with pytest.raises(UserError, match=r"normed\.pt: its attention normalises .*blocks\.0\.attn\.q_norm\.weight"):
        open_checkpoint(tmp_path / "normed.pt", **TOLD)
    torch.save({"model": weights("repa"), "args": argparse.Namespace(path_type="spiral", enc_type="x")}, tmp_path / "path.pt")
    with pytest.raises(UserError, match=r"path\.pt: its path is 'spiral'"):
        open_checkpoint(tmp_path / "path.pt", **TOLD)


BROKEN = {
    "no config": "not one in diffusers' layout",
    "config": "its config.json cannot be read",
    "no weights": "there is no such file",
    "weights": "not a checkpoint, or a damaged one",
    "other weights": "holds no SiT weights .*transformer_blocks",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_is_none_of_ours_is_one_line(what, tmp_path):
    part = tmp_path / "transformer"
    part.mkdir()
    if what != "no config":
        (part / "config.json").write_text("[1" if what == "config" else "{}")
    file = part / "diffusion_pytorch_model.safetensors"
    if what == "weights":
        file.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    if what == "other weights":
        save_file({"transformer_blocks.0.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=BROKEN[what]):
        open_checkpoint(tmp_path)


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("attacked"),)


def test_values_are_no_code_and_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(a=np.float32(0.5), b=np.bool_(True), c=[Path("x"), np.int64(7)], d={"e": (1, None)})
    torch.save({"ema": weights("dit"), "args": args}, "values.pt")
    assert vars(load_checkpoint("values.pt")["args"]) | {"c": 0} == vars(args) | {"c": 0}
    torch.save({"ema": weights("dit"), "args": argparse.Namespace(bad=Attack())}, "attack.pt")
    with open("attack.bin", "wb") as file:
        pickle.dump(Attack(), file)
    for name in ("attack.pt", "attack.bin"):
        with pytest.raises(UserError, match=f"{name}: (refused, loading it would run code|not a checkpoint)"):
            open_checkpoint(Path(name))
    assert not Path("attacked").exists()


def trained_on_digits(steps, path=None):
    """A network that learnt the noise in the digits' latents, at DiT's own steps; or as SiT, on a path."""
    torch.manual_seed(0)
    digits, autoencoder = DigitsDataset(32), load_autoencoder(VAE)
    parts = [autoencoder.moments(to_pixels(part))[0] for part in digits.images.split(500)]
    latents, labels = autoencoder.latents(torch.cat(parts), 0, 0), torch.tensor(digits.labels)
    model = SiT_models["SiT-T/2"](input_size=8, num_classes=10, learn_sigma=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        some, k, noise = torch.randint(5000, (128,)), torch.randint(1000, (128,)), torch.randn(128, 4, 8, 8)
        kept = PRODUCTS[k].float().view(-1, 1, 1, 1)
        if path is None:
            loss = (model(kept.sqrt() * latents[some] + (1 - kept).sqrt() * noise, k, labels[some]) - noise).square().mean()
        else:
            loss = create_transport(path, "noise").training_losses(model, latents[some], dict(y=labels[some]))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


PRODUCTS = torch.from_numpy(NUMBERS["dit/alphas_cumprod"])


@torch.no_grad()
def ddim(model, x, labels, scale):
    """DDIM (Song et al., arXiv 2010.02502) of all 1,000 steps, guided."""
    both = torch.tensor([*labels, *[10] * len(labels)])
    for k in range(999, -1, -1):
        cond, null = model(torch.cat([x, x]), torch.full((2 * len(x),), k), both).chunk(2)
        noise, kept, before = (
            null + scale * (cond - null),
            PRODUCTS[k].float(),
            PRODUCTS[k - 1].float() if k else torch.ones(()),
        )
        x = before.sqrt() * (x - (1 - kept).sqrt() * noise) / kept.sqrt() + (1 - before).sqrt() * noise
    return x


@pytest.mark.slow
@pytest.mark.parametrize("path", ["VP", "Linear"])
def test_a_sit_that_learnt_noise_is_not_taken_for_a_dit(path, tmp_path):
    torch.set_num_threads(2)
    torch.save(trained_on_digits(200, path).state_dict(), tmp_path / "noise.pt")
    torch.set_num_threads(1)
    with pytest.raises(UsageError, match="tell neither"):
        open_checkpoint(tmp_path / "noise.pt", image_size=32)
    assert "recipe" not in open_checkpoint(tmp_path / "noise.pt", prediction="noise")


@pytest.mark.slow
def test_a_bare_file_trained_at_dit_s_steps_is_found_and_sampled_as_by_ddim(tmp_path):
    """From the same noise: DDIM of 1,000 steps is the ODE's own way."""
    torch.set_num_threads(2)
    model = trained_on_digits(300)
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    pipe = Pipeline.load(tmp_path / "dit.pt", vae=VAE, image_size=32)
    assert pipe.recipe.time_map == "ddpm" and pipe.transport.settings.prediction == "noise"
    labels, guidance = [i % 10 for i in range(20)], Guidance(4.0, channels=None)
    theirs = ddim(model, SampleStreams(0, range(20)).randn((4, 8, 8), "cpu"), labels, 4.0)
    ode = pipe.draw(labels, solver=ODE("heun", num_steps=51), guidance=guidance)[-1]
    sde = pipe.draw(labels, solver=SDE(num_steps=100), guidance=guidance)[-1]
    torch.set_num_threads(1)
    assert theirs.std() > 0.4 and (ode - theirs).abs().mean() < 0.03 * theirs.std()  # the two ends lie a step apart
    assert abs(sde.std() / theirs.std() - 1) < 0.15  # other samples, as wide
