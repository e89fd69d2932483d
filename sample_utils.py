"""Flags that sample.py and sample_ddp.py share, and the library's objects that they turn into."""

from common.errors import UsageError
from common.kinds import KINDS
from inference import ODE, SDE, Guidance
from train_utils import (
    check_given,
    fraction,
    free,
    non_negative,
    parse_data_args,
    parse_likelihood_args,
    parse_ode_args,
    parse_precision_args,
    parse_sde_args,
    parse_transport_args,
    parse_vae_arg,
    positive_int,
    transport_settings,
    warn,
    warn_of_precision,
)
from transport import ODE_METHODS, PATHS
from transport.solvers import ADAPTIVE

MODES = {"ODE": "sample by the probability flow", "SDE": "sample by the reverse SDE"}


def parse_modes(parser, add_own, vae, cfg_scale, num_images):
    """Subcommands ODE and SDE with the flags that the scripts share around their own: add_own(group) adds those."""
    modes = parser.add_subparsers(
        dest="mode", required=True, metavar="ODE|SDE", help=f"{parser.prog} ODE --help lists its flags"
    )
    for mode, title in MODES.items():
        sub = modes.add_parser(mode, help=title, description=f"{parser.prog} {mode}: {title}.")
        parse_model_args(sub, vae)
        group = sub.add_argument_group("sampling")
        group.add_argument("--num-sampling-steps", type=positive_int, default=250, help="points in time of a fixed solver")
        group.add_argument("--sampling-path", choices=PATHS, help="interpolant to sample along (that of the network)")
        add_own(group)
        parse_speed_args(sub)
        parse_guidance_args(sub, cfg_scale)
        parse_transport_args(sub)
        if mode == "ODE":
            parse_ode_args(sub)
            parse_likelihood_args(sub, num_images)
        else:
            parse_sde_args(sub)


def parse_model_args(parser, vae, left_out=()):
    """Flags of every script that loads a checkpoint, but for those of ckpt and weights that it has in another way. Without
    them, the checkpoint's own description holds."""
    group = parser.add_argument_group("model", "left out, each is read from the checkpoint; a contradiction is an error")
    if "ckpt" not in left_out:
        names = "checkpoint, folder, name such as SiT-B-2-256, or hub:REPO/FILE"
        free(group.add_argument("--ckpt", help=f"{names} (published weights of --model and --image-size)"))
    group.add_argument(
        "--kind", default="auto", choices=KINDS, help="whose weights: SiT's, REPA's or DiT's, if that must be said"
    )
    if "weights" not in left_out:
        group.add_argument("--weights", default="ema", help="ema, or another state of the checkpoint: ema-0.999, model")
    parse_data_args(group, "classes the model knows")
    parse_vae_arg(group, vae)


def parse_speed_args(parser):
    """Flags which say how fast and within what memory, not what; but they may change rounding."""
    group = parser.add_argument_group("speed and memory")
    parse_precision_args(group)
    group.add_argument("--compile", action="store_true", help="torch.compile the network; pays off from a few hundred calls on")
    group.add_argument("--vae-batch-size", type=positive_int, help="images decoded at once (32 of 256 px, fewer if larger)")
    group.add_argument(
        "--vae-tiling", action="store_true", help="decode images larger than the autoencoder was trained on in tiles"
    )


def parse_guidance_args(parser, cfg_scale):
    group = parser.add_argument_group("guidance", "classifier-free, or by a weaker model")
    group.add_argument("--cfg-scale", type=non_negative, default=cfg_scale, help="1 is no guidance")
    group.add_argument(
        "--cfg-channels", default="3", choices=["3", "all"], help="latent channels that are guided; published numbers: 3"
    )
    group.add_argument("--guidance-low", type=fraction, default=0.0, help="guide only from this time on (0 is noise)")
    group.add_argument("--guidance-high", type=fraction, default=1.0, help="guide only up to this time (1 is data)")
    weak = "autoguidance: a weaker checkpoint to guide away from, not the null class"
    free(group.add_argument("--guidance-ckpt", help=weak))
    group.add_argument("--guidance-weights", help="which of its states (ema); without --guidance-ckpt, of --ckpt's own")


def check_likelihood_args(args):
    """Whether images are encoded rather than drawn. Raises UsageError for flags that do not go together."""
    if args.mode != "ODE" or not (args.reverse or args.likelihood):
        only = ("data_path", "num_images", "num_probes", "exact_divergence", "dequantize")
        check_given(args, only, " goes with --likelihood or --reverse")
        return False
    if args.reverse and args.likelihood:
        raise UsageError("--reverse and --likelihood: give one of them")
    if not args.data_path:
        raise UsageError(f"--{'reverse' if args.reverse else 'likelihood'} needs images: give --data-path")
    if args.reverse:
        check_given(args, ("num_probes", "exact_divergence", "dequantize"), " goes with --likelihood")
    else:
        check_given(args, ("vae_batch_size", "vae_tiling"), ": --likelihood decodes no images")
        guided = ("guidance_ckpt", "guidance_weights", "guidance_low", "guidance_high")
        check_given(args, guided, ": --likelihood is that of the model itself, without guidance")
    if "cfg_scale" not in args.given:
        args.cfg_scale = 1.0
    if args.likelihood:
        Guidance(args.cfg_scale).refuse_density()  # before anything is loaded
    return True


def solver_from(args):
    """The flags of parse_ode_args or parse_sde_args as an object."""
    if args.mode == "ODE":
        if "time_shift" in args.given and ODE_METHODS[args.sampling_method] == ADAPTIVE:
            raise UsageError(f"--time-shift: {args.sampling_method} chooses its own points; it goes with fixed solvers")
        return ODE(args.sampling_method, args.num_sampling_steps, args.atol, args.rtol, args.sampling_path)
    return SDE(
        args.sampling_method,
        args.diffusion_form,
        args.diffusion_norm,
        args.last_step,
        args.last_step_size,
        args.num_sampling_steps,
        args.sampling_path,
        args.diffusion_eta,
        args.diffusion_loss,
    )


def pipeline_from(args, device, precision):
    """The flags of parse_model_args and parse_speed_args as a Pipeline."""
    from inference import Pipeline

    if args.ckpt is None and args.kind in ("repa", "dit"):
        raise UsageError(f"--kind {args.kind}: give the file as --ckpt; the weights that have a name here are SiT's")
    if args.ckpt is None and args.num_classes != 1000:
        raise UsageError(f"--ckpt is missing: published weights know 1000 classes, not {args.num_classes}")
    warn_of_precision(device, precision)
    names = ("model", "image_size", "num_classes", *vars(transport_settings(args)))
    pipe = Pipeline.load(
        args.ckpt,
        kind=args.kind,
        weights=args.weights,
        vae=args.vae if "vae" in args.given else None,
        device=device,
        precision=precision,
        compile=args.compile,
        decoding=dict(batch_size=args.vae_batch_size, tiling=args.vae_tiling),
        default_vae=args.vae,
        **{name: getattr(args, name) for name in names if name in args.given},
    )
    if pipe.note:
        warn(pipe.note)
    return pipe


def guidance_from(args, pipeline, precision):
    """The flags of parse_guidance_args as an object; a model without a null class is guided only if that was typed."""
    scale, weak = args.cfg_scale, None
    if args.guidance_ckpt or args.guidance_weights:
        from inference import Pipeline

        more = dict(vae=pipeline.autoencoder, device=pipeline.device, precision=precision, compile=args.compile)
        more["default_transport"] = pipeline.transport.settings
        weak = Pipeline.load(
            args.guidance_ckpt or pipeline.path, weights=args.guidance_weights or "ema", kind=args.kind, **more
        )
    elif pipeline.recipe.null_class is None and "cfg_scale" not in args.given:
        scale = 1.0
    channels = None if args.cfg_channels == "all" else int(args.cfg_channels)
    return Guidance(scale, channels, args.guidance_low, args.guidance_high, weak)
