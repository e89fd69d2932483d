"""Every block of docs/change_one_idea.md, as if it were added to the file that it names: trained, resumed and sampled."""

import importlib
import re
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

from cli import DIGITS, ROOT, call
from common.checkpoint import load_checkpoint
from inference.pictures import Layout
from inference.pipeline import Pipeline  # noqa: F401  so that the rooms are loaded before a block is added
from training import dry_run, monitor, trainer  # noqa: F401

PAGE = (ROOT / "docs" / "change_one_idea.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))
IDEAS = {title: body for title, body in SECTIONS.items() if "```bash" in body}
SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", "8", "--num-workers", "0", "--log-every", "1"]


def python_of(body):
    """(file or None, code) of a section's block."""
    code = re.search(r"```python\n(.*?)```", body, flags=re.S)
    file = re.search(r"In\s`([\w/]+\.py)`:", body)
    return file and file[1], code[1] if code else ""


def library():
    """The modules of the repository that are loaded."""
    rooms = ("common", "data", "inference", "metrics", "models", "training", "transport")
    return [module for name, module in list(sys.modules.items()) if name.split(".")[0] in rooms]


@pytest.fixture
def added():
    """added(file, code) runs code where the file's own names are, and puts what it replaces in place wherever that was
    imported; undone at the end."""
    kept = [(module, dict(vars(module))) for module in library()]
    globals_ = [value for _, names in kept for name, value in names.items() if not name.startswith("__")]
    tables = [(table, table.copy()) for table in globals_ if type(table) in (dict, list)]

    def add(file, code):
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        before = dict(vars(module))
        exec(compile(code, file, "exec"), vars(module))
        for name, old in before.items():
            new = vars(module)[name]
            for other in library() if new is not old else ():
                if vars(other).get(name) is old:
                    setattr(other, name, new)

    yield add
    for table, content in tables:
        table.clear()
        (table.update if isinstance(table, dict) else table.extend)(content)
    for module, names in kept:
        for name in vars(module).keys() - names.keys():
            delattr(module, name)
        vars(module).update(names)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A working folder with photos/a, photos/b and photos.npz."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a/0", "a/1", "a/2", "b/0", "b/1"):
        (tmp_path / "photos" / name[0]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 80, 3), dtype=np.uint8)).save(f"photos/{name}.png")
    np.savez("photos.npz", arr_0=rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), labels=np.arange(5) % 2)
    return tmp_path


def run(capsys, line, ckpt, *more):
    program, script, *argv = shlex.split(line)
    assert program == "python" and script in ("train.py", "sample.py")
    argv = [part for word in argv for part in (SMALL if word == "$DIGITS" else [str(ckpt) if word == "$CKPT" else word])]
    result = call(capsys, script.removesuffix(".py"), *argv, *more)
    assert result.code == 0, (line, result.err)
    return result


@pytest.mark.parametrize("title", IDEAS)
def test_an_idea_trains_resumes_and_samples(title, added, photos, capsys):
    file, code = python_of(IDEAS[title])
    commands = re.search(r"```bash\n(.*?)```", IDEAS[title], flags=re.S)[1].splitlines()
    if code:
        added(file, code)
    more = ["--results-dir", "results", "--sample-every", "1000", "--lr", "1e-3"]
    run(capsys, commands[0], None, *more, "--max-steps", "2")
    run(capsys, commands[0], None, *more, "--max-steps", "4", "--resume")
    (resumed,) = photos.glob("results/*/checkpoints/0000004.pt")
    assert "Continuing from" in (resumed.parents[1] / "log.txt").read_text()
    run(capsys, commands[0], None, *more, "--max-steps", "4", "--results-dir", "straight")
    (straight,) = photos.glob("straight/*/checkpoints/0000004.pt")
    ours, theirs = load_checkpoint(resumed), load_checkpoint(straight)
    for name in ("model", "ema", "projector"):
        for key, value in theirs.get(name, {}).items():
            assert (ours[name][key] == value).all(), (name, key)
    for line in commands[1:]:
        result = run(capsys, line, resumed, *([] if "train.py" in line else ["--out", "picture.png"]))
        assert "activations unknown for these blocks" in result.out or "--dry-run" not in line
    height, width = (32, 64) if "32x64" in commands[0] else (32, 32)
    with Image.open("picture.png") as picture:
        layouts = [Layout(count, height, width, min(4, count), named) for count in range(1, 17) for named in (False, True)]
        assert picture.size in [layout.size for layout in layouts]
    if "feature_loss" in code:
        assert "feature_loss" in (resumed.parents[1] / "metrics.csv").read_text().splitlines()[0]
        assert "Feature Loss: " in (resumed.parents[1] / "log.txt").read_text()
    if "make_optimizer" in code:
        assert "SGD does not skip bad steps by itself" in (resumed.parents[1] / "log.txt").read_text()


def test_a_choice_that_came_later_is_no_continuation(added, photos, capsys):
    """An unfinished run, resumed with another time law, is refused by name."""
    added(*python_of(IDEAS["A law of the training times"]))
    flags = [*SMALL, "--results-dir", "results"]
    assert call(capsys, "train", *flags, "--max-steps", 2).code == 0
    (file,) = photos.glob("results/*/flags.json")
    file.write_text(file.read_text().replace('"total_steps": 2', '"total_steps": 9').replace('  "time_law": "uniform",\n', ""))
    assert "time_law" not in file.read_text()  # as a run of before there were such laws
    result = call(capsys, "train", *flags, "--max-steps", 9, "--resume", "--time-law", "root")
    assert result.code == 2 and "--time-law uniform (now root)" in result.err


def test_the_notebook(trained, monkeypatch, tmp_path):
    _, code = python_of(SECTIONS["A notebook"])
    names = {}
    exec(code.replace("0001400.pt", str(trained)).replace("num_steps=250", "num_steps=5"), names)
    assert names["images"].shape == names["back"].shape == (1, 32, 32, 3) and names["images"].dtype == np.uint8
    assert len(names["frames"]) == 20 and names["nats"].shape == (1,) and names["z"].shape == (1, 3, 32, 32)
    assert np.abs(names["back"].astype(int) - names["images"]).mean() < 3


def test_the_table_counts_the_blocks():
    for title, body in SECTIONS.items():
        file, code = python_of(body)
        lines = len([line for line in code.splitlines() if line.strip()])
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| [{title[0].lower() + title[1:]}]"))
        assert row.endswith(f"| {1 if file else 0} | {lines} |"), (row, lines)
