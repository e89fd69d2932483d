"""At which times the network is trained: each law makes times in [0, 1], 0 being noise, of uniform u (N,) in [0, 1).

Transport.training_times fits them into the training interval. A law says how often a time is seen; no loss weight
makes up for it (as in SD3, Esser et al., arXiv 2403.03206).
"""


def uniform(u):
    return u


def logit_normal(u):
    """sigmoid(n), n standard normal (arXiv 2403.03206, eq. 19 with m = 0 and s = 1): the middle more often."""
    return (2**0.5 * (2 * u - 1).erfinv()).sigmoid()


# --time-law: a new law is a function and a line here.
TIME_LAWS = {"uniform": uniform, "logit-normal": logit_normal}
