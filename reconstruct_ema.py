"""Make the average of the weights of any width, after training: from the snapshots of train.py --ema-power.

    python train.py ... --ema-power 0.05 0.10 --ema-snapshot-every 5000
    python reconstruct_ema.py results/000-... --sigma-rel 0.12
    python reconstruct_ema.py results/000-... results/001-... --sigma-rel 0.12 --at-step 300000

Several folders are those of one training, which --ckpt continued into the next. The result is a file that the samplers
and the library take as any checkpoint. docs/ema.md tells what widths are, and how near it comes.
"""

import os
from pathlib import Path

from common.errors import UsageError, UserError
from train_utils import Parser, positive_int, run, sigma_rel, warn


def make_parser():
    parser = Parser(prog="reconstruct_ema.py", description="Make the average of any width from a run's snapshots.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the run's folder, and those that continued it by --ckpt")
    parser.add_argument("--sigma-rel", type=sigma_rel, required=True, help="width of the average, as a share of the training")
    parser.add_argument("--at-step", type=positive_int, help="the average at this step (the last snapshot's)")
    parser.add_argument("--out", help="the new file (RUN/reconstructed/STEP-sigma-SIGMA_REL.pt)")
    return parser


def main(args):
    if args.out and not args.out.endswith(".pt"):
        raise UsageError(f"--out {args.out}: give the name of a .pt file")
    if args.out and os.path.lexists(args.out):
        raise UsageError(f"--out {args.out}: it is there already; give another name, or remove it")

    from common.atomic import writable_folder
    from common.checkpoint import save_checkpoint
    from training.reconstruction import doubts, find_snapshots, reconstruct

    snapshots, _ = find_snapshots(args.runs, args.at_step)
    last = max(snapshots)
    step, own = args.at_step or last, snapshots[last].parents[1] / "reconstructed"
    out = Path(args.out) if args.out else own / f"{step:07d}-sigma-{args.sigma_rel:g}.pt"
    writable_folder(out.parent, "--out")
    content, residual = reconstruct(args.runs, args.sigma_rel, args.at_step)
    try:
        save_checkpoint(content, out)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when its writer meets a full disk
        raise UserError(f"--out {out}: cannot write there ({str(error).splitlines()[0]})") from error
    count = len(content["reconstruction"]["weights"])
    print(f"{out}: the average of width {args.sigma_rel:g} at step {step:,}, from {count} snapshots; residual {residual:.2g}")
    for line in doubts(content):
        warn(line)
    print(f"To sample from it: python sample.py ODE --ckpt {out}")
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "reconstruct_ema.py")
