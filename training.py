"""The parts of a training run that are functions of the step's number, and its guards against bad numbers and bad data."""

import math
import signal
from collections import namedtuple

import torch
from torch.utils.data import Dataset

from errors import UsageError, UserError
from streams import generator
from train_utils import TRANSPORT_KEYS

# Flags that make the run what it is: it is continued only with the same.
IDENTITY = (
    "model",
    "image_size",
    "num_classes",
    "global_batch_size",
    "global_seed",
    "lr",
    "lr_schedule",
    "warmup_steps",
    "grad_clip",
    "ema_decay",
    "class_dropout_prob",
    "no_flip",
    "precision",
    "vae",
    *TRANSPORT_KEYS,
)

Draws = namedtuple("Draws", "flip posterior noise time drop")


def draw_step(seed, step, batch, shape, device):
    """All random numbers of a step, for the whole global batch: uniform flip, time and drop (batch,), normal posterior
    and noise (batch, *shape). Each process draws them all and takes its share: cheap beside the network, and the
    number of processes changes nothing."""
    g = generator(device, seed, "step", step)
    uniform = lambda: torch.rand(batch, generator=g, device=device)  # noqa: E731
    normal = lambda: torch.randn((batch, *shape), generator=g, device=device)  # noqa: E731
    return Draws(flip=uniform() < 0.5, posterior=normal(), noise=normal(), time=uniform(), drop=uniform())


def learning_rate(step, args, total_steps):
    """Linear warm-up, then constant or a cosine to 0 at the last step."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.lr_schedule == "constant":
        return args.lr
    done = (step - args.warmup_steps) / max(1, total_steps - args.warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def update_ema(ema_params, params, decay):
    """ema = decay ema + (1 - decay) params, all tensors in one call."""
    torch._foreach_lerp_(ema_params, params, 1 - decay)


def differences(args, saved):
    """What in saved flags (a dict or Namespace) contradicts args, in words; empty if the run is the same."""
    saved = saved if isinstance(saved, dict) else vars(saved)
    changed = [key for key in IDENTITY if key in saved and saved[key] != getattr(args, key)]
    return ", ".join(f"--{key.replace('_', '-')} {saved[key]} (now {getattr(args, key)})" for key in changed)


def check_data(dataset, recipe, num_images, path):
    """Class folders and the number of images must be those of the checkpoint (None: it does not say). Raises UserError."""
    if num_images is not None and num_images != len(dataset):
        raise UserError(f"--data-path: it has {len(dataset):,} images, but {path} was trained on {num_images:,}")
    if recipe.classes and recipe.classes != dataset.classes:
        new, old = set(dataset.classes), set(recipe.classes)
        example = f"{min(old - new)} is missing" if old - new else f"{min(new - old)} is new"
        raise UserError(f"--data-path: its class folders are not those of {path}: {example}")


def load_optimizer(optimizer, state, model, path):
    """Load AdamW's state, also a published one, which counts the fixed pos_embed among its parameters.

    Keeps the fused kernels, which the number guard needs. Raises UserError where the state is of another model.
    """
    try:
        (group,) = state["param_groups"]
        parameters, places = list(model.parameters()), group["params"]
        if len(places) == len(parameters):
            places = [i for i, p in enumerate(parameters) if p.requires_grad]
        moments = {new: state["state"][old] for new, old in enumerate(places) if old in state["state"]}
        # Before loading, which puts the step counts where the kernels want them: on the device, for fused ones.
        group = group | dict(params=list(range(len(places))), fused=True, foreach=None, capturable=False)
        optimizer.load_state_dict({"state": moments, "param_groups": [group]})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--ckpt {path}: its optimizer state is that of another model ({error})") from error


class Tolerant(Dataset):
    """A data set whose unreadable images are replaced by the next readable one: (image, label, index that was read)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        for tried in range(100):
            read = (index + tried) % len(self)
            try:
                return *self.dataset[read], read
            except UserError:
                continue
        raise UserError(f"100 images in a row cannot be read, the first is {self.dataset.name(index)}")


class DataGuard:
    """Warns once of each unreadable image, and stops when more than 1 % of the data are."""

    def __init__(self, dataset, warn):
        self.dataset, self.warn, self.bad = dataset, warn, set()

    def check(self, asked, read):
        """asked: indices of the batch; read: those that Tolerant gave instead (N,)."""
        for index, got in zip(asked, read.tolist()):
            if got != index and index not in self.bad:
                self.bad.add(index)
                self.warn(f"WARNING: skipped unreadable image {self.dataset.name(index)}")
                self._stop_if_many(index)

    def share(self, world):
        """Add what the other processes found. Every process must call it."""
        found = set().union(*world.gather(self.bad))
        if found - self.bad:
            self.bad = found
            self._stop_if_many(max(found))

    def _stop_if_many(self, index):
        if len(self.bad) > 0.01 * len(self.dataset):
            raise UserError(
                f"{len(self.bad)} of {len(self.dataset)} images cannot be read, more than 1 %; "
                f"one is {self.dataset.name(index)}"
            )


class NumberGuard:
    """Keeps steps with a non-finite gradient away from the weights, without waiting for the device.

    The optimizer's fused kernels read found_inf on the device and skip such a step; the host learns of it at the next
    call of check(). The gradient is the mean over processes, so all of them skip alike; the loss tells whose batch it was.
    """

    def __init__(self, optimizer, allowed, device):
        self.optimizer, self.allowed = optimizer, allowed
        self.state = torch.zeros(3, dtype=torch.int64, device=device)  # bad steps, the latest of them, was our loss bad

    def watch(self, step, loss, norm):
        """Before optimizer.step(): returns 1.0 where the step is good, else 0.0, on the device."""
        bad = ~torch.isfinite(norm)
        self.optimizer.found_inf = bad.float()
        latest = torch.stack([self.state[0] + 1, torch.full_like(self.state[0], step), (~torch.isfinite(loss)).long()])
        self.state = torch.where(bad & (self.state[0] <= self.allowed), latest, self.state)
        return 1.0 - bad.float()

    def check(self, world, indices_of, warn):
        """Raises UserError naming step, ranks and images once more steps were bad than are allowed; else warns of new ones.

        indices_of(step): this process's images at that step.
        """
        count, step, ours = self.state.tolist()
        if not count or count == getattr(self, "reported", 0):
            return
        self.reported = count
        reports = world.gather((ours, list(indices_of(step)) if ours else []))
        culprits = [f"rank {rank}, images {indices}" for rank, (bad, indices) in enumerate(reports) if bad]
        where = "; ".join(culprits) if culprits else "every rank's gradient, though each loss was finite"
        message = f"non-finite loss or gradient at step {step}: {where}"
        if count > self.allowed:
            raise UserError(f"{message}; the weights were not touched, and the newest checkpoint is good")
        warn(f"WARNING: skipped {message} ({count} of {self.allowed} such steps allowed)")


class Stop:
    """Ends a run at the next step on SIGINT, SIGTERM or SIGUSR1; a second SIGINT ends it at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received = 0
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = self.received or number


def ignore_stop_signals(worker_id):
    """In a data loading process: Ctrl-C reaches it too, but the training process decides when the end is."""
    for number in Stop.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def refuse_differences(args, saved, what):
    """Raises UsageError naming each flag of saved that args contradict."""
    different = differences(args, saved)
    if different:
        raise UsageError(f"{what} was made with {different}; give the same flags, or start anew in another --results-dir")
