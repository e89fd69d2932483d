import argparse
import os
import pickle

import pytest
import torch

from common.checkpoint import load_checkpoint, load_weights, save_checkpoint, weights_of
from common.errors import UsageError, UserError
from common.recipe import Recipe, recipe_of
from download import find_model
from models import SIT_CONFIGS, SiT
from transport import TransportSettings


def small(**changes):
    args = dict(SIT_CONFIGS["SiT-T/2"], input_size=8, in_channels=4, mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=7)
    return args | dict(learn_sigma=True) | changes


@pytest.fixture
def published(tmp_path):
    """A bare state dict, as the published weights are."""
    path = tmp_path / "bare.pt"
    torch.save(SiT(**small()).state_dict(), path)
    return path


def test_shapes_describe_a_bare_state_dict(published):
    content = load_checkpoint(published)
    recipe = recipe_of(content, weights_of(content), published)
    assert recipe.model == "SiT-T/2" and recipe.model_args == small()
    assert recipe.image_size is None and recipe.null_class == 7 and recipe.transport is None
    load_weights(recipe.build(), weights_of(content), published)
    without_sigma = SiT(**small(learn_sigma=False, input_size=16)).state_dict()
    args = recipe_of(without_sigma, without_sigma).model_args
    assert args["learn_sigma"] is False and args["input_size"] == 16
    with pytest.raises(UsageError, match=r"SiT-T/4.*SiT-T/2"):
        recipe_of(content, content, published, "SiT-T/4")


def test_published_training_checkpoint_with_a_namespace(tmp_path):
    model = SiT(**small()).state_dict()
    ema = {key: value + 1 for key, value in model.items()}
    args = argparse.Namespace(model="SiT-T/2", image_size=64, num_classes=7, path_type="GVP", prediction="score", vae="ema")
    path = tmp_path / "0000100.pt"
    torch.save({"model": model, "ema": ema, "opt": {}, "args": args}, path)
    content = load_checkpoint(path)
    state = weights_of(content, path)
    assert torch.equal(state["pos_embed"], ema["pos_embed"])
    recipe = recipe_of(content, state, path)
    assert (recipe.transport.path_type, recipe.transport.prediction) == ("GVP", "score")
    assert (recipe.vae, recipe.image_size) == ("ema", 64)
    assert torch.equal(find_model(str(path))["pos_embed"], ema["pos_embed"])


def test_a_recipe_survives_the_file(tmp_path):
    transport = TransportSettings("VP", "noise", "velocity", 1e-4)
    recipe = Recipe("SiT-T/2", small(), 64, "none", "none", transport, ["a", "b"])
    path = tmp_path / "c.pt"
    save_checkpoint({"ema": SiT(**small()).state_dict(), "recipe": recipe.to_dict()}, path)
    content = load_checkpoint(path)
    assert recipe_of(content, weights_of(content)) == recipe


def test_a_recipe_of_a_newer_version_is_refused_by_name():
    recipe = Recipe("SiT-T/2", small(), 64, "none", "none", TransportSettings(), ["a", "b"]).to_dict()
    with pytest.raises(UserError, match=r"c\.pt: its recipe is of format 3, written by a newer version"):
        Recipe.from_dict(recipe | {"format": 3}, "c.pt")
    with pytest.raises(UserError, match="its recipe has from_the_future, which this version does not know"):
        Recipe.from_dict(recipe | {"from_the_future": 1})
    with pytest.raises(UserError, match=r"its recipe makes no sense here .*time law 'of the future'"):
        Recipe.from_dict(recipe | {"transport": recipe["transport"] | {"time_law": "of the future"}})
    with pytest.raises(UserError, match="model SiT-Q/2 is not known here"):
        Recipe.from_dict(recipe | {"model": "SiT-Q/2"}).build()


def test_a_recipe_of_the_first_format_is_read():
    first = dict(model="SiT-T/2", model_args=small(), image_size=64, vae="none", vae_hash="none", path_type="VP")
    first |= dict(prediction="noise", loss_weight=None, train_eps=1e-4, sample_eps=None, classes=[])
    recipe = Recipe.from_dict(first)
    assert recipe.transport == TransportSettings("VP", "noise", train_eps=1e-4) and recipe.latent_shape == (4, 8, 8)
    unsaid = dict.fromkeys(("path_type", "prediction", "loss_weight", "train_eps", "sample_eps"))
    assert Recipe.from_dict(first | unsaid).transport is None


def test_a_width_that_no_configuration_has_needs_its_heads():
    content = SiT(**small(hidden_size=48, num_heads=3, depth=2)).state_dict()
    with pytest.raises(UserError, match=r"no SiT configuration has depth 2, width 48 and patch 2.*num_heads"):
        recipe_of(content, content)
    recipe = recipe_of(content, content, num_heads=3)
    load_weights(recipe.build(), content)
    assert recipe.build().blocks[0].attn.num_heads == 3


def test_weights_by_their_names(tmp_path):
    states = {name: SiT(**small()).state_dict() for name in ("model", "ema", "ema-0.9")}
    states["ema-0.9"]["pos_embed"] = states["ema-0.9"]["pos_embed"] + 1
    assert torch.equal(weights_of(states, name="ema-0.9")["pos_embed"], states["ema-0.9"]["pos_embed"])
    with pytest.raises(UserError, match=r"has no weights 'ema-0\.5'; it has model, ema, ema-0\.9"):
        weights_of(states | {"step": 3}, name="ema-0.5")
    with pytest.raises(UserError, match="it has bare weights alone"):
        weights_of(states["ema"], name="model")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/evil-ran",)


def test_hostile_and_damaged_files_are_refused_by_name(tmp_path, published):
    evil = tmp_path / "evil.pt"
    torch.save({"ema": Evil()}, evil)
    legacy = tmp_path / "legacy.pt"
    legacy.write_bytes(pickle.dumps({"ema": Evil()}))
    for path in (evil, legacy):
        with pytest.raises(UserError, match=f"{path}.*(run code|not a checkpoint)"):
            load_checkpoint(path)
    assert not os.path.exists("/tmp/evil-ran")
    text = tmp_path / "text.pt"
    text.write_text("hello, I am no checkpoint")
    empty = tmp_path / "empty.pt"
    empty.touch()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(published.read_bytes()[:100_000])
    listing = tmp_path / "list.pt"
    torch.save([1, 2], listing)
    for path in (text, empty, cut, listing, tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(UserError, match=str(path)) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_other_weights_are_refused(tmp_path, published):
    content = load_checkpoint(published)
    with pytest.raises(UserError, match="no SiT weights"):
        weights_of({"layer.weight": torch.zeros(1)}, "other.pt")
    del content["blocks.0.attn.qkv.bias"]
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.bias"):
        load_weights(SiT(**small()), content)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint({"a": 1}, path)
    with pytest.raises(AttributeError):
        save_checkpoint({"a": lambda: None}, path)  # cannot be pickled
    assert load_checkpoint(path) == {"a": 1} and os.listdir(tmp_path) == ["c.pt"]


def test_args_of_another_dialect_are_one_line():
    content = {"ema": SiT(**small()).state_dict(), "args": {"path_type": "linear", "prediction": "velocity"}}
    with pytest.raises(UserError, match=r"c\.pt: its args make no sense here .*'linear'"):
        recipe_of(content, content["ema"], "c.pt")


@pytest.mark.parametrize("input_size, image_size, found", [
    ((4, 16), "32x128", ((4, 16), "32x128")),  # a square number of tokens, in no square
    ((4, 16), None, (8, None)),
    ((4, 8), "32x64", ((4, 8), "32x64")),
    (8, 64, (8, 64)),
    (8, 8, (8, 8)),
])  # fmt: skip
def test_sizes_of_a_bare_file(input_size, image_size, found):
    state = SiT(**small(input_size=input_size)).state_dict()
    recipe = recipe_of(state, state, image_size=image_size)
    assert (recipe.model_args["input_size"], recipe.image_size) == found


def test_a_bare_file_that_is_not_square_is_asked_about():
    state = SiT(**small(input_size=(4, 8))).state_dict()
    with pytest.raises(UserError, match="its 8 tokens make no square; give --image-size HEIGHTxWIDTH"):
        recipe_of(state, state)
    args = {"ema": state, "args": {"image_size": "32x64"}}
    assert recipe_of(args, state, image_size="64x128").image_size == "32x64"  # what the file says


def test_a_bare_table_without_a_null_row_is_told_by_its_classes():
    state = SiT(**small(class_dropout_prob=0.0)).state_dict()
    assert recipe_of(state, state).num_classes == 6  # as published files are
    recipe = recipe_of(state, state, num_classes=7)
    assert recipe.num_classes == 7 and recipe.null_class is None
    load_weights(recipe.build(), state)


def test_a_file_of_other_averages_names_one():
    """A snapshot, which has no ema."""
    state = {"pos_embed": torch.zeros(1, 4, 8), "x_embedder.proj.weight": torch.zeros(8, 3, 2, 2)}
    with pytest.raises(UserError, match="no ema; name one of its weights, such as --weights ema-power"):
        weights_of({"ema-power-0.1": state, "step": 3}, "snapshots/0000003.pt")
    assert weights_of({"ema-power-0.1": state, "step": 3}, "x", "ema-power-0.1") == state
