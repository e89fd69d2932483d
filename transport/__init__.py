"""Interpolants, losses and samplers of SiT (arXiv 2401.08740). Knows nothing of images, files or flags."""

from .integrators import SolverError
from .path import DIFFUSION_FORMS, GVPCPlan, ICPlan, VPCPlan
from .sampler import LAST_STEPS, ODE_METHODS, SDE_METHODS, Sampler
from .transport import ModelType, PathType, Transport, WeightType

__all__ = [
    "DIFFUSION_FORMS",
    "LAST_STEPS",
    "ODE_METHODS",
    "SDE_METHODS",
    "GVPCPlan",
    "ICPlan",
    "ModelType",
    "PathType",
    "Sampler",
    "SolverError",
    "Transport",
    "VPCPlan",
    "WeightType",
    "create_transport",
]


def create_transport(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None):
    """Build a Transport from the words that the command line uses.

    path_type: Linear, GVP or VP. prediction: velocity, score or noise. loss_weight: None, velocity or likelihood
    (noise and score only). train_eps, sample_eps: how far training and sampling stay from the ends of [0, 1]; None
    takes the default of the path and prediction. Raises ValueError for anything else.
    """
    return Transport(
        path_type=_member(PathType, path_type, "path type"),
        model_type=_member(ModelType, prediction, "prediction"),
        weight_type=_member(WeightType, loss_weight, "loss weight"),
        train_eps=train_eps,
        sample_eps=sample_eps,
    )


def _member(enum, value, what):
    try:
        return enum(value)
    except ValueError:
        raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(str(m.value) for m in enum)}") from None
