"""The loops: torchdiffeq over a fixed interval, and Euler-Maruyama and Heun for the SDE. Pure functions of a drift."""

from itertools import pairwise

import torch
from torchdiffeq import odeint

ADAPTIVE_METHODS = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
FIXED_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")


def clamp_time(t, a, b, edges):
    """Bring the solver's time into [a, b], and off an end that is an edge, so that each side of it sees its own drift."""
    low, high = min(a, b), max(a, b)
    low_t, high_t = torch.tensor(low).to(t), torch.tensor(high).to(t)
    if low in edges:
        low_t = torch.nextafter(low_t, high_t)
    if high in edges:
        high_t = torch.nextafter(high_t, low_t)
    return t.clamp(low_t, high_t)


def integrate_ode(drift, state, t0, t1, *, method, num_steps, atol, rtol, edges=(), trajectory=False):
    """Solve d state/dt = drift(t, state) from t0 to t1, in either direction.

    state: a tensor or a tuple of tensors. Fixed solvers take num_steps - 1 equal steps; adaptive ones step as atol and
    rtol demand, and exactly onto each time in edges, where the drift may jump. The drift is never asked outside the
    interval: an adaptive solver would otherwise step past its end and interpolate back, and its first probing step may
    be of any size. Returns the final state alone, or, with trajectory, a list of num_steps states at equal times.
    Raises RuntimeError when SciPy's solver gives up.
    """
    grid = torch.linspace(t0, t1, num_steps)
    pick = (lambda s, i: tuple(part[i] for part in s)) if isinstance(state, tuple) else (lambda s, i: s[i])
    device = (state[0] if isinstance(state, tuple) else state).device
    if method in FIXED_METHODS:
        # Two output times and a grid of its own: the solver then keeps no intermediate state.
        times, options = (grid, {}) if trajectory else (grid[[0, -1]], {"grid_constructor": lambda f, y, t: grid.to(t)})
        stops = [(t0, t1, times, options)]
    else:
        inner = sorted((e for e in edges if min(t0, t1) < e < max(t0, t1)), reverse=t1 < t0)
        bounds = [t0, *inner, t1]
        stops = []
        for a, b in pairwise(bounds):
            wanted = grid[(grid > min(a, b)) & (grid < max(a, b))] if trajectory else grid[:0]
            times = torch.cat([torch.tensor([a]), wanted, torch.tensor([b])])
            options = {} if method == "scipy_solver" else {"step_t": times[-1:].to(device)}
            stops.append((a, b, times, options))
    states = [state]
    for a, b, times, options in stops:
        inside = lambda t, y, a=a, b=b: drift(clamp_time(t, a, b, edges), y)  # noqa: E731
        solution = odeint(inside, state, times.to(device), method=method, atol=atol, rtol=rtol, options=options)
        reached = len(solution[0] if isinstance(state, tuple) else solution)
        if reached != len(times):
            raise RuntimeError(f"{method} failed between t = {a:g} and t = {b:g}; try another solver or looser tolerances")
        if trajectory:
            ends = reached if b == t1 else reached - 1  # an edge is not one of the times that were asked for
            states += [pick(solution, i) for i in range(1, ends)]
        state = pick(solution, -1)
    return states if trajectory else state


def integrate_sde(drift, diffusion, x, t0, t1, *, method, num_steps, randn, trajectory=False):
    """Solve dX = drift(X, t) dt + sqrt(2 diffusion(X, t)) dW from t0 to t1 in num_steps - 1 equal steps.

    Euler is Euler-Maruyama; Heun is Karras et al.'s predictor-corrector: noise first, then a Heun step of the drift.
    randn(x) gives the standard normal draw of a step, shaped like x; it is drawn before the network is called.
    Returns the list of states, from x on with trajectory, else the final one alone.
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
    return states
