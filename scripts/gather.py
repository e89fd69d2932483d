"""Make one checkpoint file of the folder that many processes wrote: python scripts/gather.py RUN/checkpoints/0000050

The file is what training would have written without --ckpt-format sharded, but for that flag in its args, and is read by
whatever reads such files. All of it passes through the memory of this machine.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import UsageError, UserError
from train_utils import Parser, run


def make_parser():
    parser = Parser(description=__doc__.split("\n\n")[0].split(":")[0])
    parser.add_argument("ckpt", metavar="FOLDER", help="checkpoint of train.py --ckpt-format sharded")
    parser.add_argument("--out", metavar="FILE", help="file to write (FOLDER.pt, beside it)")
    return parser


def main(args):
    from common.atomic import writable_folder  # --help does not wait for torch
    from common.checkpoint import load_checkpoint, save_checkpoint
    from common.sharded import is_sharded

    began, path = time.time(), Path(args.ckpt)
    if not is_sharded(path):
        raise UsageError(f"{path}: it is no folder that train.py --ckpt-format sharded wrote")
    path = path.resolve()  # its name, if it was called "."
    out = Path(args.out) if args.out else path.with_name(f"{path.name}.pt")
    if os.path.lexists(out):
        raise UsageError(f"--out {out}: it is there already; give another name, or remove it")
    writable_folder(out.parent, "--out")
    content = load_checkpoint(path)
    try:
        save_checkpoint(content, out)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when its writer meets a full disk
        raise UserError(f"--out {out}: cannot write there ({str(error).splitlines()[0]})") from error
    print(f"{out}: {out.stat().st_size / 1e9:.3g} GB, {time.time() - began:.0f} s")
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "gather.py")
