"""The page that the demo ends with, of a small run."""

import base64
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from sklearn.svm import SVC

import demo_page
import demo_report
import sample_ddp
import train
from browser import SIZES, browser
from cli import ROOT
from common.checkpoint import load_checkpoint
from data.images import read_digits
from demo_pictures import curve, film, strip
from digit_classifier import features
from inference import ODE, SDE, Guidance, Pipeline
from inference.pictures import Layout

VOID = {"meta", "link", "img", "input"}
FEW = {"ODE": ODE("euler", num_steps=5), "SDE": SDE(num_steps=4)}


def small_classifier():
    images, labels = read_digits()
    return SVC().fit(features(images[::20]), labels[::20]), 0.9


@pytest.fixture(scope="module")
def demo(trained, tmp_path_factory):
    """(demo folder, what the report printed): a run of six steps, ten samples of each sampler. Its name is markup, which a page
    that does not escape it would take for its own."""
    folder = tmp_path_factory.mktemp("demo") / "<b>de&mo"
    run = folder / "results" / trained.parents[1].name
    shutil.copytree(trained.parents[1], run)
    shutil.copy(run / "samples" / "0000006.png", run / "samples" / "0000003.png")
    with Image.open(run / "samples" / "0000006.png") as picture:
        picture.crop((0, 0, 138, 138)).save(run / "samples" / "0000001.png")  # as large as an earlier version's
    for mode in ("ODE", "SDE"):
        flags = [mode, "--ckpt", run / "checkpoints" / trained.name, "--num-sampling-steps", 4, "--num-fid-samples", 20]
        flags += ["--class-labels", *range(10), "--no-png", "--sample-dir", folder / "samples", "--cfg-scale", 2]
        flags += ["--sampling-method", "euler"] * (mode == "ODE")
        assert sample_ddp.main(sample_ddp.make_parser().parse_args([str(flag) for flag in flags])) == 0
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_report, "train_classifier", small_classifier)
        patch.setattr(demo_page, "SOLVERS", FEW)
        patch.setattr("builtins.print", lambda *words, **more: printed.write(f"{words[0]}\n"))
        demo_report.main(folder)
    return folder, printed.getvalue()


class Elements(HTMLParser):
    """Elements of a page, (name, attributes), and its text; raises AssertionError where they are not closed in turn."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_that_fetches_nothing(demo):
    folder, _ = demo
    page = (folder / "index.html").read_text(encoding="utf-8")
    elements = Elements(page).found
    addresses = [attrs[key] for _, attrs in elements for key in ("src", "href", "srcset", "data", "poster") if key in attrs]
    links = [address for address in addresses if not address.startswith("data:")]
    assert len(links) == len(demo_page.NEXT)
    files = [(folder / link.partition("#")[0]).resolve() for link in links]
    assert all(file.is_relative_to(ROOT) and file.exists() for file in files)
    assert all(address.startswith("data:") for address in re.findall(r"url\(([^)]*)\)", page)) and "@import" not in page
    assert len(page) < 3e6 and all(attrs["alt"] for tag, attrs in elements if tag == "img")
    assert [tag for tag, _ in elements if tag in ("b", "script")] == ["b"] * 20 + ["script"]  # labels of rows, not the folder


def test_the_page_says_what_was_measured_and_how_it_was_made(demo, trained):
    folder, printed = demo
    text, content = Elements((folder / "index.html").read_text(encoding="utf-8")).text, load_checkpoint(trained)
    *_, first, second, third, see, browse = printed.splitlines()
    assert (folder / "report.txt").read_text() == f"{first}\n{second}\n{third}\n"
    assert see == f"see {folder}/: samples-ODE.png samples-SDE.png loss.png trajectory.gif report.txt samples/*.npz"
    assert browse.startswith(f"open {(folder / 'index.html').resolve()} ")
    pattern = r"(\w+): ([\d.]+%) of 20 samples recognised as the class asked for; diversity ([\d.]+), .*; (\d+) network calls"
    for line in (second, third):
        _, right, spread, calls = re.fullmatch(pattern, line).groups()
        assert f"{right} of these 20 recognised" in text and spread in text and calls in text
    assert "6 steps" in text and re.search(r"step 3: \d+ of 16 recognised", text) and "step 1:" not in text
    typed = next(line for line in text.splitlines() if line.startswith("python train.py"))
    flags = vars(train.make_parser().parse_args(shlex.split(typed)[2:]))
    wanted = content["args"] | {"channels": None}  # which the data said, as they would again
    assert {key: flags[key] for key in wanted if key in flags} == {key: wanted[key] for key in wanted if key in flags}
    assert "--log-every 2" in typed and "--lr 0.001" in typed and "--epochs" not in typed
    records = [json.loads(file.read_text()) for file in sorted((folder / "samples").glob("*.json"))]
    assert all(shlex.join(["python", *record["command"]]) in text for record in records)
    assert str(folder) in text  # as it is, and not as markup


def pictures_of(page, pattern):
    return [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall(pattern, page)]


def test_the_film_is_the_way_of_the_same_noise(demo):
    folder, _ = demo
    page = (folder / "index.html").read_text(encoding="utf-8")
    (reel,) = pictures_of(page, r"url\(data:image/png;base64,([^)]*)\)")
    frames = np.asarray(reel.convert("RGB")).reshape(-1, 64, 320, 3).astype(int)
    assert len(frames) == 5 and "steps(5, jump-none)" in page and 'max="4"' in page
    assert (frames[0, :32] == frames[0, 32:]).all() and (frames[4, :32] != frames[4, 32:]).any()
    pipe = Pipeline.load(next(folder.glob("results/*/checkpoints/*.pt")))
    images = pipe.sample(range(10), solver=FEW["SDE"], guidance=Guidance(2, channels=None))
    assert np.abs(frames[4, 32:] - strip(images)).max() <= 1


def test_the_rows_are_the_samples(demo):
    folder, _ = demo
    pictures = pictures_of((folder / "index.html").read_text(encoding="utf-8"), r'base64,([^"]*)" alt="samples of class')
    for file, own in zip(sorted((folder / "samples").glob("*.npz")), (pictures[:20], pictures[20:]), strict=True):
        with np.load(file) as samples:
            for i, picture in enumerate(own):  # of class i // 2 the first and the second
                wanted = samples["arr_0"][i // 2 + 10 * (i % 2)]
                assert np.abs(np.asarray(picture.convert("RGB").reduce(2)).astype(int) - wanted).max() <= 1


def test_pictures_while_training_are_judged_by_the_labels_they_were_drawn_with(demo):
    """A judge that takes an image for the digit that it is shown: all of them are right where they are told so."""
    run = next((demo[0] / "results").iterdir())
    shown = []

    class Judge:
        def predict(self, pixels):
            shown.append(pixels)
            return np.array([*range(10), *range(5), 9])

    html, shares = demo_page.pictures_while_training(run, (32, 32), Judge())
    assert shares == [(3, 15 / 16), (6, 15 / 16)] and html.count("15 of 16 recognised") == 2
    with Image.open(run / "samples" / "0000006.png") as picture:
        images = Layout(16, 32, 32, 4, named=True).cut(picture)
    assert (shown[1] == features(images)).all() and images.std() > 10


def test_a_curve_is_drawn_to_scale():
    drawn = curve([(0, 0.0), (50, 1.0), (100, 0.5)], "step", "share <&>", percent=True)
    (first, top, last) = [tuple(map(float, point.split(","))) for point in re.search(r'points="(.*?)"', drawn)[1].split()]
    assert first[0] < top[0] < last[0] and top[0] - first[0] == pytest.approx(last[0] - top[0], abs=0.2)
    assert last[1] == pytest.approx((first[1] + top[1]) / 2, abs=0.2) and top[1] < first[1]  # upwards is less
    assert "share &lt;&amp;&gt;" in drawn and ">100%</text>" in drawn
    flat = curve([(1, 2.0), (2, 2.0)], "step", "loss")
    assert "nan" not in flat and "inf" not in flat


def test_a_film_of_ways_of_other_lengths_begins_and_ends_with_both():
    ways = [[np.full((3, 4, 5, 3), level, np.uint8) for level in range(0, 2 * count, 2)] for count in (50, 7)]
    uri, count, ratio = film(ways)
    frames = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))).reshape(count, 8, 15)
    assert (count, ratio) == (40, "15 / 8")
    assert frames[[0, -1]][:, [0, 4], 0].tolist() == [[0, 0], [98, 12]] and (np.diff(frames[:, 0, 0].astype(int)) > 0).all()


@pytest.mark.browser
def test_the_page_in_a_browser(demo, tmp_path):
    from playwright.sync_api import expect

    address = (demo[0] / "index.html").resolve().as_uri()
    with browser() as chromium:
        for size in SIZES.values():
            for scheme in ("light", "dark"):
                page = chromium.new_context(viewport=size, color_scheme=scheme).new_page()
                asked, trouble = [], []
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.on("requestfailed", lambda request, trouble=trouble: trouble.append(request.url))
                page.on("console", lambda message, trouble=trouble: trouble.append(message.text))
                page.on("pageerror", lambda error, trouble=trouble: trouble.append(str(error)))
                page.goto(address)
                assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
                assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
                style = "getComputedStyle(document.body)"
                text, paper = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
                assert (brightness(text) > brightness(paper)) == (scheme == "dark")
                film, slider = page.locator("#film"), page.locator("#slider")
                end = film.screenshot()
                slider.fill("0")
                noise = film.screenshot()
                assert noise != end and page.locator("#where").inner_text() == "noise"
                page.locator("#play").click()
                expect(slider).to_have_value("4")
                expect(page.locator("#play")).to_have_text("Play")  # again, at the end
                assert film.screenshot() == end
                assert trouble == [] and [url for url in asked if not url.startswith("data:")] == [address]


@pytest.mark.browser
def test_without_scripts_the_film_runs_by_itself(demo):
    with browser() as chromium:
        page = chromium.new_context(viewport=SIZES["phone"], java_script_enabled=False).new_page()
        page.goto((demo[0] / "index.html").resolve().as_uri())
        film = page.locator("#film")
        assert page.locator("#control").is_hidden() and film.is_visible()
        seen = set()
        for _ in range(40):
            seen.add(film.screenshot())
            page.wait_for_timeout(250)
            if len(seen) > 1:
                return
        raise AssertionError("it stands still")


def brightness(colour):
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3]))
