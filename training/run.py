"""What a training run is: all that the loop, the log and the dry run need to know of it."""

import math
from argparse import Namespace
from dataclasses import dataclass

import torch

from common import distributed
from common.atomic import writable_folder
from common.checkpoint import file_hash, load_checkpoint, weights_of
from common.dialects import open_checkpoint
from common.errors import UsageError, as_usage_error, told_as
from common.precision import set_precision
from common.recipe import Recipe, flags_in, recipe_of
from common.sharded import is_sharded, open_sharded, verify
from common.sizes import latent_shape
from data.autoencoder import image_channels, load_autoencoder
from data.images import ImageData
from data.parts import split
from data.sources import open_dataset
from download import locate
from inference.pipeline import Pipeline
from models import model_config
from transport import Transport

from .identity import check_data, check_meaning, differences, refuse_differences, unknown
from .run_folder import RunFolder
from .transfer import open_init


@dataclass
class Run:
    """A run as its flags and its data make it, on this process; folder and start come with begin_run."""

    flags: Namespace
    world: distributed.World
    precision: str
    dataset: ImageData
    autoencoder: object
    transport: Transport
    recipe: Recipe  # what its checkpoints will say of themselves
    total_steps: int
    held_out: ImageData = None  # for validation
    folder: RunFolder = None
    path: object = None  # checkpoint to start from, and its content; None: from scratch
    content: dict = None
    init: object = None  # file whose weights it begins with, where it begins anew, and its content, once read
    begun: dict = None

    @property
    def device(self):
        return self.world.device

    @property
    def batch(self):
        """Images of a step on this process."""
        return self.flags.global_batch_size // self.world.size

    @property
    def micro(self):
        """Images that are done at once."""
        return self.batch // self.flags.grad_accum_steps

    def pipeline(self, model):
        """A Pipeline of weights in training, for pictures and evaluations."""
        parts = (self.recipe, model, self.transport, self.autoencoder, self.device, self.precision)
        return Pipeline(self.folder.path, *parts)


def check_world(flags, world):
    """Raises UsageError for what the flags cannot know of the number of processes."""
    parts = world.size * flags.grad_accum_steps
    if flags.global_batch_size % parts:
        by = f"{world.size} processes" + (f" x {flags.grad_accum_steps} parts" if flags.grad_accum_steps > 1 else "")
        raise UsageError(f"--global-batch-size {flags.global_batch_size} does not divide by {by}")
    if flags.shard_size and world.size % flags.shard_size:
        raise UsageError(f"--shard-size {flags.shard_size} does not divide {world.size} processes")
    if flags.eval_samples < 4:
        raise UsageError(f"--eval-samples {flags.eval_samples}: the metrics need 4 or more")


def plan_run(flags, transport_settings):
    """The run of these flags, before anything is written. Raises UserError or UsageError naming a flag."""
    with as_usage_error():
        config = model_config(flags.model)
    world = distributed.setup()
    flags.precision = precision = set_precision(flags.precision, world.device)
    flags.identity["precision"] = set_precision(None, world.device)
    set_precision(precision, world.device)
    check_world(flags, world)
    with as_usage_error():
        checked = Transport(transport_settings)
        _ = checked.train_interval, checked.ode_interval  # of the pictures drawn while training too
    dataset, held_out = open_data(flags, world)
    autoencoder = world.main_first(lambda: load_autoencoder(flags.vae, flags.channels)).to(world.device)
    dataset.check(flags.image_size, autoencoder)
    if held_out is not None:
        with told_as("--val-path", "--data-path"):
            held_out.check(flags.image_size, autoencoder)
    shape = channels, height, width = latent_shape(flags.image_size, autoencoder, config["patch_size"])
    model_args = config | dict(
        input_size=height if height == width else (height, width),
        in_channels=channels,
        class_dropout_prob=flags.class_dropout_prob,
        num_classes=flags.num_classes,
        learn_sigma=False,  # published weights have it and never use it
    )
    transport_settings = transport_settings.fitted(math.prod(shape))
    transport = Transport(transport_settings)
    names = dict(vae=flags.vae, vae_hash=autoencoder.config_hash, classes=list(dataset.classes))
    recipe = Recipe(flags.model, model_args, flags.image_size, transport=transport_settings, **names)
    total_steps = max(1, flags.epochs * len(dataset) // flags.global_batch_size)
    total_steps = min(total_steps, flags.max_steps or total_steps)
    init = world.main_first(lambda: locate(flags.init, "--init")) if flags.init else None
    with told_as(f"--init {init}", str(init)):
        flags.init_sha256 = world.from_main(lambda: file_hash(init)) if flags.init else None
    flags.identity["init_sha256"] = None  # wherever the file is
    return Run(flags, world, precision, dataset, autoencoder, transport, recipe, total_steps, held_out, init=init)


def open_data(flags, world):
    """(data to train on, held-out data or None), of which every process has the same. --num-classes becomes the data's, and
    --channels the autoencoder's, where they were not given; UsageError is raised where they differ."""
    channels = (flags.channels or 3) if flags.vae == "none" else image_channels(flags.vae)
    if flags.channels not in (None, channels):
        raise UsageError(f"--channels {flags.channels} contradicts --vae {flags.vae}, whose images have {channels}")
    flags.channels, flags.identity["channels"] = channels, 3  # what runs of before had

    def opened(path, flag):  # a million files are listed once
        with told_as(flag, "--data-path"):
            return world.from_main(lambda: open_dataset(path, flags.image_size, flags.channels))

    dataset = opened(flags.data_path, "--data-path")
    count = len(dataset.classes) or 1
    if flags.num_classes not in (None, count):
        found = f"{count} classes" if dataset.classes else "images without classes, which is to say one"
        raise UsageError(f"--num-classes {flags.num_classes}: {flags.data_path} has {found}")
    flags.num_classes = count
    if flags.val_fraction:
        return split(dataset, flags.val_fraction)
    if not flags.val_path:
        return dataset, None
    held_out = opened(flags.val_path, "--val-path")
    ours, theirs = list(dataset.classes), list(held_out.classes)
    numbers = list(map(str, range(len(ours))))  # the names of classes that have none
    if ours != theirs and (len(ours) != len(theirs) or numbers not in (ours, theirs)):
        raise UsageError(f"--val-path {flags.val_path}: its classes are not those of {flags.data_path}")
    return dataset, held_out


def open_start(path, kind=None):
    """The content of a checkpoint to begin from, of any kind where one is given; a sharded one's tensors hold no data yet."""
    if is_sharded(path):
        return open_sharded(path)
    return open_checkpoint(path, kind) if kind else load_checkpoint(path)


def find_start(flags, name, warn):
    """(run folder or None for a new one, checkpoint path or None, its content or None) to begin from.

    Raises UsageError, naming each difference, rather than starting anew beside a run that other flags left unfinished.
    """
    if flags.ckpt:
        path = locate(flags.ckpt)
        if is_sharded(path):
            if flags.kind not in ("auto", "sit"):
                raise UsageError(f"--kind {flags.kind}: {path} was written by train.py --ckpt-format sharded, so it is sit")
            verify(path)
        content = open_start(path, flags.kind)
        ours = {"args", "recipe"} <= content.keys() and "translated" not in content
        flags.init_sha256 = flags_in(content).get("init_sha256")  # what it once began with
        refuse_differences(differences(flags, content.get("args") or {}, whole=ours), f"--ckpt {path}")
        return None, path, content
    runs = RunFolder.find(flags.results_dir, name) if flags.resume else []
    different = {}
    for folder in runs:
        if (recorded := folder.flags()) is not None:
            different[folder] = ", ".join(filter(None, [differences(flags, recorded), unknown(flags, recorded)]))
            if not different[folder]:
                writable_folder(folder.path, "--results-dir")
                return folder, *folder.newest_checkpoint(warn)
    for folder, words in different.items():
        if not folder.is_finished():
            refuse_differences(words, f"--resume: the run {folder.path}")
    return None, None, None


def begin_run(run):
    """Choose or make the run's folder, and load the checkpoint that it starts from; returns warnings for the log."""
    flags, world, warnings = run.flags, run.world, []
    name = f"{flags.model.replace('/', '-')}-{flags.path_type}-{flags.prediction}-{flags.loss_weight}"

    def start():
        folder, path, run.content = find_start(flags, name, warnings.append)
        if run.init and not path:
            run.begun = open_init(run.init, flags.kind, run.recipe)
        return folder or RunFolder.new(flags.results_dir, name), path

    run.folder, run.path = world.from_main(start)
    if run.path and not world.is_main:
        run.content = open_start(locate(flags.ckpt), flags.kind) if flags.ckpt else open_start(run.path)
    if run.content:
        found = recipe_of(run.content, weights_of(run.content, run.path), run.path, flags.model)
        check_data(run.dataset, found, run.content.get("num_images"), run.path)
        check_meaning(found, run.recipe, run.path)
        warnings += filter(None, [run.content.get("translated")])
        run.recipe.model_args["learn_sigma"] = found.model_args["learn_sigma"]
    return warnings


def backbone_on_paper(recipe):
    """The run's network without data, for costs.py."""
    with torch.device("meta"):
        return recipe.build()
