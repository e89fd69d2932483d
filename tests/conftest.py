"""Every test starts from the same seed, on one thread: the tensors are small."""

import signal

import pytest
import torch

torch.set_num_threads(1)


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
