"""Flags that the scripts share, and what turns them into settings.

No torch here: --help and a misspelt flag answer at once. A flag is part of a run's identity, so that the run is continued
with the same value alone, unless it is declared free where it is added.
"""

import argparse
import difflib
import os
import re
import signal
import sys
from dataclasses import fields

from common.cores import share_cores
from common.errors import UsageError, UserError
from common.precision import PRECISIONS
from common.sizes import canonical
from inference.settings import DEQUANTIZE
from training.power_ema import NARROWEST, WIDEST
from transport import DIFFUSION_FORMS, LAST_STEPS, ODE_METHODS, SDE_METHODS, SolverError, TransportSettings

MODELS = "SiT-{XL,L,B,S,T,3B,8B,17B}/{2,4,8}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show."""

    def _get_help_string(self, action):
        if isinstance(action.default, list) and action.default != [None]:
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        nothing = action.default is None or action.default is False or action.default == [None]
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and no abbreviated flags. The namespace has two more attributes:

    given: the names of the flags that were typed; identity: {name: default} of those that make a run what it is.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        namespace, rest = super().parse_known_args(args, namespace)
        typed = {arg.split("=", 1)[0] for arg in args}
        given = {action.dest for flag, action in self._option_string_actions.items() if flag in typed}
        own = {a.dest: a.default for a in self._actions if a.dest != "help" and not getattr(a, "free", False)}
        namespace.given = getattr(namespace, "given", set()) | given
        namespace.identity = getattr(namespace, "identity", {}) | own
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


def free(action):
    """Declare a flag, as add_argument returns it, to be no part of a run's identity: it says where or how, not what."""
    action.free = True
    return action


def check_given(args, names, message):
    """Raises UsageError for the first of these flags that was typed: "--flag" and the message."""
    for name in sorted(set(names) & args.given):
        raise UsageError(f"--{name.replace('_', '-')}{message}")


class Listed(argparse.Action):
    """A list with spaces or commas between its values: --class-labels 207,360 or 207 360."""

    def __init__(self, *args, item=int, **kwargs):
        def several(text):
            return [item(part) for part in text.split(",") if part]

        several.__name__ = item.__name__  # for argparse's message
        super().__init__(*args, nargs="+", type=several, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        values = [value for some in values for value in some]
        if not values:
            raise argparse.ArgumentError(self, "expected at least one value")
        setattr(namespace, self.dest, values)


def number(kind, check, wanted):
    """A type for a flag: a number of that kind of which check(value) holds."""

    def parse(text):
        value = kind(text)
        if not check(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int = number(int, lambda value: value >= 1, "at least 1")
non_negative_int = number(int, lambda value: value >= 0, "at least 0")
seed = number(int, lambda value: -(2**63) <= value < 2**64, "a whole number of 64 bits")
below_one = number(float, lambda value: 0 < value < 1, "above 0 and below 1")
fraction = number(float, lambda value: 0 <= value <= 1, "in [0, 1]")
sigma_rel = number(float, lambda value: NARROWEST <= value <= WIDEST, f"from {NARROWEST:g} to {WIDEST:.7g}")
non_negative = number(float, lambda value: 0 <= value < float("inf"), "a finite number of at least 0")


def image_size(text):
    """A side, or HEIGHTxWIDTH, as recipes hold it."""
    try:
        return canonical(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def none_or(word):
    """The word None on a command line is Python's None."""
    return None if word == "None" else word


def parse_transport_args(parser, left_out=()):
    """One flag for each of TransportSettings but those left out, whose tables give the choices."""
    group = parser.add_argument_group("transport", "what is learnt, and on which times")
    for entry in (entry for entry in fields(TransportSettings) if entry.name not in left_out):
        choices = entry.metadata["choices"]
        group.add_argument(
            f"--{entry.name.replace('_', '-')}",
            default=entry.default,
            type=none_or if choices else entry.metadata["parse"],
            choices=list(choices) if choices else None,
            help=entry.metadata["help"],
        )


def transport_settings(args):
    """The flags of parse_transport_args as an object. Raises UsageError for a bad combination."""
    try:
        return TransportSettings(**{entry.name: getattr(args, entry.name) for entry in fields(TransportSettings)})
    except ValueError as error:
        raise UsageError(str(error)) from error


def parse_ode_args(parser):
    group = parser.add_argument_group("ODE", "solver of the probability flow")
    group.add_argument("--sampling-method", default="dopri5", choices=ODE_METHODS, help="torchdiffeq solver, or heun")
    group.add_argument("--atol", type=non_negative, default=1e-6, help="absolute tolerance of adaptive solvers")
    group.add_argument("--rtol", type=non_negative, default=1e-3, help="relative tolerance of adaptive solvers")
    group.add_argument("--reverse", action="store_true", help="from data to noise: encode the images of --data-path")
    group.add_argument("--likelihood", action="store_true", help="log-likelihood of the images of --data-path")


def parse_sde_args(parser):
    group = parser.add_argument_group("SDE", "dX = (v + D score) dt + sqrt(2 D) dW; the paper writes w = 2 D")
    group.add_argument("--sampling-method", default="Euler", choices=SDE_METHODS, help="Euler is Euler-Maruyama")
    group.add_argument("--diffusion-form", default="sigma", choices=DIFFUSION_FORMS, help="form of D(t)")
    norm = "factor of D(t), half the factor of the paper's w(t)"
    group.add_argument("--diffusion-norm", type=non_negative, default=1.0, help=norm)
    eta = "of form KL: price of the noise in its bound, beside the mean loss over dimensions (none: SBDM)"
    group.add_argument("--diffusion-eta", type=non_negative, help=eta)
    loss = "file of measure_loss.py for --diffusion-eta (the one beside the checkpoint)"
    free(group.add_argument("--diffusion-loss", metavar="FILE", help=loss))
    group.add_argument("--last-step", default="Mean", choices=LAST_STEPS, help="noiseless step that ends the solve")
    group.add_argument("--last-step-size", type=fraction, default=0.04, help="its size in time")


def parse_likelihood_args(parser, num_images):
    group = parser.add_argument_group("images", "for --likelihood and --reverse")
    free(group.add_argument("--data-path", help="folder of images, or of one sub-folder a class, or builtin:digits"))
    group.add_argument("--num-images", type=positive_int, default=num_images, help="how many, evenly spread (all)")
    group.add_argument("--num-probes", type=positive_int, default=1, help="random probes of the divergence")
    group.add_argument("--exact-divergence", action="store_true", help="no probes, one backward pass a dimension")
    noise = "pixel space: uniform noise within each of the 256 levels, which bounds the likelihood of the discrete image"
    group.add_argument("--dequantize", default="none", choices=DEQUANTIZE, help=noise)


def parse_precision_args(parser):
    return parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="arithmetic of the network (tf32 on a GPU, fp32 on a CPU); solver states are float32 in each",
    )


def parse_vae_arg(group, default):
    group.add_argument("--vae", default=default, help="autoencoder: ema, mse, none (pixels), or a diffusers folder")


def parse_data_args(group, classes, default=1000):
    """Flags of what a model is made for, in training and sampling alike."""
    group.add_argument("--model", default="SiT-XL/2", metavar=MODELS, help="backbone, or another name in models.py")
    group.add_argument("--image-size", type=image_size, default=256, metavar="N|HxW", help="pixels a side, or height x width")
    group.add_argument("--num-classes", type=positive_int, default=default, help=classes)


def say(line):
    """A line on stderr, in one piece: print writes its end by itself, and the lines of two processes may mix."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def warn(line):
    """A line on stderr, of the main process."""
    if os.environ.get("RANK", "0") == "0":
        say(f"WARNING: {line}")


def warn_of_precision(device, precision):
    """Where it is slow, or not what it is called."""
    from common.machine import precision_warning

    if line := precision_warning(device, precision):
        warn(line)


def run(main, prog):
    """Call main(); a UserError becomes one line and its exit code, Ctrl-C a quiet exit, anything else a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files that the locale cannot write
    share_cores()
    try:
        sys.exit(main())
    except (UserError, SolverError) as error:
        rank = os.environ.get("RANK", "0")
        message = re.sub(r"^[\w.]+Error: ", "", str(error).splitlines()[-1])  # a loader's process adds its traceback
        say(f"{prog}{f' [rank {rank}]' if rank != '0' else ''}: error: {message}")
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        say(f"\n{prog}: interrupted")
        sys.exit(128 + signal.SIGINT)


def update_ema(ema_model, model, decay=0.9999):
    """ema = decay ema + (1 - decay) model, in place: modules, or lists of their tensors."""
    from training.ema import update_ema as update

    update(*(list(m.parameters()) if hasattr(m, "parameters") else m for m in (ema_model, model)), decay)
