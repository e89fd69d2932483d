"""run_SiT.ipynb: what it shows is as it should be, and its one line chooses the model."""

import argparse
import base64
import copy
import io
import json
import re

import pytest
import torch
from PIL import Image

import run_notebook
from cli import DIGITS, ROOT, launch
from models import SiT_models
from run_notebook import LIMIT, METADATA, NOTEBOOK, complaints, execute, tidy
from sample import IMAGENET_CLASSES

PAGE = json.loads(NOTEBOOK.read_text())
VAE = ROOT / "assets" / "digits-vae"
LINE = re.compile(r'^CHECKPOINT = ".*"$', flags=re.M)
DRAWING = ["draw", "trajectory", "guidance", "likelihood", "noises", "mixtures"]  # cells, in order


def source(cell):
    return "".join(cell["source"])


def code(page=PAGE):
    return [cell for cell in page["cells"] if cell["cell_type"] == "code"]


def pictures(page):
    """{cell: its picture}"""
    found = {}
    for cell in code(page):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                assert cell["id"] not in found
                png = base64.b64decode("".join(output["data"]["image/png"]))
                found[cell["id"]] = Image.open(io.BytesIO(png))
    return found


def on(checkpoint):
    """The page, of which the one line names another checkpoint."""
    page = copy.deepcopy(PAGE)
    for cell in code(page):
        cell["source"] = LINE.sub(f'CHECKPOINT = "{checkpoint}"', source(cell))
    return page


def run_here(page, *changes):
    """The cells' names after all of them have run in this process, each (before, after) of changes made to their text."""
    names = {"__name__": "__main__"}
    for cell in code(page):
        text = source(cell)
        for before, after in changes:
            text = text.replace(before, after)
        exec(compile(text, cell["id"], "exec"), names)
    return names


def test_the_page_was_run_from_top_to_bottom_without_a_complaint():
    assert [cell["execution_count"] for cell in code()] == list(range(1, len(code()) + 1))
    assert list(complaints(PAGE)) == [] and NOTEBOOK.stat().st_size < LIMIT
    assert list(pictures(PAGE)) == DRAWING
    assert PAGE["cells"][0]["cell_type"] == "markdown" and source(PAGE["cells"][0]).startswith("# ")


def test_the_page_tells_nothing_of_the_machine_that_ran_it():
    assert PAGE["metadata"] == METADATA and (PAGE["nbformat"], PAGE["nbformat_minor"]) == (4, 5)
    for cell in PAGE["cells"]:
        assert cell["metadata"] == {} and all(output.get("metadata", {}) == {} for output in cell.get("outputs", ()))
        words = [json.dumps(output.get("text", output.get("data", {}).get("text/plain"))) for output in cell.get("outputs", ())]
        assert not re.search(r"/\w+/|[A-Z]:\\|0x[0-9a-f]{6}", " ".join(words)), words
    assert len({cell["id"] for cell in PAGE["cells"]}) == len(PAGE["cells"])


def test_pixels_are_enlarged_by_a_whole_number():
    """Between the words and the rows, each three by three pixels of a digit are alike."""
    picture = pictures(PAGE)["noises"].convert("L")
    left, top = picture.width - 8 * 100, picture.height - 3 * 100
    tile = picture.crop((left, top, left + 96, top + 96))
    assert (
        tile.resize((32, 32), Image.Resampling.NEAREST).resize((96, 96), Image.Resampling.NEAREST).tobytes() == tile.tobytes()
    )
    assert len(set(tile.tobytes())) > 20


def test_one_line_names_the_checkpoint():
    lines = [line for cell in code() for line in source(cell).splitlines()]
    assert sum(bool(LINE.match(line)) for line in lines) == 1
    assert [line for line in lines if not LINE.match(line) and re.search(r"demo/|\.pt\b|CHECKPOINT =", line)] == []


def test_the_badge_leads_to_the_repository_that_the_page_names():
    (repository,) = re.findall(r'^REPOSITORY = "(.*?)"', "\n".join(map(source, code())), flags=re.M)
    badges = re.findall(r"colab\.research\.google\.com/github/(.*?)\)", source(PAGE["cells"][0]))
    assert badges == [f"{repository}/blob/main/{NOTEBOOK.name}"]


def test_links_of_the_page_lead_to_files_that_are_there():
    text = "\n".join(source(cell) for cell in PAGE["cells"] if cell["cell_type"] == "markdown")
    named = re.findall(r"\]\((?!https:)(.*?)\)", text) + re.findall(r"`(\w[\w/]*\.py)`", text)
    assert len(named) > 3 and [name for name in named if not (ROOT / name).is_file()] == []


def test_without_the_demo_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as raised:
        run_here(PAGE)
    assert "`make demo`" in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_a_model_of_imagenet_s_classes_in_the_published_form(tmp_path):
    """As the published code saves it in training, with the doubled head; the autoencoder is that of the digits."""
    model = SiT_models["SiT-T/2"](input_size=8, num_classes=1000, learn_sigma=True)
    for weight in model.parameters():  # a fresh one answers 0 to everything
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    flags = argparse.Namespace(path_type="Linear", prediction="velocity", loss_weight=None, num_classes=1000)
    flags = argparse.Namespace(**vars(flags), model="SiT-T/2", image_size=32, vae=str(VAE), train_eps=None, sample_eps=None)
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "args": flags}, tmp_path / "0050000.pt")
    names = run_here(on(tmp_path / "0050000.pt"), ("num_steps=25", "num_steps=3"), ("num_steps=60", "num_steps=3"))
    assert names["pipe"].recipe.model_args["learn_sigma"] and names["imagenet"]
    assert names["classes"] == list(IMAGENET_CLASSES) and names["words"][0] == "golden retriever"
    assert names["guidance"].scale == 4 and names["guidance"].channels == 3
    assert names["labels"] == names["classes"] and (names["images"] == names["by_ode"]).all()

    ends = names["from_to"](2, 207)[[0, -1]]  # the rows that are overwritten with mixtures are read first
    noise = torch.stack([names["here"]] * 2)
    pure = names["pipe"].sample([2, 207], noise=noise, solver=names["ode"], guidance=names["guidance"])
    assert abs(ends - pure.astype(float)).max() <= 1 < abs(pure[0] - pure[1].astype(float)).max()


def test_the_classes_are_the_checkpoint_s(trained):
    names = run_here(on(trained), ("num_steps=25", "num_steps=2"), ("num_steps=60", "num_steps=2"))
    assert names["words"] == list("01234567") and not names["imagenet"] and names["labels"] == names["classes"]
    assert names["images"].shape == (8, 32, 32, 3) and not (torch.as_tensor(names["by_ode"]) == names["images"]).all()


def test_what_must_not_be_kept_is_seen_and_what_need_not_be_goes():
    page, png = copy.deepcopy(PAGE), pictures(PAGE)["draw"]
    page["metadata"]["authors"] = "somebody"
    page["cells"][0]["metadata"] = {"execution": {"started": "at noon"}}
    page["cells"][0]["source"] = source(page["cells"][0]).replace("github/", "github/OTHER").replace("OTHEROWNER", "OTHER")
    cell = next(cell for cell in page["cells"] if cell["id"] == "draw")
    cell["outputs"][0]["data"]["image/jpeg"] = "abc"
    assert tidy(page) == PAGE | {"cells": page["cells"]} and page["metadata"] == METADATA and page["cells"][0]["metadata"] == {}
    assert source(page["cells"][0]) == source(PAGE["cells"][0]) and set(cell["outputs"][0]["data"]) == {
        "text/plain",
        "image/png",
    }
    assert pictures(page)["draw"].convert("RGB").tobytes() == png.convert("RGB").tobytes()

    cell["outputs"] += [{"output_type": "stream", "name": "stderr", "text": ["be warned"]}]
    cell["outputs"] += [{"output_type": "error", "evalue": "it fell", "ename": "Error", "traceback": []}]
    cell["outputs"] += [{"output_type": "stream", "name": "stdout", "text": ["x" * LIMIT]}]
    first, second, third = complaints(page)
    assert "be warned" in first and "it fell" in second and f"above {LIMIT}" in third


@pytest.mark.browser
def test_the_page_runs_on_a_model_of_latents(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    flags = ["--vae", VAE, "--model", "SiT-T/2", "--max-steps", 6, "--global-batch-size", 16, "--num-workers", 0]
    assert launch("train", *DIGITS, *flags, "--results-dir", tmp_path, "--lr", 1e-3).code == 0
    notebook = nbformat.from_dict(on(next(tmp_path.glob("000-*/checkpoints/0000006.pt"))))
    for cell in code(notebook):
        cell["outputs"], cell["execution_count"] = [], None
    execute(notebook)
    nbformat.validate(tidy(notebook))
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code()) + 1))
    assert list(complaints(notebook)) == [] and list(pictures(notebook)) == DRAWING
    monkeypatch.setattr(run_notebook, "execute", lambda notebook: None)  # the page as it is committed is written as it is
    (tmp_path / "page.ipynb").write_text(NOTEBOOK.read_text())
    run_notebook.main(tmp_path / "page.ipynb")
    assert (tmp_path / "page.ipynb").read_text() == NOTEBOOK.read_text()
