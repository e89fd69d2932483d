"""D(t) of the SDE as a picture: the form that is chosen, before the others."""

from html import escape

import torch

from transport import DIFFUSION_FORMS

INFINITE = float("inf")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 220, 42, 12, 26, 34


def curves(plan, norm, points=241):
    """(times (points,), {form: D(t) (points,)}) in float64, infinite where D is, or is no number."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    return t, {
        form: plan.compute_diffusion(t, t, form, norm).nan_to_num(nan=INFINITE, posinf=INFINITE) for form in DIFFUSION_FORMS
    }


def top_of(values, chosen):
    """The largest D that the plot shows: all of the chosen form, but for the ends at which it has no bound."""
    inner = values[chosen][values[chosen].isfinite()].sort().values
    most = inner[int(0.9 * (len(inner) - 1))].item() if len(inner) else 0.0
    bounded = inner[-1].item() if len(inner) and inner[-1] <= 3 * most else most
    return 1.1 * bounded or 1.0


def _line(t, values, top, style):
    """A polyline, cut off where it leaves the plot; where D is infinite, it does."""
    x = LEFT + t * (WIDTH - LEFT - RIGHT)
    y = TOP + (1 - values / top) * (HEIGHT - TOP - BOTTOM)
    dots = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.clamp(min=-1e4).tolist()))
    return f'<polyline points="{dots}" fill="none" clip-path="url(#sit-plot)" {style}/>'


def plot(path, plan, form, norm, last):
    """An SVG. path: the word of the plan; last: the time at which the last step begins."""
    t, values = curves(plan, norm)
    top = top_of(values, form)
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<clipPath id="sit-plot"><rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{floor - TOP}"/></clipPath>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = LEFT + share * (right - LEFT), floor - share * (floor - TOP)
        parts.append(f'<path d="M{x:.1f},{TOP}V{floor}M{LEFT},{y:.1f}H{right}" class="sit-grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 14}" text-anchor="middle">{share:g}</text>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{share * top:.3g}</text>')
    parts += [_line(t, values[other], top, 'class="sit-faint"') for other in values if other != form]
    parts.append(_line(t, values[form], top, 'class="sit-chosen"'))
    x = LEFT + last * (right - LEFT)
    parts.append(f'<path d="M{x:.1f},{TOP}V{floor}" class="sit-last"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">time, from noise to data</text>')
    title = f"D(t) of {escape(form)}, norm {norm:g}, on the {escape(path)} path"
    parts.append(f'<text x="{LEFT}" y="16" class="sit-title">{title}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" class="sit-svg">{"".join(parts)}</svg>'


def plots(sources, sde):
    """The plot of each path that the checkpoints have, for an SDE, and a line that says what else is in it."""
    plans = {source.pipe.transport.settings.path_type: source.pipe.transport.path_sampler for source in sources}
    last = 1 - sde.last_step_size if sde.last_step != "None" else 1.0
    drawn = "".join(plot(path, plan, sde.form, sde.norm, last) for path, plan in plans.items())
    others = ", ".join(other for other in DIFFUSION_FORMS if other != sde.form)
    return f'<div class="sit-plots">{drawn}</div><p class="sit-small">Faint: {others}. Dotted: where the last step begins.</p>'
