"""What a trained model is: written into every checkpoint, and read from the shapes of those that do not say it."""

import argparse
import math
from dataclasses import asdict, dataclass, field, fields

import torch

from models import SIT_CONFIGS, SiT, SiT_models
from transport import TransportSettings

from .checkpoint import load_weights
from .errors import UsageError, UserError
from .sizes import canonical, height_width
from .time_maps import TIME_MAPS

FORMAT = 2  # of a recipe as a dict; 1 had the transport's settings beside the others and did not say its number
TRANSPORT = tuple(entry.name for entry in fields(TransportSettings))


@dataclass
class Recipe:
    """How to build a model, and what its inputs and outputs mean."""

    model: str  # name in SiT_models, or SiT for another shape
    model_args: dict  # SiT's constructor, complete
    image_size: int  # pixels a side, or a text "HEIGHTxWIDTH"; None if the file does not say
    vae: str = None  # --vae at training; None if the file does not say
    vae_hash: str = None  # of the autoencoder's config
    transport: TransportSettings = None  # None if the file does not say
    classes: list = field(default_factory=list)  # names, by class id
    time_map: str = None  # word of TIME_MAPS: what the network is told as the time

    @property
    def path_type(self):
        return self.transport and self.transport.path_type

    @property
    def prediction(self):
        return self.transport and self.transport.prediction

    @property
    def num_classes(self):
        return self.model_args["num_classes"]

    @property
    def null_class(self):
        """Id of the class that stands for none, or None where the model was not trained with one."""
        return self.num_classes if self.model_args["class_dropout_prob"] > 0 else None

    @property
    def latent_shape(self):
        """(channels, height, width) of what the network sees."""
        return self.model_args["in_channels"], *height_width(self.model_args["input_size"])

    def build(self):
        """The model, with fresh weights. Raises UserError for a name that this repository does not know."""
        if self.model != "SiT" and self.model not in SiT_models:
            raise UserError(f"model {self.model} is not known here; models.py has {', '.join(SiT_models)}")
        model = SiT_models.get(self.model, SiT)(**self.model_args)
        if self.time_map is not None:
            model.t_embedder.time_map = TIME_MAPS[self.time_map]()
        return model

    def to_dict(self):
        values = {"format": FORMAT} | asdict(self)
        return values if self.time_map else {key: value for key, value in values.items() if key != "time_map"}

    @classmethod
    def from_dict(cls, values, path="file"):
        """The recipe in a checkpoint. Raises UserError for one that a newer version wrote, rather than read it in part."""
        found, values = values.get("format", 1), dict(values)
        values.pop("format", None)
        if not isinstance(found, int) or found > FORMAT:
            raise UserError(
                f"--ckpt {path}: its recipe is of format {found}, written by a newer version; this one reads {FORMAT}"
            )
        if found == 1:
            flat = {key: values.pop(key) for key in TRANSPORT if key in values}
            values["transport"] = flat if flat.get("path_type") else None
        unknown = values.keys() - {entry.name for entry in fields(cls)}
        if unknown:
            raise UserError(f"--ckpt {path}: its recipe has {', '.join(sorted(unknown))}, which this version does not know")
        try:
            if values["transport"] is not None:
                values["transport"] = TransportSettings(**values["transport"])
            if values.get("time_map") not in TIME_MAPS:
                raise ValueError(f"unknown time map {values['time_map']!r}")
            recipe = cls(**values)
            _check_numbers(recipe.model_args)
            return recipe
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"--ckpt {path}: its recipe makes no sense here ({error})") from error


def flags_in(content):
    """The training flags, or the config of a folder, that a checkpoint's content holds, {} where it holds none."""
    flags = content.get("args", content.get("config"))
    return vars(flags) if isinstance(flags, argparse.Namespace) else flags if isinstance(flags, dict) else {}


BACKBONE = {"pos_embed": 3, "x_embedder.proj.weight": 4, "x_embedder.proj.bias": 1, "t_embedder.mlp.0.weight": 2}
BACKBONE |= {"y_embedder.embedding_table.weight": 2, "blocks.0.mlp.fc1.weight": 2, "blocks.0.attn.qkv.weight": 2}
BACKBONE |= {"final_layer.linear.weight": 2, "final_layer.linear.bias": 1}


def check_backbone(state, path):
    """Raises UserError where a state dict lacks a tensor from whose shape models.py's backbone is known."""
    for name, dims in BACKBONE.items():
        found = state.get(name)
        if not torch.is_tensor(found) or found.dim() != dims or not found.numel():
            shape = f"is of shape {tuple(found.shape)}" if torch.is_tensor(found) else "is missing"
            raise UserError(f"--ckpt {path}: these are not a SiT's weights: {name} {shape}")


def _model_of(state, path, model, num_heads):
    """(name, SiT's keywords as far as they are the backbone's) from the shapes of a state dict."""
    hidden, _, patch, _ = state["x_embedder.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    shape = {"depth": depth, "hidden_size": hidden, "patch_size": patch}
    names = [name for name, config in SIT_CONFIGS.items() if shape.items() <= config.items()]
    if model and model not in names:
        found = names[0] if names else f"a model of depth {depth}, width {hidden}, patch {patch}"
        raise UsageError(f"--model {model} contradicts {path}, which holds {found}")
    if names:
        return model or names[0], SIT_CONFIGS[names[0]] | ({"num_heads": num_heads} if num_heads else {})
    if not num_heads:
        raise UserError(
            f"--ckpt {path}: no SiT configuration has depth {depth}, width {hidden} and patch {patch}, and its number of "
            "heads cannot be seen; the library takes num_heads"
        )
    return "SiT", shape | {"num_heads": num_heads}


def _sizes(tokens, patch, image_size, path):
    """(input size, image size) of so many tokens: the image's sides, where they are known, are to the latents' as one
    number; where they are not, latents are square, and None is the image's."""
    side, area = math.isqrt(tokens) * patch, tokens * patch**2
    if image_size is None:
        if side**2 != area:
            raise UserError(f"--ckpt {path}: its {tokens} tokens make no square; give --image-size HEIGHTxWIDTH")
        return side, None
    height, width = height_width(image_size)
    factor = max(1, math.isqrt(height * width // area))
    if (height // factor) * (width // factor) == area:
        return (height // factor if height == width else (height // factor, width // factor)), image_size
    return side, image_size  # which do not go together, as whoever knows the autoencoder will say


def recipe_of(content, state, path="file", model=None, num_heads=None, image_size=None, num_classes=None):
    """Recipe of a loaded checkpoint, from its own description or else from the shapes of its weights, state.

    model, num_heads, image_size, num_classes: what shapes cannot tell, the last whether there is a null class. Raises
    UserError or UsageError naming the file.
    """
    if isinstance(content.get("recipe"), dict):
        return Recipe.from_dict(content["recipe"], path)
    flags = flags_in(content)
    check_backbone(state, path)
    try:
        recipe = _described(flags, state, path, model, num_heads, image_size, num_classes)
        _check_config(content.get("config", {}), recipe.model_args, path)
        return recipe
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"--ckpt {path}: its args make no sense here ({error})") from error


def _described(flags, state, path, model, num_heads, image_size, num_classes):
    """recipe_of, for flags that may hold anything."""
    if num_heads and (flags.get("num_heads") or num_heads) != num_heads:
        raise UsageError(f"{path} has num_heads {flags['num_heads']}, not {num_heads}")
    name, config = _model_of(state, path, model, num_heads or flags.get("num_heads"))
    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    input_size, image_size = _sizes(state["pos_embed"].shape[1], patch, flags.get("image_size", image_size), path)
    if flags.get("input_size"):
        input_size = _input_size(flags["input_size"], state["pos_embed"].shape[1], patch)
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    has_null = flags.get("num_classes", num_classes) != rows and rows > 1  # published files all have it
    has_null = has_null and flags.get("class_dropout_prob", 0.1) != 0
    model_args = {
        **config,
        "input_size": input_size,
        "in_channels": channels,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        "num_classes": rows - has_null,
        "class_dropout_prob": 0.1 if has_null else 0.0,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
    }
    _check_numbers(model_args)
    said = {key: flags[key] for key in TRANSPORT if key in flags}
    transport = TransportSettings(**said) if said.get("path_type") else None
    vae = None if flags.get("vae") is None else str(flags["vae"])
    return Recipe(name, model_args, image_size and canonical(image_size), vae=vae, transport=transport)


def _check_numbers(model_args):
    """Raises ValueError or KeyError for SiT's keywords that are no counts."""
    height_width(model_args["input_size"])
    for key in ("patch_size", "in_channels", "num_classes"):
        model_args[key]  # which are asked for before there is a network
    for key in ("patch_size", "in_channels", "num_classes", "hidden_size", "depth", "num_heads"):
        if type(value := model_args.get(key, 1)) is not int or value < 1:
            raise ValueError(f"{key} {value!r}")


def _input_size(size, tokens, patch):
    """SiT's input_size, as a config says it. Raises ValueError where so many tokens have another."""
    height, width = height_width(size)
    if height % patch or width % patch or height * width != tokens * patch**2:
        raise ValueError(f"input_size {size} is not that of {tokens} tokens")
    return height if height == width else (height, width)


def _check_config(config, model_args, path):
    """Raises UserError where the config of a folder says something else than its weights."""
    for key in ("depth", "hidden_size", "patch_size", "in_channels", "mlp_ratio", "learn_sigma", "num_classes"):
        if key in config and config[key] != model_args[key]:
            raise UserError(f"--ckpt {path}: its config says {key} {config[key]}, its weights say {model_args[key]}")


def _on_paper(recipe, state, path):
    """The network of a recipe, without memory. Raises UserError for one that makes no sense, or of more than these weights."""
    try:
        if recipe.model_args.get("depth", 0) > len(state) or recipe.model_args.get("hidden_size", 0) > 10**5:
            raise ValueError("it is of more than the weights beside it")
        with torch.device("meta"):
            return recipe.build()
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"--ckpt {path}: its recipe makes no sense here ({str(error) or type(error).__name__})") from error


def build_with(recipe, state, path="file"):
    """The network of a recipe with these weights, float32 on the CPU. Raises UserError where they do not fit.

    No weights are drawn, only to be replaced: that takes longer than to load them. The memory is the network's own, where the
    state's may be a mapped file.
    """
    model = _on_paper(recipe, state, path)
    own = {name: value.to(torch.float32, copy=True) if torch.is_tensor(value) else value for name, value in state.items()}
    load_weights(model, own, path, assign=True)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):  # buffers that no file holds
        model = load_weights(recipe.build(), own, path)
    return model
