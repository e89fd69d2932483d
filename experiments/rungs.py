"""The steps of the ladder and the samplers at its top, as flags and settings, beside what the paper has of them."""

from dataclasses import dataclass

from inference import ODE, SDE


@dataclass(frozen=True)
class Rung:
    """A way to train. paper: FID-50K of SiT-B/2 after 400K steps, by the ODE and by the SDE, where the paper has it."""

    title: str
    flags: dict  # of train.py
    paper: dict


# arXiv 2401.08740, section 4: sampled without guidance, 250 network calls. Its first step is DiT's, whose times are discrete.
RUNGS = {
    "vp-noise": Rung("VP, noise", dict(path_type="VP", prediction="noise"), {"ODE": 44.2}),
    "vp-score": Rung("VP, score", dict(path_type="VP", prediction="score"), {"ODE": 43.6}),
    "vp-score-weighted": Rung(
        "VP, score, weighted", dict(path_type="VP", prediction="score", loss_weight="velocity"), {"ODE": 39.1}
    ),
    "vp-velocity": Rung("VP, velocity", dict(path_type="VP", prediction="velocity"), {"ODE": 39.8}),
    "gvp-velocity": Rung("GVP, velocity", dict(path_type="GVP", prediction="velocity"), {"ODE": 34.6}),
    "linear-velocity": Rung("Linear, velocity", dict(path_type="Linear", prediction="velocity"), {"ODE": 34.84, "SDE": 33.02}),
    "linear-data": Rung("Linear, data", dict(path_type="Linear", prediction="data"), {}),
    "logit-normal": Rung(
        "Linear, velocity, logit-normal times",
        dict(path_type="Linear", prediction="velocity", time_law="logit-normal"),
        {},
    ),
}


@dataclass(frozen=True)
class Claim:
    """What the paper finds of two steps, or of two samplers of one."""

    text: str
    before: tuple  # (rung, sampler)
    after: tuple
    better: bool  # whether the paper's second number is lower by more than 1; else the two are about the same


CLAIMS = [
    Claim("score instead of noise", ("vp-noise", "ODE"), ("vp-score", "ODE"), False),
    Claim("the score's loss weighted as the velocity's", ("vp-score", "ODE"), ("vp-score-weighted", "ODE"), True),
    Claim("velocity instead of the weighted score", ("vp-score-weighted", "ODE"), ("vp-velocity", "ODE"), False),
    Claim("GVP instead of VP", ("vp-velocity", "ODE"), ("gvp-velocity", "ODE"), True),
    Claim("Linear instead of GVP", ("gvp-velocity", "ODE"), ("linear-velocity", "ODE"), False),
    Claim("the SDE instead of the ODE", ("linear-velocity", "ODE"), ("linear-velocity", "SDE"), True),
]

CALLS = 40  # network calls for a sample, of fixed solvers
MAIN = {"ODE": ODE("heun", num_steps=CALLS // 2 + 1), "SDE": SDE(num_steps=CALLS)}  # the paper's two, on every step
TOP = "logit-normal"  # whose samplers are compared
GUIDANCE = (1.0, 2.0)
LAST_STEPS = (0.04, 0.01)
FORMS = ("constant", "SBDM", "sigma", "decreasing", "increasing-decreasing")  # on this path linear is sigma, and KL is SBDM

SAMPLERS = {
    "ODE dopri5": ODE("dopri5"),
    "ODE Heun": MAIN["ODE"],
    "ODE Euler": ODE("euler", num_steps=CALLS + 1),
    "ODE multistep": ODE("multistep", num_steps=CALLS + 1),
} | {
    f"SDE {form}, last step {size:g}": SDE(form=form, last_step_size=size, num_steps=CALLS)
    for form in FORMS
    for size in LAST_STEPS
}


def design():
    """All of the above that makes the numbers what they are, as plain values."""
    solvers = {name: repr(solver) for name, solver in (MAIN | SAMPLERS).items()}
    return dict(rungs={name: rung.flags for name, rung in RUNGS.items()}, solvers=solvers, top=TOP, guidance=list(GUIDANCE))
