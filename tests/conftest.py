"""Every test starts from the same seed, on one thread: the tensors are small."""

import os
import re
import signal
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


# GPUs are hidden from tests, whose numbers are a CPU's, but for those marked gpu, when they are asked for. Here, before any
# other file can ask for them: pytest itself has not read the command line yet.
if not any(flag == "-m" and re.search(r"(?<!not )\bgpu\b", marks) for flag, marks in pairwise(sys.argv)):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals():
    """train.main, run in this process, takes Ctrl-C for itself: give it back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint that the real train.py made: SiT-T/8 on the digits' pixels, six steps."""
    from cli import DIGITS, launch

    folder = tmp_path_factory.mktemp("trained")
    flags = ["--vae", "none", "--model", "SiT-T/8", "--max-steps", 6, "--global-batch-size", 16, "--num-workers", 0]
    done = launch("train", *DIGITS, *flags, "--results-dir", folder, "--lr", 1e-3, "--log-every", 2, "--sample-every", 6)
    assert done.code == 0, done.err
    return next(folder.glob("000-*/checkpoints/0000006.pt"))


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """File of random weights for torch-fidelity's Inception, scaled to keep the signal."""
    import torch.nn as nn
    from torch_fidelity import feature_extractor_inceptionv3 as library

    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: None)
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = library.FeatureExtractorInceptionV3("random", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.normal_(network.fc.weight, std=0.1)
    nn.init.normal_(network.fc.bias)
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


# Inputs of the metrics: a random Inception whose features differ between images, and images that differ.


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="session")
def weights(inception_weights):
    return inception_weights


def pictures(count, seed):
    """uint8 (count, 32, 32, 3): waves of random direction, colour and contrast."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    frequency = rng.normal(0, 0.4, (count, 2, 1, 1))
    waves = np.sin(frequency[:, 0] * y + frequency[:, 1] * x + rng.uniform(0, 6, (count, 1, 1)))
    pixels = 127 + rng.uniform(-90, 90, (count, 1, 1, 3)) * waves[..., None] + rng.uniform(-60, 60, (count, 1, 1, 3))
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def inception(weights):
    from metrics.features import load_inception

    return load_inception(weights)


@pytest.fixture(scope="session")
def sample_images():
    return pictures(7, seed=1)


@pytest.fixture(scope="session")
def reference_images():
    return pictures(8, seed=2)


@pytest.fixture(scope="session")
def sample_features(sample_images, inception):
    from metrics.features import extract_features

    return extract_features(sample_images, inception, batch_size=4)


@pytest.fixture(scope="session")
def reference_features(reference_images, inception):
    from metrics.features import extract_features

    return extract_features(reference_images, inception, batch_size=4)


@pytest.fixture(scope="session")
def samples(folder, sample_images):
    """The samples as a folder of PNGs."""
    path = folder / "samples"
    path.mkdir()
    for i, image in enumerate(sample_images):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    (path / "notes.txt").write_text("not an image")
    return path


@pytest.fixture(scope="session")
def reference(folder, reference_images):
    """The reference images as a .npz."""
    np.savez(folder / "reference.npz", arr_0=reference_images, arr_1=np.arange(len(reference_images)))
    return folder / "reference.npz"
