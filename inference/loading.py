"""What Pipeline.load asks of a file and of what it is told beside it."""

import math

from common.errors import UsageError, as_usage_error
from common.recipe import TRANSPORT, flags_in
from common.sizes import canonical
from data.autoencoder import PUBLISHED as PUBLISHED_VAES
from data.autoencoder import load_autoencoder
from transport import Transport, TransportSettings

TOLD = ("model", "num_heads", "image_size", "num_classes", *TRANSPORT)  # what a file may not say


def check_told(told):
    """What is told, without what is left out, sizes in their one form. Raises UsageError for a word that is unknown."""
    if unknown := told.keys() - set(TOLD):
        raise UsageError(f"Pipeline.load knows no {', '.join(sorted(unknown))}; it takes {', '.join(TOLD)}")
    told = {key: value for key, value in told.items() if value is not None or key == "loss_weight"}
    if "image_size" in told:
        with as_usage_error():
            told["image_size"] = canonical(told["image_size"])
    return told


def open_transport(told, recipe, path, default=None):
    """The file's transport, or where it does not say, what is told, or default. Raises UsageError where the file
    contradicts what is told."""
    found = dict(model=recipe.model, image_size=recipe.image_size, num_classes=recipe.num_classes)
    found["num_heads"] = recipe.model_args["num_heads"]
    settings = {key: told[key] for key in TRANSPORT if key in told}
    if recipe.transport is not None:
        found |= vars(recipe.transport)
        for name in ("sample_eps", "time_shift"):  # sampling's own to choose
            found[name] = settings.get(name, found[name])
        settings = {key: found[key] for key in TRANSPORT}
    elif default is not None:
        settings = vars(default) | settings
    for name, value in found.items():
        if name in told and value is not None and told[name] != value:
            raise UsageError(f"--{name.replace('_', '-')} {told[name]} contradicts {path}, which has {value}")
    with as_usage_error():
        return Transport(TransportSettings(**settings).fitted(math.prod(recipe.latent_shape)))


def open_autoencoder(name, recipe, path):
    """The autoencoder called name, or one that is loaded already. One with other latents than the checkpoint's is an error;
    ema and mse share theirs."""
    channels = 1 if recipe.model_args["in_channels"] == 1 else 3  # of images, where they are what the network sees
    autoencoder = load_autoencoder(name, channels) if isinstance(name, str) else name
    name = autoencoder.name
    same_latents = recipe.vae in PUBLISHED_VAES and name in PUBLISHED_VAES
    if not same_latents and recipe.vae_hash not in (None, autoencoder.config_hash):
        raise UsageError(f"--vae {name} contradicts {path}, which was trained with another autoencoder, {recipe.vae}")
    return autoencoder


def check_decoding(settings, autoencoder):
    given = {key: value for key, value in (settings or {}).items() if value}
    for key in given if autoencoder.name == "none" else ():
        raise UsageError(f"--vae-{key.replace('_', '-')}: --vae none is pixel space, there is nothing to decode")
    return given


def note_on_classes(content, told, recipe, path):
    """A line where the last row of a bare file's label table was taken as that of the null class, and ImageNet's 1001 rows
    do not say so; else None."""
    rows = recipe.num_classes + 1
    said = (isinstance(content.get("recipe"), dict) and "translated" not in content) or "num_classes" in (
        flags_in(content).keys() | told.keys()
    )
    if said or rows == 1001 or recipe.null_class is None:
        return None
    taken = f"{recipe.num_classes} classes and the null class"
    return (
        f"{path} does not say how many classes it knows: its {rows} labels are taken as {taken}; if not, --num-classes {rows}"
    )
