"""Sampler: turns a Transport and a network into samples, encodings and likelihoods."""

import math
from dataclasses import dataclass

import torch

from .integrators import integrate_ode, integrate_sde, points
from .likelihood import divergence, standard_normal_logp
from .path import expand_t
from .solvers import ADAPTIVE, LAST_STEPS, ODE_METHODS, check_ode, check_sde


def _rademacher(x, num_probes):
    return torch.randint(0, 2, (num_probes, *x.shape), device=x.device).to(x.dtype) * 2 - 1


@dataclass
class Flow:
    """A network read by a transport, and D(t): what the steps of the SDE ask for, at one network call each."""

    transport: object
    model: object
    model_kwargs: dict
    form: object  # a word of DIFFUSION_FORMS, or a function such as they are
    norm: float

    @property
    def plan(self):
        return self.transport.path_sampler

    def diffusion(self, x, t):
        return self.plan.compute_diffusion(x, t, form=self.form, norm=self.norm)

    def jump(self, x, t, dt, noise):
        """sqrt(2 D dt) noise"""
        return torch.sqrt(2 * self.diffusion(x, t) * dt) * noise

    def coefficients(self, x, t):
        """(alpha, sigma), at x's rank."""
        t = expand_t(t, x)
        return self.plan.compute_alpha_t(t)[0], self.plan.compute_sigma_t(t)[0]

    def forgetting(self, x, t):
        """D / sigma^2, the rate at which the SDE replaces noise, at x's rank."""
        return self.diffusion(x, t) / self.coefficients(x, t)[1] ** 2

    def drift(self, x, t):
        """v + D score"""
        velocity, score = self.transport.predict(self.model, x, t, self.model_kwargs)
        return velocity + self.diffusion(x, t) * score

    def velocity(self, x, t):
        return self.transport.predict_velocity(self.model, x, t, self.model_kwargs)

    def data(self, x, t):
        """E[x1 | x]"""
        return self.transport.predict_data(self.model, x, t, self.model_kwargs)


class Sampler:
    """Builds sampling functions fn(z, model, **model_kwargs) for one Transport.

    z (N, ...) is where the solve starts: noise, or data when reversed. model(x, t, **model_kwargs) is the network.
    num_steps counts points in time, so that a fixed solver takes num_steps - 1 steps. Bad settings raise ValueError.
    """

    def __init__(self, transport):
        self.transport = transport

    def _ode(self, sampling_method, num_steps, edges=(), **more):
        """integrate_ode with its settings checked and bound."""
        shift = self.transport.settings.time_shift
        check_ode(sampling_method, num_steps, shift)
        settings = dict(method=sampling_method, num_steps=num_steps, shift=shift, plan=self.transport.path_sampler, **more)
        settings |= dict(edges=self.transport.times_of(edges), margin=self.transport.margin)
        return lambda drift, state, t0, t1: integrate_ode(drift, state, t0, t1, **settings)

    def sample_ode(
        self,
        *,
        sampling_method="dopri5",
        num_steps=50,
        atol=1e-6,
        rtol=1e-3,
        reverse=False,
        edges=(),
        trajectory=False,
        on_step=bool,
    ):
        """Sampling by the probability flow dx/dt = v(x, t) (SiT eq. 6).

        sampling_method: a word of ODE_METHODS. atol, rtol: for adaptive solvers. reverse: from data to noise over the same
        interval. edges: times of the network at which its answer may jump. on_step(): called at every step. Returns
        fn(z, model, **model_kwargs) -> a list of states whose [-1] is the sample; the only one unless trajectory,
        which gives num_steps of them.
        """
        more = dict(atol=atol, rtol=rtol, edges=edges, trajectory=trajectory, on_step=on_step)
        solve = self._ode(sampling_method, num_steps, **more)
        t0, t1 = self.transport.ode_interval
        if reverse:
            t0, t1 = t1, t0

        @torch.no_grad()
        def sample(z, model, **model_kwargs):
            def drift(t, x):
                return self.transport.predict_velocity(model, x, t.expand(len(x)), model_kwargs)

            states = solve(drift, z * self.transport.scale(t0), t0, t1)
            return self._ended(states if trajectory else [states], t1)

        return sample

    def ode_times(self, sampling_method="dopri5", num_steps=50):
        """Times of the states that sample_ode gives with trajectory, float64 (num_steps,), noise first."""
        shift = 1 if ODE_METHODS[sampling_method] == ADAPTIVE else self.transport.settings.time_shift
        return points(*self.transport.ode_interval, num_steps, shift, torch.zeros((), dtype=torch.float64))

    def sde_times(self, diffusion_form="SBDM", last_step="Mean", last_step_size=0.04, num_steps=250):
        """Times of the states that sample_sde gives with trajectory, float64 (num_steps,), or one more with a last step."""
        h = last_step_size if LAST_STEPS[str(last_step)] else 0.0
        t0, t1 = self.transport.sde_interval(diffusion_form, h)
        times = points(t0, t1, num_steps, self.transport.settings.time_shift, torch.zeros((), dtype=torch.float64))
        return torch.cat([times, times[-1:] + h]) if LAST_STEPS[str(last_step)] else times

    def _ended(self, states, t1):
        """States of which the last is in the size that it is returned in."""
        return [*states[:-1], states[-1] / self.transport.scale(t1)]

    def sample_sde(
        self,
        *,
        sampling_method="Euler",
        diffusion_form="SBDM",
        diffusion_norm=1.0,
        last_step="Mean",
        last_step_size=0.04,
        num_steps=250,
        randn=torch.randn_like,
        edges=(),
        trajectory=False,
        on_step=bool,
    ):
        """Sampling by dX = (v + D score) dt + sqrt(2 D) dW (SiT eq. 5 with w = 2 D).

        sampling_method: a word of SDE_METHODS. diffusion_form, diffusion_norm: D(t), see compute_diffusion.
        last_step: what follows the num_steps - 1 stochastic steps, without noise, over last_step_size: Mean (drift of
        the SDE), Euler (the ODE's velocity), Tweedie (E[x1 | x]), or None for nothing. randn(x): where the noise comes
        from. Returns fn(z, model, **model_kwargs) -> a list of states as sample_ode does.
        """
        last_step = str(last_step)  # Python's None is the word None
        check_sde(sampling_method, diffusion_form, diffusion_norm, last_step, last_step_size, num_steps)
        finish = LAST_STEPS[last_step]
        h = last_step_size if finish else 0.0
        t0, t1 = self.transport.sde_interval(diffusion_form, h)

        @torch.no_grad()
        def sample(z, model, **model_kwargs):
            flow = Flow(self.transport, model, model_kwargs, diffusion_form, diffusion_norm)
            settings = dict(method=sampling_method, num_steps=num_steps, randn=randn, trajectory=trajectory, on_step=on_step)
            settings |= dict(shift=self.transport.settings.time_shift, edges=self.transport.times_of(edges))
            states = integrate_sde(flow, z * self.transport.scale(t0), t0, t1, **settings)
            if finish is None:
                return self._ended(states, t1)
            x, t = states[-1], torch.full((), t1, device=z.device, dtype=z.dtype).expand(len(z))
            x = finish(flow, x, t, h)
            return [*states, x] if trajectory else [x]

        return sample

    def sample_ode_likelihood(
        self,
        *,
        sampling_method="dopri5",
        num_steps=50,
        atol=1e-6,
        rtol=1e-3,
        edges=(),
        num_probes=1,
        exact_divergence=False,
        rademacher=_rademacher,
    ):
        """Log-likelihood of data by the instantaneous change of variables along the reversed probability flow.

        The divergence is Skilling-Hutchinson's estimate with num_probes Rademacher probes, rademacher(x, num_probes) ->
        (num_probes, N, ...), fixed for the whole solve, or exact at one backward pass per dimension. Returns
        fn(x, model, **model_kwargs) -> (log p(x) (N,) in nats, z the encoding of x). Works under no_grad.
        """
        if num_probes < 1:
            raise ValueError(f"num_probes must be at least 1, not {num_probes}")
        solve = self._ode(sampling_method, num_steps, atol=atol, rtol=rtol, edges=edges)
        t0, t1 = self.transport.ode_interval

        @torch.no_grad()
        def likelihood(x, model, **model_kwargs):
            probes = None if exact_divergence else rademacher(x, num_probes)

            def drift(t, state):
                velocity = lambda x: self.transport.predict_velocity(model, x, t.expand(len(x)), model_kwargs)  # noqa: E731
                return divergence(velocity, state[0], probes)

            begin, end = self.transport.scale(t0), self.transport.scale(t1)
            z, delta = solve(drift, (x * end, x.new_zeros(len(x))), t1, t0)
            return standard_normal_logp(z / begin) + delta + x[0].numel() * math.log(end / begin), z / begin

        return likelihood
