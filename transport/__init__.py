"""Interpolants, losses and samplers of SiT (arXiv 2401.08740). Knows nothing of images, files or flags."""

from importlib import import_module

# Where each public name lives. It is imported when it is asked for: the tables of names need no torch.
_HOMES = {
    "diffusion": ("DIFFUSION_FORMS",),
    "path": ("PATHS", "GVPCPlan", "ICPlan", "VPCPlan"),
    "prediction": ("LOSS_WEIGHTS", "PREDICTIONS"),
    "sampler": ("Sampler",),
    "settings": ("TransportSettings",),
    "solvers": ("LAST_STEPS", "ODE_METHODS", "SDE_METHODS", "SolverError"),
    "times": ("TIME_LAWS",),
    "transport": ("ModelType", "PathType", "Transport", "WeightType", "create_transport"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
