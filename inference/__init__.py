"""From a checkpoint to images, likelihoods and encodings: the library that the scripts, a notebook and a page all use."""

from importlib import import_module

from .settings import ODE, SDE, Guidance

__all__ = ["ODE", "SDE", "Guidance", "Pipeline"]


def __getattr__(name):
    if name != "Pipeline":  # which needs torch; the settings do not
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(".pipeline", __name__).Pipeline
