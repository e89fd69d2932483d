import json

import pytest
import torch
from diffusers import AutoencoderKL

from cli import ROOT
from common.errors import UserError
from data.autoencoder import load_autoencoder, to_uint8
from data.images import DigitsDataset, held_out_digits, to_pixels

VAE = ROOT / "assets" / "digits-vae"


def test_numbers_come_from_its_config():
    config = json.loads((VAE / "config.json").read_text())
    autoencoder = load_autoencoder(str(VAE))
    assert (autoencoder.channels, autoencoder.factor) == (config["latent_channels"], 4)
    assert autoencoder.scale == config["scaling_factor"] != 0.18215
    mean, std = autoencoder.moments(torch.zeros(2, 3, 32, 32))
    assert mean.shape == std.shape == (2, 4, 8, 8) and std.min() > 0
    noise = torch.randn_like(mean)
    autoencoder.shift = 0.5
    x = autoencoder.latents(mean, std, noise)
    assert torch.allclose(x, (mean + std * noise - 0.5) * autoencoder.scale)
    assert torch.allclose(autoencoder.decode(x), autoencoder.vae.decode(mean + std * noise).sample, atol=1e-5)
    assert not any(p.requires_grad for p in autoencoder.vae.parameters()) and not x.requires_grad
    assert not any(p.requires_grad for p in [autoencoder.decode(x)])


@pytest.mark.slow
def test_latents_have_unit_scale_and_reconstructions_are_recognised():
    from digit_classifier import features, train_classifier

    digits, held = DigitsDataset(32), held_out_digits()
    autoencoder = load_autoencoder(str(VAE))
    mean, std = autoencoder.moments(to_pixels(digits.images[held]))
    x = autoencoder.latents(mean, std, torch.randn_like(std))
    assert 0.9 < x.std() < 1.1
    classifier, _ = train_classifier()
    right = classifier.predict(features(to_uint8(autoencoder.decode(x)).numpy())) == digits.labels[held]
    assert right.mean() >= 0.96


def test_what_it_does_at_once_is_limited(monkeypatch):
    autoencoder, digits = load_autoencoder(str(VAE)), to_pixels(DigitsDataset(32).images[:5])
    sizes = {"encoder": [], "decoder": []}
    for name, seen in sizes.items():
        hook = lambda module, inputs, output, seen=seen: seen.append(len(inputs[0]))  # noqa: E731
        getattr(autoencoder.vae, name).register_forward_hook(hook)
    mean, std = autoencoder.moments(digits)
    whole = autoencoder.decode(mean)
    slices = autoencoder.decode(mean, batch_size=2)
    assert torch.allclose(whole, slices, atol=1e-5) and sizes == {"encoder": [5], "decoder": [5, 2, 2, 1]}
    monkeypatch.setattr("data.autoencoder._slice", lambda *sides: {(32, 32): 3}[sides])  # as large images would have it
    assert torch.allclose(autoencoder.moments(digits)[0], mean, atol=1e-5)
    assert torch.allclose(autoencoder.moments(digits)[1], std, atol=1e-5)
    assert torch.allclose(autoencoder.decode(mean), whole, atol=1e-5)
    assert sizes == {"encoder": [5, 3, 2, 3, 2], "decoder": [5, 2, 2, 1, 3, 2]}


def test_large_images_are_decoded_in_tiles():
    autoencoder = load_autoencoder(str(VAE))
    digits = DigitsDataset(32).images[::1250][:4]
    large = torch.cat([torch.cat([*digits[:2]], 2), torch.cat([*digits[2:]], 2)], 1)[None]  # 64 x 64, of 32 x 32 digits
    mean, std = autoencoder.moments(to_pixels(large))
    x = autoencoder.latents(mean, std, 0)
    calls = []
    autoencoder.vae.decoder.register_forward_hook(lambda module, inputs, output: calls.append(tuple(inputs[0].shape)))
    whole, tiled = autoencoder.decode(x), autoencoder.decode(x, tiling=True)
    assert calls[0] == (1, 4, 16, 16) and len(calls) > 4 and max(calls[1:]) == (1, 4, 8, 8)
    assert whole.shape == tiled.shape and (whole - tiled).abs().mean() < 0.1
    assert torch.equal(autoencoder.decode(x), whole)  # the next one that does not ask for tiles gets none
    assert torch.equal(autoencoder.moments(to_pixels(large))[0], mean)
    small = x[..., :8, :8]
    assert torch.equal(autoencoder.decode(small, tiling=True), autoencoder.decode(small))


def test_it_is_small():
    assert (VAE / "diffusion_pytorch_model.safetensors").stat().st_size < 2_000_000


def test_pixel_space_changes_nothing():
    autoencoder = load_autoencoder("none")
    pixels = torch.rand(1, 3, 4, 4) * 2 - 1
    assert torch.equal(autoencoder.decode(autoencoder.latents(*autoencoder.moments(pixels), torch.randn(1, 3, 4, 4))), pixels)
    assert (autoencoder.channels, autoencoder.factor) == (3, 1)


def test_uint8_rounds_and_clamps():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(1, 3, 1, 5)
    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(to_uint8(to_pixels(levels)).permute(0, 3, 1, 2), levels)  # there and back


def test_what_cannot_be_loaded_is_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no autoencoder there"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a readable AutoencoderKL"):
        load_autoencoder(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"download https://huggingface.co/stabilityai/sd-vae-ft-ema .* --vae") as caught:
        load_autoencoder("ema")
    assert "\n" not in str(caught.value)


def test_numbers_of_each_channel_are_honoured(tmp_path):
    """latents_mean and latents_std of a config, as diffusers' pipelines do: decoding multiplies and adds them."""
    vae = AutoencoderKL.from_pretrained(ROOT / "assets" / "digits-vae")
    numbers = dict(latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[1.0, 2.0, 0.5, 3.0])
    vae.register_to_config(**numbers)
    vae.save_pretrained(tmp_path / "vae")
    plain, other = load_autoencoder(str(ROOT / "assets" / "digits-vae")), load_autoencoder(str(tmp_path / "vae"))
    assert plain.config_hash != other.config_hash
    mean, std = plain.moments(to_pixels(DigitsDataset(32).images[:2]))
    x = other.latents(mean, std, torch.ones_like(mean))
    center, spread = (torch.tensor(values).view(-1, 1, 1) for values in numbers.values())
    torch.testing.assert_close(x, (mean + std - center) / spread * plain.scale)
    torch.testing.assert_close(other.decode(x), plain.decode((mean + std) * plain.scale))
    vae.register_to_config(latents_mean=[0.5])
    vae.save_pretrained(tmp_path / "bad")
    with pytest.raises(UserError, match="1 numbers in latents_mean or latents_std for 4 channels"):
        load_autoencoder(str(tmp_path / "bad"))
