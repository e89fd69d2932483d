"""Measure the loss of a checkpoint by time, from which --diffusion-eta takes the SDE's amount of noise.

python measure_loss.py results/000-.../checkpoints/0400000.pt --data-path /data/imagenet/val
python sample.py SDE --ckpt results/000-.../checkpoints/0400000.pt --diffusion-form KL --diffusion-eta 0.01

The loss is that of the velocity, a mean over dimensions, whatever the network predicts; images, times and noise are the same
each time, and any number of processes (torchrun) gives the same file.
"""

from pathlib import Path

from common.errors import UsageError, UserError
from sample_utils import parse_model_args, pipeline_from
from train_utils import Parser, parse_precision_args, parse_transport_args, positive_int, run, seed, warn


def make_parser():
    parser = Parser(prog="measure_loss.py", description="The loss of a checkpoint by time, for --diffusion-form KL.")
    parser.add_argument("ckpt", metavar="CKPT", help="checkpoint, or a name as sample.py's --ckpt takes it")
    parse_model_args(parser, vae="ema", left_out=("ckpt",))
    group = parser.add_argument_group("measurement")
    group.add_argument("--data-path", required=True, help="images with their classes, of any kind that train.py takes")
    group.add_argument("--num-images", type=positive_int, default=200, help="of them, evenly spread, each once in each bin")
    group.add_argument("--bins", type=positive_int, default=50, help="of time")
    group.add_argument("--seed", type=seed, default=0, help="of times and noise")
    group.add_argument("--out", metavar="FILE.json", help="where the losses go (beside the checkpoint)")
    parse_precision_args(group)
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    parse_transport_args(parser, left_out=("time_shift",))
    parser.set_defaults(time_shift=1.0, vae_batch_size=None, vae_tiling=False)
    return parser


def main(args):
    if args.num_images < 2:
        raise UsageError("--num-images 1: a standard error takes 2 or more")

    from common import distributed
    from common.atomic import writable_folder, writing
    from common.precision import set_precision
    from data.parts import spread
    from data.sources import LabelledImages
    from inference.pictures import save_velocity_loss
    from inference.velocity_loss import Points, beside, measure

    world = distributed.setup()
    precision = set_precision(args.precision, world.device)
    pipe = world.main_first(lambda: pipeline_from(args, world.device, precision))
    out = Path(args.out or beside(pipe.path, pipe.weights))
    if out.suffix != ".json" or out.is_dir():
        raise UsageError(f"--out {out}: give a file name that ends in .json")
    world.from_main(lambda: writable_folder(out.parent, "--out"))
    dataset = LabelledImages(args.data_path, pipe.recipe)
    if dataset.null_class is not None:
        raise UserError(
            f"--data-path {args.data_path}: its classes are not those of {pipe.path}, whose loss is that of labelled images"
        )
    if dataset.note:
        warn(f"{args.data_path}: {dataset.note}")
    chosen = spread(len(dataset), args.num_images)
    loss = measure(Points(pipe, dataset, chosen, args.bins, args.seed, args.data_path), world)
    if world.is_main:
        with writing(out.parent, "--out"):
            loss.save(out)
            save_velocity_loss(loss, out.with_suffix(".png"), f"{pipe.path.name}, {pipe.weights}")
        for i in sorted({0, args.bins // 4, args.bins // 2, 3 * args.bins // 4, args.bins - 1}):
            print(f"t = {loss.times[i]:.3f}: {loss.mean[i]:.4f} +- {loss.standard_error[i]:.4f}")
        print(f"{out}: {len(chosen):,} images in each of {args.bins} bins; a plot beside it")
    distributed.cleanup()
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "measure_loss.py")
