"""Sample pictures from a checkpoint, encode images, or read their likelihood.

python sample.py ODE --ckpt results/000-.../checkpoints/0050000.pt
python sample.py SDE --ckpt ... --class-labels 207 360 --num-samples-per-class 4
"""

import math
import time
from pathlib import Path

from common.errors import UsageError
from sample_utils import check_likelihood_args, guidance_from, parse_modes, pipeline_from, solver_from
from train_utils import Listed, Parser, check_given, positive_int, run, seed, warn

IMAGENET_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # golden retriever, otter, ... as in the published picture


def make_parser():
    def add_own(group):
        group.add_argument("--class-labels", action=Listed, metavar="ID", help="classes to draw (eight, or all up to 16)")
        group.add_argument("--num-samples-per-class", type=positive_int, default=1, help="pictures of each class")
        group.add_argument("--seed", type=seed, default=0, help="noise of picture i depends on it and on i alone")
        group.add_argument("--out", default="sample.png", help="file for the picture")
        group.add_argument("--trajectory", metavar="FILE.gif", help="also draw the way from noise to image")

    parser = Parser(prog="sample.py", description="Sample from a SiT by its ODE or its SDE.")
    parse_modes(parser, add_own, vae="mse", cfg_scale=4.0, num_images=16)
    return parser


def labels_from(args, recipe):
    labels = args.class_labels
    if labels is None:
        labels = IMAGENET_CLASSES if recipe.num_classes == 1000 else range(min(recipe.num_classes, 16))
    return [label for label in labels for _ in range(args.num_samples_per_class)]


def generate(args, pipe, settings):
    """Draw samples and save their picture."""
    from inference.pictures import class_names, save_gif, save_picture

    labels = labels_from(args, pipe.recipe)
    pipe.check_classes(labels)
    started = time.time()
    states = pipe.draw(labels, seed=args.seed, trajectory=bool(args.trajectory), **settings)
    seconds = time.time() - started
    columns = args.num_samples_per_class if args.num_samples_per_class > 1 else min(4, len(labels))
    names = class_names(pipe.recipe, labels)
    save_picture(pipe.decode(states[-1]), args.out, columns, names)
    print(f"{args.out}: {len(labels)} samples, {pipe.calls} network calls, {seconds:.1f} s")
    if args.trajectory:
        last, frames = len(states) - 1, min(40, len(states))
        picked = sorted({round(i * last / max(1, frames - 1)) for i in range(frames)})
        save_gif([pipe.decode(states[i]) for i in picked], args.trajectory, columns, names)
        print(f"{args.trajectory}: {len(picked)} of {len(states)} states")


def print_likelihood(args, pipe, dataset, indices, settings):
    """Bits per dimension of images, one line each."""
    images, labels = dataset.batch(indices)
    probes = dict(num_probes=args.num_probes, exact_divergence=args.exact_divergence, dequantize=args.dequantize)
    draws = dict(seed=args.seed, indices=indices)
    nats, bits = pipe.likelihood(images.permute(0, 2, 3, 1), labels, **draws, **probes, **settings)
    for i, value, each in zip(indices, bits.tolist(), nats.tolist()):
        print(f"{dataset.name(i)}: {value:.4f} bits/dim ({each:.2f} nats)")
    where = "pixels" if pipe.autoencoder.name == "none" else "latents (not comparable between autoencoders)"
    print(f"mean {bits.mean():.4f} bits/dim of {math.prod(pipe.latent_shape)} dimensions in {where}")


def encode(args, pipe, dataset, indices, settings):
    """Run the ODE from images to noise and back: save the encodings, and a picture of both ends."""
    import numpy as np

    from inference.pictures import class_names, save_picture

    images, labels = dataset.batch(indices)
    images = images.permute(0, 2, 3, 1)
    z = pipe.encode(images, labels, **settings)
    back = pipe.draw(labels, noise=z, **settings)[-1]
    file = Path(args.out).with_suffix(".npz")
    np.savez(file, z=z.cpu().numpy(), labels=labels.numpy(), names=np.array([dataset.name(i) for i in indices]))
    pairs = np.stack([images.numpy(), pipe.decode(back)], 1)
    names = class_names(pipe.recipe, labels.repeat_interleave(2))
    save_picture(pairs.reshape(-1, *pairs.shape[2:]), args.out, columns=8, names=names)
    error = (back - pipe.to_latents(images)).square().mean().sqrt().item()
    print(f"{file}: encodings z {tuple(z.shape)}, mean {z.mean():.3f}, std {z.std():.3f}")
    print(f"{args.out}: each image beside its way to noise and back, which changed the latents by {error:.1e} (rms)")


def main(args):
    encodes = check_likelihood_args(args)
    if encodes:
        own = ("class_labels", "num_samples_per_class", "trajectory")
        check_given(args, own, " does not go with --reverse or --likelihood")
    solver = solver_from(args)

    from common import distributed
    from common.atomic import writable_folder
    from common.precision import set_precision

    device = distributed.setup().device
    for flag, path, suffixes in (("--out", args.out, (".png", ".jpg", ".webp")), ("--trajectory", args.trajectory, (".gif",))):
        if path and (Path(path).suffix.lower() not in suffixes or Path(path).is_dir()):
            raise UsageError(f"{flag} {path}: give a file name that ends in {' or '.join(suffixes)}")
        if path:
            writable_folder(Path(path).parent, flag)
    precision = set_precision(args.precision, device)
    pipe = pipeline_from(args, device, precision)
    settings = dict(solver=solver, guidance=guidance_from(args, pipe, precision))
    if not encodes:
        generate(args, pipe, settings)
        return 0

    from common.spread import spread
    from data.sources import LabelledImages

    dataset = LabelledImages(args.data_path, pipe.recipe)
    if dataset.note:
        warn(f"{args.data_path}: {dataset.note}")
    indices, started = spread(len(dataset), args.num_images), time.time()
    (print_likelihood if args.likelihood else encode)(args, pipe, dataset, indices, settings)
    print(f"{len(indices)} images, {pipe.calls} network calls, {time.time() - started:.1f} s")
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "sample.py")
