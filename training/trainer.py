"""The state of a run in this process, and its step."""

import contextlib

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.checkpoint import weights_of
from common.flags import flags_of
from common.signals import Stop
from common.unreadable import DataGuard
from data.images import to_latents
from data.loader import read_ahead
from data.order import StepSampler

from .draws import draw_step
from .ema import Averages
from .guards import NumberGuard
from .objective import make_objective
from .optimizer import learning_rate, load_optimizer, make_optimizer, step_of
from .parallel import parallel_of
from .tensors import host_copy, host_shards, load_shards, whole
from .transfer import open_init, take_over

CONTENT = ("args", "optimizer", "step", "num_images", "recipe")  # of a checkpoint, beside the states


def compile_blocks(model):
    """torch.compile a backbone block by block, in place; one that has no blocks as a whole.

    The blocks share one graph, which takes a fraction of the time to compile. Gradients of a block are ready, and on their
    way to the other processes, while the ones before it are still computed, so DDP need not cut the graph at the borders
    of its buckets. Nor do shards, which are gathered and reduced outside of a block's graph.
    """
    torch._dynamo.config.optimize_ddp = False
    for part in getattr(model, "blocks", None) or [model]:
        part.compile()


class Trainer:
    """Model, averages, optimizer and data of a Run, from where it starts; take_step trains on one batch.

    states has what a checkpoint holds, by name: model and whatever else the objective has, the averages, and opt.
    """

    def __init__(self, run, monitor):
        self.run, self.stop, self.step = run, Stop(), 0
        self.message = lambda: 0  # of the processes' signals: none is under way
        torch.manual_seed(run.flags.global_seed)  # the same initial weights on every process
        self.parallel = parallel_of(run.flags, run.world, run.precision)
        model = self._first_weights(monitor.log)
        copy = lambda model: self.parallel.copy(model, run.recipe)  # noqa: E731
        self.averages = Averages(model, run.flags.ema_decay, run.flags.ema_power, copy)
        model.grad_checkpointing = run.flags.grad_checkpointing
        self.objective = self.parallel.place(make_objective(model, run.transport, run.flags))
        self.optimizer = make_optimizer(self.objective, run.flags)
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.trained = [p for p in self.objective.parameters() if p.requires_grad]
        own, others = self.objective.states(), {**self.averages.models, "opt": self.optimizer}
        if taken := own.keys() & (others.keys() | set(CONTENT)):
            raise ValueError(
                f"an objective's module cannot be called {min(taken)}: checkpoints have another thing of that name"
            )
        self.states = own | others
        if run.content:
            self._continue(monitor.log)
        self.mirrors = run.dataset.mirrors and not run.flags.no_flip
        self.numbers = NumberGuard(self.optimizer, run.flags.skip_nonfinite, run.device)
        self.images = DataGuard(run.dataset, monitor.warn)

    @property
    def ema(self):
        """The average to sample from."""
        return self.averages.models["ema"]

    @property
    def is_complete(self):
        return self.step >= self.run.total_steps

    @property
    def is_snapshot_due(self):
        """Whether the averages by a power of time are to be kept as they are at this step."""
        flags = self.run.flags
        every = flags.ema_snapshot_every or flags.ckpt_every
        return bool(flags.ema_power) and self.step > 0 and (self.step % every == 0 or self.is_complete)

    def _first_weights(self, log):
        """The model of the checkpoint that the run starts from, of which published files have an EMA alone, or a new one."""
        run, path = self.run, self.run.path
        if run.content:
            content = run.content = self.parallel.read(run.content, path)
            weights = weights_of(content, path, "model" if "model" in content else None)
            return self.parallel.build_with(run.recipe, weights, path)
        model = self.parallel.build(run.recipe, log)
        if run.init:
            begun = run.begun or open_init(run.init, run.flags.kind, run.recipe)
            take_over(model, run.recipe, begun, run.init, log)
            run.begun = None  # its memory
        return model

    def _continue(self, log):
        """Load each state from the checkpoint's; what it lacks starts from its weights, or anew, as the log says."""
        content, path = self.run.content, self.run.path
        weights = weights_of(content, path)
        for name, state in self.states.items():
            if name == "opt":
                if "opt" in content:
                    load_optimizer(self.optimizer, content, self.objective, path)
            elif name in content or name == "model" or name in self.averages.models:
                there = isinstance(content.get(name), dict)
                own = name == "model" or name in self.averages.models  # of the backbone, with other code's prefixes or wrappers
                found = (weights_of(content, path, name) if there else weights) if own else content[name]
                load_shards(state, found, path)
                if name in self.averages.gammas and name not in content:
                    log(f"{path} has no {name}: it starts from the weights that are sampled from, as if all steps had had them")
            else:
                log(f"{path} has no state {name!r}: it starts anew")
        self.step = step_of(content, path) if "opt" in content else 0
        self.run.content = None  # its memory

    def prepare(self):
        """Compile the model, and connect it to those of the other processes."""
        run = self.run
        if run.flags.compile:
            compile_blocks(self.objective.model)
        self.forward = self.parallel.connect(self.objective.train())

    @contextlib.contextmanager
    def reading(self):
        """Batches, and the model prepared for steps on them; the loader's processes live as long as the block."""
        run, flags = self.run, self.run.flags
        ends, share = (self.step, run.total_steps), (run.world.rank, run.world.size)
        self.order = StepSampler(len(run.dataset), flags.global_batch_size, flags.global_seed, *ends, *share)
        with read_ahead(run.dataset, self.order, flags.num_workers, run.device) as self.batches:  # of one endless epoch
            self.prepare()  # with the loader's processes there already: NCCL's threads and memory are not to be forked
            yield

    def signal(self):
        """The signal that a process had received before the last step, or 0: the processes' message travels during a step.
        One that is alone knows at once."""
        if not self.run.world.distributed:
            return self.stop.received
        heard, self.message = self.message(), self.run.world.max_later(self.stop.received)
        return heard

    def next_batch(self):
        """This process's images, or moments, and labels of the next step, on the device."""
        self.step += 1
        images, labels, read = next(self.batches)
        self.images.check(self.order.indices_of(self.step), read)
        return images.to(self.run.device, non_blocking=True), labels.to(self.run.device, non_blocking=True)

    def take_step(self, images, labels):
        """Train on a batch. Returns (losses by name, gradient norm, 1.0 for a good step), scalars on the device."""
        run, flags = self.run, self.run.flags
        draws = draw_step(flags.global_seed, self.step, flags.global_batch_size, run.recipe.latent_shape, run.device)
        draws = draws.part(slice(run.world.rank * run.batch, (run.world.rank + 1) * run.batch))
        self.optimizer.zero_grad()
        sums = {}
        for first in range(0, run.batch, run.micro):
            part = slice(first, first + run.micro)
            losses = self._forward_backward(images[part], labels[part], draws.part(part), first + run.micro < run.batch)
            for name, loss in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=run.device)) + loss.detach()
        norm = whole(get_total_norm([p.grad for p in self.trained if p.grad is not None]))
        if flags.grad_clip:
            clip_grads_with_norm_(self.trained, flags.grad_clip, norm)
        good = self.numbers.watch(self.step, sums["loss"], norm)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs):
            group["lr"] = learning_rate(self.step - 1, peak, flags, run.total_steps)
        if self.numbers.may_step():
            self.optimizer.step()
        self.averages.update(self.step, self.numbers.bad.float())
        return sums, norm, good

    def on_host(self, content, sharded):
        """A content in host memory of its own: whole on the main process, with nothing on the others, or sharded, where each
        has what it holds. Every process must call it."""
        if sharded:
            return host_shards(content, self.parallel.host_mesh)
        return host_copy(content, keep=self.run.world.is_main)

    def together(self, model):
        """A context with a network to ask in the place of a model of this trainer, which may be sharded: each process as
        often as it likes. Every process must enter it."""
        return self.parallel.together(model, self.run.recipe.latent_shape)

    def _forward_backward(self, images, labels, draws, more):
        """Losses of a part of the batch, each over the number of parts. more: gradients do not meet yet, as they do once a
        step, after the last part."""
        run = self.run
        x1 = to_latents(run.autoencoder, images, draws.flip & self.mirrors, draws.posterior)
        with self.parallel.accumulating(self.forward) if more else contextlib.nullcontext():
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                losses = self.forward(x1, labels, draws)
            losses = {name: loss.mean() / run.flags.grad_accum_steps for name, loss in losses.items()}
            losses["loss"].backward()
        return losses

    @property
    def lr(self):
        return self.optimizer.param_groups[0]["lr"]

    def check(self, log):
        """Raises UserError where numbers or images were too bad. Every process must call it."""
        self.numbers.check(self.run.world, self.order.indices_of, log)

    def content(self):
        """What a checkpoint holds. "args" are as published, "recipe" is all that sampling needs."""
        return {name: state.state_dict() for name, state in self.states.items()} | {
            "args": flags_of(self.run.flags),
            "optimizer": type(self.optimizer).__name__,
            "step": self.step,
            "num_images": len(self.run.dataset),
            "recipe": self.run.recipe.to_dict(),
        }

    def snapshot(self):
        """What a snapshot holds, for training/reconstruction.py: sampled from by --weights as a checkpoint is."""
        about = dict(step=self.step, recipe=self.run.recipe.to_dict(), args=flags_of(self.run.flags))
        return about | self.averages.by_power()
