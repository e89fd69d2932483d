"""What the page draws is what the command line and the library draw; visitors do not touch each other's work."""

import re
import shlex
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import app
from cli import call
from common.errors import UsageError
from inference import ODE, SDE, Guidance, Pipeline
from inference.pictures import Layout
from page import cards, curves
from page.choices import Choices, read
from page.drawing import Source, draw, encode, frames_for, spaced, translated
from page.visits import Cancelled, Visits
from transport import DIFFUSION_FORMS, PATHS

FAST = dict(ode=ODE("heun", 5), sde=SDE(form="linear", norm=0.5, last_step="Euler", last_step_size=0.1, num_steps=5), frames=3)
CHOICES = Choices((3, 7), each=2, seed=5, guidance=Guidance(2.5, None, 0.2, 0.8), **FAST)
FIELDS = dict(labels=[3], pictures=1, seed=0, modes=["ODE", "SDE"], guidance=2.5, low=0.0, high=1.0, channels="all", frames=4)
FIELDS |= dict(ode_method="dopri5", ode_steps=10, sde_method="Euler", sde_steps=10, form="sigma", norm=1, last_step="Mean")
FIELDS |= dict(last_step_size=0.04)


@pytest.fixture(scope="module")
def source(trained):
    told = dict(weights="model")  # the average has hardly begun to learn
    return Source(str(trained), Pipeline.load(trained, device="cpu", **told), ["--weights", "model"], told)


@pytest.fixture
def image(tmp_path):
    from data.images import read_digits

    Image.fromarray(read_digits()[0][3700]).save(tmp_path / "seven.png")
    return tmp_path / "seven.png"


def test_each_card_is_the_picture_of_its_command_line_and_of_its_lines(source, tmp_path, capsys):
    shown = draw([source], CHOICES, source)
    assert [card.mode for card in shown] == ["ODE", "SDE"] and (shown[0].states[0] == shown[1].states[0]).all()
    assert (shown[0].states[-1] != shown[1].states[-1]).any()
    for card in shown:
        assert card.error is None and card.states.shape == card.expected.shape == (3, 4, 32, 32, 3)
        words = shlex.split(card.command)
        assert words[:2] == ["python", "sample.py"]
        result = call(capsys, "sample", *words[2:], "--out", tmp_path / "s.png")
        assert result.code == 0, result.err
        assert f"{card.calls} network calls" in result.out
        with Image.open(tmp_path / "s.png") as picture:
            assert (Layout(4, 32, 32, 2, named=True).cut(picture) == card.states[-1]).all()
        names = {}
        exec(card.library, names)
        assert (names["images"] == card.states[-1]).all()


def test_what_the_checkpoint_was_opened_with_is_in_the_call(trained, tmp_path, capsys):
    argv = ["--ckpt", str(trained), "--weights", "model", "--precision", "bf16", "--model", "SiT-T/8", "--image-size", "32"]
    args = app.make_parser().parse_args([*argv, "--sample-eps", "0.01"])
    (source,) = app.sources_from(args)
    (card,) = draw([source], replace(CHOICES, modes=("SDE",)), source)
    assert card.error is None
    for part in ("--weights model", "--precision bf16", "--model SiT-T/8", "--image-size 32", "--sample-eps 0.01"):
        assert part in card.command
    assert call(capsys, "sample", *shlex.split(card.command)[2:], "--out", tmp_path / "s.png").code == 0
    names = {}
    exec(card.library, names)
    assert (names["images"] == card.states[-1]).all()


def test_calls_are_counted_for_each_request(source):
    before = source.pipe.calls
    (ode, sde), again = draw([source], CHOICES, source), draw([source], replace(CHOICES, frames=0), source)
    assert (ode.calls, sde.calls) == (8, 5) and (ode.more_calls, sde.more_calls) == (3, 3) and source.pipe.calls == before
    assert [card.calls for card in again] == [8, 5] and again[0].expected is None
    assert len(again[0].states) == 1 and (again[0].states[-1] == ode.states[-1]).all()


def test_frames_are_spaced_from_noise_to_image_and_no_page_is_huge(source):
    assert spaced(250, 40)[0] == 0 and spaced(250, 40)[-1] == 249 and len(set(spaced(250, 40))) == 40
    assert spaced(3, 40) == [0, 1, 2] and spaced(7, 1) == spaced(7, 0) == [6]
    assert frames_for(replace(CHOICES, frames=40), [source]) == 40
    huge = SimpleNamespace(pipe=SimpleNamespace(latent_shape=(4, 64, 64), autoencoder=SimpleNamespace(factor=8)))
    assert frames_for(replace(CHOICES, frames=40), [huge]) == 3


def test_an_image_goes_to_noise_and_back_and_has_a_likelihood_without_guidance(source, image):
    choices = replace(CHOICES, ode=ODE(rtol=1e-5), guidance=Guidance(10.0, None))
    (card,) = encode([source], choices, image, 7, source)
    assert card.error is None
    (plain,) = encode([source], replace(choices, guidance=Guidance()), image, 7, source)
    assert card.bits == plain.bits and (card.pictures["its noise"] != plain.pictures["its noise"]).any()
    off = np.abs(card.pictures["image"].astype(int) - card.pictures["decoded back"])
    assert off.max() <= 2 and card.pictures["image"].max() > 200
    names = {}
    exec(card.library.replace("'seven.png'", repr(str(image))), names)
    assert names["bits"][0] == card.bits and (names["back"][0] == card.pictures["decoded back"]).all()


def test_a_file_that_is_no_image_is_one_line(source, tmp_path):
    (tmp_path / "no.png").write_text("hello")
    (card,) = encode([source], CHOICES, tmp_path / "no.png", None, source)
    assert "cannot read image no.png" in card.error and str(tmp_path) not in card.error


@pytest.mark.parametrize("change, words", [
    (dict(labels=[]), "classes"),
    (dict(modes=[]), "draw by"),
    (dict(pictures=0), "pictures of each"),
    (dict(pictures=33), "32"),
    (dict(seed=None), "seed: give a whole number"),
    (dict(seed=1.5), "seed"),
    (dict(guidance=-1), "--cfg-scale"),
    (dict(guidance=1, low=0.5), "--guidance-low"),
    (dict(low=0.9, high=0.1), "--guidance-low"),
    (dict(ode_method="magic"), "magic"),
    (dict(sde_steps=1), "num_steps"),
    (dict(ode_steps=10**9), "steps of the ODE"),
    (dict(form="magic"), "magic"),
    (dict(norm="much"), "norm"),
    (dict(norm=-1), "norm"),
    (dict(last_step_size=1), "last_step_size"),
    (dict(frames=41), "frames"),
])  # fmt: skip
def test_wrong_choices_are_one_line(change, words):
    assert read(FIELDS).labels == (3,)
    with pytest.raises(UsageError, match=re.escape(words)):
        read(FIELDS | change)


def test_what_a_checkpoint_cannot_do_is_its_cards_message(source):
    cards_ = draw([source], replace(CHOICES, ode=ODE("implicit_adams", 5), labels=(3, 11)), source)
    assert all("class 11" in card.error for card in cards_)
    assert 'role="alert"' in cards.results(cards_)


def named(classes, count=None):
    recipe = SimpleNamespace(classes=classes, num_classes=count or len(classes))
    return Source("x.pt", SimpleNamespace(recipe=recipe, path=Path("run/x.pt")))


def test_classes_of_other_checkpoints_are_found_by_name():
    first, other, bare = named(["cat", "dog"]), named(["ant", "dog", "cow"]), named([], 2)
    assert translated(1, first, first) == 1 and translated(1, other, first) == 1 and translated(1, bare, first) == 1
    assert translated(0, named(["dog", "cat"]), first) == 1
    with pytest.raises(UsageError, match=r"x\.pt does not know cat"):
        translated(0, other, first)
    with pytest.raises(UsageError, match="does not know cat"):
        translated(0, named([], 3), first)


def test_a_cancelled_request_ends_at_the_next_network_call(source):
    visits, calls = Visits(), []

    def say(share, line):
        calls.append(line)
        visits.stop("me")

    with pytest.raises(Cancelled), visits.work("me") as work:
        draw([source], replace(CHOICES, sde=SDE(num_steps=2000), modes=("SDE",)), source, work.check, say)
    assert len(calls) == 1 and "1 network calls" in calls[0] and visits.stop("me") == 0


def test_one_visitors_cancel_leaves_the_other_alone_and_both_wait_for_the_network():
    visits, order, begun = Visits(), [], threading.Event()

    def visit(name):
        try:
            with visits.work(name) as work:
                begun.set()
                order.append(name)
                for _ in range(20):
                    threading.Event().wait(0.01)
                    work.check()
                order.append(name)
        except Cancelled:
            order.append(f"{name} cancelled")

    threads = [threading.Thread(target=visit, args=[name]) for name in "abc"]
    threads[0].start()
    begun.wait(5)
    for thread in threads[1:]:
        thread.start()
    while len(visits._works) < 3:
        threading.Event().wait(0.005)
    assert visits.stop("b") == 1 and visits.stop("nobody") == 0
    for thread in threads:
        thread.join(10)
    assert order == ["a", "a", "b cancelled", "c", "c"] or order == ["a", "a", "c", "c", "b cancelled"]


def test_what_would_fill_the_memory_is_refused(source, tmp_path):
    many = replace(CHOICES, each=16, sde=SDE(num_steps=2000), modes=("SDE",))
    (card,) = draw([source], many, source)
    assert "too many to keep" in card.error and card.states is None
    Image.new("1", (8000, 7000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    (card,) = encode([source], CHOICES, tmp_path / "bomb.png", 3, source)
    assert "56,000,000 pixels" in card.error and str(tmp_path) not in card.error


def test_text_that_is_not_ours_is_no_html(source):
    evil = "<img src=x onerror=alert(1)>"
    assert "<img src=x" not in cards.message(evil) + cards.heading([(evil, evil)])
    card = draw([source], replace(CHOICES, frames=0, modes=("ODE",)), source)[0]
    card.title = card.command = evil
    card.notes, card.names = [evil], [evil] * 4
    assert "<img src=x" not in cards.results([card]) and "&lt;img src=x" in cards.results([card])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_plots_of_diffusion_have_a_finite_range_and_every_form(path, form):
    svg = curves.plot(path, PATHS[path](), form, 1.0, 0.96)
    assert svg.count("<polyline") == len(DIFFUSION_FORMS) and svg.count("sit-chosen") == 1 and f"on the {path} path" in svg
    assert not re.search(r"\b(nan|inf)\b", svg)
    t, values = curves.curves(PATHS[path](), 1.0)
    top = curves.top_of(values, form)
    assert 0 < top < 100
    inner = values[form][(t > 0.2) & (t < 0.95)]
    assert bool((inner <= top).all()) and inner.max() > 0.05 * top
