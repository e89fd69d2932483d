"""The page in gradio: fields, buttons and what they call. Results are HTML with pictures inside: no file is served."""

import traceback
from functools import partial
from pathlib import Path

import gradio as gr

from common.errors import UserError
from inference import SDE
from transport import DIFFUSION_FORMS, LAST_STEPS, ODE_METHODS, SDE_METHODS

from . import cards
from .choices import MODES, MOST_FRAMES, number, read
from .curves import plots
from .drawing import draw, encode
from .visits import Cancelled

INSIDE = "Something went wrong inside; the terminal in which app.py runs has the traceback."
UPLOAD = "25mb"  # of an image that is dropped in
# One request at a time has the network; the others wait in line and see their place.
QUEUE = dict(concurrency_limit=1, concurrency_id="network", api_visibility="private")
DIRECT = dict(queue=False, api_visibility="private", show_progress="hidden")


def answer(make):
    """make() -> HTML, or what is wrong, as HTML."""
    try:
        return make()
    except Cancelled:
        return cards.message("Cancelled.")
    except UserError as error:
        return cards.message(str(error))
    except Exception:
        traceback.print_exc()
        return cards.message(INSIDE)


class Page:
    """sources: the checkpoints, of which the first's classes are those to choose from; visits: who draws at the moment."""

    def __init__(self, sources, visits):
        self.sources, self.visits, self.fields = sources, visits, {}

    def values(self, entries):
        return dict(zip(self.fields, entries))

    def chosen(self, values):
        return [self.sources[i] for i in values["ckpts"]] if "ckpts" in values else self.sources

    def draw(self, request: gr.Request, progress=gr.Progress(), *entries):  # noqa: B008
        def make():
            values = self.values(entries)
            choices, sources = read(values), self.chosen(values)
            if not sources:
                return cards.message("checkpoints: choose one or more")
            say = lambda share, line: progress(share, desc=line)  # noqa: E731
            with self.visits.work(request.session_hash) as work:
                return cards.results(draw(sources, choices, self.sources[0], work.check, say))

        return answer(make)

    def encode(self, request: gr.Request, progress=gr.Progress(), file=None, label=None, *entries):  # noqa: B008
        def make():
            if file is None:
                return cards.message("image: drop one in")
            values = self.values(entries)
            choices, sources = read(values | dict(labels=[0], modes=["ODE"])), self.chosen(values)
            if not sources:
                return cards.message("checkpoints: choose one or more")
            say = lambda share, line: progress(share, desc=line)  # noqa: E731
            own = None if label in (None, -1) else label
            with self.visits.work(request.session_hash) as work:
                found = encode(sources, choices, Path(file), own, self.sources[0], work.check, say)
            return cards.image_results(found, choices.guidance.scale != 1)

        return answer(make)

    def plot(self, form, norm, last_step, last_step_size):
        def make():
            values = dict(norm=norm, last_step_size=last_step_size)
            numbers = {name: number(values, name) for name in values}
            return plots(self.sources, SDE(form=form, last_step=last_step, **numbers))

        return answer(make)

    def cancel(self, request: gr.Request):
        self.visits.stop(request.session_hash)
        return cards.message("Cancelled.")

    def leave(self, request: gr.Request):
        self.visits.stop(request.session_hash)

    def field(self, name, component):
        self.fields[name] = component
        return component


def _what(page):
    first = page.sources[0]
    count = first.pipe.recipe.num_classes
    names = [(first.class_name(label), label) for label in range(count)]
    page.field("labels", gr.Dropdown(names, value=list(range(min(3, count))), multiselect=True, label="Classes"))
    with gr.Row():
        page.field("pictures", gr.Number(1, label="Pictures of each", min_width=110))
        page.field("seed", gr.Number(0, label="Seed", min_width=110))
    page.field("modes", gr.CheckboxGroup(list(MODES), value=list(MODES), label="Draw by", info="from the same noise"))
    if len(page.sources) > 1:
        several = [(source.name, i) for i, source in enumerate(page.sources)]
        page.field("ckpts", gr.CheckboxGroup(several, value=list(range(len(several))), label="Checkpoints"))
    frames = "0 draws the pictures alone; each takes one more network call"
    page.field("frames", gr.Slider(0, MOST_FRAMES, 16, step=1, label="Frames of the trajectory", info=frames))


def _how(page):
    guided = any(source.pipe.recipe.null_class is not None for source in page.sources)
    with gr.Accordion("Guidance", open=False):
        info = "1 is none" if guided else "trained without a null class: only 1 is possible"
        page.field("guidance", gr.Number(2.5 if guided else 1, label="Scale", info=info, interactive=guided))
        with gr.Row():
            page.field("low", gr.Number(0, step=0.05, label="From time", info="0 is noise", min_width=110))
            page.field("high", gr.Number(1, step=0.05, label="Up to time", info="1 is data", min_width=110))
        page.field("channels", gr.Radio(["3", "all"], value="all", label="Channels", info="published numbers: 3"))
    with gr.Accordion("ODE", open=False), gr.Row():
        page.field("ode_method", gr.Dropdown(list(ODE_METHODS), value="dopri5", label="Method", min_width=110))
        page.field("ode_steps", gr.Number(40, label="Steps", info="of fixed solvers", min_width=110))


def _noise(page):
    with gr.Accordion("SDE, and its D(t)", open=False, elem_id="sde"):
        with gr.Row():
            page.field("sde_method", gr.Dropdown(list(SDE_METHODS), value="Euler", label="Method", min_width=110))
            page.field("sde_steps", gr.Number(60, label="Steps", min_width=110))
        with gr.Row():
            form = page.field("form", gr.Dropdown(list(DIFFUSION_FORMS), value="sigma", label="Form of D(t)", min_width=110))
            norm = page.field("norm", gr.Number(1, label="Norm", info="half the paper's", min_width=110))
        with gr.Row():
            last = page.field("last_step", gr.Dropdown(list(LAST_STEPS), value="Mean", label="Last step", min_width=110))
            size = page.field("last_step_size", gr.Number(0.04, step=0.01, label="Its size", min_width=110))
        plot = gr.HTML(page.plot("sigma", 1, "Mean", 0.04), elem_id="plot", padding=False, elem_classes="sit-block")
    inputs = [form, norm, last, size]
    for entry in inputs:
        entry.change(page.plot, inputs, plot, trigger_mode="always_last", **DIRECT)


def _work(page, name, elem_id, begin, inputs, result):
    """A button that begins some work, one that ends it, and where its result comes: its id, and the words there before."""
    with gr.Row():
        go = gr.Button(name, variant="primary", elem_id=elem_id)
        stop = gr.Button("Cancel", elem_id=f"cancel-{elem_id}")
    shown, before = result
    empty = f"<p class='sit-small'>{before}</p>"
    out = gr.HTML(empty, elem_id=shown, min_height=160, padding=False, elem_classes="sit-block")
    working = go.click(begin, inputs, out, **QUEUE)
    stop.click(page.cancel, None, out, cancels=[working], **DIRECT)


def _results(page):
    fields, first = list(page.fields.values()), page.sources[0]
    with gr.Tab("Draw"):
        _work(page, "Draw", "draw", page.draw, fields, ("results", "Pictures come here."))
    with gr.Tab("An image of yours"):
        gr.Markdown("Encoded to noise by the ODE, decoded back, and its likelihood.")
        with gr.Row():
            file = gr.File(label="Image", file_types=["image"], elem_id="image", height=120)
            names = [("none", -1)] + [(first.class_name(label), label) for label in range(first.pipe.recipe.num_classes)]
            label = gr.Dropdown(names, value=-1, label="Its class", elem_id="label")
        _work(page, "Encode", "encode", page.encode, [file, label, *fields], ("encoded", "The image comes here."))


def build(sources, visits):
    """The gradio Blocks of these checkpoints."""
    page = Page(sources, visits)
    with gr.Blocks(title="SiT", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML(cards.heading([(source.name, describe(source)) for source in sources]), padding=False, elem_classes="sit-block")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                _what(page)
                _how(page)
                _noise(page)
            with gr.Column(scale=5, min_width=300):
                _results(page)
        blocks.unload(page.leave)
    blocks.queue(default_concurrency_limit=1, max_size=64)
    return blocks


def describe(source):
    """A line about a checkpoint."""
    recipe, settings = source.pipe.recipe, source.pipe.transport.settings
    size = f"{recipe.image_size} px" if isinstance(recipe.image_size, int) else recipe.image_size
    return f"{recipe.model}, {recipe.num_classes} classes, {size}, {settings.path_type} path, {settings.prediction} prediction"


def theme():
    """Fonts of the visitor's own system: the page asks nobody else for any."""
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    darker = dict(body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")  # its own is hard to read
    return gr.themes.Default(**fonts).set(**darker, body_text_color_subdued_dark="*neutral_300")


launching = partial(dict, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False, show_error=False, footer_links=[])
