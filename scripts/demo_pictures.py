"""The demo's pictures as texts for its page: data URIs of images, and curves as SVG."""

import base64
import io
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

WIDE, HIGH = 420, 240  # units of a curve's own
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 42  # around what is drawn
FRAMES = 40  # of a film
TRACE = 24  # levels between the channels of a pixel that nobody sees as a colour


def data_uri(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(pixels):
    """uint8 (H, W, 3) -> a data URI, without the trace of colour of drawn digits, which would make it three times as large."""
    file, grey = io.BytesIO(), np.ptp(pixels.astype(np.int16), axis=-1).max() <= TRACE
    pixels = pixels.mean(-1).round().astype(np.uint8) if grey else np.ascontiguousarray(pixels)
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return data_uri(file.getvalue())


def strip(images, scale=1):
    """uint8 images (N, H, W, 3) side by side, each pixel a square of scale: uint8 (H, N W, 3) for scale 1."""
    return np.concatenate(list(images), axis=1).repeat(scale, 0).repeat(scale, 1)


def film(ways):
    """ways: for each row of the film the frames of images on their way, noise first, each uint8 (N, H, W, 3).

    Returns (data URI of all frames one below the other, their number, width over height of one)."""
    longest = max(map(len, ways))
    count = min(FRAMES, longest)
    pick = lambda frames: [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]  # noqa: E731
    frames = [np.concatenate([strip(images) for images in rows]) for rows in zip(*map(pick, ways))]
    height, width, _ = frames[0].shape
    return png(np.concatenate(frames)), count, f"{width} / {height}"


def curve(points, x_label, y_label, kind="", percent=False):
    """An SVG of points (x, y), two or more, whose colours are the page's. kind: a class that it gets."""
    xs, ys = zip(*points)
    low, high = (0.0, 1.0) if percent else (min(ys), max(ys))
    y_ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    x_ticks = [tick for tick in MaxNLocator(6, integer=True).tick_values(0, max(xs)) if 0 <= tick <= max(xs)]
    low, high = y_ticks[0], y_ticks[-1]
    x_at = lambda x: LEFT + (WIDE - LEFT - RIGHT) * x / max(xs)  # noqa: E731
    y_at = lambda y: HIGH - BOTTOM - (HIGH - TOP - BOTTOM) * (y - low) / (high - low)  # noqa: E731
    parts = [
        f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" class="{kind}" aria-label="{escape(y_label)}, by {escape(x_label)}">'
    ]
    for tick in y_ticks:
        y, shown = y_at(tick), f"{tick:.0%}" if percent else f"{tick:g}"
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDE - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{x_at(tick):.1f}" y="{HIGH - BOTTOM + 16}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 6}" text-anchor="middle">{escape(x_label)}</text>')
    places = [f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points]
    parts.append(f'<polyline points="{" ".join(places)}"/>')
    for place, (x, y) in zip(places, points):
        across, down = place.split(",")
        said = f"{y:.0%}" if percent else f"{y:.3f}"
        parts.append(f'<circle cx="{across}" cy="{down}" r="3"><title>step {x:,}: {said}</title></circle>')
    return "".join([*parts, "</svg>"])
