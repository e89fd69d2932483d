"""Hand a model on: as a folder that diffusers loads, or as a file that the published code loads.

    python export.py results/000-.../checkpoints/0400000.pt --out sit-b-2
    python export.py CKPT --out sit-b-2 --push my-name/sit-b-2
    python export.py CKPT --out SiT-B-2.pt --to published

The folder has the weights as safetensors, the autoencoder, the classes' names, a card with the recipe and a few samples, and
the code: `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` needs no file of this repository. sample.py --ckpt
reads it too.
"""

import os
import re
import shutil
from pathlib import Path

from common.errors import UsageError, UserError
from common.kinds import KINDS
from train_utils import Parser, image_size, non_negative_int, parse_transport_args, positive_int, run, transport_settings


def make_parser():
    parser = Parser(prog="export.py", description="Hand a model on.")
    parser.add_argument("ckpt", help="checkpoint, folder, published name or hub:REPO/FILE")
    parser.add_argument("--out", required=True, help="the new folder, or the file of --to published")
    parser.add_argument("--to", default="diffusers", choices=["diffusers", "published"], help="whose layout")
    parser.add_argument("--push", metavar="REPO", help="upload the folder to the Hugging Face Hub, as OWNER/NAME")
    parser.add_argument("--samples", type=non_negative_int, default=8, help="pictures on the card")
    group = parser.add_argument_group("model", "left out, each is read from the checkpoint; a contradiction is an error")
    group.add_argument(
        "--kind", default="auto", choices=KINDS, help="whose weights: SiT's, REPA's or DiT's, if that must be said"
    )
    group.add_argument("--weights", default="ema", help="ema, or another state of the checkpoint: ema-0.999, model")
    group.add_argument("--vae", help="autoencoder, where the checkpoint does not say: ema, mse, none, or a diffusers folder")
    group.add_argument("--image-size", type=image_size, metavar="N|HxW", help="pixels a side, or height x width")
    group.add_argument("--num-classes", type=positive_int, help="classes the model knows")
    parse_transport_args(parser)
    return parser


def main(args):
    out = Path(os.path.abspath(args.out))
    if args.to == "published":
        if args.push or "samples" in args.given:
            raise UsageError(f"--{'push' if args.push else 'samples'} goes with --to diffusers")
        if out.suffix != ".pt":
            raise UsageError(f"--out {args.out}: give the name of a .pt file")
    if out.exists() and (args.to == "published" or not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {args.out}: it is there already; give another name, or remove it")
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        raise UsageError(f"--push {args.push}: a repository on the Hub is named OWNER/NAME")

    from common.atomic import writable_folder, writing

    told = dict(image_size=args.image_size, num_classes=args.num_classes)
    told |= {name: value for name, value in vars(transport_settings(args)).items() if name in args.given}
    writable_folder(out.parent, "--out")
    with writing(args.out, "--out"):
        (to_published if args.to == "published" else to_diffusers)(args, out, told)
    if args.push:
        push(args, out)
    return 0


def to_published(args, out, told):
    from common.checkpoint import weights_of
    from common.dialects import open_checkpoint
    from common.recipe import build_with, recipe_of
    from download import locate
    from inference import export

    path = locate(args.ckpt)
    content = open_checkpoint(path, args.kind, **told)
    state = weights_of(content, path, None if args.weights == "ema" else args.weights)
    recipe = recipe_of(content, state, path, **{name: told[name] for name in ("image_size", "num_classes")})
    export.write_published(recipe, build_with(recipe, state, path).state_dict(), out)
    print(f"{args.out}: {recipe.model}, as the published code loads it")


def to_diffusers(args, out, told):
    from inference import Pipeline, export

    pipe = Pipeline.load(args.ckpt, kind=args.kind, weights=args.weights, vae=args.vae, **told)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        export.write_folder(pipe, unfinished, args.samples, args.weights)
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f'{args.out}: DiffusionPipeline.from_pretrained("{args.out}", trust_remote_code=True) loads it')


def push(args, folder):
    from inference import export

    try:
        print(f"{export.push(folder, args.push)} has it")
    except Exception as error:  # the Hub and the network raise a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        then = f"the folder is whole: `hf auth login`, then `hf upload {args.push} {args.out}`"
        raise UserError(f"--push {args.push}: {reason}; {then}") from error


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "export.py")
