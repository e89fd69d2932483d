"""Fine-tuning: what is taken over from another network's weights, and what is made anew."""

import argparse
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from cli import DIGITS, call, one_line
from common.checkpoint import load_checkpoint
from common.dialects import fold_repa
from common.errors import UserError
from common.recipe import Recipe
from models import model_config
from training.transfer import CLASSES, open_init, take_over
from transport import TransportSettings


def recipe(classes="abc", **changes):
    arguments = dict(input_size=8, num_classes=len(classes), learn_sigma=False, depth=2, hidden_size=16, num_heads=2) | changes
    return Recipe("SiT", model_config("SiT-S/2", **arguments), 32, transport=TransportSettings(), classes=list(classes))


def filled(some, seed=0):
    """A network of which no weight is zero."""
    torch.manual_seed(seed)
    model = some.build().eval()
    for name, weight in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(weight, std=0.2)
    return model


def transfer(before, after, bare=False):
    """(network before, network after, lines of the log)"""
    old, new, lines = filled(before), filled(after, seed=1), []
    content = {"ema": old.state_dict()} | ({} if bare else {"recipe": before.to_dict()})
    take_over(new, after, content, "w.pt", lines.append)
    return old, new, lines


def answers(model, classes, channels=4, size=8):
    torch.manual_seed(7)
    with torch.no_grad():
        return model(torch.randn(len(classes), channels, size, size), torch.linspace(0, 1, len(classes)), torch.tensor(classes))


@pytest.mark.parametrize("bare", [False, True])
def test_of_a_head_with_sigma_the_used_half_is_taken(bare):
    old, new, lines = transfer(recipe(learn_sigma=True), recipe(), bare)
    assert_close(answers(new, [0, 1, 2, 3]), answers(old, [0, 1, 2, 3]))
    assert lines == [
        f"Starting from the weights of w.pt: {len(new.state_dict())} of {len(new.state_dict())} tensors taken over"
    ]


def test_classes_go_by_their_names_and_the_null_class_is_kept():
    old, new, lines = transfer(recipe("abc"), recipe("dcfga"))
    assert_close(answers(new, [1, 4, 5]), answers(old, [2, 0, 3]))
    fresh = filled(recipe("dcfga"), seed=1).state_dict()[CLASSES]
    assert torch.equal(new.state_dict()[CLASSES][[0, 2, 3]], fresh[[0, 2, 3]])
    assert re.search("not taken over: y_embedder.* 3 of 5 classes' rows are new .by name.; 2 are kept", lines[1])


@pytest.mark.parametrize("after, kept", [("xyz", [0, 1, 2, 3]), ("wxyz", [3])])
def test_without_names_by_their_number(after, kept):
    """Of a bare file, whose classes have no names: as many are the same ones."""
    old, new, lines = transfer(recipe("abc"), recipe(after), bare=True)
    rows = new.state_dict()[CLASSES]
    assert torch.equal(rows[-len(kept) :], old.state_dict()[CLASSES][kept])
    assert len(lines) == (1 if len(kept) == 4 else 3) and ("it knows 3 classes" in lines[-1]) == (len(kept) == 1)
    if len(kept) == 1:  # as many rows as there are classes now: one of them may have been a class
        assert "its 4 labels are taken as 3 classes and the null class" in lines[1]


def test_a_null_class_that_there_was_not_is_told():
    before = recipe("abc", class_dropout_prob=0.0)
    old, new, lines = transfer(before, recipe("abc"))
    rows, fresh = new.state_dict()[CLASSES], filled(recipe("abc"), seed=1).state_dict()[CLASSES]
    assert torch.equal(rows[:3], old.state_dict()[CLASSES]) and torch.equal(rows[3], fresh[3])
    assert "not taken over: y_embedder" in lines[1] and "but the null class's, which it has not" in lines[1]


def test_a_head_of_the_same_shape_but_another_layout_is_made_anew():
    """4 channels in patches of 4 are as many numbers as 16 in patches of 2."""
    _, new, lines = transfer(recipe(patch_size=4), recipe(in_channels=16))
    assert torch.equal(new.final_layer.linear.weight, filled(recipe(in_channels=16), 1).final_layer.linear.weight)
    assert any("final_layer.linear.weight, of 4 channels, patches of 4, here of 16 channels, patches of 2" in x for x in lines)


def test_another_size_makes_positions_for_it():
    old, new, lines = transfer(recipe(), recipe(input_size=(4, 12)))
    assert new.pos_embed.shape == (1, 12, 16) and "pos_embed, made for a grid of 2 x 6 patches" in lines[1]
    assert len(lines) == 2 and torch.equal(new.blocks[1].mlp.fc1.weight, old.blocks[1].mlp.fc1.weight)
    with torch.no_grad():
        assert new(torch.randn(2, 4, 4, 12), torch.rand(2), torch.tensor([0, 3])).isfinite().all()


@pytest.mark.parametrize("change, lost", [(dict(in_channels=3), 3), (dict(patch_size=4), 4)])
def test_other_channels_or_patches_make_the_ends_anew_and_name_them(change, lost):
    _, new, lines = transfer(recipe(), recipe(**change))
    named = [line for line in lines if "not taken over" in line]
    assert len(named) == lost and all(any(end in line for end in ("x_embedder", "final_layer", "pos_embed")) for line in named)
    assert torch.equal(
        new.state_dict()["x_embedder.proj.weight"], filled(recipe(**change), 1).state_dict()["x_embedder.proj.weight"]
    )
    assert f"{len(new.state_dict()) - lost} of" in lines[0]


def test_weights_that_meant_something_else_are_said():
    before = recipe()
    before.transport, before.time_map = TransportSettings("VP", "noise"), "ddpm"
    lines = transfer(before, recipe())[2]
    assert "noise on the path VP, this run is for velocity on Linear" in lines[1] and "told times as ddpm" in lines[2]


@pytest.mark.parametrize("change, what", [(dict(depth=3), "depth is 3"), (dict(hidden_size=32), "hidden_size is 32")])
def test_another_network_is_one_line(change, what, tmp_path):
    torch.save({"ema": filled(recipe(**change)).state_dict(), "recipe": recipe(**change).to_dict()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=f"--init .*w.pt: its {what}, that of --model SiT is "):
        open_init(tmp_path / "w.pt", "auto", recipe())


SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--sample-every", 1000]


def test_a_run_that_begins_with_weights(trained, tmp_path, capsys):
    """With the EMA's of another run: at a learning rate of zero it stays what they are. Resumed, it is the file's hash that
    must be the same, wherever the file is now."""
    flags = [*SMALL, "--results-dir", tmp_path / "r", "--lr", 0]
    assert call(capsys, "train", *flags, "--init", trained, "--max-steps", 2).code == 0
    (run,) = (tmp_path / "r").iterdir()
    assert "Starting from the weights of" in (run / "log.txt").read_text()
    ours, theirs = load_checkpoint(run / "checkpoints" / "0000002.pt"), load_checkpoint(trained)
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][key], value) for key, value in theirs["ema"].items())
    assert ours["step"] == 2 and len(json.loads((run / "flags.json").read_text())["init_sha256"]) == 64
    shutil.copy(trained, tmp_path / "moved.pt")
    result = call(capsys, "train", *flags, "--init", tmp_path / "moved.pt", "--max-steps", 3, "--resume")
    assert result.code == 0 and "Continuing from" in result.out and "Starting from" not in result.out, result.err
    flags_file = run / "flags.json"
    flags_file.write_text(flags_file.read_text().replace('"total_steps": 3', '"total_steps": 9'))  # as if it were not done
    other = [*flags, "--init", run / "checkpoints" / "0000002.pt", "--max-steps", 4, "--resume"]
    one_line(call(capsys, "train", *other), 2, "--init-sha256")
    one_line(call(capsys, "train", *flags, "--max-steps", 4, "--resume"), 2, "--init-sha256", "(now None)")


def test_a_run_that_began_with_weights_goes_on_from_its_checkpoint_alone(trained, tmp_path, capsys):
    """Without the file that it once began with."""
    shutil.copy(trained, tmp_path / "first.pt")
    flags = [*SMALL, "--results-dir", tmp_path / "r"]
    assert call(capsys, "train", *flags, "--init", tmp_path / "first.pt", "--max-steps", 1).code == 0
    (tmp_path / "first.pt").unlink()
    (path,) = tmp_path.glob("r/*/checkpoints/0000001.pt")
    result = call(capsys, "train", *flags, "--ckpt", path, "--max-steps", 2)
    assert result.code == 0 and "Continuing from" in result.out, result.err
    shas = [json.loads(file.read_text())["init_sha256"] for file in tmp_path.glob("r/*/flags.json")]
    assert len(shas) == 2 and shas[0] == shas[1] and len(shas[0]) == 64
    gone = call(capsys, "train", *flags, "--init", tmp_path / "first.pt", "--resume", "--max-steps", 3)
    one_line(gone, 1, f"--init {tmp_path / 'first.pt'}: ")


def test_a_folder_that_knows_its_heads_is_not_taken_for_another(trained, tmp_path):
    content = load_checkpoint(trained)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "config.json").write_text(json.dumps(dict(num_heads=8)))
    save_file(content["ema"], tmp_path / "f" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="f has num_heads 8, not 4"):
        open_init(tmp_path / "f", "auto", Recipe.from_dict(content["recipe"]))


def test_a_training_checkpoint_with_other_code_s_prefixes_goes_on(trained, tmp_path, capsys):
    content = load_checkpoint(trained)
    for name in ("model", "ema"):
        content[name] = {f"module._orig_mod.{key}": value for key, value in content[name].items()}
    torch.save(content, tmp_path / "prefixed.pt")
    for file in (trained, tmp_path / "prefixed.pt"):
        flags = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 16, "--num-workers", 0, "--lr", 1e-3]
        flags += ["--ckpt", file, "--results-dir", tmp_path / file.stem, "--max-steps", content["step"] + 1]
        assert call(capsys, "train", *flags).code == 0
    ours, theirs = (load_checkpoint(next(tmp_path.glob(f"{stem}/*/checkpoints/*.pt"))) for stem in (trained.stem, "prefixed"))
    assert all(torch.equal(value, theirs["model"][key]) for key, value in ours["model"].items())


def test_wrong_input_of_init_is_one_line(trained, tmp_path, capsys):
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    for more, code, words in (
        (["--init", trained, "--ckpt", trained], 2, ["--ckpt and --init"]),
        (["--kind", "sit"], 2, ["--kind goes with --init or --ckpt"]),
        (["--init", tmp_path / "no.pt"], 1, [tmp_path / "no.pt"]),
        (["--init", tmp_path / "broken.pt"], 1, ["--init", tmp_path / "broken.pt", "not a checkpoint"]),
        (["--init", trained, "--model", "SiT-S/8"], 1, [f"--init {trained}", "depth is 6"]),
    ):
        one_line(call(capsys, "train", *SMALL, *more, "--max-steps", 1, "--results-dir", tmp_path / "r"), code, *words)
    assert not (tmp_path / "r").exists()


def test_a_training_checkpoint_of_repa_is_continued(trained, tmp_path, capsys):
    """Its weights in our terms; its projectors and its optimizer's state are left out, and the log says so."""
    state = load_checkpoint(trained)["ema"] | {"projectors.0.0.weight": torch.zeros(4, 128)}
    args = argparse.Namespace(path_type="linear", enc_type="dinov2-vit-b", num_classes=10, learning_rate=1e-4)
    repa = {"model": state, "ema": state, "opt": {"state": {}, "param_groups": []}, "args": args, "steps": 6}
    torch.save(repa, tmp_path / "repa.pt")
    flags = [*SMALL, "--lr", 0, "--max-steps", 1, "--results-dir", tmp_path / "r"]
    result = call(capsys, "train", *flags, "--ckpt", tmp_path / "repa.pt")
    assert result.code == 0, result.err
    (path,) = tmp_path.glob("r/*/checkpoints/0000001.pt")
    log = (path.parents[1] / "log.txt").read_text()
    assert "its time and sign are folded into them, its projectors and its optimizer's state left out" in log
    ours, theirs = load_checkpoint(path)["model"], fold_repa(state)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    one_line(call(capsys, "train", *flags, "--path-type", "GVP", "--ckpt", tmp_path / "repa.pt"), 2, "--path-type Linear")


def test_dit_s_training_is_not_continued_but_begun_with(trained, tmp_path, capsys):
    content = load_checkpoint(trained)
    recipe = content["recipe"] | {"time_map": "ddpm"}
    torch.save({"ema": content["ema"], "recipe": recipe}, tmp_path / "dit.pt")
    flags = [*SMALL, "--max-steps", 1, "--results-dir", tmp_path / "r"]
    one_line(call(capsys, "train", *flags, "--ckpt", tmp_path / "dit.pt"), 2, "ddpm", "--init takes its weights")
    result = call(capsys, "train", *flags, "--init", tmp_path / "dit.pt")
    assert result.code == 0 and "it was told times as ddpm, this run tells t" in result.out, result.err
