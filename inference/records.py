"""How a number was made: what must stand beside it so that anyone can make it again."""

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import version

import torch

from common.checkpoint import file_hash
from common.recipe import TRANSPORT
from transport import TransportSettings

PACKAGES = ("torch", "torchdiffeq", "diffusers", "timm", "numpy")
# What the checkpoint says, once loaded: of these the recipe counts, not what was typed.
SAID_BY_FILE = ("model", "image_size", "num_classes", "vae", *TRANSPORT)


def identity_of(settings, pipeline, paths):
    """All that decides the images, as a dict for the .json. settings: by flag; paths: {name: checkpoint}."""
    recipe = {key: value for key, value in pipeline.recipe.to_dict().items() if key != "classes"}
    return {
        "settings": {key: value for key, value in sorted(settings.items()) if key not in SAID_BY_FILE},
        "checkpoints": {name: {"path": str(path), "sha256": file_hash(path)} for name, path in paths.items()},
        "recipe": recipe,
        "device_type": pipeline.device.type,
    }


def identity_hash(identity, defaults):
    """8 hex digits that differ for runs that differ in anything. Of settings and recipe only what is not the default
    counts, so that a setting which a later version adds does not orphan what was begun before."""
    plain = asdict(TransportSettings())
    recipe, settings = identity["recipe"], identity["settings"]
    decides = {
        "settings": {key: value for key, value in settings.items() if key not in defaults or value != defaults[key]},
        "transport": {key: value for key, value in recipe["transport"].items() if value != plain[key]},
        "recipe": [recipe[key] for key in ("image_size", "vae", "vae_hash")],
        "checkpoints": [checkpoint["sha256"] for checkpoint in identity["checkpoints"].values()],
        "device_type": identity["device_type"],
    } | {key: identity[key] for key in ("data",) if key in identity}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]


def machine_of(world):
    """Where it was made, as a dict for the .json."""
    return {
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu",
        "processes": world.size,
        "threads_per_process": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
    }
