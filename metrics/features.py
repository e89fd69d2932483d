"""What a network sees in images, such as torch-fidelity's Inception, behind FID, sFID, Inception Score, precision and recall.

A network is called with uint8 images (N, 3, H, W) of any size and gives Features, or as many of their fields as it has, on its
device; its widths are how many numbers each has for an image. networks.py has the others.
"""

import io
import pickle
import sys
from http.client import HTTPException
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from common.errors import UserError

POOL, SPATIAL, LOGITS = 2048, 17 * 17 * 7, 1008  # numbers that the Inception gives for an image


class Features(NamedTuple):
    """What a network sees in N images: float32 on the CPU. The widths are the Inception's; the others have the first alone."""

    pool: torch.Tensor  # (N, 2048): what distances are measured in
    spatial: torch.Tensor = None  # (N, 2023): 7 channels of a 17 x 17 map, channels last
    logits: torch.Tensor = None  # (N, 1008), without the bias


def take(features, rows):
    """The Features of some of their images: a slice, or indices."""
    return Features(*(None if field is None else field[rows] for field in features))


class Inception:
    """The network behind the features of published FIDs."""

    widths = (POOL, SPATIAL, LOGITS)

    def __init__(self, network, device):
        self.network, self.device = network.to(device), device
        # Past its ReLU: TensorFlow's mixed_6/conv, of which sFID reads the first 7 channels.
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output):
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def __call__(self, images):
        pool, logits = self.network(images.to(self.device))
        return Features(pool, self._spatial, logits)


def load_inception(weights=None, device="cpu"):
    """Inception from a file of weights or from torch-fidelity's own download. Raises UserError naming the file."""
    name = f"--inception-weights {weights}"
    try:
        if weights is None:
            name = f"the Inception weights (download {URL_INCEPTION_V3} and give it as --inception-weights)"
            settings = dict(map_location="cpu", weights_only=True, check_hash=True, progress=sys.stderr.isatty())
            state = torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, **settings)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity would run whatever code a file holds: it gets a copy of what loads without running any.
        torch.save(state, copy := io.BytesIO())
        copy.seek(0)
        settings = dict(feature_extractor_weights_path=copy, cuda=False, verbose=False)
        network = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], **settings)
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{name}: refused, it is not a plain file of weights and might run code") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{name}: damaged, or not the weights of torch-fidelity's inception-v3-compat") from error
    return Inception(network, device)


@torch.no_grad()
def extract_features(images, network, batch_size=64, start=0, stop=None, title=None):
    """A network's Features of images[start:stop], uint8 (N, H, W, 3): a NumPy array, a CPU tensor, or what open_images gives.

    The arithmetic is that of common.precision. title names a progress bar, which is shown on a terminal.
    """
    stop = len(images) if stop is None else stop
    features, done = [torch.empty(stop - start, width) for width in network.widths], 0
    with tqdm(total=stop - start, desc=title, unit=" images", leave=False, disable=None if title else True) as bar:
        for i in range(start, stop, batch_size):
            j = min(i + batch_size, stop)
            batch = torch.tensor(np.asarray(images[i:j])).permute(0, 3, 1, 2)
            for whole, part in zip(features, network(batch)) if len(batch) else ():
                whole[done : done + len(batch)] = part
            done += len(batch)
            bar.update(j - i)
    return Features(*(whole[:done] for whole in features))  # fewer, where files could not be read


def gather_features(features, world):
    """All processes' Features as one, by rank: on rank 0, elsewhere None."""
    if not world.distributed:
        return features
    parts = [None] * world.size if world.is_main else None
    dist.gather_object([field for field in features if field is not None], parts)
    return Features(*map(torch.cat, zip(*parts))) if world.is_main else None


def shared_features(images, network, batch_size, world, title=None):
    """gather_features of images that all processes can read and extract a contiguous share of."""
    start, stop = (len(images) * rank // world.size for rank in (world.rank, world.rank + 1))
    title = title if world.is_main else None
    features = extract_features(images, network, batch_size, start, stop, title)
    if guard := getattr(images, "guard", None):
        guard.share(world)  # few in each process may be many together
    return gather_features(features, world)
