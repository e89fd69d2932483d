import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from inference.guidance import compile_network
from models import SiT, SiT_models

REFERENCE = np.load(Path(__file__).parent / "data" / "reference.npz")
SMALL = dict(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=5)

# Parameters with patch 2, 4 and 8 for 32 x 32 latents and 1000 classes, learn_sigma.
PARAMETERS = {
    "S": (32_963_360, 32_945_024, 33_148_160),
    "B": (130_512_416, 130_475_648, 130_881_536),
    "L": (458_102_816, 458_053_760, 458_594_816),
    "XL": (675_129_632, 675_074_432, 675_683_072),
    "3B": (3_036_917_792, 3_036_819_584, 3_037_901_312),
    "8B": (8_189_061_152, 8_188_913_792, 8_190_536_192),
    "17B": (16_971_620_384, 16_971_423_872, 16_973_586_944),
}


def small_model(**kwargs):
    """A small model in evaluation mode that does something: a fresh one returns 0."""
    model = SiT(**{**SMALL, **kwargs}).eval()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(n=4):
    return torch.randn(n, 4, 8, 8), torch.rand(n), torch.randint(0, 5, (n,))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["tiny", "nosigma"])
def test_agrees_with_the_published_code(name, compiled):
    config = json.loads(str(REFERENCE[f"model/{name}/cfg"]))
    model = SiT(**config).eval()
    state = model.state_dict()
    for key in state.keys() - {"pos_embed"}:
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        state[key] = torch.from_numpy(rng.standard_normal(state[key].shape) * 0.08).float()
    model.load_state_dict(state, strict=True)
    if compiled:
        compile_network(model)

    rng = np.random.default_rng(7)
    size, null = config["input_size"], config["num_classes"]
    x = torch.from_numpy(rng.standard_normal((4, config["in_channels"], size, size))).float()
    t = torch.from_numpy(rng.random(4)).float()
    y = torch.from_numpy(rng.integers(0, null + 1, 4))
    with torch.no_grad():
        out = model(x, t, y)
        out_cfg = model.forward_with_cfg(x, t, torch.tensor([y[0], y[1], null, null]), 2.5)
    for ours, theirs in ((out, f"model/{name}/out"), (out_cfg, f"model/{name}/out_cfg")):
        theirs = torch.from_numpy(REFERENCE[theirs])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts(size):
    with torch.device("meta"):
        models = [SiT_models[f"SiT-{size}/{patch}"](input_size=32, num_classes=1000) for patch in (2, 4, 8)]
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == PARAMETERS[size]


def test_state_dict_has_the_published_names_and_shapes():
    linears = {
        "t_embedder.mlp.0": (32, 256),
        "t_embedder.mlp.2": (32, 32),
        "final_layer.linear": (2 * 2 * 8, 32),
        "final_layer.adaLN_modulation.1": (2 * 32, 32),
    }
    for i in range(2):
        linears[f"blocks.{i}.attn.qkv"] = (3 * 32, 32)
        linears[f"blocks.{i}.attn.proj"] = (32, 32)
        linears[f"blocks.{i}.mlp.fc1"] = (4 * 32, 32)
        linears[f"blocks.{i}.mlp.fc2"] = (32, 4 * 32)
        linears[f"blocks.{i}.adaLN_modulation.1"] = (6 * 32, 32)
    expected = {
        "pos_embed": (1, 16, 32),
        "x_embedder.proj.weight": (32, 4, 2, 2),
        "x_embedder.proj.bias": (32,),
        "y_embedder.embedding_table.weight": (6, 32),
    }
    for name, shape in linears.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    model = SiT(**SMALL)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_fresh_model_returns_zero(learn_sigma):
    out = SiT(**SMALL, learn_sigma=learn_sigma)(*inputs())
    assert out.shape == (4, 4, 8, 8)
    assert not out.any()


def test_initial_weights():
    model = SiT(**{**SMALL, "hidden_size": 128, "num_classes": 200})
    qkv, patches = model.blocks[1].attn.qkv.weight, model.x_embedder.proj.weight
    for weight, fans in ((qkv, 128 + 3 * 128), (patches, 128 + 4 * 2 * 2)):  # xavier: uniform within sqrt(6 / fans)
        bound = math.sqrt(6 / fans)
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for weight in (model.y_embedder.embedding_table.weight, *(model.t_embedder.mlp[i].weight for i in (0, 2))):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias") or "adaLN" in name)


def test_pos_embed_has_the_column_first_and_the_row_last():
    pos_embed = SiT(**{**SMALL, "input_size": 6}).pos_embed.reshape(3, 3, 32)
    frequencies = 10000.0 ** -(np.arange(8) / 8)

    def wave(position):
        return torch.from_numpy(np.concatenate([np.sin(position * frequencies), np.cos(position * frequencies)])).float()

    for row in range(3):
        for column in range(3):
            torch.testing.assert_close(pos_embed[row, column], torch.cat([wave(column), wave(row)]), rtol=0, atol=1e-7)


def test_training_replaces_labels_with_one_draw():
    model, (x, t, y) = small_model(class_dropout_prob=0.4), inputs(16)
    torch.manual_seed(1)
    dropped = torch.where(torch.rand(16) < 0.4, 5, y)  # 5, the number of classes, is the null class
    assert 0 < (dropped == 5).sum() < 16
    after_one_draw = torch.get_rng_state()
    expected = model(x, t, dropped)

    torch.manual_seed(1)
    torch.testing.assert_close(model.train()(x, t, y), expected)
    assert torch.equal(torch.get_rng_state(), after_one_draw)


def test_force_drop_ids_take_the_place_of_the_draw():
    model, (x, t, y) = small_model(class_dropout_prob=0.5), inputs()
    expected = model(x, t, torch.tensor([y[0], 5, y[2], 5]))
    before = torch.get_rng_state()
    out = model.train()(x, t, y, force_drop_ids=torch.tensor([False, True, False, True]))
    torch.testing.assert_close(out, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_drops_no_label():
    model, (x, t, y) = small_model(class_dropout_prob=1.0), inputs()
    assert not torch.allclose(model(x, t, y), model(x, t, torch.full_like(y, 5)))


def test_no_null_class_without_dropout():
    model, (x, t, y) = small_model(class_dropout_prob=0.0), inputs()
    assert model.y_embedder.embedding_table.num_embeddings == 5
    torch.testing.assert_close(model.train()(x, t, y), model.eval()(x, t, y))


@torch.no_grad()
def test_bfloat16_model():
    model, (x, t, y) = small_model(), inputs()
    expected = model(x, t, y)
    out = model.to(torch.bfloat16)(x, t, y)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_time_features_are_float32_in_a_bfloat16_model():
    t = torch.tensor([0.999, 1.0])  # the same number in bfloat16
    model = small_model()
    features = model.t_embedder.features(t)
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(features, torch.cat([angles.cos(), angles.sin()], dim=1).float(), rtol=0, atol=1e-6)

    early, late = model.to(torch.bfloat16).t_embedder(t)
    assert torch.equal(model.t_embedder.features(t), features)
    assert not torch.equal(early, late)


def test_time_is_embedded_in_float32_beside_bfloat16():
    model, (x, t, y) = small_model(), inputs()
    exact, seen = model.t_embedder(t), []
    model.blocks[0].adaLN_modulation.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):  # training
        assert torch.equal(model.t_embedder(t), exact)
        model(x, t, y)
    model.to(torch.bfloat16).t_embedder.float()  # sampling; here the weights have been rounded
    assert model.t_embedder(t).dtype == torch.float32
    assert model(x, t, y).dtype == torch.float32 and seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("guided_channels", [3, None])
def test_guidance(guided_channels):
    model, (x, t, y) = small_model(), inputs()
    y[2:] = 5
    t[2:] = t[:2]
    x[2:] = x[:2]
    cond, uncond = model(x, t, y).chunk(2)
    out = model.forward_with_cfg(x, t, y, 2.5, guided_channels)
    expected = torch.cat([uncond + 2.5 * (cond - uncond)] * 2)
    if guided_channels:  # the fourth channel stays as it was for each half
        expected[:, 3] = torch.cat([cond, uncond])[:, 3]
    torch.testing.assert_close(out, expected)


def test_guidance_is_on_three_channels_and_reads_the_first_half():
    model, (x, t, y) = small_model(), inputs()
    out = model.forward_with_cfg(x, t, y, 2.5)
    x[2:] = float("nan")
    assert torch.equal(model.forward_with_cfg(x, t, y, 2.5), out)
    assert torch.equal(model.forward_with_cfg(x, t, y, 2.5, guided_channels=3), out)


def test_a_batch_equals_its_samples_one_by_one():
    model, (x, t, y) = small_model(), inputs()
    one_by_one = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, t, y), one_by_one)


def test_input_size_must_be_a_multiple_of_the_patch_size():
    with pytest.raises(ValueError, match="9"):
        SiT(**{**SMALL, "input_size": 9})


def test_gradient_checkpointing_gives_the_same_gradients():
    model, (x, t, y) = small_model(class_dropout_prob=0.0).train(), inputs()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        calls.clear()
        model(x, t, y).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert len(calls) == (2 if model.grad_checkpointing else 1)  # once more in the backward pass
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)
