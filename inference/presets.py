"""The paper's samplers on ImageNet 256, as flags of sample_ddp.py, with the FID-50K to expect (arXiv 2401.08740).

ODE is Heun, SDE is Euler-Maruyama with a last step of 0.04; 250 network calls each. Weights: EMA 0.9999 at batch 256.
"""

from dataclasses import dataclass

from common.errors import UsageError

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
    of_dit: bool = False


PRESETS = {
    "S-2-400k": Preset("SiT-S/2", "400K", 1.0, {"ODE": 58.97, "SDE": 57.64}),
    "B-2-400k": Preset("SiT-B/2", "400K", 1.0, {"ODE": 34.84, "SDE": 33.02}),
    "L-2-400k": Preset("SiT-L/2", "400K", 1.0, {"ODE": 20.01, "SDE": 18.79}),
    "XL-2-400k": Preset("SiT-XL/2", "400K", 1.0, {"ODE": 18.04, "SDE": 17.19}),
    "XL-2-7m": Preset("SiT-XL/2", "7M", 1.0, {"ODE": 9.35, "SDE": 8.26}),
    "XL-2-7m-cfg": Preset("SiT-XL/2", "7M", 1.5, {"ODE": 2.15, "SDE": 2.06}),
    "XL-2-512-cfg": Preset("SiT-XL/2", "3M", 1.5, {"SDE": 2.62}, image_size=512),
    # DiT's weights (arXiv 2212.09748, table 4). Its numbers are of 250 steps of its own sampler; SBDM is the SDE behind that.
    "DiT-XL-2-7m": Preset("SiT-XL/2", "7M", 1.0, {"SDE": 9.62}, of_dit=True),
    "DiT-XL-2-7m-cfg": Preset("SiT-XL/2", "7M", 1.5, {"SDE": 2.27}, of_dit=True),
}


def settings_of(name, mode):
    """(flags of sample_ddp.py by name, the paper's FID-50K) of a preset. Raises UsageError where it has no such mode."""
    preset = PRESETS[name]
    if mode not in preset.fid:
        raise UsageError(f"--preset {name} is for {', '.join(preset.fid)}, not {mode}")
    settings = dict(model=preset.model, image_size=preset.image_size, cfg_scale=preset.cfg_scale, weights="ema")
    settings |= dict(kind="dit", diffusion_form="SBDM") if preset.of_dit else {}
    return settings | dict(precision="fp32", num_fid_samples=50_000) | SOLVERS[mode], preset.fid[mode]
