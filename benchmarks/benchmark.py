"""How fast this machine trains and samples: python benchmarks/benchmark.py --model SiT-S/2 --batch-size 8

Weights and data are random, so nothing is downloaded. A line of the table is a piece of work in one setting, as the
scripts do it; but they run the autoencoder in float32 (TF32 on GPUs) and uncompiled alone, compile without freezing, and in
training block by block, where this compiles the network as one.

    seconds       median of a call's time
    of peak       arithmetic of the model (costs.py) in that time, as a share of this machine's best matrix product in the
                  setting's precision; attention counts, element-wise work is not arithmetic here
    memory        the most in use in a call, above what was in use before it: tensors on a GPU, the process on a CPU
    ratio         how many times as fast as the first line of that work, as the median over turns: the settings take
                  turns, so that a machine that slows down slows them all

The .json has "machine", "settings", "peaks" (FLOP/s by precision) and "results", the lines: section, setting, turns,
seconds, images_per_second, share_of_peak, memory_bytes and ratio; null where it means nothing.
"""

import os
import sys
import tempfile
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch.nn.utils import get_total_norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measure import BF16, COMPILED, FAST, FROZEN, PLAIN, TF32, Setting, Stopwatch, compiled

from common.errors import UsageError
from common.flags import flags_of
from common.machine import PeakMemory
from common.streams import SampleStreams
from data.autoencoder import LatentSpace
from data.images import load_image, to_latents
from inference import Guidance
from inference.guidance import GuidedNetwork, compile_network
from models import SIT_CONFIGS, SiT_models
from train_utils import MODELS, Parser, positive_int, run
from training.costs import SD_AUTOENCODER, autoencoder_flops, forward_flops, on_paper, step_flops
from training.ema import update_ema
from transport import Sampler, create_transport


class Benchmark:
    """The pieces of work, one method each, on one model, batch and machine."""

    def __init__(self, args, device):
        self.args, self.device, self.batch = args, device, args.batch_size
        self.paper, self.transport = on_paper(args.model, args.image_size), create_transport()
        self.forward_flops, self.step_flops = self.batch * forward_flops(self.paper), step_flops(self.paper, self.batch)
        self.settings = (PLAIN, FAST) if args.quick else (PLAIN, BF16, COMPILED, FAST)
        if device.type == "cuda":
            self.settings = PLAIN, TF32, *self.settings[1:]
        self.steps = 3 if args.quick else 6  # points in time of the short solves
        sides = self.sides = [side * self.paper.patch_size for side in self.paper.grid]
        torch.manual_seed(0)
        self.x = torch.randn(self.batch, 4, *sides, device=device)
        self.t = torch.rand(self.batch, device=device)
        self.y = torch.randint(1000, (self.batch,), device=device)
        self.watch = Stopwatch(device, args.out, flags_of(args), args.quick)

    def network(self, setting, training=False):
        """The network, compiled where guidance calls it too, but for sampling."""
        model = SiT_models[self.args.model](input_size=self.sides, learn_sigma=False)
        for weight in model.parameters():
            if not weight.any():  # a product with zeros takes less power, and so less time, than a trained model's
                torch.nn.init.normal_(weight, std=0.02)
        model = model.to(self.device, torch.float32 if training else setting.dtype)
        model.train(training).requires_grad_(training)
        model.pos_embed.requires_grad_(False)
        model.forward = compiled(model.forward, setting)
        return model

    def autoencoder(self):
        return LatentSpace(AutoencoderKL(**SD_AUTOENCODER), "random").to(self.device)

    def forward(self):
        @torch.no_grad()
        def call(network):
            return network(self.x, self.t, self.y)

        settings = self.settings if self.args.quick else (*self.settings, FROZEN)
        works = {setting: partial(call, self.network(setting)) for setting in settings}
        self.watch.compare("forward", works, self.batch, self.forward_flops)

    def trainer(self, setting, latents, checkpointing=False):
        """A training step as train.py takes it; bf16 is autocast. latents() -> (N, C, h, w)"""
        model = self.network(setting, training=True)
        model.grad_checkpointing = checkpointing
        trained = [p for p in model.parameters() if p.requires_grad]
        averaged = [p.detach().clone() for p in trained]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
        kept = dict(y=self.y, force_drop_ids=self.t < 0.1)

        def step():
            x1 = latents()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
                loss = self.transport.training_losses(model, x1, kept)["loss"].mean()
            loss.backward()
            get_total_norm([p.grad for p in trained])
            optimizer.step()
            optimizer.zero_grad()
            update_ema(averaged, trained, 0.9999)

        return step

    def train(self):
        works = {setting: self.trainer(setting, lambda: self.x) for setting in self.settings}
        self.watch.compare("train", works, self.batch, self.step_flops)

    def checkpointing(self):
        for plain in (PLAIN, replace(BF16, name="bf16 autocast")):
            less = replace(plain, name=f"{plain.name}, checkpointing")
            works = {plain: self.trainer(plain, lambda: self.x), less: self.trainer(less, lambda: self.x, True)}
            self.watch.compare("checkpoint", works, self.batch, self.step_flops)

    def guided(self, setting):
        """Guidance at 4, which calls the network on twice the batch, as the scripts that sample have it."""
        network = self.network(replace(setting, compile=False))
        if setting.compile:
            compile_network(network)
        return GuidedNetwork(network, Guidance(4.0), null_class=1000, compiled=setting.compile)

    def sde_sampler(self, steps, transport=None):
        noise = SampleStreams(0, range(self.batch)).randn_like
        return Sampler(transport or self.transport).sample_sde(num_steps=steps, randn=noise)

    def sampling(self, section, sample, calls):
        works = {setting: partial(sample, self.x, self.guided(setting), y=self.y) for setting in self.settings}
        self.watch.compare(section, works, self.batch, calls * 2 * self.forward_flops)

    def ode(self):
        sample = Sampler(self.transport).sample_ode(sampling_method="heun", num_steps=self.steps)
        self.sampling("ODE", sample, 2 * (self.steps - 1))

    def sde(self):
        self.sampling("SDE", self.sde_sampler(self.steps), self.steps)

    def sde_twice(self):
        """Against a sampler that calls the network for the velocity and again for the score, as the published one did."""
        twice = create_transport()
        twice.predict = lambda *inputs: (self.transport.predict(*inputs)[0], self.transport.predict(*inputs)[1])
        works = {}
        for name, setting, transport in (
            ("two calls a drift, float32", PLAIN, twice),
            ("one call a drift, float32", PLAIN, self.transport),
            ("one call, bf16 + compile", FAST, self.transport),
        ):
            sample = self.sde_sampler(self.args.sde_steps, transport)
            works[replace(setting, name=name)] = partial(sample, self.x, self.guided(setting), y=self.y)
        self.watch.compare("SDE, twice", works, self.batch, budget=30)

    def sde_memory(self):
        """Memory of a long solve beside a short one's, on few images: the time is the network's."""
        few = slice(max(1, self.batch // 4))
        network, x, y = self.guided(PLAIN), self.x[few], self.y[few]
        sizes = (5, 50) if self.args.quick else (25, 250)
        Sampler(self.transport).sample_sde(num_steps=sizes[0])(x, network, y=y)
        for steps in sizes:
            sample, peak = Sampler(self.transport).sample_sde(num_steps=steps), PeakMemory(self.device)
            seconds = self.watch.seconds(partial(sample, x, network, y=y))
            self.watch.add("SDE, long", replace(PLAIN, name=f"{steps} steps"), seconds, peak.read(), len(x))

    def likelihood(self):
        """By Euler's method and one probe; the backward pass is as much arithmetic as the forward pass."""
        score = Sampler(self.transport).sample_ode_likelihood(sampling_method="euler", num_steps=self.steps)
        works = {setting: partial(score, self.x, self.network(setting), y=self.y) for setting in self.settings}
        self.watch.compare("likelihood", works, self.batch, (self.steps - 1) * 2 * self.forward_flops)

    def ema(self):
        trained = [p.detach() for p in self.network(PLAIN, training=True).parameters() if p.requires_grad]
        averaged = [p.clone() for p in trained]

        def one_by_one():
            for average, weight in zip(averaged, trained):
                average.mul_(0.9999).add_(weight, alpha=1 - 0.9999)

        works = {Setting("tensor by tensor"): one_by_one, Setting("all at once"): lambda: update_ema(averaged, trained, 0.9999)}
        self.watch.compare("EMA", works, budget=5)

    def moments(self, folder, count):
        """A cache of latents as encode_latents.py lays it out, of random moments: its .npy."""
        file = Path(folder) / "moments.npy"
        array = np.lib.format.open_memmap(file, "w+", np.float16, (count, 2, 2, 4, *self.sides))
        for index in range(count):
            array[index] = np.random.default_rng(index).random(array.shape[1:], np.float32)
        array.flush()
        return file

    def read(self, file, count):
        """Random entries of a .npy, mapped anew: (count, 2, 2, C, h, w) float16."""
        array = np.load(file, mmap_mode="r")
        chosen = np.random.default_rng(0).permutation(len(array))[:count]
        return torch.stack([torch.from_numpy(np.array(array[index])) for index in chosen])

    def reading(self):
        """By one process: photographs of ImageNet's usual size, decoded and cropped, and the moments of as many."""
        count = 16 if self.args.quick else 256
        with tempfile.TemporaryDirectory() as folder:
            file, photo = self.moments(folder, 2 * count), Path(folder) / "photo.jpg"
            coarse = np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(photo, quality=90)

            def forget():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

            jpeg, memory, disk = Setting("JPEGs"), Setting("moments from the page cache"), Setting("moments from disk")
            decode = lambda: [load_image(photo, self.args.image_size) for _ in range(count)]  # noqa: E731
            read = lambda: self.read(file, count)  # noqa: E731
            works = {jpeg: decode, memory: read, disk: read}
            self.watch.compare("reading", works, count, before={disk: forget}, budget=15)

    def encode_decode(self):
        pixels = torch.rand(self.batch, 3, self.args.image_size, self.args.image_size, device=self.device) * 2 - 1
        works = {"encode": {}, "decode": {}}
        for setting in self.settings:
            vae = self.autoencoder().vae.to(setting.dtype)
            vae.encoder, vae.decoder = compiled(vae.encoder, setting), compiled(vae.decoder, setting)
            works["encode"][setting] = torch.no_grad()(partial(vae.encode, pixels.to(setting.dtype)))
            works["decode"][setting] = torch.no_grad()(partial(vae.decode, self.x.to(setting.dtype)))
        for (section, work), flops in zip(works.items(), autoencoder_flops(self.args.image_size)):
            self.watch.compare(section, work, self.batch, self.batch * flops, budget=30)

    def cached(self):
        """A training step that encodes its images beside one that reads their moments from a cache."""
        autoencoder, size = self.autoencoder(), self.args.image_size
        images = torch.randint(256, (self.batch, 3, size, size), dtype=torch.uint8, device=self.device)
        flip = self.t < 0.5
        with tempfile.TemporaryDirectory() as folder:
            file = self.moments(folder, 2 * self.batch)
            encode = partial(to_latents, autoencoder, images, flip, self.x)
            read = lambda: to_latents(autoencoder, self.read(file, self.batch).to(self.device), flip, self.x)  # noqa: E731
            works = {}
            for setting in (PLAIN, FAST):
                for name, latents in (("encoding", encode), ("cached", read)):
                    works[replace(setting, name=f"{name}, {setting.name}")] = self.trainer(setting, latents)
            self.watch.compare("latents", works, self.batch, budget=30)


SECTIONS = {
    "forward": Benchmark.forward,
    "train": Benchmark.train,
    "checkpointing": Benchmark.checkpointing,
    "ode": Benchmark.ode,
    "sde": Benchmark.sde,
    "sde-twice": Benchmark.sde_twice,
    "sde-memory": Benchmark.sde_memory,
    "likelihood": Benchmark.likelihood,
    "ema": Benchmark.ema,
    "reading": Benchmark.reading,
    "autoencoder": Benchmark.encode_decode,
    "cached": Benchmark.cached,
}


def make_parser():
    parser = Parser(prog="benchmark.py", description="Time a SiT's training and sampling on this machine.")
    parser.add_argument("--model", default="SiT-S/2", choices=SIT_CONFIGS, metavar=MODELS, help="backbone")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images")
    parser.add_argument("--image-size", type=positive_int, default=256, help="pixels a side")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"], help="where"
    )
    parser.add_argument("--sde-steps", type=positive_int, default=20, help="steps of the comparison with a 250-step SDE")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="NAME", help=f"of {', '.join(SECTIONS)} (all)")
    parser.add_argument("--quick", action="store_true", help="see that all runs: one turn, two settings")
    parser.add_argument("--out", default="benchmark.json", help="the .json")
    return parser


def main(args):
    multiple = 8 * SIT_CONFIGS[args.model]["patch_size"]
    if args.image_size % multiple:
        raise UsageError(f"--image-size {args.image_size} is not a multiple of {multiple}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no GPU that torch can use")
    if args.sde_steps < 2:
        raise UsageError("--sde-steps counts points in time and must be at least 2")
    device = torch.device(args.device)
    diffusers_logging.set_verbosity_error()  # of a dtype that it would rather choose itself
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    torch._functorch.config.donated_buffer = False  # likelihood goes back through a graph that it keeps
    benchmark = Benchmark(args, device)
    for name in args.only or SECTIONS:
        torch._dynamo.reset()
        SECTIONS[name](benchmark)
    benchmark.watch.progress.close()
    print(f"\n{args.out} has these numbers")
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "benchmark.py")
