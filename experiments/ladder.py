"""The paper's design ladder at equal compute, on data that a laptop can train on: python experiments/ladder.py

Each step is trained from several seeds, sampled by the paper's two samplers and judged by a classifier of real images; then
every sampler is compared on the last. Writes OUT/ladder.md, or --page, with pictures beside it; docs/ladder.md is such a page.
The same command again goes on where it was stopped.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.atomic import writable_folder, write_json
from common.errors import UsageError, UserError
from train_utils import Listed, Parser, below_one, image_size, non_negative, non_negative_int, positive_int, run

ROOT = Path(__file__).resolve().parent.parent
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DIGITS, AUTOENCODER = "builtin:digits", "assets/digits-vae"


def make_parser():
    parser = Parser(prog="ladder.py", description="The paper's design ladder, in miniature.")
    group = parser.add_argument_group("data and model")
    group.add_argument("--data-path", default=DIGITS, help="images of two classes or more, of any kind that train.py takes")
    group.add_argument("--vae", default=AUTOENCODER, help="autoencoder: ema, mse, none, or a diffusers folder")
    group.add_argument("--image-size", type=image_size, default=32, help="pixels a side, or height x width")
    group.add_argument("--model", default="SiT-T/2", help="backbone")
    group = parser.add_argument_group("what each step gets")
    group.add_argument("--images", type=positive_int, default=32_000, help="trained on, in all")
    group.add_argument("--batch-size", type=positive_int, default=64, help="images a training step")
    group.add_argument("--lr", type=non_negative, default=2e-3, help="peak learning rate")
    group.add_argument("--held-out", type=below_one, default=0.2, help="share of the data to judge against")
    group.add_argument("--samples", type=positive_int, default=400, help="of each sampler")
    group.add_argument("--likelihoods", type=positive_int, default=64, help="held-out images")
    group.add_argument("--seeds", action=Listed, item=non_negative_int, default=[0, 1, 2], metavar="SEED", help="of training")
    group.add_argument("--rungs", action=Listed, item=str, metavar="RUNG", help="some of the steps, by name (all)")
    group = parser.add_argument_group("running")
    group.add_argument("--out", default="ladder", help="folder for runs and numbers")
    group.add_argument("--page", metavar="FILE.md", help="the page (OUT/ladder.md); pictures go to pictures/ beside it")
    group.add_argument("--jobs", type=positive_int, help="pieces at once (one for each core; one on a GPU)")
    return parser


def as_typed(name):
    return f"--{name.replace('_', '-')}"


def found(folder):
    """An autoencoder's folder, of which the default is this repository's: the pieces run there."""
    return (ROOT if folder == AUTOENCODER else Path()).joinpath(folder).resolve()


def training(args, name, seed, out):
    """The command that trains a step of the ladder, or goes on with it."""
    from experiments.rungs import RUNGS

    steps = max(1, args.images // args.batch_size)
    vae = args.vae if args.vae in ("ema", "mse", "none") else str(found(args.vae))
    flags = dict(data_path=args.data_path, vae=vae, image_size=args.image_size, model=args.model)
    flags |= dict(val_fraction=args.held_out, val_every=steps, val_images=min(200, args.likelihoods))
    flags |= dict(global_batch_size=args.batch_size, max_steps=steps, lr=args.lr, warmup_steps=steps // 10)
    flags |= dict(lr_schedule="cosine", grad_clip=1, ema_decay=0.99, global_seed=seed, num_workers=0)
    flags |= dict(sample_every=10 * steps, ckpt_every=max(1, steps // 4), keep_last=1, log_every=max(1, steps // 10))
    flags |= dict(results_dir=out / "runs" / f"{name}-{seed}")
    words = [str(word) for flag, value in (flags | RUNGS[name].flags).items() for word in (as_typed(flag), value)]
    return [sys.executable, str(ROOT / "train.py"), *words, "--resume"]


def pieces(args, rungs, out):
    """Stages of {piece: its command}: a stage needs those before it. A piece is done when OUT/PIECE.json is there."""
    from experiments.rungs import GUIDANCE, TOP

    measure = lambda piece: [sys.executable, str(ROOT / "experiments" / "measuring.py"), str(out), piece]  # noqa: E731
    each = [(name, seed) for seed in args.seeds for name in rungs]
    samplers = [f"samplers-{seed}-{scale}" for seed in args.seeds for scale in GUIDANCE] if TOP in rungs else []
    trained = {f"trained-{name}-{seed}": training(args, name, seed, out) for name, seed in each}
    return {
        "training": {"judge": measure("judge")} | trained,
        "measuring": {piece: measure(piece) for piece in [*samplers, *(f"{name}-{seed}" for name, seed in each)]},
    }


def read_times(out):
    """{piece: seconds that it took}"""
    return json.loads((out / "times.json").read_text()) if (out / "times.json").exists() else {}


def shown(seconds):
    return f"{seconds / 60:.1f} min"


def work(stage, commands, out, at_once, signals):
    """Run the commands of a stage whose file is missing, some at once. Raises UserError where one fails; none outlives this.

    Each has one thread, whatever the cores: another number would round otherwise, and the numbers would be others.
    """
    environment = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    waiting = [piece for piece in commands if not (out / f"{piece}.json").exists()]
    running, done, started = {}, len(commands) - len(waiting), time.time()
    total, begun, times = len(waiting), {}, read_times(out)
    if done:
        print(f"{stage}: {done} of {len(commands)} are there already", flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                piece = waiting.pop(0)
                with open(out / "logs" / f"{piece}.txt", "w") as log:
                    # A group of its own, so that Ctrl-C reaches this process alone, which ends the others.
                    more = dict(stdout=log, stderr=log, env=environment, start_new_session=True, cwd=ROOT)
                    running[piece] = subprocess.Popen(commands[piece], **more)
                begun[piece] = time.time()
            time.sleep(0.2)
            if signals:
                raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])
            for piece, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[piece]
                if process.returncode:
                    log = (out / "logs" / f"{piece}.txt").read_text().strip().splitlines()
                    last = log[-1].split("error: ", 1)[-1] if log else f"exit code {process.returncode}"
                    raise UserError(f"{piece}: {last} (all that it said: {out / 'logs' / f'{piece}.txt'})")
                seconds = time.time() - begun.pop(piece)
                times[piece] = times.get(piece, 0) + seconds
                write_json(out / "times.json", times)
                if piece.startswith("trained-"):
                    write_json(out / f"{piece}.json", {})
                finished = total - len(waiting) - len(running)
                left = (time.time() - started) / finished * (total - finished)
                print(f"{stage}: {piece} in {seconds:.0f} s; {finished} of {total}, about {shown(left)} left", flush=True)
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGTERM)
        for process in running.values():
            process.wait()
        for piece, since in begun.items():  # stopped on the way, and that took time too
            times[piece] = times.get(piece, 0) + time.time() - since
        write_json(out / "times.json", times)


def remember(args, out):
    """Keep what makes the numbers what they are beside them. Raises UsageError for a folder of other numbers."""
    from experiments.rungs import design

    names = ("data_path", "vae", "model", "image_size", "images", "batch_size", "lr", "held_out", "samples", "likelihoods")
    settings = json.loads(json.dumps({name: getattr(args, name) for name in names} | dict(design=design())))
    file = out / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                made = "with other steps or samplers"
                if name in names:
                    made = f"with {as_typed(name)} {before.get(name)}, not {value}"
                raise UsageError(f"--out {out}: it was made {made}; give another folder")
    write_json(file, settings)
    return settings


@contextmanager
def alone(out):
    """A block of which there is one at a time for a folder. Raises UserError beside another."""
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--out {out}: another ladder.py is at work there") from error
        yield


@contextmanager
def heeded():
    """A list of the signals that came meanwhile, which would end this process: its pieces have to be ended first, and one that
    is just being started would be forgotten."""
    came = []
    before = {number_: signal.signal(number_, lambda came_, frame: came.append(came_)) for number_ in ENDING}
    try:
        yield came
    finally:
        for number_, handler in before.items():
            signal.signal(number_, handler)


def check(args, dataset):
    """Raises UsageError for what cannot be judged."""
    from experiments.rungs import RUNGS

    if unknown := set(args.rungs or ()) - set(RUNGS):
        raise UsageError(f"--rungs {min(unknown)}: choose from {', '.join(RUNGS)}")
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError(f"--seeds {' '.join(map(str, args.seeds))}: one of them stands there twice")
    if dataset.encoded or len(dataset.classes) < 2:
        raise UsageError(f"--data-path {args.data_path}: the judge tells classes apart: give images, of two classes or more")
    if args.samples < 2 * len(dataset.classes):
        raise UsageError(f"--samples {args.samples}: two of each of {len(dataset.classes)} classes are the least")


def main(args):
    import torch

    from data.sources import open_dataset
    from experiments.page import write_page
    from experiments.rungs import RUNGS

    args.data_path = args.data_path if args.data_path == DIGITS else str(Path(args.data_path).resolve())
    check(args, open_dataset(args.data_path, args.image_size))
    rungs, started = {name: rung for name, rung in RUNGS.items() if name in (args.rungs or RUNGS)}, time.time()
    out = writable_folder(Path(args.out).resolve(), "--out")
    writable_folder(out / "logs", "--out")
    at_once = args.jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    with alone(out):
        settings = remember(args, out)
        each = f"{len(args.seeds)} seeds each, {args.images:,} images a training"
        print(f"{len(rungs)} steps of the ladder, {each}; {at_once} at once", flush=True)
        stages = pieces(args, rungs, out)
        with heeded() as signals:
            for stage, commands in stages.items():
                work(stage, commands, out, at_once, signals)
        page = Path(args.page) if args.page else out / "ladder.md"
        names = [piece for commands in stages.values() for piece in commands]
        write_page(page, out, settings, rungs, args.seeds, names, at_once)
    print(f"{page}: written after {shown(time.time() - started)}")
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "ladder.py")
