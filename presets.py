"""The paper's samplers on ImageNet 256, as flags of sample_ddp.py, with the FID-50K to expect (arXiv 2401.08740).

ODE is Heun, SDE is Euler-Maruyama with a last step of 0.04; 250 network calls each. Weights: EMA 0.9999 at batch 256.
"""

from dataclasses import dataclass

from errors import UsageError

SOLVERS = {
    "ODE": dict(sampling_method="heun", num_sampling_steps=126),  # two calls a step
    "SDE": dict(sampling_method="Euler", num_sampling_steps=250, last_step="Mean", last_step_size=0.04),
}


@dataclass(frozen=True)
class Preset:
    model: str
    training_steps: str
    cfg_scale: float
    fid: dict  # by subcommand
    image_size: int = 256


PRESETS = {
    "S-2-400k": Preset("SiT-S/2", "400K", 1.0, {"ODE": 58.97, "SDE": 57.64}),
    "B-2-400k": Preset("SiT-B/2", "400K", 1.0, {"ODE": 34.84, "SDE": 33.02}),
    "L-2-400k": Preset("SiT-L/2", "400K", 1.0, {"ODE": 20.01, "SDE": 18.79}),
    "XL-2-400k": Preset("SiT-XL/2", "400K", 1.0, {"ODE": 18.04, "SDE": 17.19}),
    "XL-2-7m": Preset("SiT-XL/2", "7M", 1.0, {"ODE": 9.35, "SDE": 8.26}),
    "XL-2-7m-cfg": Preset("SiT-XL/2", "7M", 1.5, {"ODE": 2.15, "SDE": 2.06}),
    "XL-2-512-cfg": Preset("SiT-XL/2", "3M", 1.5, {"SDE": 2.62}, image_size=512),
}


def apply_preset(args):
    """Fill the flags of args that were not typed from args.preset; returns the FID-50K to expect, or None where what was
    typed differs from it.

    Raises UsageError for a preset that has no such subcommand.
    """
    preset = PRESETS[args.preset]
    if args.mode not in preset.fid:
        raise UsageError(f"--preset {args.preset} is for {', '.join(preset.fid)}, not {args.mode}")
    settings = dict(
        model=preset.model,
        image_size=preset.image_size,
        cfg_scale=preset.cfg_scale,
        precision="fp32",
        num_fid_samples=50_000,
        **SOLVERS[args.mode],
    )
    if "tf32" in args.given and "precision" not in args.given:
        args.precision, args.given = "tf32" if args.tf32 else "fp32", args.given | {"precision"}
    changed = [key for key, value in settings.items() if key in args.given and getattr(args, key) != value]
    for key, value in settings.items():
        if key not in args.given:
            setattr(args, key, value)
    args.given = args.given | {"model", "image_size"}  # a checkpoint of another model is a contradiction
    return None if changed else preset.fid[args.mode]
