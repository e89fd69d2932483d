"""DINOv2 by hand, and the files that it is read from."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from common.errors import UserError
from metrics.networks import MEAN, STD, at_224_pixels, load_dinov2, load_networks

WIDTH, DEPTH = 128, 2  # two heads of 64


@pytest.fixture(scope="module")
def state():
    """A small DINOv2's weights under facebook's names, for 37 x 37 patches, of a size at which all of them matter."""
    numbers = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + 37**2, WIDTH), "mask_token": (1, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 14, 14), "patch_embed.proj.bias": (WIDTH,)}
    parts = {"norm1": WIDTH, "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "ls1.gamma": (WIDTH,)}
    parts |= {"norm2": WIDTH, "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH), "ls2.gamma": (WIDTH,)}
    layers = {f"blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in parts.items()} | {"norm": WIDTH}
    for name, shape in layers.items():
        if name.endswith("gamma"):
            shapes[name] = shape
        else:
            shape = (shape,) if isinstance(shape, int) else shape
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: torch.randn(shape, generator=numbers) / max(shape[1:], default=4) ** 0.5 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vitl14_pretrain.pth"
    torch.save(state, path)
    return path


def by_hand(state, x):
    """DINOv2's class token of normalised pixels (N, 3, 224, 224), from its paper's equations."""
    layer = lambda name, x: F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    norm = lambda name, x: F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)  # noqa: E731
    patches = x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), tokens], 1) + at_224_pixels(state["pos_embed"])
    for i in range(DEPTH):
        q, k, v = (
            layer(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", tokens)).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        )
        mixed = ((q @ k.transpose(2, 3) / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + state[f"blocks.{i}.ls1.gamma"] * layer(f"blocks.{i}.attn.proj", mixed)
        hidden = F.gelu(layer(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", tokens)))
        tokens = tokens + state[f"blocks.{i}.ls2.gamma"] * layer(f"blocks.{i}.mlp.fc2", hidden)
    return norm("norm", tokens)[:, 0]


def test_the_class_token_by_hand(state, file, sample_images):
    network = load_dinov2(file)
    assert network.widths == (WIDTH,)
    images = torch.tensor(sample_images[:2]).permute(0, 3, 1, 2)
    (found,) = network(images)
    expected = by_hand(state, network.see(images))
    assert found.std(0).mean() > 0.02  # or nothing here would prove anything
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (480, 300)])
def test_images_are_resized_as_pil_does(file, size):
    """Bicubic with antialiasing, to a level: PIL rounds to 8 bits after each direction."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([127 + 120 * np.sin(x / 5 + y / 9 + c) for c in range(3)], -1).round().astype(np.uint8)
    seen = load_dinov2(file).see(torch.tensor(image).permute(2, 0, 1)[None])[0]
    levels = 255 * (seen * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.BICUBIC), np.float32)
    assert np.abs(levels.permute(1, 2, 0).numpy() - expected).max() < 1.1


def test_positions_are_where_the_original_samples_them():
    """Patch i of 16 lies at (i + 0.5) 37 / 16.1 - 0.5 of 37, between four patches, by cubic convolution with a = -0.75."""
    a, pos_embed = -0.75, torch.randn(1, 1 + 37**2, 3)
    weights = np.zeros((16, 37))
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            s = abs(place - j)
            near, far = (a + 2) * s**3 - (a + 3) * s**2 + 1, a * (s**3 - 5 * s**2 + 8 * s - 4)
            weights[i, min(max(j, 0), 36)] += near if s <= 1 else far
    found = at_224_pixels(pos_embed)
    expected = np.einsum("ij,kl,jlc->ikc", weights, weights, pos_embed[0, 1:].reshape(37, 37, 3).numpy())
    np.testing.assert_allclose(found[0, 1:].reshape(16, 16, 3), expected, atol=1e-4)
    assert torch.equal(found[:, 0], pos_embed[:, 0]) and at_224_pixels(found) is found


def test_files_of_timm_and_for_224_pixels_give_the_same(state, file, tmp_path, sample_images):
    images = torch.tensor(sample_images[:1]).permute(0, 3, 1, 2)
    (expected,) = load_dinov2(file)(images)
    small = {name: value for name, value in state.items() if name != "mask_token"} | {
        "pos_embed": at_224_pixels(state["pos_embed"])
    }
    save_file({name: value.contiguous() for name, value in small.items()}, tmp_path / "model.safetensors")
    torch.testing.assert_close(load_dinov2(tmp_path / "model.safetensors")(images)[0], expected)


class Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_files_that_are_none_are_one_line(state, file, tmp_path):
    def refused(name, message):
        with pytest.raises(UserError, match=message) as raised:
            load_dinov2(tmp_path / name)
        assert str(raised.value).startswith("--dinov2-weights ") and name in str(raised.value) and "\n" not in str(raised.value)

    refused("nothing.pth", "there is no such file")
    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 40)
    for name in ("cut.pth", "text.pth", "cut.safetensors"):
        refused(name, "not a checkpoint, or a damaged one|cannot be read")
    torch.save({"cls_token": Harmful(tmp_path / "harm")}, tmp_path / "code.pth")
    refused("code.pth", "refused, loading it would run code")
    assert not (tmp_path / "harm").exists()
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    torch.save(state | {"cls_token": torch.ones(3)}, tmp_path / "shape.pth")
    torch.save(state | {"pos_embed": "words"}, tmp_path / "words.pth")
    torch.save(state | {"pos_embed": torch.ones(1, 300, WIDTH)}, tmp_path / "grid.pth")
    for name in ("other.pth", "shape.pth", "words.pth", "grid.pth"):
        refused(name, "these are not the weights of a DINOv2")
    torch.save({name: value for name, value in state.items() if name != "norm.bias"}, tmp_path / "less.pth")
    torch.save(state | {"register_tokens": torch.ones(1, 4, WIDTH)}, tmp_path / "registers.pth")
    refused("less.pth", "norm.bias")
    refused("registers.pth", "register_tokens")


def test_without_a_network_the_mend_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"--dinov2-weights hub:timm/vit_large.*cannot download.*give the file as --dinov2-weights"
    ):
        load_dinov2()


def test_pixels_are_box_averages_of_grey(sample_images):
    (found,) = load_networks(["pixels"], {}, "cpu")["pixels"](torch.tensor(sample_images).permute(0, 3, 1, 2))
    grey = sample_images.astype(np.float64).mean(3) / 255
    expected = grey.reshape(7, 16, 2, 16, 2).mean((2, 4)).reshape(7, 256)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    odd = torch.full((1, 3, 28, 28), 51, dtype=torch.uint8)  # digits of other sizes
    np.testing.assert_allclose(load_networks(["pixels"], {}, "cpu")["pixels"](odd)[0].numpy(), 0.2, atol=1e-6)
