import argparse
import os
import pickle

import pytest
import torch

from checkpoint import Recipe, load_checkpoint, load_weights, recipe_of, save_checkpoint, weights_of
from download import find_model, locate
from errors import UsageError, UserError
from models import SIT_CONFIGS, SiT


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
    assert recipe.image_size == 64 and recipe.null_class == 7 and recipe.prediction is None
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
    assert (recipe.path_type, recipe.prediction, recipe.vae, recipe.image_size) == ("GVP", "score", "ema", 64)
    assert torch.equal(find_model(str(path))["pos_embed"], ema["pos_embed"])


def test_a_recipe_survives_the_file(tmp_path):
    recipe = Recipe("SiT-T/2", small(), 64, "none", "none", "VP", "noise", "velocity", 1e-4, None, ["a", "b"])
    path = tmp_path / "c.pt"
    save_checkpoint({"ema": SiT(**small()).state_dict(), "recipe": recipe.to_dict()}, path)
    content = load_checkpoint(path)
    assert recipe_of(content, weights_of(content)) == recipe
    newer = recipe.to_dict() | {"from_the_future": 1}
    assert Recipe.from_dict(newer) == recipe


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


def test_published_weights_say_what_to_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def offline(url, target):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(
        UserError, match=r"download https://www.dl.dropboxusercontent.com.* save it as pretrained_models/SiT-XL-2"
    ):
        locate("SiT-XL-2-256x256.pt")
    (tmp_path / "pretrained_models" / "SiT-XL-2-256x256.pt").touch()
    assert locate("SiT-XL-2-256x256.pt").name == "SiT-XL-2-256x256.pt"  # found, not downloaded again
