"""The loops: torchdiffeq over a fixed interval, and Euler-Maruyama and Heun for the SDE. Pure functions of a drift."""

from itertools import pairwise

import torch
from torchdiffeq import odeint

STEPPING_METHODS = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
ADAPTIVE_METHODS = (*STEPPING_METHODS, "scipy_solver")
FIXED_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")


class SolverError(RuntimeError):
    """An adaptive solver gave up: its step shrank to nothing, or the network's output was not finite."""


def bounds(a, b, edges, like):
    """Smallest and largest time at which the drift may be asked between a and b: just inside an end that is an edge, so
    that each side of a jump sees its own drift. Scalars of like's dtype and device."""
    low, high = like.new_tensor(min(a, b)), like.new_tensor(max(a, b))
    inner_low = torch.nextafter(low, high) if min(a, b) in edges else low
    inner_high = torch.nextafter(high, low) if max(a, b) in edges else high
    return inner_low, inner_high


def integrate_ode(drift, state, t0, t1, *, method, num_steps, atol, rtol, edges=(), trajectory=False, on_step=lambda: None):
    """Solve d state/dt = drift(t, state) from t0 to t1, in either direction.

    state: a tensor or a tuple of tensors. Fixed solvers take num_steps - 1 equal steps; adaptive ones step as atol and
    rtol demand, and exactly onto each time in edges, where the drift may jump. The drift is never asked outside the
    interval: an adaptive solver would otherwise step past its end and interpolate back, and its first probing step may
    be of any size. on_step() is called for every step but those of SciPy's solver, which hides its own. Returns the
    final state alone, or, with trajectory, a list of num_steps states at equal times. Raises SolverError when an
    adaptive solver gives up.
    """
    is_tuple = isinstance(state, tuple)
    pick = (lambda s, i: tuple(part[i] for part in s)) if is_tuple else (lambda s, i: s[i])
    like = state[0] if is_tuple else state
    grid = torch.linspace(t0, t1, num_steps, dtype=like.dtype, device=like.device)
    fixed = method in FIXED_METHODS
    inner = () if fixed else sorted({e for e in edges if min(t0, t1) < e < max(t0, t1)}, reverse=t1 < t0)
    states = [state]
    for a, b in pairwise([t0, *inner, t1]):
        ends = grid.new_tensor([a, b])
        between = grid[(grid > ends.min()) & (grid < ends.max())] if trajectory else grid[:0]
        times = torch.cat([ends[:1], between, ends[1:]])
        options = {"max_order": 4} if method.endswith("_adams") else {}  # the default, 12, is unstable
        if fixed and not trajectory:  # two output times and a grid of its own: the solver keeps no state on the way
            options["grid_constructor"] = lambda f, y, t: grid
        elif method in STEPPING_METHODS:
            options["step_t"] = ends[1:]
        low, high = bounds(a, b, inner, like)

        def inside(t, y, low=low, high=high):
            return drift(t.clamp(low, high), y)

        if method != "scipy_solver":
            callback = "callback_step" if fixed else "callback_accept_step"
            setattr(inside, callback, lambda t, y, dt: on_step())
        failure = f"{method} failed between t = {a:g} and t = {b:g}; try another solver or looser tolerances"
        try:
            solution = odeint(inside, state, times, method=method, atol=atol, rtol=rtol, options=options)
        except AssertionError as error:  # how torchdiffeq says that its step shrank to nothing
            raise SolverError(f"{failure} ({str(error).splitlines()[0][:80]})") from error
        reached = len(solution[0] if is_tuple else solution)
        if reached != len(times):
            raise SolverError(failure)
        if trajectory:
            asked_for = bool((grid == ends[1]).any())  # an edge need not be one of the grid's times
            wanted = reached if asked_for else reached - 1
            states += [pick(solution, i) for i in range(1, wanted)]
        state = pick(solution, -1)
    return states if trajectory else state


def integrate_sde(drift, diffusion, x, t0, t1, *, method, num_steps, randn, trajectory=False, on_step=lambda: None):
    """Solve dX = drift(X, t) dt + sqrt(2 diffusion(X, t)) dW from t0 to t1 in num_steps - 1 equal steps.

    Euler is Euler-Maruyama; Heun is Karras et al.'s predictor-corrector: noise first, then a Heun step of the drift.
    randn(x) gives the standard normal draw of a step, shaped like x; it is drawn before the network is called.
    Returns a list: the states from x on with trajectory, else the final one alone. on_step() is called after each step.
    """
    times = torch.linspace(t0, t1, num_steps, device=x.device, dtype=x.dtype)
    dt = (t1 - t0) / (num_steps - 1)
    states = [x]
    for i, t in enumerate(times[:-1]):
        t = t.expand(len(x))
        noise = randn(x)
        jump = torch.sqrt(2 * diffusion(x, t) * dt) * noise
        if method == "Euler":
            x = x + drift(x, t) * dt + jump
        else:
            x = x + jump
            k1 = drift(x, t)
            k2 = drift(x + dt * k1, times[i + 1].expand(len(x)))
            x = x + dt * (k1 + k2) / 2
        states = [*states, x] if trajectory else [x]
        on_step()
    return states
