"""How a number was made: what must stand beside it so that anyone can make it again."""

import hashlib
import json
import platform
from importlib.metadata import version

import torch

PACKAGES = ("torch", "torchdiffeq", "diffusers", "timm", "numpy")
# Flags that say where or how, not what: two runs that differ in these alone make the same images.
NOT_IDENTITY = ("given", "ckpt", "guidance_ckpt", "sample_dir", "preset", "tf32", "data_path", "encodes")


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def identity_of(args, pipeline, paths):
    """All that decides the images, as a dict for the .json; its hash names the run."""
    recipe = {key: value for key, value in pipeline.recipe.to_dict().items() if key != "classes"}
    settings = {key: value for key, value in sorted(vars(args).items()) if key not in {*NOT_IDENTITY, *recipe, "num_classes"}}
    return {
        "settings": settings | {"cfg_scale": pipeline.model.scale},
        "checkpoints": {name: {"path": str(path), "sha256": file_hash(path)} for name, path in paths.items()},
        "recipe": recipe,
        "device_type": pipeline.device.type,
    }


def run_name(args, pipeline, identity):
    """Readable, and different for runs that differ in anything: no run is mistaken for another's remains."""
    hashed = json.dumps(identity | {"checkpoints": [c["sha256"] for c in identity["checkpoints"].values()]}, sort_keys=True)
    model, ckpt = pipeline.recipe.model.replace("/", "-"), pipeline.path.stem
    task = "likelihood" if args.encodes else f"{args.mode}-{args.num_sampling_steps}-{args.sampling_method}"
    guidance = f"cfg-{pipeline.model.scale:g}-seed-{args.global_seed}"
    return f"{model}-{ckpt}-{task}-{guidance}-{hashlib.sha256(hashed.encode()).hexdigest()[:8]}"


def machine_of(world):
    """Where it was made, as a dict for the .json."""
    return {
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu",
        "processes": world.size,
        "threads_per_process": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
    }
