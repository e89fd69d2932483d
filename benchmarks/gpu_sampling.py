"""What gpu.py measures of sampling and of what comes after: solves, noise, PNGs, the autoencoder, precision and recall.

An item is a function that yields (setting, {figure: number}). Weights are random, but for dopri5's, whose number of calls is
that of a trained network: the demo's.
"""

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKL
from gpu_training import recipe_of

import train
from common.chunks import ChunkStore
from common.machine import PeakMemory
from common.precision import set_precision
from common.streams import SampleStreams
from data.autoencoder import LatentSpace
from inference import ODE, SDE, Guidance, Pipeline
from inference.chunked import keep_chunk
from metrics.scores import precision_recall
from training.costs import SD_AUTOENCODER
from transport import Transport

ROOT = Path(__file__).resolve().parent.parent


def open_pipeline(bench, name, precision, compile):
    recipe = recipe_of(*bench.small((name, 256), ("SiT-T/8", 64)))
    with torch.device(bench.device):  # which draws a gigabyte of weights faster
        model = recipe.build()
    for weight in model.parameters():
        if not weight.any():  # zeros take less power, and so less time, than a trained network's
            torch.nn.init.normal_(weight, std=0.02)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = model.to(bench.device, dtype).eval().requires_grad_(False)
    model.t_embedder.float()
    return Pipeline(Path(name), recipe, model, Transport(recipe.transport), None, bench.device, precision, compile)


@contextlib.contextmanager
def noise_timed():
    """Yields a list that gets the seconds for which a solve waits for its noise."""
    waited, ahead = [], SampleStreams.ahead

    @contextlib.contextmanager
    def timed(streams):
        with ahead(streams) as randn_like:

            def draw(x):
                started = time.perf_counter()
                noise = randn_like(x)
                waited.append(time.perf_counter() - started)
                return noise

            yield draw

    with mock.patch.object(SampleStreams, "ahead", timed):
        yield waited


def guided(bench, name):
    """A chunk of the guided SDE, with few of its 250 steps, each of which costs the same."""
    number, batch = bench.small((25, 32), (4, 2))
    for precision, compile in (("bf16", True), ("bf16", False), (bench.default, True), (bench.default, False)):
        bench.forget()
        pipe = open_pipeline(bench, name, precision, compile)
        draw = lambda: pipe.draw([1] * batch, solver=SDE(num_steps=number), guidance=Guidance(1.5))  # noqa: B023, E731
        first = bench.seconds(draw)
        with noise_timed() as waited:
            seconds = bench.seconds(draw)
        streams, x = SampleStreams(0, range(batch)), torch.empty(batch, *pipe.latent_shape, device=bench.device)
        alone = bench.seconds(lambda: streams.randn_like(x), 10)  # noqa: B023
        yield (
            f"{pipe.recipe.model}, batch {batch}, {precision}" + (", compiled" if compile else ""),
            {
                "first chunk, s": first,
                "250 steps, s": 250 * seconds / number,
                "ms a step": 1000 * seconds / number,
                "host waits for noise, %": 100 * sum(waited) / seconds,
                "noise at once, ms a step": 1000 * alone,
                "images/s of 250 steps": batch * number / seconds / 250,
            },
        )


def writing(bench):
    """A chunk's file with its PNGs and without: noise, which compresses worst."""
    size, batch = bench.small((256, 32), (32, 4))
    images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8, device=bench.device)
    with tempfile.TemporaryDirectory() as folder:
        store = ChunkStore(Path(folder), batch, batch)
        for setting, png in ((f"{batch} images of {size} px as .npz", None), ("with PNGs", Path(folder))):
            seconds = bench.seconds(lambda: keep_chunk(store, 0, {"images": images}, png), 5)  # noqa: B023
            yield setting, {"seconds": seconds, "images/s": batch / seconds}


def dopri5(bench):
    """Network calls of dopri5 on the demo's model, trained here, by the arithmetic of the network."""
    recipe = ["--model", "SiT-T/2", "--global-batch-size", "128", "--lr", "2e-3", "--warmup-steps", "100", "--lr-schedule"]
    recipe += ["cosine", "--grad-clip", "1", "--ema-decay", "0.998", "--max-steps", "1400"]
    quick = ["--model", "SiT-T/8", "--global-batch-size", "8", "--max-steps", "4"]
    data = ["--data-path", "builtin:digits", "--vae", str(ROOT / "assets" / "digits-vae"), "--image-size", "32"]
    with tempfile.TemporaryDirectory() as folder:
        more = ["--num-classes", "10", "--num-workers", "0", "--sample-every", "1000000", "--results-dir", folder]
        with contextlib.redirect_stdout(sys.stderr):
            train.main(train.make_parser().parse_args([*data, *bench.small(recipe, quick), *more]))
        (path,) = Path(folder).glob("*/checkpoints/*.pt")
        for precision in bench.precisions:
            pipe = Pipeline.load(path, device=bench.device, precision=precision)
            labels = [i % 10 for i in range(bench.small(100, 4))]
            draw = lambda: pipe.draw(labels, solver=ODE(), guidance=Guidance(2.75, channels=None))  # noqa: B023, E731
            draw()
            seconds = bench.seconds(draw)
            yield precision, {"network calls": pipe.calls // 2, "seconds": seconds}


def autoencoder(bench):
    config, size, batch = SD_AUTOENCODER, *bench.small((256, 32), (64, 2))
    if bench.quick:
        config = config | dict(block_out_channels=(32, 32, 32, 32), norm_num_groups=8)
    space = LatentSpace(AutoencoderKL(**config), "random").to(bench.device)
    pixels = torch.rand(batch, 3, size, size, device=bench.device) * 2 - 1
    latents = torch.randn(batch, 4, size // 8, size // 8, device=bench.device)
    for layout in (torch.channels_last, torch.contiguous_format):
        space.vae.to(memory_format=layout)
        for precision in bench.precisions[:-1]:  # it is not run in bf16
            set_precision(precision, bench.device)
            for work, call in (("encode", lambda: space.moments(pixels)), ("decode", lambda: space.decode(latents))):
                call()
                memory = PeakMemory(bench.device)
                seconds = bench.seconds(call, bench.small(5, 1))
                figures = {"ms": 1000 * seconds, "images/s": batch / seconds, "memory, GB": memory.read() / 1e9}
                yield f"{work} {batch} of {size} px, {precision}, {str(layout).removeprefix('torch.')}", figures


def manifold(bench):
    samples, reference = bench.small((50_000, 10_000), (200, 100))
    features = [torch.randn(count, 2048) for count in (samples, reference)]
    memory = PeakMemory(bench.device)
    seconds = bench.seconds(lambda: precision_recall(*features, bench.device))
    yield f"precision and recall, {samples:,} x {reference:,}", {"seconds": seconds, "memory, GB": memory.read() / 1e9}
