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
from data import load_labelled_images, to_pixels
from errors import UsageError
from likelihood import bits_per_dim
from sampling import load_pipeline, sampler_from
from streams import SampleStreams
from train_utils import (
    Parser,
    parse_guidance_args,
    parse_model_args,
    parse_ode_args,
    parse_precision_args,
    parse_sde_args,
    parse_transport_args,
    positive_int,
    run,
    set_precision,
    writable_folder,
)
from transport import Sampler

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
        group.add_argument("--seed", type=int, default=0, help="picture i depends on it and on i alone")
        group.add_argument("--out", default="sample.png", help="file for the picture")
        group.add_argument("--trajectory", metavar="FILE.gif", help="also draw the way from noise to image")
        parse_precision_args(group)
        parse_guidance_args(sub, cfg_scale=4.0)
        parse_transport_args(sub)
        if mode == "ODE":
            parse_ode_args(sub)
            group = sub.add_argument_group("images", "for --reverse and --likelihood")
            group.add_argument("--data-path", help="folder of images, or of one sub-folder a class, or builtin:digits")
            group.add_argument("--num-images", type=positive_int, default=16, help="how many of them, spread over the set")
            group.add_argument("--num-probes", type=positive_int, default=1, help="random probes of the divergence")
            group.add_argument("--exact-divergence", action="store_true", help="no probes: one backward pass a dimension")
        else:
            parse_sde_args(sub)
    return parser


def check_args(args):
    """What argparse cannot see: flags that only make sense together."""
    args.encodes = args.mode == "ODE" and (args.reverse or args.likelihood)
    if not args.encodes:
        for flag in {"data_path", "num_images", "num_probes", "exact_divergence"} & args.given:
            raise UsageError(f"--{flag.replace('_', '-')} goes with --reverse or --likelihood")
        return
    if args.reverse and args.likelihood:
        raise UsageError("--reverse and --likelihood: give one of them")
    if not args.data_path:
        raise UsageError(f"--{'reverse' if args.reverse else 'likelihood'} needs images: give --data-path")
    for flag in {"class_labels", "num_samples_per_class", "trajectory"} & args.given:
        raise UsageError(f"--{flag.replace('_', '-')} does not go with --reverse or --likelihood")
    if args.likelihood and "cfg_scale" in args.given and args.cfg_scale != 1:
        raise UsageError("--likelihood is that of the model itself: --cfg-scale must be 1, a guided flow has no density")
    if "cfg_scale" not in args.given:
        args.cfg_scale = 1.0


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
    sample = sampler_from(args, pipeline.transport, network.edges, streams.randn_like, bool(args.trajectory))
    started = time.time()
    states = sample(z, network, y=labels.to(device))
    seconds = time.time() - started
    columns = args.num_samples_per_class if args.num_samples_per_class > 1 else min(4, len(labels))
    save_picture(pipeline.decode(states[-1]), args.out, columns)
    print(f"{args.out}: {len(labels)} samples, {network.calls} network calls, {seconds:.1f} s")
    if args.trajectory:
        picked = sorted({round(i) for i in np.linspace(0, len(states) - 1, 40)})
        save_gif([pipeline.decode(states[i]) for i in picked], args.trajectory, columns)
        print(f"{args.trajectory}: {len(picked)} of {len(states)} states")


def encode(args, pipeline):
    """Run the ODE from images to noise: their encodings, or their likelihood."""
    recipe, network, device = pipeline.recipe, pipeline.model, pipeline.device
    images, labels, names = load_labelled_images(args.data_path, recipe, args.num_images)
    streams = SampleStreams(args.seed, range(len(images)))
    pixels = to_pixels(images.to(device), torch.zeros(len(images), dtype=torch.bool, device=device))
    mean, std = pipeline.autoencoder.moments(pixels)
    x = pipeline.autoencoder.latents(mean, std, torch.zeros_like(std))  # the posterior's mean
    y = labels.to(device)
    solver = dict(sampling_method=args.sampling_method, num_steps=args.num_sampling_steps, atol=args.atol, rtol=args.rtol)
    solver["edges"] = network.edges
    sampler = Sampler(pipeline.transport)
    started = time.time()
    if args.likelihood:
        probing = dict(num_probes=args.num_probes, exact_divergence=args.exact_divergence, rademacher=streams.rademacher)
        logp, _ = sampler.sample_ode_likelihood(**solver, **probing)(x, network, y=y)
        bits = bits_per_dim(logp, pipeline.autoencoder, pipeline.latent_shape)
        for name, nats, value in zip(names, logp.tolist(), bits.tolist()):
            print(f"{name}: {value:.4f} bits/dim ({nats:.2f} nats)")
        print(f"mean {bits.mean():.4f} bits/dim of {math.prod(pipeline.latent_shape)} dimensions", end=", ")
        print("in pixels" if pipeline.autoencoder.name == "none" else "in latents: not comparable between autoencoders")
    else:
        z = sampler.sample_ode(**solver, reverse=True)(x, network, y=y)[-1]
        back = sampler.sample_ode(**solver)(z, network, y=y)[-1]
        file = Path(args.out).with_suffix(".npz")
        np.savez(file, z=z.cpu().numpy(), labels=labels.numpy(), names=np.array(names))
        pairs = torch.stack([images.permute(0, 2, 3, 1), pipeline.decode(back)], 1).flatten(0, 1)
        save_picture(pairs, args.out, columns=8)
        error = (back - x).square().mean().sqrt().item()
        print(f"{file}: encodings z {tuple(z.shape)}, mean {z.mean():.3f}, std {z.std():.3f}")
        print(f"{args.out}: each image beside its way to noise and back, which changed the latents by {error:.1e} (rms)")
    print(f"{len(images)} images, {network.calls} network calls, {time.time() - started:.1f} s")


def main(args):
    check_args(args)
    device = distributed.setup().device
    writable_folder(Path(args.out).parent, "--out")
    if args.trajectory:
        writable_folder(Path(args.trajectory).parent, "--trajectory")
    pipeline = load_pipeline(args, device, set_precision(args.precision, device))
    encode(args, pipeline) if args.encodes else generate(args, pipeline)
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "sample.py")
