"""What this repository reaches on a GPU, in one command and less than 20 minutes: python benchmarks/gpu.py

Each item is a process of its own with a time limit, so that one that fails, hangs or runs out of memory costs no other; what
it had measured by then is kept. Results are added to gpu.json, run after run: {"runs": [{"date", "machine", "quick",
"items": {name: {"ended", "seconds", "rows": [{"setting", "figures"}]}}}]}. gpu.md has the tables of the latest.

    --quick --device cpu      all of it in miniature, anywhere
    --item NAME               one item in this process, as lines of JSON
"""

import contextlib
import getpass
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.atomic import writable_folder, write_atomically, write_json
from common.errors import UsageError, UserError
from train_utils import Parser, run

LIMITS = {  # seconds
    "peaks": 40,
    "train-256": 110,
    "train-256-whole": 140,
    "train-512": 110,
    "train-512-whole": 120,
    "ddp": 150,
    "shards": 100,
    "sample-XL": 110,
    "sample-S": 70,
    "writing": 20,
    "dopri5": 60,
    "autoencoder": 45,
    "manifold": 30,
    "checkpoint": 60,
    "profile": 35,
}


def items():
    """{name: function of a Bench that yields (setting, {figure: number})}, in seconds of imports."""
    from functools import partial

    import gpu_sampling as sampling
    import gpu_training as training

    return {
        "peaks": training.peaks,
        "train-256": partial(training.steps, image_size=256, batch=32, compiled=(None, "blocks")),
        "train-256-whole": partial(training.steps, image_size=256, batch=32, compiled=("whole",)),
        "train-512": partial(training.steps, image_size=512, batch=16, compiled=(None, "blocks")),
        "train-512-whole": partial(training.steps, image_size=512, batch=16, compiled=("whole",)),
        "ddp": training.ddp,
        "shards": training.shards,
        "sample-XL": partial(sampling.guided, name="SiT-XL/2"),
        "sample-S": partial(sampling.guided, name="SiT-S/2"),
        "writing": sampling.writing,
        "dopri5": sampling.dopri5,
        "autoencoder": sampling.autoencoder,
        "manifold": sampling.manifold,
        "checkpoint": training.checkpoint,
        "profile": training.profile,
    }


def do_item(args):
    """One item in this process."""
    import torch
    from measure import Bench

    for setting, figures in items()[args.item](Bench(torch.device(args.device), args.quick)):
        print(json.dumps(dict(setting=setting, figures=figures)), flush=True)


@contextlib.contextmanager
def deferred():
    """Signals that end the benchmark wait for the block's end: a process that is being started must be known, to be ended."""
    numbers, waiting = (signal.SIGINT, signal.SIGTERM), []
    kept = {number: signal.signal(number, lambda received, _: waiting.append(received)) for number in numbers}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
    for number in waiting:
        signal.raise_signal(number)


def do_in_process(name, args):
    """One item in a process of its own: {"ended", "seconds", "rows"}. Its lines are shown as they come."""
    command = [sys.executable, __file__, "--item", name, "--device", args.device, *["--quick"] * args.quick]
    started, rows, ended = time.time(), [], "done"
    # Its files, the compiler's too, so that each first step compiles; beside the results, since /tmp may be in memory.
    scratch = tempfile.TemporaryDirectory(dir=args.out.resolve().parent, prefix=".gpu-")
    with scratch as folder, tempfile.TemporaryFile("w+") as errors:
        # In miniature, where no one looks at the time to compile, it is the compiler's usual cache.
        usual = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
        compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", usual) if args.quick else os.path.join(folder, "compiled")
        environment = os.environ | dict(TMPDIR=folder, TORCHINDUCTOR_CACHE_DIR=compiled)
        settings = dict(stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env=environment)

        def end():
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself just now
                os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(LIMITS[name], end)
        try:
            with deferred():
                child = subprocess.Popen(command, **settings)
            timer.start()
            for line in child.stdout:
                if line.startswith("{"):
                    rows.append(json.loads(line))
                    print(f"  {in_words(rows[-1])}", flush=True)
            code = child.wait()
        except BaseException:
            end()
            child.wait()
            raise
        finally:
            timer.cancel()
        if code == -signal.SIGKILL and time.time() - started >= LIMITS[name]:
            ended = f"stopped at its limit of {LIMITS[name]} s"
        elif code:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit code {code}"]
            ended = f"failed: {said[-1]}"
            print("\n".join(said[-20:]), file=sys.stderr, flush=True)
    return dict(ended=ended, seconds=round(time.time() - started, 1), rows=rows)


def in_words(row):
    return f"{row['setting']}: " + ", ".join(f"{name} {value:,.4g}" for name, value in row["figures"].items())


def tables(measured):
    """Markdown of a run."""
    lines = [f"# {measured['machine']}", "", f"{measured['date']}{', in miniature' if measured['quick'] else ''}"]
    for name, item in measured["items"].items():
        lines += ["", f"## {name}", "", f"{item['seconds']} s, {item['ended']}"]
        columns = list(dict.fromkeys(figure for row in item["rows"] for figure in row["figures"]))
        if columns:
            lines += ["", f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
        for row in item["rows"]:
            cells = [f"{row['figures'][c]:,.4g}" if c in row["figures"] else "" for c in columns]
            lines.append(f"| {row['setting']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def earlier(path):
    """The runs that a .json has already."""
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text())["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out {path}: no file of this benchmark; move it away or name another") from error


def make_parser():
    parser = Parser(prog="gpu.py", description="Measure training and sampling on a GPU.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="where")
    parser.add_argument("--quick", action="store_true", help="in miniature, to see that all runs")
    parser.add_argument("--only", nargs="+", choices=LIMITS, metavar="NAME", help=f"of {', '.join(LIMITS)} (all)")
    parser.add_argument("--item", choices=LIMITS, metavar="NAME", help="one, in this process, as lines of JSON")
    parser.add_argument("--out", default="gpu.json", type=Path, help="the .json, to which is added; its tables are a .md")
    return parser


def main(args):
    import torch
    from measure import device_name

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no GPU that torch can use; --quick --device cpu runs in miniature")
    if args.item:
        do_item(args)
        return 0
    writable_folder(args.out.parent, "--out")
    runs = earlier(args.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of what ends the item's process
    machine = f"{device_name(torch.device(args.device))}, torch {torch.__version__}"
    measured = dict(date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", machine=machine, quick=args.quick, items={})
    names = args.only or list(LIMITS)
    for number, name in enumerate(names, 1):
        print(f"{name} ({number} of {len(names)}, at most {LIMITS[name]} s)", flush=True)
        measured["items"][name] = item = do_in_process(name, args)
        print(f"  {item['seconds']} s, {item['ended']}", flush=True)
        write_json(args.out, {"runs": [*runs, measured]})
        write_atomically(args.out.with_suffix(".md"), lambda file: file.write(tables(measured)), "w")
    print(f"\n{tables(measured)}\n{args.out} and {args.out.with_suffix('.md')} have these numbers")
    failed = [name for name, item in measured["items"].items() if item["ended"].startswith("failed")]
    if failed:
        raise UserError(f"{', '.join(failed)} failed, as said above; the others are there")
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "gpu.py")
