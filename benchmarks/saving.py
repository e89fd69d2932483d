"""What the steps wait for a checkpoint that is written in place, and behind them, by turns: python benchmarks/saving.py

On the digits' pixels. Steps go on until a file that is written behind them is there, and tell what that costs them.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from common.checkpoint import save_checkpoint
from train_utils import Parser, positive_int, run, transport_settings
from training.monitor import Monitor
from training.run import begin_run, plan_run
from training.trainer import Trainer


def measure(trainer, monitor, saves):
    in_place, behind, alone, beside = taken = [[] for _ in range(4)]

    def timed(seconds, call):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)

    step = lambda: trainer.take_step(*trainer.next_batch())[0]["loss"].item()  # noqa: E731
    step()  # the optimizer's state
    for _ in range(saves):
        timed(in_place, lambda: save_checkpoint(trainer.content(), monitor.folder.checkpoint_path(trainer.step)))
        timed(alone, step)
        timed(behind, lambda: monitor.save(trainer))
        while not monitor.saving.writer.last["checkpoints"].done():
            timed(beside, step)
    for name, seconds in zip(("wait in place", "wait behind", "a step alone", "a step during a write"), taken):
        print(f"{name:<24}{median(seconds):.3f} s")
    print(f"median ratio of {saves} pairs of waits: {median(one / other for one, other in zip(behind, in_place)):.3f}")


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data-path", "builtin:digits", "--image-size", "32", "--vae", "none", "--model", args.model]
        flags += ["--global-batch-size", str(args.batch), "--num-workers", "0", "--results-dir", folder, "--keep-last", "1"]
        flags = train.make_parser().parse_args(flags)
        begin_run(planned := plan_run(flags, transport_settings(flags)))
        with Monitor(planned) as monitor:
            monitor.begin(trainer := Trainer(planned, monitor))
            with trainer.reading():
                measure(trainer, monitor, args.saves)


if __name__ == "__main__":
    parser = Parser(prog="benchmarks/saving.py", description="What the steps wait for a checkpoint.")
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--saves", type=positive_int, default=10, help="of each kind")
    parser.add_argument("--batch", type=positive_int, default=2, help="images a step")
    run(lambda: main(parser.parse_args()), "benchmarks/saving.py")
