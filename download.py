"""Find a checkpoint: a local file, published weights by name, or a file on the Hugging Face Hub, downloaded once."""

import sys
from pathlib import Path
from typing import NamedTuple

from common.checkpoint import file_hash, load_checkpoint, weights_of
from common.errors import UsageError, UserError
from common.sizes import canonical

FOLDER = Path("pretrained_models")  # where a file that was brought by hand is looked for
COLLECTION = "nyu-visionx/SiT-collections"


class Published(NamedTuple):
    """Weights in COLLECTION, as NAME.pt; aliases: other names that people have them under."""

    model: str
    image_size: int
    sha256: str = None
    aliases: tuple = ()


PUBLISHED = {f"SiT-{size}-2-256": Published(f"SiT-{size}/2", 256) for size in "SBL"} | {
    "SiT-XL-2-256": Published(
        "SiT-XL/2", 256, "e645b5cd82d1d645cfd9b7c96041b56b2a0aa61faed90c0869e79be02ab55aca", ("SiT-XL-2-256x256",)
    ),
    "SiT-XL-2-512": Published("SiT-XL/2", 512, None, ("SiT-XL-2-512x512",)),
}


def published_name(model=None, image_size=None):
    """The name of the published weights of a model (None: the paper's SiT-XL/2) for images of a size (None: 256). Raises
    UsageError where there are none."""
    wanted = model or "SiT-XL/2", canonical(image_size or 256)
    for name, weights in PUBLISHED.items():
        if wanted == weights[:2]:
            return name
    there = ", ".join(f"{weights.model} at {weights.image_size} px" for weights in PUBLISHED.values())
    raise UsageError(f"--ckpt is missing: there are no published weights of {wanted[0]} at {wanted[1]} px; there are {there}")


def locate(name, flag="--ckpt"):
    """Path of a checkpoint: a file or folder, or the name of published weights, or hub:REPO/FILE[@REVISION]; of these the
    file is downloaded where it is not there yet. Raises UserError, naming flag, with what to do without network."""
    path, known = Path(name), str(name).removesuffix(".pt")
    if path.exists():
        return path
    if str(name).startswith("hub:"):
        return _from_hub(flag, name, *_parse(flag, str(name)))
    for published, weights in PUBLISHED.items():
        if known in (published, *weights.aliases):
            by_hand = [FOLDER / f"{each}.pt" for each in (published, *weights.aliases)]
            there = [file for file in by_hand if file.is_file()]
            return there[0] if there else _from_hub(flag, name, COLLECTION, by_hand[0].name, None, weights.sha256, FOLDER)
    return path


def _parse(flag, name):
    """(repository, file, revision or None) of hub:OWNER/NAME/FILE[@REVISION]."""
    where, _, revision = name.removeprefix("hub:").partition("@")
    owner, _, rest = where.partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise UsageError(f"{flag} {name}: a file on the Hub is named hub:OWNER/NAME/FILE, and @REVISION if it must be that one")
    return f"{owner}/{repository}", file, revision or None


def _from_hub(flag, name, repository, file, revision, sha256=None, folder=None):
    """A file of the Hub's cache, which huggingface_hub downloads with a progress bar. folder: where a copy that is brought by
    hand is found under the same name; None: it must be given as flag."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries without network are a page long; ours is one line
    try:
        cached = try_to_load_from_cache(repository, file, revision=revision)
        if not isinstance(cached, str):
            print(f"Looking for {repository}/{file} on the Hugging Face Hub", file=sys.stderr, flush=True)
        path = Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # the Hub, the network and the disk raise a dozen unrelated types here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        command = f"hf download {repository} {file}{f' --revision {revision}' if revision else ''} --local-dir {folder or '.'}"
        then = f"copy {file} into {folder.resolve()}" if folder else f"give the file as {flag}"
        raise UserError(
            f"{flag} {name}: cannot download it ({reason}); on a machine with network run `{command}`, and {then}"
        ) from error
    if sha256 and not isinstance(cached, str) and (found := file_hash(path)) != sha256:
        path.resolve().unlink()
        raise UserError(f"{flag} {name}: {repository}/{file} is not the published file: its SHA-256 is {found}, not {sha256}")
    return path


def find_model(name):
    """State dict of a published or local checkpoint: its EMA weights if it is one of training."""
    path = locate(name)
    return weights_of(load_checkpoint(path), path)
