"""Flags and helpers that the scripts share."""

import argparse
import difflib
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from autoencoder import PUBLISHED as PUBLISHED_VAES
from errors import UsageError, UserError
from models import SIT_CONFIGS
from transport import DIFFUSION_FORMS, LAST_STEPS, ODE_METHODS, SDE_METHODS, SolverError, create_transport

TRANSPORT_KEYS = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, no abbreviated flags, and args.given: the names of the flags that were typed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        namespace, rest = super().parse_known_args(args, namespace)
        typed = {arg.split("=", 1)[0] for arg in args}
        given = {action.dest for flag, action in self._option_string_actions.items() if flag in typed}
        namespace.given = getattr(namespace, "given", set()) | given
        return namespace, rest

    def _flags(self):
        parsers = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        return [flag for parser in parsers for flag in parser._option_string_actions]

    def error(self, message):
        words = message.split()
        if message.startswith("unrecognized arguments:"):
            near = difflib.get_close_matches(words[2].split("=")[0], self._flags(), n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def non_negative_int(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def fraction(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], not {text}")
    return value


def non_negative(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, not {text}")
    return value


def none_or(word):
    """The word None on a command line is Python's None."""
    return None if word == "None" else word


def parse_transport_args(parser):
    group = parser.add_argument_group("transport", "what is learnt, and on which times")
    group.add_argument("--path-type", default="Linear", choices=["Linear", "GVP", "VP"], help="interpolant")
    group.add_argument(
        "--prediction", default="velocity", choices=["velocity", "score", "noise"], help="what the network's output means"
    )
    group.add_argument(
        "--loss-weight",
        type=none_or,
        choices=[None, "velocity", "likelihood"],
        help="weight of the score and noise losses over time",
    )
    group.add_argument("--sample-eps", type=non_negative, help="sampling's distance from the ends of [0, 1] (path's own)")
    group.add_argument("--train-eps", type=non_negative, help="training's distance from the ends of [0, 1] (path's own)")


def parse_ode_args(parser):
    group = parser.add_argument_group("ODE", "solver of the probability flow")
    group.add_argument("--sampling-method", default="dopri5", choices=ODE_METHODS, help="torchdiffeq solver, or heun")
    group.add_argument("--atol", type=non_negative, default=1e-6, help="absolute tolerance of adaptive solvers")
    group.add_argument("--rtol", type=non_negative, default=1e-3, help="relative tolerance of adaptive solvers")
    group.add_argument("--reverse", action="store_true", help="from data to noise: encode the images of --data-path")
    group.add_argument("--likelihood", action="store_true", help="log-likelihood of the images of --data-path")


def parse_likelihood_args(parser, num_images):
    group = parser.add_argument_group("images", "for --likelihood and --reverse")
    group.add_argument("--data-path", help="folder of images, or of one sub-folder a class, or builtin:digits")
    group.add_argument("--num-images", type=positive_int, default=num_images, help="how many, evenly spread (all)")
    group.add_argument("--num-probes", type=positive_int, default=1, help="random probes of the divergence")
    group.add_argument("--exact-divergence", action="store_true", help="no probes, one backward pass a dimension")
    group.add_argument(
        "--dequantize",
        default="none",
        choices=["none", "uniform"],
        help="pixel space: uniform noise within each of the 256 levels, which bounds the likelihood of the discrete image",
    )


def check_likelihood_args(args):
    """args.encodes: whether images are encoded rather than drawn. Raises UsageError for flags that do not go together."""
    args.encodes = args.mode == "ODE" and (args.reverse or args.likelihood)
    if not args.encodes:
        for flag in {"data_path", "num_images", "num_probes", "exact_divergence", "dequantize"} & args.given:
            raise UsageError(f"--{flag.replace('_', '-')} goes with --likelihood or --reverse")
        return
    if args.reverse and args.likelihood:
        raise UsageError("--reverse and --likelihood: give one of them")
    if not args.data_path:
        raise UsageError(f"--{'reverse' if args.reverse else 'likelihood'} needs images: give --data-path")
    for flag in {"guidance_ckpt", "guidance_low", "guidance_high"} & args.given if args.likelihood else ():
        raise UsageError(f"--{flag.replace('_', '-')}: --likelihood is that of the model itself, without guidance")
    for flag in {"num_probes", "exact_divergence", "dequantize"} & args.given if args.reverse else ():
        raise UsageError(f"--{flag.replace('_', '-')} goes with --likelihood")
    if args.likelihood and "cfg_scale" in args.given and args.cfg_scale != 1:
        raise UsageError("--likelihood is that of the model itself: --cfg-scale must be 1, a guided flow has no density")
    for flag in {"vae_batch_size", "vae_tiling"} & args.given if args.likelihood else ():
        raise UsageError(f"--{flag.replace('_', '-')}: --likelihood decodes no images")
    if "cfg_scale" not in args.given:
        args.cfg_scale = 1.0


def parse_sde_args(parser):
    group = parser.add_argument_group("SDE", "dX = (v + D score) dt + sqrt(2 D) dW; the paper writes w = 2 D")
    group.add_argument("--sampling-method", default="Euler", choices=SDE_METHODS, help="Euler is Euler-Maruyama")
    group.add_argument("--diffusion-form", default="sigma", choices=DIFFUSION_FORMS, help="form of D(t)")
    group.add_argument(
        "--diffusion-norm", type=non_negative, default=1.0, help="factor of D(t), half the factor of the paper's w(t)"
    )
    group.add_argument("--last-step", default="Mean", choices=LAST_STEPS, help="noiseless step that ends the solve")
    group.add_argument("--last-step-size", type=fraction, default=0.04, help="its size in time")


def parse_precision_args(parser):
    parser.add_argument(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        help="arithmetic of the network (tf32 on a GPU, fp32 on a CPU); solver states are float32 in each",
    )


def parse_speed_args(parser):
    """Flags of the scripts that sample which say how fast and within what memory, not what."""
    group = parser.add_argument_group("speed and memory")
    parse_precision_args(group)
    group.add_argument("--compile", action="store_true", help="torch.compile the network; pays off from a few hundred calls on")
    group.add_argument("--vae-batch-size", type=positive_int, help="images decoded at once (32 of 256 px, fewer if larger)")
    group.add_argument(
        "--vae-tiling", action="store_true", help="decode images larger than the autoencoder was trained on in tiles"
    )


def set_precision(precision, device, tf32=True):
    """Settle --precision: returns fp32, tf32 or bf16 and sets torch's matrix products to match.

    tf32: whether a GPU uses it when no precision was asked for. Raises UsageError for tf32 without a GPU.
    """
    cuda = device.type == "cuda"
    if precision == "tf32" and not cuda:
        raise UsageError(f"--precision tf32: this device ({device}) has no TF32; use fp32 or bf16")
    precision = precision or ("tf32" if cuda and tf32 else "fp32")
    # With bf16 too: for what runs outside autocast, such as the autoencoder.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return precision


def parse_model_args(parser, vae):
    """Flags of every script that loads a checkpoint. Without them, the checkpoint's own description holds."""
    group = parser.add_argument_group("model", "left out, each is read from the checkpoint; a contradiction is an error")
    group.add_argument("--ckpt", help="checkpoint of train.py or published weights (the paper's SiT-XL/2 at 256 px)")
    group.add_argument("--model", default="SiT-XL/2", choices=SIT_CONFIGS, metavar="SiT-{XL,L,B,S,T}/{2,4,8}", help="backbone")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels a side")
    group.add_argument("--num-classes", type=positive_int, default=1000, help="classes the model knows")
    parse_vae_arg(group, vae)


def parse_vae_arg(group, default):
    group.add_argument(
        "--vae", default=default, help=f"autoencoder: {', '.join(PUBLISHED_VAES)}, none (pixels), or a diffusers folder"
    )


def parse_guidance_args(parser, cfg_scale):
    group = parser.add_argument_group("guidance", "classifier-free, or by a weaker model")
    group.add_argument("--cfg-scale", type=non_negative, default=cfg_scale, help="1 is no guidance")
    group.add_argument(
        "--cfg-channels", default="3", choices=["3", "all"], help="latent channels that are guided; published numbers: 3"
    )
    group.add_argument("--guidance-low", type=fraction, default=0.0, help="guide only from this time on (0 is noise)")
    group.add_argument("--guidance-high", type=fraction, default=1.0, help="guide only up to this time (1 is data)")
    group.add_argument("--guidance-ckpt", help="autoguidance: a weaker checkpoint to guide away from, not the null class")


def transport_from(settings):
    """create_transport from an object or dict that has its settings; a bad combination is a UsageError."""
    settings = settings if isinstance(settings, dict) else vars(settings)
    try:
        return create_transport(**{key: settings[key] for key in TRANSPORT_KEYS})
    except ValueError as error:
        raise UsageError(str(error)) from error


def latent_shape(image_size, autoencoder, patch_size):
    """(channels, side, side) of the latents of an image. Raises UsageError where the size does not divide."""
    multiple = autoencoder.factor * patch_size
    if image_size % multiple:
        raise UsageError(
            f"--image-size {image_size} is not a multiple of {multiple} "
            f"(autoencoder {autoencoder.name} shrinks by {autoencoder.factor}, patches are {patch_size} wide)"
        )
    side = image_size // autoencoder.factor
    return autoencoder.channels, side, side


def writable_folder(path, flag):
    """Make a folder and see that it can be written to. Raises UserError naming the flag and the folder."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot write there ({error.strerror})") from error
    return path


@contextmanager
def writing(path, flag):
    """A full disk becomes a UserError naming the flag and the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot write there ({error.strerror or error})") from error


def run(main, prog):
    """Call main(); a UserError becomes one line and its exit code, Ctrl-C a quiet exit, anything else a traceback."""
    try:
        sys.exit(main())
    except (UserError, SolverError) as error:
        rank = os.environ.get("RANK", "0")
        message = str(error).splitlines()[-1].removeprefix("errors.UserError: ")  # a loader's process adds its traceback
        print(f"{prog}{f' [rank {rank}]' if rank != '0' else ''}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
