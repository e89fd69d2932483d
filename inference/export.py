"""A model as others take it: a folder that diffusers loads with no file of this repository, or a file of the published code.

The folder's code is this repository's own, in two files; bundle/ has what makes a pipeline of diffusers of it.
"""

import ast
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.atomic import ANY_TEXT, write_json
from common.checkpoint import WEIGHTS_FILE, file_hash, save_checkpoint
from common.errors import UserError
from common.recipe import TRANSPORT

from .pictures import class_names, save_picture
from .settings import ODE, Guidance

ROOT = Path(__file__).resolve().parent.parent
# The repository's files of each of the folder's, in the order in which they need each other.
TRANSFORMER = ["transport/diffusion.py", "transport/path.py", "common/time_maps.py", "models.py"]
TRANSFORMER += ["inference/bundle/sit_transformer.py"]
PIPELINE = [f"transport/{name}.py" for name in ("diffusion", "path", "prediction", "times", "settings", "solvers")]
PIPELINE += [f"transport/{name}.py" for name in ("integrators", "likelihood", "sampler", "transport")]
PIPELINE += ["common/errors.py", "common/streams.py", "data/autoencoder.py", "inference/guidance.py"]
PIPELINE += ["inference/bundle/pipeline.py"]
SAMPLE = dict(solver=ODE("heun", num_steps=50), scale=4.0)  # how the card's samples are drawn


def merged(files):
    """The text of one module that has the content of the repository's files: from the Hub, diffusers fetches no more than one
    file of code for each component."""
    inside, parts = {Path(name).stem for name in files}, []
    for name in files:
        text = (ROOT / name).read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[-1] in inside:
                lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
        kept = "\n".join(line for line in lines if line is not None)
        parts.append(f"# {'-' * 20} {name}\n\n{kept.strip()}\n")
    return "\n\n".join(parts)


def write_folder(pipe, folder, samples, weights="ema"):
    """A pipeline as a folder in diffusers' layout: weights, code, autoencoder, a card, and so many samples. weights: which of
    the checkpoint's they are, for the card."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    recipe, has_vae = pipe.recipe.to_dict(), pipe.autoencoder.name != "none"
    recipe["vae"] = "vae" if has_vae else "none"  # wherever it was: it is in the folder now
    state = {key: value.detach().cpu().contiguous() for key, value in pipe.model.state_dict().items()}
    save_file(state, transformer / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {"_class_name": "SiTTransformer", **pipe.recipe.model_args, "time_map": pipe.recipe.time_map, "recipe": recipe}
    write_json(transformer / "config.json", config)
    (transformer / "sit_transformer.py").write_text(merged(TRANSFORMER), encoding="utf-8")
    (folder / "pipeline.py").write_text(merged(PIPELINE), encoding="utf-8")
    vae = ["diffusers", "AutoencoderKL"] if has_vae else [None, None]
    index = {"_class_name": ["pipeline", "SiTPipeline"], "transformer": ["sit_transformer", "SiTTransformer"], "vae": vae}
    write_json(folder / "model_index.json", index)
    if has_vae:
        pipe.autoencoder.vae.save_pretrained(folder / "vae")
        vae_config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        vae_config.pop("_name_or_path", None)  # a place on this machine
        write_json(folder / "vae" / "config.json", vae_config)
    labels = [i % pipe.recipe.num_classes for i in range(samples)]
    scale = SAMPLE["scale"] if pipe.recipe.null_class is not None else 1.0
    if labels:
        images = pipe.sample(labels, solver=SAMPLE["solver"], guidance=Guidance(scale))
        save_picture(images, folder / "samples.png", columns=4, names=class_names(pipe.recipe, labels))
    (folder / "README.md").write_text(card(pipe, labels, scale, weights), **ANY_TEXT)  # names of classes are names of folders


def card(pipe, labels, scale, weights):
    """The folder's README.md, with the metadata that the Hub reads."""
    recipe, names = pipe.recipe, pipe.recipe.classes
    what = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts(pipe, weights).items())
    known = [f"{i}. {' '.join(name.split())}" for i, name in enumerate(names)]
    known = "\n".join(known) or f"0 to {recipe.num_classes - 1}, without names"
    drawn = ""
    if labels:
        drawn = (
            f"![samples](samples.png)\n\nClasses {', '.join(map(str, labels))}, by `pipe({labels}, seed=0, "
            f'guidance_scale={scale:g}, method="heun", num_inference_steps={SAMPLE["solver"].num_steps})`.\n\n'
        )
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [sit, flow-matching, class-conditional]
---

# {recipe.model} at {recipe.image_size} px

A Scalable Interpolant Transformer ([Ma et al., 2024](https://arxiv.org/abs/2401.08740)).

{drawn}```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS FOLDER OR REPOSITORY", trust_remote_code=True)
images = pipe([{(repr(names[0]) if names else 0)}], guidance_scale={scale:g}).images
```

The code lies beside the weights and needs torch, diffusers and timm; torchdiffeq brings its adaptive solvers.

| | |
|---|---|
{what}

## Classes

{known}
"""


def facts(pipe, weights):
    """What the model is, for the card."""
    recipe, arguments = pipe.recipe, pipe.recipe.model_args
    parameters = sum(weight.numel() for weight in pipe.model.parameters())
    shape = ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "input_size", "num_classes")
    found = {"parameters": f"{parameters:,}"} | {name: arguments[name] for name in shape}
    found |= {name: getattr(recipe.transport, name) for name in TRANSPORT} | {"times": recipe.time_map or "t, 0 being noise"}
    found |= {"autoencoder": Path(recipe.vae).name, "weights": weights}
    found |= {"made from": f"{pipe.path.name}, SHA-256 {file_hash(pipe.path)}"}
    return found


def write_published(recipe, state, path):
    """The weights as the published code's find_model loads them: a bare state dict, whose head has the second half of channels
    that nothing uses, with zeros where this model has none. Raises UserError for a network that the published code has not."""
    lacking = {
        "times of its own": recipe.time_map is not None,
        "no null class": recipe.null_class is None,
        "images that are not square": len(set(recipe.latent_shape[1:])) > 1,
        "a prediction of its own": recipe.prediction not in (None, "velocity", "noise", "score"),
    }
    if found := [what for what, true in lacking.items() if true]:
        raise UserError(f"--to published: this model has {' and '.join(found)}, for which the published code has no place")
    channels = recipe.model_args["in_channels"]
    if not recipe.model_args["learn_sigma"]:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            used = state[name].unflatten(0, (-1, 1, channels))
            state[name] = torch.cat([used, torch.zeros_like(used)], dim=1).flatten(0, 2)
    save_checkpoint(state, path)


def push(folder, repository):
    """Upload a folder to the Hub, with a progress bar; the repository is made where it is not there. Returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    made = api.create_repo(repository, exist_ok=True)
    api.upload_folder(folder_path=str(folder), repo_id=made.repo_id, commit_message="SiT, as a pipeline of diffusers")
    return str(made)
