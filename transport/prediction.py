"""What the network's output means. One class for each answer: its loss, and the velocity and score that samplers need.

x = alpha x1 + sigma x0 and v = alpha' x1 + sigma' x0 make velocity, score, noise and data linear maps of one another
(path.py), so that a network that gives one of them gives all. Outputs and x are (N, ...), times t (N,).
"""

from typing import NamedTuple

from .path import expand_t


class Point(NamedTuple):
    """A place on the paths between noise and data, at which the network is trained."""

    x0: object  # noise (N, ...)
    x1: object  # data (N, ...)
    t: object  # (N,)
    xt: object  # alpha x1 + sigma x0
    ut: object  # alpha' x1 + sigma' x0


class Prediction:
    """How one kind of output is read on one path. A kind has error(output, point), what the loss squares, and
    velocity(output, x, t), the v(x, t) of which the output is the answer; the score follows."""

    eps = 1e-3  # distance from the ends of [0, 1], in training and sampling, on paths that leave it to the prediction
    train_eps = None  # that of training on every path, for a kind whose loss wants one of its own
    takes_weight = False  # whether the loss may be weighted over time

    def __init__(self, plan):
        self.plan = plan

    def inputs(self, x, t):
        """The state and times (N,) that the network is asked at."""
        return x, t

    def score(self, output, x, t):
        """grad log p_t(x)."""
        return self.plan.get_score_from_velocity(self.velocity(output, x, t), x, t)


class Velocity(Prediction):
    """The network gives v(x, t) itself (SiT eq. 4), which is finite on all of [0, 1]."""

    eps = 0.0

    def error(self, output, point):
        return output - point.ut

    def velocity(self, output, x, t):
        return output


class Score(Prediction):
    """The network gives grad log p_t(x); its error is multiplied by sigma (SiT eq. 7)."""

    takes_weight = True

    def error(self, output, point):
        return self.plan.compute_sigma_t(expand_t(point.t, point.x1))[0] * output + point.x0

    def velocity(self, output, x, t):
        return self.plan.get_velocity_from_score(output, x, t)

    def score(self, output, x, t):
        return output


class Noise(Prediction):
    """The network gives E[x0 | x]."""

    takes_weight = True

    def error(self, output, point):
        return output - point.x0

    def velocity(self, output, x, t):
        return self.plan.get_velocity_from_noise(output, x, t)

    def score(self, output, x, t):
        return -output / self.plan.compute_sigma_t(expand_t(t, x))[0]


class Data(Prediction):
    """The network gives E[x1 | x]. Its loss is the velocity's: (d/sigma)^2 times the squared error of x1.

    Near t = 1 that factor outweighs all other times (on the linear path 1e6 at a distance of 1e-3, and 1,000 on average),
    so that training stays 0.05 away, where JiT bounds it too (Li & He, arXiv 2511.13720); sampling goes on to 1e-3.
    """

    train_eps = 0.05

    def error(self, output, point):
        return self.velocity(output, point.xt, point.t) - point.ut

    def velocity(self, output, x, t):
        return self.plan.get_velocity_from_data(output, x, t)


# --prediction: a new one is a class and a line here.
PREDICTIONS = {"velocity": Velocity, "score": Score, "noise": Noise, "data": Data}

# --loss-weight, w(t) of shape (N,), for predictions that take one (SiT table 8 and section 3.2).
LOSS_WEIGHTS = {
    None: lambda plan, t: t.new_ones(t.shape),
    "velocity": lambda plan, t: (plan.compute_g_t(t) / plan.compute_sigma_t(t)[0]) ** 2,  # as if velocity were learnt
    "likelihood": lambda plan, t: plan.compute_g_t(t) / plan.compute_sigma_t(t)[0] ** 2,  # a bound on the likelihood
}
