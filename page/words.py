"""The page's call as a command line of sample.py, and as lines of the library."""

import shlex
from dataclasses import MISSING, fields

from data.autoencoder import PUBLISHED

from .choices import MODES


def brief(settings):
    """A settings object as Python would make it, without what is its default."""

    def is_default(entry):
        value = getattr(settings, entry.name)
        return entry.default is not MISSING and value == entry.default

    said = [f"{entry.name}={getattr(settings, entry.name)!r}" for entry in fields(settings) if not is_default(entry)]
    return f"{type(settings).__name__}({', '.join(said)})"


def _guidance_flags(guidance):
    flags = ["--cfg-scale", guidance.scale]
    if guidance.scale == 1:
        return flags
    flags += ["--cfg-channels", "all" if guidance.channels is None else guidance.channels]
    return [*flags, "--guidance-low", guidance.low, "--guidance-high", guidance.high]


def _solver_flags(mode, solver):
    flags = ["--sampling-method", solver.method, "--num-sampling-steps", solver.num_steps]
    if mode == "ODE":
        return flags
    flags += ["--diffusion-form", solver.form, "--diffusion-norm", solver.norm]
    return [*flags, "--last-step", solver.last_step, "--last-step-size", solver.last_step_size]


def command(source, choices, mode, labels):
    """python sample.py ..., one line; labels: the checkpoint's own class ids."""
    words = ["python", "sample.py", mode, "--ckpt", source.ckpt, *source.flags]
    words += ["--class-labels", *labels, "--num-samples-per-class", choices.each, "--seed", choices.seed]
    words += [*_guidance_flags(choices.guidance), *_solver_flags(mode, choices.solver(mode))]
    return shlex.join(map(str, words))


def _loading(source):
    told = dict(source.told)
    if source.pipe.autoencoder.name in PUBLISHED:  # of which the library and the scripts have other defaults
        told.setdefault("vae", source.pipe.autoencoder.name)
    return f"pipe = Pipeline.load({', '.join([repr(str(source.ckpt)), *(f'{key}={value!r}' for key, value in told.items())])})"


def library(source, choices, mode, labels):
    """Python's lines for the same pictures, called images."""
    settings = [f"seed={choices.seed}", f"solver={brief(choices.solver(mode))}"]
    if choices.guidance.scale != 1:
        settings.append(f"guidance={brief(choices.guidance)}")
    every = [label for label in labels for _ in range(choices.each)]
    names = sorted({mode, "Guidance", "Pipeline"}, key=lambda name: (name not in MODES, name))
    return "\n".join([
        f"from inference import {', '.join(names)}",
        "",
        _loading(source),
        f"images = pipe.sample({every}, {', '.join(settings)})",
    ])  # fmt: skip


def library_of_image(source, choices, label, file):
    """Python's lines for what the page makes of an image."""
    called = brief(choices.ode)
    more = f", guidance={brief(choices.guidance)}" if choices.guidance.scale != 1 else ""
    return "\n".join([
        "from inference import ODE, Guidance, Pipeline",
        "from data.images import load_image",
        "",
        _loading(source),
        f"images = load_image({file!r}, pipe.recipe.image_size).permute(1, 2, 0)[None]",
        f"z = pipe.encode(images, [{label}], solver={called}{more})",
        f"back = pipe.sample([{label}], noise=z, solver={called}{more})",
        f"nats, bits = pipe.likelihood(images, [{label}], seed={choices.seed}, solver={called})",
    ])  # fmt: skip
