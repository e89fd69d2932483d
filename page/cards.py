"""Results as HTML: pictures as data, so that the page asks the server for no file; text that is not ours is escaped."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

WIDTH = 96  # pixels on the screen that a small picture is enlarged to, by a whole number

# Of a page that did not come from this machine or by https, browsers keep the clipboard: the text is selected instead.
COPY = "const text = this.nextElementSibling, board = navigator.clipboard; "
COPY += "board ? board.writeText(text.innerText) : getSelection().selectAllChildren(text); "
COPY += "this.innerText = board ? 'Copied' : 'Selected'"
SLIDE = "this.closest('.sit-results').style.setProperty('--frame', this.value)"


def png(image):
    """uint8 (H, W, 3) as a data URI, without loss."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def message(text):
    """A line about what is wrong."""
    return f'<div class="sit-error" role="alert">{escape(text)}</div>'


def heading(sources):
    """The page's title, and a line for each (name, description)."""
    lines = "".join(f'<div class="sit-small"><b>{escape(name)}</b>: {escape(text)}</div>' for name, text in sources)
    return f'<h1 class="sit-title">SiT</h1>{lines}'


def film(frames, caption, alt):
    """One picture of uint8 (frames, H, W, 3), of which the page's --frame is seen, with a line below."""
    count, height, width = frames.shape[:3]
    shown = width * max(1, WIDTH // width)
    image = f'<img src="{png(frames.reshape(count * height, width, 3))}" alt="{escape(alt)}" style="--frames:{count}">'
    box = f'<span class="sit-film" style="width:{shown}px;aspect-ratio:{width}/{height}">{image}</span>'
    return f'<figure class="sit-picture">{box}<figcaption>{escape(caption)}</figcaption></figure>'


def _code(title, text):
    return f'<div class="sit-small">{title}</div><button class="sit-copy" onclick="{COPY}">Copy</button>' + (
        f'<pre class="sit-code">{escape(text)}</pre>'
    )


def _calls(card):
    more = f" (and {card.more_calls} for what the network expects)" if card.more_calls else ""
    return f"{card.calls} network calls, {card.seconds:.2f} s{more}"


def _card(card):
    head = f"<h3>{escape(card.mode)}</h3><div class='sit-small'>{escape(card.title)}</div>"
    if card.error:
        return f'<section class="sit-card">{head}{message(card.error)}</section>'
    parts = [head, f'<div class="sit-small sit-calls">{_calls(card)}</div>']
    parts += [f'<div class="sit-small">{escape(note)}</div>' for note in card.notes]
    times = "".join(f"<span>t = {time:.3f}</span>" for time in card.times)
    if len(card.times) > 1:
        parts.append(f'<div class="sit-times"><div style="--frames:{len(card.times)}">{times}</div></div>')
    rows = [("State x<sub>t</sub>, decoded", "state", card.states)]
    if card.expected is not None:
        rows.append(("What the network expects, E[x<sub>1</sub> | x<sub>t</sub>]", "expected", card.expected))
    for title, kind, frames in rows:
        pictures = "".join(film(frames[:, i], name, f"{name}, {kind}") for i, name in enumerate(card.names))
        parts.append(f'<div class="sit-small">{title}</div><div class="sit-row sit-{kind}">{pictures}</div>')
    told = _code("Command line", card.command) + _code("Library", card.library)
    parts.append(f"<details><summary>The same by hand</summary>{told}</details>")
    return f'<section class="sit-card">{"".join(parts)}</section>'


def results(cards):
    """Cards side by side below a slider that moves them all."""
    frames = max((len(card.times) for card in cards), default=0)
    slider = ""
    if frames > 1:
        moving = f'type="range" min="0" max="{frames - 1}" value="{frames - 1}" step="1" oninput="{SLIDE}"'
        slider = (
            f'<label class="sit-slider"><span>noise</span><input aria-label="trajectory" {moving}><span>image</span></label>'
        )
    inside = "".join(_card(card) for card in cards)
    return f'<div class="sit-results" style="--frame:{max(0, frames - 1)}">{slider}<div class="sit-cards">{inside}</div></div>'


def image_results(cards, guided):
    """ImageCards side by side; guided: whether guidance was set, which the likelihood leaves out."""
    sections = []
    for card in cards:
        if card.error:
            body = message(card.error)
        else:
            pictures = "".join(film(np.asarray(image)[None], name, name) for name, image in card.pictures.items())
            facts = "".join(f"<li>{escape(fact)}</li>" for fact in card.facts)
            bits = f"<p><b class='sit-bits'>{card.bits:.4f} bits/dim</b> ({card.nats:.2f} nats)</p>"
            told = f"<details><summary>The same by hand</summary>{_code('Library', card.library)}</details>"
            body = f'<div class="sit-row">{pictures}</div>{bits}<ul class="sit-small">{facts}</ul>{told}'
        sections.append(f'<section class="sit-card"><h3>{escape(card.title)}</h3>{body}</section>')
    note = "The likelihood is that of the model itself: a guided flow has no density that its network knows."
    note += " The way to noise and back is guided as set; the likelihood is not." if guided else ""
    inside = f'<p class="sit-small">{note}</p><div class="sit-cards">{"".join(sections)}</div>'
    return f'<div class="sit-results" style="--frame:0">{inside}</div>'
