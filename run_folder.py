"""A training run on disk: log.txt, metrics.csv, loss.png, checkpoints/ and samples/."""

import csv
import json
import logging
import os
import re
import sys
import time
from datetime import datetime
from pathlib import Path

import matplotlib
from tqdm import tqdm

from atomic import write_atomically, write_json
from checkpoint import load_checkpoint
from errors import UserError
from train_utils import writable_folder
from training import IDENTITY

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = ("step", "loss", "grad_norm", "lr", "images_per_second")


class TqdmHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class RunFolder:
    """results/NNN-NAME, with the next free number. Only the main process makes and writes it."""

    def __init__(self, path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.samples.mkdir(exist_ok=True)
        self.plotted = 0.0

    @classmethod
    def new(cls, results_dir, name):
        results = writable_folder(results_dir, "--results-dir")
        numbers = [int(match[1]) for entry in results.iterdir() if (match := re.match(r"(\d{3,})-", entry.name))]
        return cls(results / f"{max(numbers, default=-1) + 1:03d}-{name}")

    @classmethod
    def find(cls, results_dir, name):
        """Existing runs of that name, the newest first."""
        folders = [path for path in Path(results_dir).glob(f"*-{name}") if re.fullmatch(r"\d{3,}", path.name.split("-")[0])]
        return [cls(path) for path in sorted(folders, key=lambda path: int(path.name.split("-")[0]), reverse=True)]

    def write_flags(self, args):
        """Record what the run is, before its first checkpoint."""
        write_json(self.path / "flags.json", {key: getattr(args, key) for key in IDENTITY})

    def flags(self):
        """The recorded flags, or None for a folder that has none (a run that was killed before it began)."""
        try:
            return json.loads((self.path / "flags.json").read_text())
        except (OSError, ValueError):
            return None

    def newest_checkpoint(self, warn):
        """(path, content) of the newest whole checkpoint, or (None, None); each damaged one is named and passed over."""
        for path in sorted(self.checkpoints.glob("*.pt"), reverse=True):
            try:
                return path, load_checkpoint(path)
            except UserError as error:
                warn(f"WARNING: skipped a damaged checkpoint: {error}")
        return None, None

    def prune(self, keep_last, keep_every):
        """Remove all checkpoints but the last keep_last and those at multiples of keep_every; None keeps all."""
        if keep_last is None:
            return
        for path in sorted(self.checkpoints.glob("*.pt"))[:-keep_last]:
            if not keep_every or int(path.stem) % keep_every:
                path.unlink(missing_ok=True)

    def rewind(self, step):
        """Forget metrics after step: the run is about to make them again."""
        file = self.path / "metrics.csv"
        if file.exists():
            header, *rows = file.read_text().splitlines()
            kept = [row for row in rows if int(row.split(",")[0]) <= step]
            write_atomically(file, lambda out: out.write("\n".join([header, *kept]) + "\n"), "w")

    def append(self, line):
        """A last line in log.txt, from any process."""
        with open(self.path / "log.txt", "a") as log:
            log.write(f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {line}\n")

    def logger(self):
        """Logs to log.txt and above the progress bar."""
        logger = logging.getLogger(str(self.path))
        logger.setLevel(logging.INFO)
        logger.propagate = False
        for handler, pattern in (
            (logging.FileHandler(self.path / "log.txt"), "[%(asctime)s] %(message)s"),
            (TqdmHandler(), "[%(asctime)s] %(message)s"),
        ):
            handler.setFormatter(logging.Formatter(pattern, datefmt="%Y-%m-%d %H:%M:%S"))
            logger.addHandler(handler)
        return logger

    def start_wandb(self, args):
        """Open a W&B run, as WANDB_KEY, ENTITY and PROJECT say; WANDB_MODE=offline needs no key."""
        import wandb  # slow to import, and few runs want it

        try:
            if os.environ.get("WANDB_KEY"):
                wandb.login(key=os.environ["WANDB_KEY"])
            return wandb.init(
                entity=os.environ.get("ENTITY"),
                project=os.environ.get("PROJECT", "SiT"),
                name=self.path.name,
                dir=self.path,
                config={key: value for key, value in vars(args).items() if key != "given"},
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--wandb: {reason}; set WANDB_KEY, or WANDB_MODE=offline to log without network") from error

    def checkpoint_path(self, step):
        return self.checkpoints / f"{step:07d}.pt"

    def add_metrics(self, **values):
        """Append one row to metrics.csv."""
        file = self.path / "metrics.csv"
        is_new = not file.exists()
        with open(file, "a", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow(values)

    def plot_loss_rarely(self, seconds=30):
        """plot_loss, unless that was a moment ago."""
        if time.time() - self.plotted > seconds:
            self.plot_loss()

    def plot_loss(self):
        """Draw metrics.csv as loss.png: the logged means, and a running mean where there are many."""
        file = self.path / "metrics.csv"
        if not file.exists():
            return
        self.plotted = time.time()
        with open(file) as rows:
            points = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(rows)]
        steps, losses = zip(*points)
        figure, axes = plt.subplots(figsize=(6, 4), dpi=120)
        window = len(losses) // 20
        axes.plot(steps, losses, color="tab:blue", alpha=0.35 if window > 1 else 1, linewidth=1, label="mean since last log")
        if window > 1:
            smooth = [
                sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1]) for i in range(len(losses))
            ]
            axes.plot(steps, smooth, color="tab:blue", label=f"running mean of {window + 1}")
        axes.set(xlabel="step", ylabel="training loss", title=self.path.name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(self.path / "loss.png")
        plt.close(figure)
