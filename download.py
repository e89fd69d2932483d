"""Find a checkpoint: a local file, or published weights, downloaded once."""

from pathlib import Path

import torch

from common.checkpoint import load_checkpoint, weights_of
from common.errors import UserError

PUBLISHED = {
    "SiT-XL-2-256x256.pt": "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/"
    "SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
}
FOLDER = Path("pretrained_models")


def locate(name):
    """Path of a checkpoint file, downloading it first if name is that of published weights. Raises UserError offline."""
    if name not in PUBLISHED:
        return Path(name)
    target = FOLDER / name
    if not target.is_file():
        try:
            FOLDER.mkdir(exist_ok=True)
            torch.hub.download_url_to_file(PUBLISHED[name], str(target))  # to a temporary name first
        except OSError as error:
            raise UserError(f"cannot download {name} ({error}); download {PUBLISHED[name]} and save it as {target}") from error
    return target


def find_model(name):
    """State dict of a published or local checkpoint: its EMA weights if it is one of training."""
    path = locate(name)
    return weights_of(load_checkpoint(path), path)
