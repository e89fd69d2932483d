"""A page to play with: draw from checkpoints, side by side, and look at the way from noise to image.

python app.py --ckpt demo/results/000-*/checkpoints/0001400.pt
"""

import os
import shutil
import signal
import sys
import threading
from argparse import Namespace

from sample_utils import parse_model_args, pipeline_from
from train_utils import Parser, free, number, parse_precision_args, parse_transport_args, positive_int, run, say, warn

PASSED_ON = ("kind", "weights", "model", "image_size", "num_classes", "vae", "precision", "vae_batch_size", "vae_tiling")
ENDING = (signal.SIGTERM, signal.SIGHUP)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def make_parser():
    parser = Parser(prog="app.py", description="A page to draw from checkpoints and look at the way from noise to image.")
    group = parser.add_argument_group("page")
    names = "checkpoints, side by side: files, folders, names such as SiT-B-2-256, or hub:REPO/FILE"
    free(group.add_argument("--ckpt", nargs="+", required=True, help=names))
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine alone")
    port = number(int, lambda value: 1 <= value <= 65535, "from 1 to 65535")
    group.add_argument("--port", type=port, default=7860, help="port to listen on")
    parse_model_args(parser, "mse", left_out=("ckpt",))
    speed = parser.add_argument_group("speed and memory")
    parse_precision_args(speed)
    speed.add_argument("--vae-batch-size", type=positive_int, help="images decoded at once (32 of 256 px, fewer if larger)")
    speed.add_argument("--vae-tiling", action="store_true", help="decode large images in tiles")
    parse_transport_args(parser)
    return parser


def given_flags(args, transport_names):
    """(flags of sample.py, keywords of Pipeline.load) that a checkpoint is opened with, of those that were typed."""
    flags, told, decoding = [], {}, {}
    for name in (name for name in (*PASSED_ON, *transport_names) if name in args.given):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
        (decoding if name.startswith("vae_") else told)[name.removeprefix("vae_") if name.startswith("vae_") else name] = value
    return flags, told | ({"decoding": decoding} if decoding else {})


def sources_from(args):
    """A Source for each --ckpt. Raises UserError for one that cannot be read."""
    from dataclasses import fields

    from common import distributed
    from common.precision import set_precision
    from page.drawing import Source
    from transport import TransportSettings

    device = distributed.setup().device
    precision = set_precision(args.precision, device)
    flags, told = given_flags(args, [entry.name for entry in fields(TransportSettings)])
    each = [Namespace(**vars(args) | dict(ckpt=ckpt, compile=False)) for ckpt in args.ckpt]
    return [Source(one.ckpt, pipeline_from(one, device, precision), flags, told) for one in each]


def leave(received, frame):
    """What is being loaded is given up, and the temporary folder goes."""
    raise SystemExit(128 + received)


def wait():
    """Until Ctrl-C, or one of the signals that end a process."""
    ended = threading.Event()
    for number_ in (signal.SIGINT, *ENDING):
        signal.signal(number_, lambda received, frame: (setattr(ended, "by", received), ended.set()))
    while not ended.wait(3600):
        pass
    return ended.by


def main(args):
    from page import server
    from page.visits import Visits

    for number_ in ENDING:
        signal.signal(number_, leave)
    server.check_port(args.host, args.port)
    folder = server.prepare(args.host)
    try:
        sources = sources_from(args)
        address = server.start(sources, Visits(), args.host, args.port)
        if args.host not in LOOPBACK:
            warn(f"--host {args.host}: whoever reaches this address can draw on this machine; there is no password")
        print(f"{address} (Ctrl-C ends it)", flush=True)
        received = wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        say("\napp.py: interrupted")
        sys.stdout.flush()
    finally:  # also where the terminal is gone, and nobody can be told
        os._exit(128 + received)  # a drawing under way is not waited for: its thread may be deep in a network call


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "app.py")
