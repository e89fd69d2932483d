"""Interpolants: x_t = alpha_t x1 + sigma_t x0, from noise x0 at t = 0 to data x1 at t = 1.

SiT (arXiv 2401.08740), section 2.1 and table 1. A plan knows its two coefficients and their derivatives; all else follows.
With x = alpha x1 + sigma x0 and its velocity v = alpha' x1 + sigma' x0, the pair (x, v) is a linear map of (x1, x0) of
determinant d = alpha' sigma - alpha sigma', hence

    x0 = (alpha' x - alpha v) / d        x1 = (sigma v - sigma' x) / d        score = -x0 / sigma

On the three paths of the paper d never vanishes, and only the score is singular, at sigma = 0. Velocity from noise or
score divides by alpha: singular at t = 0 for Linear and GVP. Times t are (N,) or anything that broadcasts against x;
results have x's shape. Tensors are used by their methods alone, so that the names in PATHS are there without torch.
"""

import math

from .diffusion import DIFFUSION_FORMS


def expand_t(t, x):
    """Give t (N,) the trailing axes of x (N, ...), so that it broadcasts; other shapes stay as they are."""
    if t.dim() == 1 and x.dim() > 1:
        return t.reshape(-1, *[1] * (x.dim() - 1))
    return t


class Plan:
    """What every path derives from its coefficients, compute_alpha_t(t) -> (alpha, d alpha/dt) and compute_sigma_t(t)."""

    # Distance from the ends that training and sampling keep when the user gives none; None: the prediction's own.
    train_eps = sample_eps = None

    def interval(self, eps):
        """(t0, t1): the times at a distance of eps from the ends where the path may be singular."""
        return eps, 1.0 - eps

    def compute_d_alpha_alpha_ratio_t(self, t):
        """alpha'/alpha"""
        alpha, d_alpha = self.compute_alpha_t(t)
        return d_alpha / alpha

    def compute_determinant_t(self, t):
        """d = alpha' sigma - alpha sigma'."""
        (alpha, d_alpha), (sigma, d_sigma) = self.compute_alpha_t(t), self.compute_sigma_t(t)
        return d_alpha * sigma - alpha * d_sigma

    def compute_polar_t(self, t):
        """((r, dr/dt), (angle, d angle/dt)): alpha = r sin(angle), sigma = r cos(angle), the angle from 0 to pi/2.

        What any two paths with the same angle differ by is the size of x alone.
        """
        (alpha, d_alpha), (sigma, d_sigma) = self.compute_alpha_t(t), self.compute_sigma_t(t)
        radius = (alpha**2 + sigma**2).sqrt()
        turning = self.compute_determinant_t(t) / radius**2
        return (radius, (alpha * d_alpha + sigma * d_sigma) / radius), (alpha.atan2(sigma), turning)

    def time_of(self, alpha, sigma):
        """The t in [0, 1] at which alpha(t) : sigma(t) is alpha : sigma, or that end of [0, 1] which is nearer to it."""
        low, high = alpha * 0, alpha * 0 + 1
        for _ in range(60):  # in float64 no more halves are left
            middle = (low + high) / 2
            beyond = self.compute_alpha_t(middle)[0] * sigma > self.compute_sigma_t(middle)[0] * alpha
            low, high = low.where(beyond, middle), middle.where(beyond, high)
        return (low + high) / 2

    def plan(self, t, x0, x1):
        """(t, x_t, u_t) of noise x0 and data x1, with u_t = alpha' x1 + sigma' x0, the velocity to learn."""
        s = expand_t(t, x1)
        alpha, d_alpha = self.compute_alpha_t(s)
        sigma, d_sigma = self.compute_sigma_t(s)
        return t, alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0

    def compute_drift(self, x, t):
        """(-(alpha'/alpha) x, g): minus the drift of the noising process, and g with v = (alpha'/alpha) x + g score.

        g = (alpha'/alpha) sigma^2 - sigma sigma'. The sign is the published code's.
        """
        t = expand_t(t, x)
        alpha_ratio = self.compute_d_alpha_alpha_ratio_t(t)
        return -alpha_ratio * x, self.compute_g_t(t)

    def compute_g_t(self, t):
        """g of compute_drift; the two terms share the factor sigma d / alpha."""
        return self.compute_sigma_t(t)[0] * self.compute_determinant_t(t) / self.compute_alpha_t(t)[0]

    def get_noise_from_velocity(self, velocity, x, t):
        """x0, from the velocity at x."""
        t = expand_t(t, x)
        alpha, d_alpha = self.compute_alpha_t(t)
        return (d_alpha * x - alpha * velocity) / self.compute_determinant_t(t)

    def get_data_from_velocity(self, velocity, x, t):
        """x1, from the velocity at x. With the mean velocity this is E[x1 | x], Tweedie's formula."""
        t = expand_t(t, x)
        sigma, d_sigma = self.compute_sigma_t(t)
        return (sigma * velocity - d_sigma * x) / self.compute_determinant_t(t)

    def get_score_from_velocity(self, velocity, x, t):
        """grad log p_t(x) (SiT eq. 9), singular where sigma = 0."""
        return -self.get_noise_from_velocity(velocity, x, t) / self.compute_sigma_t(expand_t(t, x))[0]

    def get_velocity_from_score(self, score, x, t):
        """Inverse of get_score_from_velocity, singular where alpha = 0."""
        drift, g = self.compute_drift(x, t)
        return g * score - drift

    def get_velocity_from_noise(self, noise, x, t):
        """Inverse of get_noise_from_velocity, singular where alpha = 0."""
        t = expand_t(t, x)
        alpha, d_alpha = self.compute_alpha_t(t)
        return (d_alpha * x - self.compute_determinant_t(t) * noise) / alpha

    def get_velocity_from_data(self, data, x, t):
        """Inverse of get_data_from_velocity, singular where sigma = 0."""
        t = expand_t(t, x)
        sigma, d_sigma = self.compute_sigma_t(t)
        return (d_sigma * x + self.compute_determinant_t(t) * data) / sigma

    def compute_diffusion(self, x, t, form="constant", norm=1.0):
        """D(t) of dX = (v + D score) dt + sqrt(2 D) dW, at x's rank. The paper writes w = 2 D (SiT eq. 5).

        form: a word of DIFFUSION_FORMS, or a function such as they are. Raises ValueError for another word.
        """
        if not callable(form) and form not in DIFFUSION_FORMS:
            raise ValueError(f"unknown diffusion form {form!r}; choose from {', '.join(DIFFUSION_FORMS)}")
        return (form if callable(form) else DIFFUSION_FORMS[form])(self, expand_t(t, x), norm)


class ICPlan(Plan):
    """Linear path: alpha = t, sigma = 1 - t."""

    def compute_alpha_t(self, t):
        return t, t.new_ones(t.shape)

    def compute_sigma_t(self, t):
        return 1 - t, -t.new_ones(t.shape)

    def compute_determinant_t(self, t):
        return t.new_ones(t.shape)

    def time_of(self, alpha, sigma):
        return alpha / (alpha + sigma)


class GVPCPlan(Plan):
    """Generalised variance-preserving path: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def compute_alpha_t(self, t):
        return (t * math.pi / 2).sin(), math.pi / 2 * (t * math.pi / 2).cos()

    def compute_sigma_t(self, t):
        return (t * math.pi / 2).cos(), -math.pi / 2 * (t * math.pi / 2).sin()

    def compute_determinant_t(self, t):
        return t.new_full(t.shape, math.pi / 2)

    def time_of(self, alpha, sigma):
        return 2 / math.pi * alpha.atan2(sigma)


class VPCPlan(Plan):
    """Variance-preserving diffusion path of score-based models: beta runs from sigma_max at noise to sigma_min at data."""

    train_eps, sample_eps = 1e-5, 1e-3  # sigma' is infinite at t = 1, whatever is predicted

    def __init__(self, sigma_min=0.1, sigma_max=20.0):
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def interval(self, eps):
        return 0.0, 1.0 - eps  # regular at t = 0: alpha(0) > 0

    def log_alpha(self, t):
        return -((1 - t) ** 2) * (self.sigma_max - self.sigma_min) / 4 - (1 - t) * self.sigma_min / 2

    def compute_d_alpha_alpha_ratio_t(self, t):
        """beta / 2; no division, so exact also where alpha is tiny."""
        return (self.sigma_min + (1 - t) * (self.sigma_max - self.sigma_min)) / 2

    def compute_alpha_t(self, t):
        alpha = self.log_alpha(t).exp()
        return alpha, alpha * self.compute_d_alpha_alpha_ratio_t(t)

    def compute_sigma_t(self, t):
        sigma = (-(2 * self.log_alpha(t)).expm1()).sqrt()  # 1 - alpha^2 without cancellation near t = 1
        alpha, d_alpha = self.compute_alpha_t(t)
        return sigma, -alpha * d_alpha / sigma

    def compute_determinant_t(self, t):
        return self.compute_alpha_t(t)[1] / self.compute_sigma_t(t)[0]

    def compute_g_t(self, t):
        return self.compute_d_alpha_alpha_ratio_t(t)

    def time_of(self, alpha, sigma):
        """The root of log_alpha, a square in 1 - t, without cancellation near t = 1."""
        log_alpha = (-((sigma / alpha) ** 2).log1p() / 2).clamp(min=self.log_alpha(0))
        half = self.sigma_min / 2
        root = (half**2 - (self.sigma_max - self.sigma_min) * log_alpha).sqrt()
        return 1 + 2 * log_alpha / (half + root)


# --path-type: a new path is a class and a line here.
PATHS = {"Linear": ICPlan, "GVP": GVPCPlan, "VP": VPCPlan}
