"""Sample pictures from a checkpoint, encode images, or read their likelihood.

python sample.py ODE --ckpt results/000-.../checkpoints/0050000.pt
python sample.py SDE --ckpt ... --class-labels 207 360 --num-samples-per-class 4
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

import distributed
from costs import synchronize
from data import LabelledImages, spread, to_pixels
from errors import UsageError
from likelihood import log_likelihood
from sampling import load_pipeline, sampler_from
from streams import SampleStreams
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
)

IMAGENET_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # golden retriever, otter, ... as in the published picture


def make_parser():
    parser = Parser(prog="sample.py", description="Sample from a SiT by its ODE or its SDE.")
    modes = parser.add_subparsers(dest="mode", required=True, metavar="ODE|SDE", help="sample.py ODE --help lists its flags")
    for mode, title in (("ODE", "sample by the probability flow"), ("SDE", "sample by the reverse SDE")):
        sub = modes.add_parser(mode, help=title, description=f"sample.py {mode}: {title}.")
        parse_model_args(sub, vae="mse")
        group = sub.add_argument_group("sampling")
        group.add_argument("--num-sampling-steps", type=positive_int, default=250, help="points in time of a fixed solver")
        group.add_argument("--class-labels", type=int, nargs="+", metavar="ID", help="classes to draw (eight, or all up to 16)")
        group.add_argument("--num-samples-per-class", type=positive_int, default=1, help="pictures of each class")
        group.add_argument("--seed", type=int, default=0, help="noise of picture i depends on it and on i alone")
        group.add_argument("--out", default="sample.png", help="file for the picture")
        group.add_argument("--trajectory", metavar="FILE.gif", help="also draw the way from noise to image")
        parse_speed_args(sub)
        parse_guidance_args(sub, cfg_scale=4.0)
        parse_transport_args(sub)
        if mode == "ODE":
            parse_ode_args(sub)
            parse_likelihood_args(sub, num_images=16)
        else:
            parse_sde_args(sub)
    return parser


def save_picture(images, path, columns):
    """uint8 images (N, H, W, 3) as one PNG."""
    grid = make_grid(images.permute(0, 3, 1, 2), nrow=columns, padding=2, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def save_gif(frames, path, columns, seconds=3.0):
    """Frames, each uint8 images (N, H, W, 3), as a GIF that ends with a pause."""
    grids = [make_grid(f.permute(0, 3, 1, 2), nrow=columns, padding=2, pad_value=255).permute(1, 2, 0) for f in frames]
    pictures = [Image.fromarray(grid.numpy()) for grid in grids]
    each = int(1000 * seconds / len(pictures))
    durations = [each] * (len(pictures) - 1) + [1500]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def labels_from(args, recipe):
    labels = args.class_labels
    if labels is None:
        labels = IMAGENET_CLASSES if recipe.num_classes == 1000 else range(min(recipe.num_classes, 16))
    wrong = [label for label in labels if not 0 <= label < recipe.num_classes]
    if wrong:
        raise UsageError(f"--class-labels {wrong[0]}: this model knows the classes 0 to {recipe.num_classes - 1}")
    return torch.tensor([label for label in labels for _ in range(args.num_samples_per_class)])


def generate(args, pipeline):
    """Draw samples and save their picture."""
    labels = labels_from(args, pipeline.recipe)
    network, device = pipeline.model, pipeline.device
    streams = SampleStreams(args.seed, range(len(labels)))
    z = streams.randn(pipeline.latent_shape, device)
    sample = sampler_from(args, pipeline.transport, network.edges, streams.randn_like, trajectory=bool(args.trajectory))
    started = time.time()
    states = sample(z, network, y=labels.to(device))
    synchronize(device)
    seconds = time.time() - started
    columns = args.num_samples_per_class if args.num_samples_per_class > 1 else min(4, len(labels))
    save_picture(pipeline.decode(states[-1]).cpu(), args.out, columns)
    print(f"{args.out}: {len(labels)} samples, {network.calls} network calls, {seconds:.1f} s")
    if args.trajectory:
        picked = sorted({round(i) for i in np.linspace(0, len(states) - 1, 40)})
        save_gif([pipeline.decode(states[i]).cpu() for i in picked], args.trajectory, columns)
        print(f"{args.trajectory}: {len(picked)} of {len(states)} states")


def print_likelihood(args, pipeline, dataset, indices):
    """Bits per dimension of images, one line each."""
    streams = SampleStreams(args.seed, indices)
    nats, bits = log_likelihood(pipeline, args, *dataset.batch(indices), streams)
    for i, value, each in zip(indices, bits.tolist(), nats.tolist()):
        print(f"{dataset.name(i)}: {value:.4f} bits/dim ({each:.2f} nats)")
    where = "pixels" if pipeline.autoencoder.name == "none" else "latents (not comparable between autoencoders)"
    print(f"mean {bits.mean():.4f} bits/dim of {math.prod(pipeline.latent_shape)} dimensions in {where}")


def encode(args, pipeline, dataset, indices):
    """Run the ODE from images to noise and back: save the encodings, and a picture of both ends."""
    network, device = pipeline.model, pipeline.device
    images, labels = dataset.batch(indices)
    mean, _ = pipeline.autoencoder.moments(to_pixels(images.to(device)))
    x, y = pipeline.autoencoder.latents(mean, 0, 0), labels.to(device)
    z = sampler_from(args, pipeline.transport, network.edges, reverse=True)(x, network, y=y)[-1]
    back = sampler_from(args, pipeline.transport, network.edges)(z, network, y=y)[-1]
    file = Path(args.out).with_suffix(".npz")
    np.savez(file, z=z.cpu().numpy(), labels=labels.numpy(), names=np.array([dataset.name(i) for i in indices]))
    pairs = torch.stack([images.permute(0, 2, 3, 1), pipeline.decode(back).cpu()], 1).flatten(0, 1)
    save_picture(pairs, args.out, columns=8)
    error = (back - x).square().mean().sqrt().item()
    print(f"{file}: encodings z {tuple(z.shape)}, mean {z.mean():.3f}, std {z.std():.3f}")
    print(f"{args.out}: each image beside its way to noise and back, which changed the latents by {error:.1e} (rms)")


def main(args):
    check_likelihood_args(args)
    for flag in ({"class_labels", "num_samples_per_class", "trajectory"} & args.given) if args.encodes else ():
        raise UsageError(f"--{flag.replace('_', '-')} does not go with --reverse or --likelihood")
    device = distributed.setup().device
    for flag, path, suffixes in (("--out", args.out, (".png", ".jpg", ".webp")), ("--trajectory", args.trajectory, (".gif",))):
        if path and (Path(path).suffix.lower() not in suffixes or Path(path).is_dir()):
            raise UsageError(f"{flag} {path}: give a file name that ends in {' or '.join(suffixes)}")
        if path:
            writable_folder(Path(path).parent, flag)
    pipeline = load_pipeline(args, device, set_precision(args.precision, device))
    if not args.encodes:
        generate(args, pipeline)
        return 0
    dataset = LabelledImages(args.data_path, pipeline.recipe)
    indices = spread(len(dataset), args.num_images)
    started = time.time()
    if args.likelihood:
        print_likelihood(args, pipeline, dataset, indices)
    else:
        encode(args, pipeline, dataset, indices)
    print(f"{len(indices)} images, {pipeline.model.calls} network calls, {time.time() - started:.1f} s")
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "sample.py")
