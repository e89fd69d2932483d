"""The solvers by name, and the steps that are ours. integrators.py runs them; torchdiffeq has the others.

Tensors are used by their methods alone, so that the names are there without torch.
"""

from .diffusion import DIFFUSION_FORMS


class SolverError(RuntimeError):
    """An adaptive solver gave up: its step shrank to nothing, or the network's output was not finite."""


ADAPTIVE, FIXED = "adaptive", "fixed"  # torchdiffeq's kinds

# --sampling-method of the ODE: how torchdiffeq steps, or a solver of our own, a generator of states:
#
#     def solver(drift, x, times, plan):     # x at times[0]; drift(t, x) -> dx/dt, one network call; plan: the path
#         for t, following in zip(times, times[1:]):
#             x = ...
#             yield x                        # the state at the following time
ODE_METHODS = {
    **dict.fromkeys(("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver"), ADAPTIVE),
    **dict.fromkeys(("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"), FIXED),
    "heun": FIXED,  # the paper's word for torchdiffeq's heun2
}


def euler_maruyama(drift, x, t, following, dt, jump):
    """x + drift dt + jump: strong order 1/2."""
    return x + drift(x, t) * dt + jump


def stochastic_heun(drift, x, t, following, dt, jump):
    """Noise first, then a Heun step of the drift, as Karras et al.'s predictor-corrector does (arXiv 2206.00364)."""
    x = x + jump
    k1 = drift(x, t)
    k2 = drift(x + dt * k1, following)
    return x + dt * (k1 + k2) / 2


# --sampling-method of the SDE: step(drift, x, t, following, dt, jump) -> the state at the following time, t + dt.
# drift(x, t) is one network call; t and following are (N,); jump (N, ...) is sqrt(2 D dt) times standard normal noise.
SDE_METHODS = {"Euler": euler_maruyama, "Heun": stochastic_heun}

# --last-step: noiseless, of size h from x at time t, or None for nothing. flow has drift(x, t), velocity(x, t) and data(x, t).
LAST_STEPS = {
    "Mean": lambda flow, x, t, h: x + flow.drift(x, t) * h,
    "None": None,
    "Tweedie": lambda flow, x, t, h: flow.data(x, t),
    "Euler": lambda flow, x, t, h: x + flow.velocity(x, t) * h,
}


def _check(what, value, allowed):
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(map(str, allowed))}")


def _check_steps(num_steps):
    if num_steps != int(num_steps) or num_steps < 2:
        raise ValueError(f"num_steps counts points in time and must be a whole number of at least 2, not {num_steps}")


def check_ode(method, num_steps):
    """Raises ValueError for settings of the ODE that no network could make sense of."""
    _check("ODE solver", method, ODE_METHODS)
    _check_steps(num_steps)


def check_sde(method, form, norm, last_step, last_step_size, num_steps):
    """Raises ValueError for settings of the SDE that no network could make sense of."""
    _check("SDE sampler", method, SDE_METHODS)
    _check("diffusion form", form, DIFFUSION_FORMS)
    _check("last step", last_step, LAST_STEPS)
    _check_steps(num_steps)
    if not 0 <= last_step_size < 1:
        raise ValueError(f"last_step_size must be in [0, 1), not {last_step_size}")
    if not norm >= 0:
        raise ValueError(f"diffusion_norm must be at least 0, not {norm}")
