"""The loops: an ODE by torchdiffeq or a solver of ours over a fixed interval, and the SDE. Pure functions of a drift."""

from itertools import pairwise

import torch

from .solvers import ADAPTIVE, FIXED, ODE_METHODS, SDE_METHODS, SolverError
from .times import shifted


def points(t0, t1, num_steps, shift, like):
    """Times from t0 to t1 in equal steps, or moved towards noise by a shift, with like's dtype and device."""
    grid = torch.linspace(t0, t1, num_steps, dtype=like.dtype, device=like.device)
    if shift != 1:
        low, high = min(t0, t1), max(t0, t1)
        grid[1:-1] = low + (high - low) * shifted((grid[1:-1] - low) / (high - low), shift)
    return grid


def restarts(times, edges):
    """Indices of those times at which the drift is another than at the time before, or may be."""
    values = times.tolist() if edges else []  # which waits for a GPU
    jumps = lambda a, b: any((a < edge) != (b < edge) or (a <= edge) != (b <= edge) for edge in edges)  # noqa: E731
    return [i for i in range(1, len(values)) if jumps(values[i - 1], values[i])]


def bounds(a, b, edges, like, margin=0.0):
    """Smallest and largest time at which the drift may be asked between a and b: just inside an end that is an edge, so
    that each side of a jump sees its own drift. margin: how far inside, where the next number is not enough. Scalars of
    like's dtype and device."""
    low, high = like.new_tensor(min(a, b)), like.new_tensor(max(a, b))
    inner_low = torch.nextafter(low, high) + margin if min(a, b) in edges else low
    inner_high = torch.nextafter(high, low) - margin if max(a, b) in edges else high
    return inner_low, inner_high


def integrate_ode(
    drift,
    state,
    t0,
    t1,
    *,
    method,
    num_steps,
    plan=None,
    shift=1,
    edges=(),
    margin=0.0,
    trajectory=False,
    on_step=bool,
    **tolerances,
):
    """Solve d state/dt = drift(t, state) from t0 to t1, in either direction.

    state: a tensor or a tuple of tensors. Fixed solvers, and those of our own, take num_steps - 1 steps, equal but for the
    shift of their points, and where ours remember earlier steps they begin anew behind each time in edges, where the drift may
    jump. Adaptive ones step as the tolerances atol and rtol demand, and exactly onto the edges (margin: see bounds). The drift
    is never asked outside the interval: an adaptive solver would otherwise step past its end and interpolate back, and its
    first probing step may be of any size. on_step() is called for every step but those of SciPy's solver, which
    hides its own. Returns the final state alone, or, with trajectory, a list of num_steps states at equal times. Raises
    SolverError when an adaptive solver gives up.
    """
    like = state[0] if isinstance(state, tuple) else state
    kind = ODE_METHODS[method]
    grid = points(t0, t1, num_steps, 1 if kind == ADAPTIVE else shift, like)
    if kind not in (ADAPTIVE, FIXED):
        return _step_by_step(kind, drift, state, grid, plan, edges, trajectory, on_step)
    inner = () if kind == FIXED else sorted({e for e in edges if min(t0, t1) < e < max(t0, t1)}, reverse=t1 < t0)
    states = [state]
    for a, b in pairwise([t0, *inner, t1]):
        ends = grid.new_tensor([a, b])
        between = grid[(grid > ends.min()) & (grid < ends.max())] if trajectory else grid[:0]
        times = torch.cat([ends[:1], between, ends[1:]])
        low, high = bounds(a, b, inner, like, margin)

        def inside(t, y, low=low, high=high):
            inside.latest = drift(t.clamp(low, high), y)
            return inside.latest

        inside.latest = torch.zeros(())
        solution = _torchdiffeq(inside, state, times, method, None if trajectory else grid, on_step, **tolerances)
        asked_for = bool((grid == ends[1]).any())  # an edge need not be one of the grid's times
        states += solution[1:] if asked_for else solution[1:-1]
        state = solution[-1]
    return states if trajectory else state


def _torchdiffeq(drift, state, times, method, grid, on_step, atol, rtol):
    """States at each of times, by torchdiffeq. grid: where a fixed solver steps, if not from time to time."""
    from torchdiffeq import odeint  # of which the SDE, and solvers of our own, need nothing

    fixed = ODE_METHODS[method] == FIXED
    options = {"max_order": 4} if method.endswith("_adams") else {}  # the default, 12, is unstable
    if fixed and grid is not None:  # two output times and a grid of its own: the solver keeps no state on the way
        options["grid_constructor"] = lambda f, y, t: grid
    elif not fixed and method != "scipy_solver":
        options["step_t"] = times[-1:]
    if method != "scipy_solver":
        setattr(drift, "callback_step" if fixed else "callback_accept_step", lambda t, y, dt: on_step())
    name, reason = "heun2" if method == "heun" else method, None
    try:
        solution = odeint(drift, state, times, method=name, atol=atol, rtol=rtol, options=options)
        states = list(zip(*solution)) if isinstance(state, tuple) else list(solution)
    except AssertionError as error:  # how torchdiffeq says that its step shrank to nothing
        states, reason = [], error
    if len(states) != len(times):
        bad = not all(part.isfinite().all() for part in _parts(drift.latest))
        mend = "the network's output is not a finite number" if bad else "try another solver or looser tolerances"
        raise SolverError(f"{method} failed between t = {times[0]:g} and t = {times[-1]:g}; {mend}") from reason
    return states


def _parts(state):
    return state if isinstance(state, tuple) else (state,)


def _step_by_step(solver, drift, state, grid, plan, edges, trajectory, on_step):
    """A solver of ours, which knows single tensors, and nothing of edges: a tuple travels as the columns of one."""
    pack = unpack = lambda x: x
    if isinstance(state, tuple):
        shapes, widths = [part.shape for part in state], [part[0].numel() for part in state]
        pack = lambda parts: torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)  # noqa: E731
        unpack = lambda x: tuple(part.reshape(s) for part, s in zip(x.split(widths, dim=1), shapes))  # noqa: E731
    states, low, high = [state], grid.min(), grid.max()
    ends = [0, *restarts(grid, edges), len(grid) - 1]
    for first, last in pairwise(ends):
        piece = grid[first : last + 1]
        for x in solver(lambda t, x: pack(drift(t.clamp(low, high), unpack(x))), pack(states[-1]), piece, plan):
            states = [*states, unpack(x)] if trajectory else [unpack(x)]
            on_step()
    return states if trajectory else states[-1]


def integrate_sde(flow, x, t0, t1, *, method, num_steps, randn, shift=1, edges=(), trajectory=False, on_step=bool):
    """Solve the SDE of a flow (sampler.py) from t0 to t1 in num_steps - 1 steps, equal but for the shift of their points.

    method: a word of SDE_METHODS. randn(x) gives the standard normal draw of a step, shaped like x; it is drawn before
    the network is called. edges: times at which the drift may jump. Returns a list: the states from x on with trajectory,
    else the final one alone. on_step() is called after each step.
    """
    times = points(t0, t1, num_steps, shift, x)
    steps = times.diff() if shift != 1 else [(t1 - t0) / (num_steps - 1)] * (num_steps - 1)
    states, kept, jumps = [x], {}, restarts(times, edges)
    for i, (dt, (t, following)) in enumerate(zip(steps, pairwise(times))):
        if i in jumps:
            kept.clear()
        t, following = t.expand(len(x)), following.expand(len(x))
        x = SDE_METHODS[method](flow, x, t, following, dt, randn(x), kept)
        states = [*states, x] if trajectory else [x]
        on_step()
    return states
