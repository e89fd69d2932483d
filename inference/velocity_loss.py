"""L(t), the mean square by which a network's velocity misses that of the data: measured once, kept in a small file."""

import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from common.atomic import write_json
from common.checkpoint import file_hash
from common.errors import UserError
from common.precision import set_precision
from common.streams import generator
from data.images import to_latents

CHUNK = 32  # points at once


@dataclass(frozen=True)
class VelocityLoss:
    """Losses by time, in equal bins of the sampling interval: |v_hat - v|^2, a mean over dimensions, of labelled data.

    Called with times of any shape, it gives values between those of the bins' middles, and the ends' beyond them.
    """

    begin: float
    end: float
    mean: list  # of each bin
    standard_error: list
    of: dict  # what it is the loss of: the weights, and how they are read
    made_from: dict  # data, number of images, seed and precision

    def __call__(self, t):
        values = torch.tensor(self.mean, dtype=t.dtype, device=t.device)
        place = ((t - self.begin) / (self.end - self.begin) * len(values) - 0.5).clamp(0, len(values) - 1)
        left = place.floor().long().clamp(max=max(0, len(values) - 2))
        right = (left + 1).clamp(max=len(values) - 1)
        return values[left] + (place - left) * (values[right] - values[left])

    @property
    def times(self):
        """The middle of each bin."""
        width = (self.end - self.begin) / len(self.mean)
        return [self.begin + width * (i + 0.5) for i in range(len(self.mean))]

    def save(self, path):
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path):
        """Raises UserError for a file that is none of these."""
        try:
            loss = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            numbers = torch.tensor([loss.begin, loss.end, *loss.mean], dtype=torch.float64)
            dict(loss.of), dict(loss.made_from)
            if not loss.mean or not bool(numbers.isfinite().all()) or min(loss.mean) <= 0 or loss.begin >= loss.end:
                raise ValueError("its losses are no positive numbers of an interval")
            return loss
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); measure_loss.py makes it") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a file of measure_loss.py ({str(error).splitlines()[0]})") from error


def beside(checkpoint, weights="ema"):
    """Where the losses of a checkpoint's weights are kept."""
    checkpoint = Path(checkpoint)
    return checkpoint.with_name(f"{checkpoint.name.removesuffix('.pt')}.loss{'' if weights == 'ema' else f'-{weights}'}.json")


def subject(pipeline):
    """What a loss is the loss of."""
    recipe, transport = pipeline.recipe, pipeline.transport.settings
    about = dict(path_type=transport.path_type, prediction=transport.prediction, time_map=recipe.time_map)
    about |= dict(vae_hash=recipe.vae_hash, weights=pipeline.weights)
    return about | {"checkpoint_sha256": _hash_once(pipeline.path, pipeline.path.stat().st_mtime_ns)}


@lru_cache
def _hash_once(path, changed):
    """Of a file of gigabytes, which every chunk of samples asks for."""
    return file_hash(path)


def loss_of(pipeline, file=None):
    """The VelocityLoss of a pipeline's weights, from file or from beside their checkpoint. Raises UserError where it is that
    of others."""
    path = Path(file or beside(pipeline.path, pipeline.weights))
    if not path.exists():
        raise UserError(
            f"--diffusion-eta needs the loss of these weights by time, and {path} is not there: run measure_loss.py "
            f"{pipeline.path} --data-path DATA{'' if pipeline.weights == 'ema' else f' --weights {pipeline.weights}'} first"
        )
    loss = VelocityLoss.load(path)
    ours = subject(pipeline)
    if wrong := [key for key in ours if loss.of.get(key) != ours[key]]:
        what = f"{wrong[0].replace('_', ' ')} {loss.of.get(wrong[0])}, not {ours[wrong[0]]}"
        raise UserError(f"{path}: it is the loss of something else than {pipeline.path}: of {what}; run measure_loss.py again")
    return loss


class Points:
    """Point i is image i // bins of those chosen (indices into the data set), its label, noise, and a time in bin i mod bins:
    each image once in each bin, so that the bins' losses differ by their times alone. All are functions of (seed, i).
    """

    def __init__(self, pipeline, dataset, chosen, bins, seed, name):
        self.pipeline, self.dataset, self.chosen, self.bins, self.seed = pipeline, dataset, chosen, bins, seed
        self.name = name  # of the data
        self.network = pipeline.network()  # compiled, if the pipeline is to be
        self.interval = pipeline.transport.ode_interval

    def losses(self, indices):
        """|v_hat - v|^2 of points, a mean over dimensions, float64 (n,)."""
        pipe, device, shape = self.pipeline, self.pipeline.device, self.pipeline.latent_shape
        whose = sorted({i // self.bins for i in indices})
        images, labels = self.dataset.batch([self.chosen[j] for j in whose])  # each is encoded once for its points
        streams = [generator("cpu", self.seed, "velocity loss of image", j) for j in whose]
        posterior = torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device)
        flip = torch.zeros(len(whose), dtype=torch.bool, device=device)
        rows = torch.tensor([whose.index(i // self.bins) for i in indices])
        x1 = to_latents(pipe.autoencoder, images.to(device), flip, posterior)[rows.to(device)]
        streams = [generator("cpu", self.seed, "velocity loss", i) for i in indices]
        noise = torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device)
        u = torch.cat([(i % self.bins + torch.rand(1, generator=g)) / self.bins for i, g in zip(indices, streams)])
        t0, t1 = self.interval
        t, x, velocity = pipe.transport.path_sampler.plan((t0 + (t1 - t0) * u).to(device), noise, x1)
        found = pipe.transport.predict_velocity(self.network, x, t, dict(y=labels[rows].to(device)))
        return (found - velocity).flatten(1).square().mean(1).double().cpu()


@torch.no_grad()
def measure(points, world):
    """VelocityLoss of all points, on every process; each does its chunks of them."""
    pipe, bins, count, found = points.pipeline, points.bins, points.bins * len(points.chosen), {}
    set_precision(pipe.precision, pipe.device)
    chunks = range(world.rank, -(-count // CHUNK), world.size)
    for chunk in tqdm(chunks, desc="loss by time", unit="chunk", disable=None if world.is_main else True):
        found[chunk] = points.losses(range(chunk * CHUNK, min(count, (chunk + 1) * CHUNK))).tolist()
    together = {chunk: losses for part in world.gather(found) for chunk, losses in part.items()}
    losses = [loss for chunk in sorted(together) for loss in together[chunk]]
    if not all(map(math.isfinite, losses)):
        raise UserError(f"--ckpt {pipe.path}: its losses are not finite numbers; its weights may be damaged")
    by_bin = [torch.tensor(losses[i::bins], dtype=torch.float64) for i in range(bins)]
    errors = [(each.std() / len(each) ** 0.5).item() for each in by_bin]
    means = [each.mean().item() for each in by_bin]
    made_from = dict(data=points.name, images=len(points.chosen), seed=points.seed, precision=pipe.precision)
    return VelocityLoss(*points.interval, means, errors, subject(pipe), made_from)
