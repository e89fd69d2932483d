"""A network and its weights."""

import pytest
import torch

from common.checkpoint import load_checkpoint, weights_of
from common.errors import UserError
from common.recipe import Recipe, build_with, recipe_of


@pytest.fixture
def content(trained):
    return load_checkpoint(trained)


def test_weights_are_loaded_into_memory_of_their_own_and_none_are_drawn(content, monkeypatch):
    recipe, state = recipe_of(content, content["ema"]), weights_of(content)
    expected = recipe.build()
    expected.load_state_dict(state)
    before = torch.get_rng_state()
    model = build_with(recipe, state)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad, name
        assert ours.data_ptr() != state[name].data_ptr()


def test_weights_of_half_precision_become_float32(content):
    half = {name: value.half() for name, value in content["ema"].items()}
    model = build_with(recipe_of(content, half), half)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("broken", ["missing", "shape", "no tensor"])
def test_weights_that_do_not_fit_are_named(content, broken):
    state, name = dict(content["ema"]), "final_layer.linear.bias"
    state[name] = {"shape": torch.zeros(3), "no tensor": "weights"}.get(broken)
    if broken == "missing":
        del state[name]
    with pytest.raises(UserError, match=r"file.pt: the weights do not fit the model.*final_layer.linear.bias"):
        build_with(recipe_of(content, content["ema"]), state, "file.pt")


class WithBuffer(torch.nn.Module):
    """A backbone with a table that no file holds."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.arange(4), persistent=False)


def test_a_buffer_that_no_file_holds_is_made(monkeypatch):
    monkeypatch.setattr(Recipe, "build", lambda self: WithBuffer())
    model = build_with(Recipe("any", {}, 32), {"weight": torch.ones(2)})
    assert model.table.tolist() == [0, 1, 2, 3] and model.weight.tolist() == [1, 1]


def changed(state, **tensors):
    named = {
        "head": "final_layer.linear.bias",
        "table": "y_embedder.embedding_table.weight",
        "patches": "x_embedder.proj.weight",
    }
    named |= {"mlp": "blocks.0.mlp.fc1.weight", "time": "t_embedder.mlp.0.weight", "positions": "pos_embed"}
    names = {named[key]: value for key, value in tensors.items()}
    return {key: value for key, value in (state | names).items() if value is not ...}


STATES = {
    "no head": dict(head=...),
    "no table": dict(table=...),
    "no mlp": dict(mlp=...),
    "no time": dict(time=...),
    "patches of two dimensions": dict(patches=torch.zeros(128, 16)),
    "patches that are no tensor": dict(patches=None),
    "positions of one dimension": dict(positions=torch.zeros(16)),
    "a table without rows": dict(table=torch.zeros(0, 128)),
}


@pytest.mark.parametrize("what", STATES)
def test_what_is_no_state_of_ours_is_one_line(what, content):
    state = changed(content["ema"], **STATES[what])
    with pytest.raises(UserError, match=r"w.pt: (these are not a SiT's weights|holds no SiT weights)"):
        recipe_of(state, weights_of(state, "w.pt"), "w.pt")


ARGS = [dict(image_size="abc"), dict(image_size=32.5), dict(image_size=0), dict(num_heads="4"), dict(num_heads=-4)]
ARGS += [dict(path_type=["Linear"]), dict(path_type="Linear", train_eps="0"), dict(input_size=[4, 8])]


@pytest.mark.parametrize("args", ARGS)
def test_args_that_make_no_sense_are_one_line(args, content):
    state = content["ema"]
    with pytest.raises(UserError, match=r"w.pt: its args make no sense here \(.+\)"):
        recipe_of({"ema": state, "args": args}, state, "w.pt")


CHANGES = [dict(num_heads=7), dict(num_heads=0), dict(patch_size=0), dict(hidden_size="128"), dict(depth=10**5)]
CHANGES += [dict(hidden_size=10**9), dict(mlp_ratio=float("inf")), dict(input_size=-8), dict(more=1), None, {}]


@pytest.mark.parametrize("change", CHANGES)
def test_a_recipe_that_makes_no_sense_is_one_line(change, content):
    recipe = content["recipe"] | {"model": "SiT"}
    recipe["model_args"] = recipe["model_args"] | change if change else change
    with pytest.raises(UserError, match=r"w.pt: its recipe makes no sense here \(.+\)"):
        build_with(recipe_of({"recipe": recipe}, content["ema"], "w.pt"), content["ema"], "w.pt")


def test_a_config_beside_weights_is_believed_or_refused(content):
    """In diffusers' layout: sizes that shapes leave open are its, and what it denies of the weights is named."""
    state = content["ema"] | {"pos_embed": torch.zeros(1, 4, 128)}
    config = dict(num_heads=4, input_size=[8, 32], num_classes=11, class_dropout_prob=0.0)
    recipe = recipe_of({"ema": state, "config": config}, state, "f")
    assert recipe.latent_shape == (3, 8, 32) and recipe.null_class is None and recipe.num_classes == 11
    for key, value in dict(depth=99, hidden_size=7, patch_size=4, in_channels=9, mlp_ratio=2.0, learn_sigma=True).items():
        with pytest.raises(UserError, match=f"f: its config says {key} {value}, its weights say"):
            recipe_of({"ema": state, "config": config | {key: value}}, state, "f")
