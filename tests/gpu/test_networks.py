"""The networks on the device against the CPU's double precision: SiT, autoencoder, Inception, and what compares features."""

import copy

import numpy as np
import pytest
import torch

from cli import ROOT
from common.machine import PeakMemory
from common.precision import set_precision
from common.streams import SampleStreams
from conftest import pictures
from data.autoencoder import LatentSpace, load_autoencoder, to_uint8
from data.images import to_pixels
from inference.guidance import GuidedNetwork, compile_network
from inference.settings import Guidance
from metrics.features import Inception, extract_features, load_inception
from metrics.scores import precision_recall
from models import SiT_models

from .conftest import CUDA, PRECISIONS, TOLERANCE, error

pytestmark = pytest.mark.gpu
VAE = str(ROOT / "assets" / "digits-vae")
CONVOLVED = {"fp32": 5e-5, "tf32": 3e-2}  # of an autoencoder's output: its convolutions may be done by Winograd's transform


def network(seed=0):
    """A small SiT of which no weight is zero, and an input of it: the first one is larger than the tiles of a kernel."""
    torch.manual_seed(seed)
    model = SiT_models["SiT-S/2"](input_size=16, depth=4, num_classes=10, learn_sigma=False).eval().requires_grad_(False)
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    torch.manual_seed(1)
    return model, (torch.randn(6, 4, 16, 16), torch.linspace(0, 1, 6), torch.arange(6))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_has_the_error_it_should(precision, device):
    model, inputs = network()
    exact = copy.deepcopy(model).double()(inputs[0].double(), *inputs[1:])
    set_precision(precision, device)
    model = model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    model.t_embedder.float()
    out = model(*(x.to(device) for x in inputs))
    assert out.dtype == torch.float32
    assert error(out, exact) < TOLERANCE[precision]
    assert precision == "fp32" or error(out, exact) > TOLERANCE["fp32"]  # or it was not that precision


WEAK = "autoguidance"


@pytest.mark.parametrize("kind", ["plain", "guided", "interval", WEAK])
def test_compiled_is_eager_and_replays_its_graphs(kind, device):
    """Over a solve's calls, of which some are guided and some not. CUDA graphs that were skipped are counted by inductor."""
    counted = torch._dynamo.utils.counters["inductor"]
    torch._dynamo.reset()
    counted.clear()
    set_precision("fp32", device)
    scale, low = (1.0 if kind == "plain" else 3.0), (0.4 if kind == "interval" else 0.0)
    guidance, results = Guidance(scale, channels=None, low=low), []
    for compiled in (False, True):
        model, (x, _, y) = network()
        weak = network(seed=5)[0].to(device) if kind == WEAK else None
        for each in (model.to(device), weak):
            if compiled and each is not None:
                compile_network(each)
        guided = GuidedNetwork(model, guidance, null_class=10, weak=weak, compiled=compiled)
        x, y = x.to(device), y.to(device)
        kept = []  # what a call gave must not change with the next
        for time in (0.0, 0.2, 0.5, 0.7, 1.0, 0.1):
            kept.append(guided(x, torch.tensor(time, device=device).expand(len(x)), y))  # as solvers have it
        results.append(torch.stack(kept))
    assert error(results[1], results[0]) < 1e-4
    if CUDA:  # none was skipped, and there were some
        assert counted["cudagraph_skips"] == 0 and counted["cudagraph_recorded_non_static_inputs"] > 0, dict(counted)


@pytest.mark.parametrize("shape", [(4, 32, 32), (3, 5)])
def test_noise_is_the_cpus(shape, device):
    ours, cpus = SampleStreams(3, range(70)), SampleStreams(3, range(70))
    like = torch.empty(70, *shape, device=device)
    assert ours.randn(shape, device).device.type == device.type
    cpus.randn(shape, "cpu")
    with ours.ahead() as randn_like:
        for _ in range(12):
            noise = randn_like(like)
            assert noise.device.type == device.type and torch.equal(noise.cpu(), cpus.randn_like(like.cpu()))


@pytest.mark.parametrize("precision", PRECISIONS[:2])  # it is never run in bf16
def test_the_autoencoder_encodes_and_decodes_as_in_double_precision(precision, device):
    pixels = to_pixels(torch.from_numpy(pictures(5, seed=0)).permute(0, 3, 1, 2))
    exact = load_autoencoder(VAE)
    exact.vae.double()
    moments = exact.moments(pixels.double())
    latents = exact.latents(*moments, torch.ones_like(moments[0]))
    decoded = exact.decode(latents)
    set_precision(precision, device)
    ours = load_autoencoder(VAE).to(device)
    for one, other in zip(ours.moments(pixels.to(device)), moments):
        assert error(one, other) < CONVOLVED[precision]
    again = ours.decode(latents.float().to(device))
    assert error(again, decoded) < CONVOLVED[precision]
    levels = (to_uint8(again).cpu().int() - to_uint8(decoded).int()).abs()
    assert levels.max() <= (1 if precision == "fp32" else 3)


def test_decoding_in_parts_takes_less_memory(device):
    """As much as a part takes, and the pixels of all: with Stable Diffusion's layers, at an eighth of its width."""
    from diffusers import AutoencoderKL

    from training.costs import SD_AUTOENCODER

    vae = AutoencoderKL(**SD_AUTOENCODER | dict(block_out_channels=(32, 32, 64, 64)))
    autoencoder = LatentSpace(vae, "random").to(device)
    latents = torch.randn(32, 4, 16, 16, device=device)
    autoencoder.decode(latents[:1])
    peaks = {}
    for size in (32, 2):
        peak = PeakMemory(device)
        autoencoder.decode(latents, batch_size=size)
        peaks[size] = peak.read()
    # A GPU's count is of tensors alone; a process's, of pages too that its allocator held for the tests before.
    assert peaks[2] < peaks[32] / (4 if device.type == "cuda" else 2), peaks


@pytest.mark.parametrize("precision", PRECISIONS[:2])
def test_inception_sees_on_the_device_what_it_sees_on_the_cpu(precision, device, inception_weights):
    images = pictures(9, seed=4)
    set_precision("fp32", torch.device("cpu"))
    theirs = extract_features(images, load_inception(inception_weights), batch_size=9)
    set_precision(precision, device)
    inception = load_inception(inception_weights, device)
    assert isinstance(inception, Inception) and next(inception.network.parameters()).device.type == device.type
    for ours, cpus in zip(extract_features(images, inception, batch_size=4), theirs):
        assert ours.device.type == "cpu" and error(ours, cpus) < 10 * TOLERANCE[precision]


def test_precision_and_recall_are_numpys(device):
    rng = np.random.default_rng(0)
    samples, reference = rng.normal(0.2, 1, (300, 16)), rng.normal(0, 1, (250, 16))

    def covered(points, centres):
        between = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(between, axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radii).any(1).mean()

    set_precision(None, device)
    expected = covered(samples, reference), covered(reference, samples)
    assert min(expected) > 0.2 and max(expected) < 1
    assert precision_recall(samples, reference, device, rows=64) == pytest.approx(expected, abs=1e-12)
