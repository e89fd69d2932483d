"""The solvers by name, and the steps that are ours. integrators.py runs them; torchdiffeq has the others.

Tensors are used by their methods alone, so that the names are there without torch.
"""

from itertools import pairwise

from .diffusion import DIFFUSION_FORMS


class SolverError(RuntimeError):
    """An adaptive solver gave up: its step shrank to nothing, or the network's output was not finite."""


ADAPTIVE, FIXED = "adaptive", "fixed"  # torchdiffeq's kinds


def multistep(drift, x, times, plan):
    """Order 2 at one network call a step, on any path and regular at both ends of it.

    x / r turns with the path's angle (path.compute_polar_t) as y'' = -y + q, where q = 0 while the network's expected noise
    and data stay what they are: its step is then DDIM's (Song et al., arXiv 2010.02502; as a rotation: Salimans & Ho, arXiv
    2202.00512, appendix D). q is estimated from the step before, as DPM-Solver++(2M) does for the data alone (Lu et al., arXiv
    2211.01095), whose steps in log(alpha / sigma) have no end at noise and data.
    """
    y_before = speed_before = turn = None
    for t, following in pairwise(times):
        (r, growth), (angle, turning) = plan.compute_polar_t(t)
        (r_next, _), (angle_next, _) = plan.compute_polar_t(following)
        y = x / r
        speed = (drift(t, x) - growth * y) / (r * turning)  # dy/d angle
        q = 0.0
        if turn is not None:
            q = (speed - turn.cos() * speed_before + turn.sin() * y_before) / turn.sin()
        y_before, speed_before, turn = y, speed, angle_next - angle
        x = r_next * (turn.cos() * y + turn.sin() * speed + (1 - turn.cos()) * q)
        yield x


# --sampling-method of the ODE: how torchdiffeq steps, or a solver of our own, a generator of states:
#
#     def solver(drift, x, times, plan):     # x at times[0]; drift(t, x) -> dx/dt, one network call; plan: the path
#         for t, following in zip(times, times[1:]):
#             x = ...
#             yield x                        # the state at the following time
#
# Where the drift may jump between two times, it is begun anew.
ODE_METHODS = {
    **dict.fromkeys(("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver"), ADAPTIVE),
    **dict.fromkeys(("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"), FIXED),
    "heun": FIXED,  # the paper's word for torchdiffeq's heun2
    "multistep": multistep,
}


def euler_maruyama(flow, x, t, following, dt, noise, kept):
    """x + drift dt + jump: strong order 1/2."""
    jump = flow.jump(x, t, dt, noise)
    return x + flow.drift(x, t) * dt + jump


def stochastic_heun(flow, x, t, following, dt, noise, kept):
    """Noise first, then a Heun step of the drift, as Karras et al.'s predictor-corrector does (arXiv 2206.00364)."""
    x = x + flow.jump(x, t, dt, noise)
    k1 = flow.drift(x, t)
    k2 = flow.drift(x + dt * k1, following)
    return x + dt * (k1 + k2) / 2


def sde_multistep(flow, x, t, following, dt, noise, kept):
    """Exact for one data point whatever the step, and of weak order 2 at one network call a step.

    Given E[x1 | x], the SDE is linear in x: (x - alpha x1) / sigma is multiplied by exp(-K), K the integral of D / sigma^2 over
    the step, and as much noise is added as keeps its variance. E[x1 | x] goes on as it did in the step before. With D of SBDM
    on VP this is the SDE-DPM-Solver++(2M) of Lu et al. (arXiv 2211.01095), but for the variable of that line.
    """
    data = flow.data(x, t)
    ahead = data if not kept else data + dt / (2 * kept["dt"]) * (data - kept["data"])
    kept.update(data=data, dt=dt)
    (alpha, sigma), (alpha_next, sigma_next) = flow.coefficients(x, t), flow.coefficients(x, following)
    nodes = (0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18)  # of Gauss and Legendre
    forgetting = sum(weight * dt * flow.forgetting(x, t + (following - t) * node) for node, weight in nodes)
    noisy = sigma_next * (-(-2 * forgetting).expm1()).sqrt()
    return alpha_next * ahead + sigma_next / sigma * (-forgetting).exp() * (x - alpha * ahead) + noisy * noise


# --sampling-method of the SDE: step(flow, x, t, following, dt, noise, kept) -> the state at the following time, t + dt.
# flow (sampler.py) has drift(x, t) and data(x, t), at one network call each; t and following are (N,); noise (N, ...) is
# standard normal; kept is a dict that lives from step to step, emptied where the drift may jump.
SDE_METHODS = {"Euler": euler_maruyama, "Heun": stochastic_heun, "Multistep": sde_multistep}

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


def check_ode(method, num_steps, time_shift=1):
    """Raises ValueError for settings of the ODE that no network could make sense of."""
    _check("ODE solver", method, ODE_METHODS)
    _check_steps(num_steps)
    if method.endswith("_adams") and time_shift != 1:
        raise ValueError(
            f"{method} takes equal steps alone, but the model's or your time_shift is {time_shift:g}: give 1, or another solver"
        )


def check_sde(method, form, norm, last_step, last_step_size, num_steps):
    """Raises ValueError for settings of the SDE that no network could make sense of."""
    _check("SDE sampler", method, SDE_METHODS)
    if not callable(form):
        _check("diffusion form", form, DIFFUSION_FORMS)
    _check("last step", last_step, LAST_STEPS)
    _check_steps(num_steps)
    if not 0 <= last_step_size < 1:
        raise ValueError(f"last_step_size must be in [0, 1), not {last_step_size}")
    if not norm >= 0:
        raise ValueError(f"diffusion_norm must be at least 0, not {norm}")
