"""Every test starts from the same seed, on one thread: the tensors are small."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint that the real train.py made: SiT-T/8 on the digits' pixels, six steps."""
    from cli import DIGITS, launch

    folder = tmp_path_factory.mktemp("trained")
    flags = ["--vae", "none", "--model", "SiT-T/8", "--max-steps", 6, "--global-batch-size", 16, "--num-workers", 0]
    done = launch("train", *DIGITS, *flags, "--results-dir", folder, "--lr", 1e-3, "--log-every", 2, "--sample-every", 6)
    assert done.code == 0, done.err
    return next(folder.glob("000-*/checkpoints/0000006.pt"))
