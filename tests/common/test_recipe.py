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
