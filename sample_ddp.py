"""Many samples from many processes: PNGs and one .npz for an FID, or the likelihood of a data set.

    torchrun --nproc_per_node=8 sample_ddp.py SDE --ckpt ... --num-fid-samples 50000
    python sample_ddp.py ODE --likelihood --data-path builtin:digits --ckpt ...

Image i depends on (--global-seed, i) alone, and work is cut into chunks of --per-proc-batch-size by index, so that any
number of processes makes the same .npz, bit for bit. Killed and started again, it makes only the chunks that are missing.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import distributed
from atomic import write_json
from chunks import ChunkStore, write_npz, written_behind
from data import LabelledImages, spread
from download import locate
from errors import UsageError
from likelihood import finish_likelihood, log_likelihood
from presets import PRESETS, apply_preset
from records import identity_of, machine_of, run_name
from sampling import load_pipeline, sampler_from
from streams import SampleStreams, generator
from train_utils import (
    Parser,
    check_likelihood_args,
    parse_guidance_args,
    parse_likelihood_args,
    parse_model_args,
    parse_ode_args,
    parse_sde_args,
    parse_speed_args,
    parse_transport_args,
    positive_int,
    run,
    set_precision,
    writable_folder,
    writing,
)


def make_parser():
    parser = Parser(prog="sample_ddp.py", description="Many samples, or the likelihood of a data set, under torchrun or alone.")
    modes = parser.add_subparsers(
        dest="mode", required=True, metavar="ODE|SDE", help="sample_ddp.py ODE --help lists its flags"
    )
    for mode, title in (("ODE", "sample by the probability flow"), ("SDE", "sample by the reverse SDE")):
        sub = modes.add_parser(mode, help=title, description=f"sample_ddp.py {mode}: {title}.")
        parse_model_args(sub, vae="ema")
        group = sub.add_argument_group("sampling")
        group.add_argument("--preset", choices=PRESETS, help="the paper's settings for flags that are left out (presets.py)")
        group.add_argument("--num-sampling-steps", type=positive_int, default=250, help="points in time of a fixed solver")
        group.add_argument("--num-fid-samples", type=positive_int, default=50_000, help="how many samples")
        group.add_argument("--per-proc-batch-size", type=positive_int, default=4, help="samples a chunk")
        group.add_argument("--global-seed", type=int, default=0, help="sample i depends on it and on i alone")
        group.add_argument("--labels", default="random", choices=["random", "balanced"], help="how labels are drawn")
        group.add_argument("--class-labels", type=int, nargs="+", metavar="ID", help="sample i gets label i mod their number")
        group.add_argument("--sample-dir", default="samples", help="where the folder, .npz and .json go")
        group.add_argument("--no-png", action="store_true", help="only the .npz")
        group.add_argument(
            "--tf32", default=True, action=argparse.BooleanOptionalAction, help="on GPUs, unless --precision says"
        )
        parse_speed_args(sub)
        parse_guidance_args(sub, cfg_scale=1.0)
        parse_transport_args(sub)
        if mode == "ODE":
            parse_ode_args(sub)
            parse_likelihood_args(sub, num_images=None)
        else:
            parse_sde_args(sub)
    return parser


def label_of(args, num_classes, index):
    """Class of sample index: a function of the seed and the index alone."""
    if args.class_labels:
        return args.class_labels[index % len(args.class_labels)]
    if args.labels == "random":
        return int(torch.randint(num_classes, (), generator=generator("cpu", args.global_seed, "label", index)))
    block, place = divmod(index, num_classes)  # each run of num_classes samples has every class once, shuffled
    return int(torch.randperm(num_classes, generator=generator("cpu", args.global_seed, "balanced", block))[place])


def draw_chunk(args, pipeline, indices):
    """Samples of these indices: dict of arrays for the chunk's file, of which the images are still on the device."""
    labels = torch.tensor([label_of(args, pipeline.recipe.num_classes, i) for i in indices])
    streams, steps = SampleStreams(args.global_seed, indices), []
    network, device = pipeline.model, pipeline.device
    calls = network.calls
    sample = sampler_from(args, pipeline.transport, network.edges, streams.randn_like, on_step=lambda: steps.append(1))
    latents = sample(streams.randn(pipeline.latent_shape, device), network, y=labels.to(device))[-1]
    return dict(images=pipeline.decode(latents), labels=labels.numpy(), calls=network.calls - calls, steps=len(steps))


def score_chunk(args, pipeline, dataset, indices):
    """Likelihoods of these images: dict of arrays for the chunk's file."""
    calls = pipeline.model.calls
    images, labels = dataset.batch(indices)
    nats, bits = log_likelihood(pipeline, args, images, labels, SampleStreams(args.global_seed, indices))
    return dict(nats=nats.numpy(), bits=bits.numpy(), labels=labels.numpy(), calls=pipeline.model.calls - calls)


def keep_chunk(store, chunk, arrays, png_folder):
    """Write a chunk's file and pictures: in a thread, so that the device draws the next chunk meanwhile."""
    if "images" in arrays:
        arrays["images"] = arrays["images"].cpu().numpy()
    with writing(store.folder, "--sample-dir"):
        for index, image in zip(store.indices(chunk), arrays["images"]) if png_folder else ():
            Image.fromarray(image).save(png_folder / f"{index:06d}.png")
        store.save(chunk, **arrays)


def finish_samples(store, npz, side, expected_fid):
    """Assemble the .npz from the chunks, one at a time; returns what the .json says of it."""
    calls = [store.load(chunk, "calls", "steps") for chunk in range(store.count)]
    sizes = [len(store.indices(chunk)) for chunk in range(store.count)]
    parts = (store.load(chunk, "images")[0] for chunk in range(store.count))
    write_npz(npz, (store.total, side, side, 3), np.uint8, parts)
    return {
        "samples": store.total,
        "network_calls_per_sample": sum(int(c) * n for (c, _), n in zip(calls, sizes)) / store.total,
        "solver_steps_per_sample": sum(int(s) * n for (_, s), n in zip(calls, sizes)) / store.total or None,
        "expected_fid_50k": expected_fid,
    }


def report(summary, result, done):
    """The lines that a user came for."""
    if "bits_per_dim" in summary:
        for what in ("bits_per_dim", "nats"):
            error = summary[f"{what}_standard_error"]
            print(f"{what.replace('_', ' ')}: {summary[what]:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
        calls = summary["network_calls_per_image"]
    else:
        calls = summary["network_calls_per_sample"]
    print(f"{result}{' was complete already' if done else ''}: {calls:g} network calls an image", end=", ")
    print(f"{summary['wall_seconds']:.1f} s, {summary['images_per_second']:.2f} images/s")
    if summary.get("expected_fid_50k"):
        print(f"the paper's FID-50K with these settings: {summary['expected_fid_50k']}")


def main(args):
    expected_fid = apply_preset(args) if args.preset else None
    check_likelihood_args(args)
    if args.mode == "ODE" and args.reverse:
        raise UsageError("--reverse encodes images to look at: use sample.py; here --likelihood is the task of --data-path")
    if args.encodes:
        for flag in {"class_labels", "labels", "num_fid_samples", "preset", "no_png"} & args.given:
            raise UsageError(f"--{flag.replace('_', '-')} does not go with --likelihood")
    if {"precision", "tf32"} <= args.given and (args.precision == "tf32") != args.tf32:
        raise UsageError(f"--precision {args.precision} and --{'' if args.tf32 else 'no-'}tf32: give one of them")
    world = distributed.setup(timeout_hours=24)  # a slow process may end long after the others
    precision = set_precision(args.precision, world.device, args.tf32)
    pipeline = world.main_first(lambda: load_pipeline(args, world.device, precision))
    wrong = [label for label in args.class_labels or () if not 0 <= label < pipeline.recipe.num_classes]
    if wrong:
        raise UsageError(f"--class-labels {wrong[0]}: this model knows the classes 0 to {pipeline.recipe.num_classes - 1}")
    args.precision = precision

    paths = {"model": pipeline.path} | ({"guidance": locate(args.guidance_ckpt)} if args.guidance_ckpt else {})
    identity = world.broadcast(identity_of(args, pipeline, paths) if world.is_main else None)
    if args.encodes:
        dataset = LabelledImages(args.data_path, pipeline.recipe)
        indices = spread(len(dataset), args.num_images)
        names = repr([dataset.name(i) for i in indices])
        identity["data"] = {"path": args.data_path, "names_sha256": hashlib.sha256(names.encode()).hexdigest()}
        total = len(indices)
    else:
        total = args.num_fid_samples
    name = run_name(args, pipeline, identity)
    folder = Path(args.sample_dir)
    result = folder / f"{name}.csv" if args.encodes else folder / f"{name}.npz"
    settings_file = folder / f"{name}.json"
    png_folder = None if args.no_png or args.encodes else folder / name
    store = ChunkStore(folder / f"{name}.chunks", total, args.per_proc_batch_size)
    if world.is_main:
        for path in (folder, store.folder, *([png_folder] if png_folder else [])):
            writable_folder(path, "--sample-dir")
    done = world.broadcast(settings_file.exists() and result.exists())
    missing = world.broadcast(store.missing() if not done else [])

    started = time.time()
    own = missing[world.rank :: world.size]
    made = sum(len(store.indices(chunk)) for chunk in missing)
    progress = tqdm(total=sum(len(store.indices(c)) for c in own), disable=None if world.is_main else True, unit="image")
    with written_behind() as write:
        for chunk in own:
            if args.encodes:
                arrays = score_chunk(args, pipeline, dataset, [indices[i] for i in store.indices(chunk)])
            else:
                arrays = draw_chunk(args, pipeline, store.indices(chunk))
            write(keep_chunk, store, chunk, arrays, png_folder)
            progress.update(len(store.indices(chunk)))
    progress.close()
    world.barrier()
    if world.is_main:
        if not done:
            with writing(folder, "--sample-dir"):
                if args.encodes:
                    summary = finish_likelihood(store, result, dataset, indices)
                else:
                    summary = finish_samples(store, result, pipeline.recipe.image_size, expected_fid)
                seconds = time.time() - started
                speed = {"made_in_this_run": made, "wall_seconds": seconds, "images_per_second": made / seconds}
                write_json(settings_file, {"command": sys.argv} | summary | identity | speed | machine_of(world))
        if store.folder.is_dir():
            store.remove()
        report(json.loads(settings_file.read_text()), result, done)
    distributed.cleanup()
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "sample_ddp.py")
