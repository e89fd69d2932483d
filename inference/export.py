"""A model as others take it: a folder that diffusers loads with no file of this repository, or a file of the published code.

The folder's code is this repository's own, file by file, with its imports made neighbours; bundle/ has the two files that make
a diffusers pipeline of it.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.atomic import ANY_TEXT, write_json
from common.checkpoint import WEIGHTS_FILE, file_hash, save_checkpoint
from common.recipe import TRANSPORT

from .pictures import save_picture
from .settings import ODE, Guidance

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ("inference/bundle/sit_transformer.py", "inference/bundle/pipeline.py")
OF_TRANSFORMER = ("models.py", "common/time_maps.py", "transport/path.py", "transport/diffusion.py")
OF_PIPELINE = [f"transport/{name}.py" for name in ("diffusion", "integrators", "likelihood", "path", "prediction", "sampler")]
OF_PIPELINE += [f"transport/{name}.py" for name in ("settings", "solvers", "times", "transport")]
OF_PIPELINE += ["common/errors.py", "common/streams.py", "data/autoencoder.py", "inference/guidance.py"]
SAMPLE = dict(solver=ODE("heun", num_steps=50), scale=4.0)  # how the card's samples are drawn


def copy_code(files, folder):
    """The repository's files as neighbours in a folder."""
    for name in files:
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"^(\s*from) (?:transport|common|data|inference)\.(\w+) import", r"\1 .\2 import", text, flags=re.M)
        (folder / Path(name).name).write_text(text, encoding="utf-8")


def write_folder(pipe, folder, samples):
    """A pipeline as a folder in diffusers' layout: weights, code, autoencoder, a card, and so many samples."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    recipe, has_vae = pipe.recipe.to_dict(), pipe.autoencoder.name != "none"
    state = {key: value.detach().cpu().contiguous() for key, value in pipe.model.state_dict().items()}
    save_file(state, transformer / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {"_class_name": "SiTTransformer", **pipe.recipe.model_args, "time_map": pipe.recipe.time_map, "recipe": recipe}
    write_json(transformer / "config.json", config)
    copy_code((BUNDLE[0], *OF_TRANSFORMER), transformer)
    copy_code((BUNDLE[1], *OF_PIPELINE), folder)
    vae = ["diffusers", "AutoencoderKL"] if has_vae else [None, None]
    index = {"_class_name": ["pipeline", "SiTPipeline"], "transformer": ["sit_transformer", "SiTTransformer"], "vae": vae}
    write_json(folder / "model_index.json", index)
    if has_vae:
        pipe.autoencoder.vae.save_pretrained(folder / "vae")
    labels = [i % pipe.recipe.num_classes for i in range(samples)]
    scale = SAMPLE["scale"] if pipe.recipe.null_class is not None else 1.0
    if labels:
        images = pipe.sample(labels, solver=SAMPLE["solver"], guidance=Guidance(scale))
        save_picture(images, folder / "samples.png", columns=min(4, samples))
    (folder / "README.md").write_text(card(pipe, labels, scale), **ANY_TEXT)  # names of classes are names of folders


def card(pipe, labels, scale):
    """The folder's README.md, with the metadata that the Hub reads."""
    recipe, names = pipe.recipe, pipe.recipe.classes
    what = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts(pipe).items())
    known = (
        "\n".join(f"{i}. {name}" for i, name in enumerate(names)) if names else f"0 to {recipe.num_classes - 1}, without names"
    )
    drawn = ""
    if labels:
        drawn = (
            f"![samples](samples.png)\n\nClasses {', '.join(map(str, labels))}, by `pipe({labels}, seed=0, "
            f'guidance_scale={scale:g}, method="heun", num_steps={SAMPLE["solver"].num_steps})`.\n\n'
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


def facts(pipe):
    """What the model is, for the card."""
    recipe, arguments = pipe.recipe, pipe.recipe.model_args
    parameters = sum(weight.numel() for weight in pipe.model.parameters())
    shape = ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "input_size", "num_classes")
    found = {"parameters": f"{parameters:,}"} | {name: arguments[name] for name in shape}
    found |= {name: getattr(recipe.transport, name) for name in TRANSPORT} | {"times": recipe.time_map or "t, 0 being noise"}
    found |= {"autoencoder": recipe.vae, "made from": f"{pipe.path.name}, SHA-256 {file_hash(pipe.path)}"}
    return found


def write_published(pipe, path):
    """The weights as the published code's find_model loads them: a bare state dict, whose head has the second half of channels
    that nothing uses, with zeros where this model has none."""
    state = {key: value.detach().cpu() for key, value in pipe.model.state_dict().items()}
    channels = pipe.recipe.model_args["in_channels"]
    if not pipe.recipe.model_args["learn_sigma"]:
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
