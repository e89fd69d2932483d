"""The page as a visitor uses it: the real command, in chromium."""

import base64
import io
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from browser import SIZES, browser
from cli import ENV, ROOT, call, command, kill_tree
from inference.pictures import Layout

pytestmark = pytest.mark.browser
pytest.importorskip("gradio")
DONE = "#results .sit-card, #results .sit-error"


def start(trained, folder, *more):
    """(process, port) of app.py, when it says that it is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = command("app", "--ckpt", *trained, "--port", port, *more)
    # Nothing but this machine can be reached: whoever asks elsewhere through these proxies is told so at once.
    offline = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    env = {**ENV, **offline, "TMPDIR": str(folder)}
    process = subprocess.Popen(argv, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    line = process.stdout.readline()
    assert "Ctrl-C ends it" in line, line + process.stdout.read()
    return process, port


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory):
    process, port = start([trained], tmp_path_factory.mktemp("served"), "--weights", "model")
    yield f"http://127.0.0.1:{port}"
    kill_tree(process)


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture(params=SIZES)
def page(request, chromium, served):
    with visitor(chromium, served, request.param) as opened:
        yield opened


def visitor(chromium, served, size="desktop"):
    """A page of a visitor who has just come; that it asked this server alone is checked at the end."""
    from contextlib import contextmanager

    @contextmanager
    def opened():
        context = chromium.new_context(viewport=SIZES[size])
        page, asked = context.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served)
        page.wait_for_selector("#draw")
        yield page
        wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        context.close()
        assert wide[0] <= wide[1], "the page scrolls sideways"
        assert not [url for url in asked if not url.startswith((served, "data:", "blob:"))]

    return opened()


def fill(page, label, value):
    page.get_by_label(label, exact=True).fill(str(value))


def open_part(page, title):
    page.get_by_role("button", name=title).click()


def draw(page, wait=DONE):
    page.eval_on_selector_all(DONE, "old => old.forEach(each => each.classList.add('old'))")
    page.click("#draw")
    page.wait_for_selector(", ".join(f"{each}:not(.old)" for each in wait.split(", ")), timeout=60000)


def strips(page, kind="state", where="#results"):
    """The pictures of a row of each card, as arrays of all their frames."""
    urls = page.eval_on_selector_all(f"{where} .sit-{kind} img", "images => images.map(image => image.src)")
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


def test_a_shorter_film_waits_at_its_end(chromium, served):
    with visitor(chromium, served) as page:
        open_part(page, "ODE")
        page.get_by_label("Method").first.click()
        page.get_by_role("option", name="euler", exact=True).click()
        page.get_by_label("Steps").first.fill("6")
        draw(page)
        films = strips(page)
        assert films[0].shape[0] == 6 * 32 and films[3].shape[0] == 16 * 32
        for value, shown in (("15", 5), ("9", 5), ("5", 5), ("2", 2)):
            page.get_by_role("slider", name="trajectory", exact=True).fill(value)
            tops = "(image) => [image.getBoundingClientRect().y, image.parentElement.getBoundingClientRect().y]"
            image, box = page.eval_on_selector("#results .sit-state .sit-film img", tops)
            assert image - box == pytest.approx(-shown * 96, abs=1)
            times, line = page.eval_on_selector("#results .sit-times div", tops)
            assert (times - line) / page.eval_on_selector("#results .sit-times", "e => e.clientHeight") == pytest.approx(
                -shown, abs=0.1
            )


def test_draw_slide_and_copy(page, tmp_path, capsys):
    open_part(page, "SDE, and its D(t)")
    page.wait_for_selector("#plot svg")
    draw(page)
    assert page.locator("#results .sit-card").count() == 2 and not page.locator(".sit-error").count()
    calls = page.locator("#results .sit-calls").all_inner_texts()
    assert re.match(r"\d+ network calls, [\d.]+ s \(and 16 for", calls[0]) and calls[1].startswith("60 network calls")
    films = strips(page)
    assert len(films) == 6 and films[0].shape == (16 * 32, 32, 3) and len(strips(page, "expected")) == 6
    assert all((films[i][:32] == films[i + 3][:32]).all() for i in range(3)), "not the same noise"
    shown = page.locator("#results .sit-state .sit-film").first.bounding_box()
    assert shown["width"] == shown["height"] == 96

    def top():
        box = page.locator("#results .sit-state .sit-film img").first.bounding_box()
        return box["y"] - page.locator("#results .sit-state .sit-film").first.bounding_box()["y"]

    assert top() == pytest.approx(-15 * 96, abs=1)
    page.get_by_role("slider", name="trajectory", exact=True).fill("0")
    assert top() == pytest.approx(0, abs=1)
    page.locator("#results summary").first.click()
    words = page.locator("#results .sit-code").first.inner_text().split()
    assert words[:3] == ["python", "sample.py", "ODE"] and page.get_by_role("button", name="Copy").first.is_visible()
    result = call(capsys, "sample", *words[2:], "--out", tmp_path / "s.png")
    assert result.code == 0, result.err
    with Image.open(tmp_path / "s.png") as picture:
        images = Layout(3, 32, 32, 3, named=True).cut(picture)
    for i in range(3):
        assert (images[i] == films[i][-32:]).all()


def test_the_plot_follows_the_form(page):
    open_part(page, "SDE, and its D(t)")
    assert "D(t) of sigma, norm 1, on the Linear path" in page.locator("#plot").inner_text()
    page.get_by_label("Form of D(t)").click()
    page.get_by_role("option", name="increasing-decreasing").click()
    page.wait_for_selector("#plot svg[aria-label*='increasing-decreasing']")
    fill(page, "Norm", 3)
    page.wait_for_selector("#plot svg[aria-label*='norm 3']")
    fill(page, "Norm", -3)
    page.wait_for_selector("#plot .sit-error")


def test_wrong_input_is_one_message(page):
    fill(page, "Seed", "")
    draw(page, "#results .sit-error")
    assert page.locator("#results .sit-error").all_inner_texts() == ["seed: give a whole number"]
    fill(page, "Seed", 1)
    open_part(page, "Guidance")
    fill(page, "Scale", -2)
    draw(page, "#results .sit-error")
    assert "--cfg-scale -2" in page.locator("#results .sit-error").inner_text() and page.locator(".sit-card").count() == 0
    fill(page, "Scale", 3)
    draw(page)
    assert page.locator("#results .sit-error").count() == 0 and page.locator("#results .sit-card").count() == 2


def test_an_image_dropped_in(page, tmp_path):
    from data.images import read_digits

    Image.fromarray(read_digits()[0][3700]).save(tmp_path / "seven.png")
    (tmp_path / "no.png").write_text("no image")
    page.get_by_role("tab", name="An image of yours").click()
    page.click("#encode")
    page.wait_for_selector("#encoded .sit-error:has-text('drop one in')")
    page.set_input_files("#image input[type=file]", tmp_path / "no.png")
    page.wait_for_selector("#image :text('no')")
    page.wait_for_timeout(500)
    page.click("#encode")
    page.wait_for_selector("#encoded .sit-error:has-text('cannot read image no.png')")
    assert "/" not in page.locator("#encoded .sit-error").inner_text()
    page.get_by_label("Remove this file").or_(page.locator("#image button[aria-label=Clear]")).first.click()
    page.set_input_files("#image input[type=file]", tmp_path / "seven.png")
    page.wait_for_selector("#image :text('seven')")
    page.wait_for_timeout(500)
    page.click("#encode")
    page.wait_for_selector("#encoded .sit-bits", timeout=60000)
    assert re.fullmatch(r"-?[\d.]+ bits/dim", page.locator("#encoded .sit-bits").inner_text())
    image, _, back = strips(page, "row", "#encoded")
    assert np.abs(image.astype(int) - back).max() <= 12 and image.max() > 200
    assert "the likelihood is not" in page.locator("#encoded").inner_text()


def slow(page):
    """Settings that take long."""
    open_part(page, "SDE, and its D(t)")
    page.locator("#sde").get_by_label("Steps").fill("2000")
    fill(page, "Pictures of each", 5)


def test_cancel_and_two_visitors_at_once(chromium, served):
    with visitor(chromium, served) as one, visitor(chromium, served) as two:
        slow(one)
        one.click("#draw")
        one.wait_for_selector("#results :text('network calls')", timeout=30000)
        fill(two, "Seed", 7)
        two.click("#draw")
        two.wait_for_timeout(1500)
        assert two.locator("#results .sit-card").count() == 0  # waits for its turn
        two.click("#cancel-draw")  # which is not the other's
        two.wait_for_selector("#results .sit-error:has-text('Cancelled')")
        two.click("#draw")
        one.wait_for_timeout(1500)
        assert one.locator("#results .sit-error").count() == 0 and two.locator("#results .sit-card").count() == 0
        one.click("#cancel-draw")
        begun = time.monotonic()
        two.wait_for_selector("#results .sit-card", timeout=30000)
        assert time.monotonic() - begun < 25
        assert one.locator("#results .sit-error").all_inner_texts() == ["Cancelled."]
        two.locator("#results summary").first.click()
        assert "--seed 7" in two.locator("#results .sit-code").first.inner_text()
        fill(one, "Pictures of each", 1)
        one.locator("#sde").get_by_label("Steps").fill("10")
        draw(one, "#results .sit-card")
        one.locator("#results summary").first.click()
        assert "--seed 0" in one.locator("#results .sit-code").first.inner_text()


def test_a_visitor_who_leaves_is_not_drawn_for(chromium, served):
    with visitor(chromium, served) as gone:
        slow(gone)
        gone.click("#draw")
        gone.wait_for_selector("#results :text('network calls')", timeout=30000)
    with visitor(chromium, served) as next_one:
        draw(next_one, "#results .sit-card")


def test_no_file_is_served(served, trained, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    paths = ["/etc/passwd", trained, ROOT / "README.md", ROOT / "page/page.css", tmp_path / "secret.txt", "README.md"]
    paths += ["../../etc/passwd", "http://127.0.0.1:1/x", "%2fetc%2fpasswd"]
    for route in (
        "gradio_api/file=",
        "file=",
        "gradio_api/file/",
        "file/",
        "gradio_api/proxy=",
        "static/../",
        "assets/..%2f..%2f",
    ):
        for path in paths:
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{served}/{route}{path}", timeout=10)
            assert refused.value.code in (403, 404, 405), (route, path)
            if "file" in route:
                assert refused.value.read() == b"this page serves no files\n"
    with urllib.request.urlopen(served) as answer:
        policy = answer.headers["content-security-policy"]
    assert "connect-src 'self' data: blob:;" in policy and "frame-ancestors 'self'" in policy


def test_ctrl_c_ends_it_at_once_and_several_checkpoints_are_side_by_side(chromium, trained, tmp_path):
    process, port = start([trained, trained], tmp_path)
    try:
        with visitor(chromium, f"http://127.0.0.1:{port}") as page:
            draw(page)
            assert page.locator("#results .sit-card").count() == 4
            films = strips(page)
            assert len(films) == 12 and all((films[i] == films[i + 6]).all() for i in range(6))
            slow(page)
            page.click("#draw")
            page.wait_for_selector("#results :text('network calls')", timeout=30000)
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=10)
            assert process.returncode == 130 and time.monotonic() - begun < 3
            assert "Traceback" not in out and "interrupted" in out
        assert not list(tmp_path.glob("sit-app-*"))
    finally:
        kill_tree(process)
