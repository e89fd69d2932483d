"""A training run on disk: log.txt, flags.json, tables of what was measured, loss.png, checkpoints/, samples/, and
snapshots/ of the averages by a power of time where there are such."""

import csv
import io
import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from common.atomic import ANY_TEXT, writable_folder, write_atomically, write_json
from common.checkpoint import DamagedFile, load_checkpoint
from common.errors import UserError
from common.flags import flags_of
from common.sharded import is_sharded, open_sharded, remove_sharded, verify

from .identity import END, identity_of
from .plot import save_plot

METRICS, EVALUATIONS, VALIDATIONS = "metrics.csv", "evaluations.csv", "validations.csv"
SNAPSHOTS = "snapshots"


class TqdmHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def by_step(folder):
    """{step: file} of a folder, in the order of their steps; files of other names are not ours."""
    steps = {int(path.stem): path for path in folder.glob("*.pt") if path.stem.isdecimal()}
    return dict(sorted(steps.items()))  # as text, step 10,000,000 would come before step 9,999,999


def recorded_flags(path):
    """The flags that a run's folder says it was made with, or None where there are none: it is no run, or never began."""
    try:
        return json.loads((path / "flags.json").read_text())
    except (OSError, ValueError):
        return None


class RunFolder:
    """results/NNN-NAME, with the next free number. Only the main process makes and writes it."""

    def __init__(self, path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.snapshots = self.path / SNAPSHOTS  # made with the first one
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

    def write_flags(self, flags, total_steps):
        """Record what the run is and where it shall end, before its first checkpoint."""
        write_json(self.path / "flags.json", identity_of(flags) | {END: total_steps})

    def flags(self):
        """The recorded flags, or None for a folder that has none (a run that was killed before it began)."""
        return recorded_flags(self.path)

    def saved(self):
        """{step: checkpoint} in the order of their steps: a file, or a folder that many processes wrote; the file if both."""
        folders = (path for path in self.checkpoints.iterdir() if path.name.isdecimal() and is_sharded(path))
        return dict(sorted(({int(path.name): path for path in folders} | by_step(self.checkpoints)).items()))

    def is_finished(self):
        return max(self.saved(), default=-1) >= self.flags()[END]

    def newest_checkpoint(self, warn):
        """(path, content) of the newest whole checkpoint, or (None, None); each damaged one is named and passed over. Tensors
        of a folder's content are on the meta device, for each process to read its own (common/sharded.py)."""
        while saved := self.saved():
            path = saved[max(saved)]
            try:
                if not path.is_dir():
                    return path, load_checkpoint(path)
                verify(path)
                return path, open_sharded(path)
            except DamagedFile as error:
                damaged = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(damaged, ignore_errors=True)  # a folder takes the name of no other
                path.rename(damaged)  # nor may it count among those to keep
                warn(f"WARNING: skipped a damaged checkpoint, now {damaged.name}: {error}")
        return None, None

    def prune(self, keep_last, keep_every):
        """Remove all checkpoints but the last keep_last and those at multiples of keep_every; None keeps all."""
        if keep_last is None:
            return
        for step, path in list(self.saved().items())[:-keep_last]:
            if not keep_every or step % keep_every:
                path.with_suffix(".pt").unlink(missing_ok=True)
                if path.with_suffix("").is_dir():  # of which scripts/gather.py made the file
                    remove_sharded(path.with_suffix(""))

    def rewind(self, step):
        """Forget what a killed process left half done, and metrics and snapshots after step: the run is about to make them
        again, and the same."""
        for leftover in (*self.checkpoints.glob(".*.tmp"), *self.snapshots.glob(".*.tmp")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for later, snapshot in by_step(self.snapshots).items():
            if later > step:
                snapshot.unlink()
        for file in (self.path / name for name in (METRICS, EVALUATIONS, VALIDATIONS)):
            if file.exists():
                header, *rows = file.read_text().splitlines() or [""]
                whole = [row for row in rows if row.count(",") == header.count(",") and row.split(",")[0].isdigit()]
                text = "\n".join([header, *(row for row in whole if int(row.split(",")[0]) <= step)])
                write_atomically(file, lambda out, text=text: out.write(text + "\n"), "w") if header else file.unlink()

    def append(self, line):
        """A last line in log.txt, from any process."""
        with open(self.path / "log.txt", "a", **ANY_TEXT) as log:
            log.write(f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {line}\n")

    def logger(self):
        """Logs to log.txt and above the progress bar."""
        logger = logging.getLogger(str(self.path))
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logging.raiseExceptions = False  # a full disk must not end the run for want of a log line
        for handler, pattern in (
            (logging.FileHandler(self.path / "log.txt", **ANY_TEXT), "[%(asctime)s] %(message)s"),
            (TqdmHandler(), "[%(asctime)s] %(message)s"),
        ):
            handler.setFormatter(logging.Formatter(pattern, datefmt="%Y-%m-%d %H:%M:%S"))
            logger.addHandler(handler)
        return logger

    def start_wandb(self, flags):
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
                id=self._wandb_id(),
                resume="allow",
                config=flags_of(flags),
            )
        except (wandb.errors.Error, UnicodeError) as error:  # the latter of names that are no UTF-8
            reason = " ".join(str(error).split())
            raise UserError(f"--wandb: {reason}; set WANDB_KEY, or WANDB_MODE=offline to log without network") from error

    def _wandb_id(self):
        """The W&B run of this folder, the same each time it is resumed."""
        file = self.path / "wandb-id.txt"
        if not file.exists():
            write_atomically(file, lambda out: out.write(f"{secrets.token_hex(4)}\n"), "w")
        return file.read_text().strip()

    def checkpoint_path(self, step, suffix=".pt"):
        """suffix: "" for the folder that many processes write."""
        return self.checkpoints / f"{step:07d}{suffix}"

    def snapshot_path(self, step):
        return self.snapshots / f"{step:07d}.pt"

    def add_row(self, name, **values):
        """Append one row to a .csv in the folder; a column that it lacks is added to the rows before."""
        file, columns = self.path / name, []
        if file.exists():
            with open(file) as rows:
                columns = next(csv.reader(rows), [])
        if new := [column for column in values if column not in columns]:
            text, rows = io.StringIO(), self.read_rows(name)
            columns += new
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(file, lambda out: out.write(text.getvalue()), "w")
        with open(file, "a", newline="") as out:
            csv.DictWriter(out, columns).writerow(values)

    def read_rows(self, name):
        """The rows of a .csv in the folder, each a dict of texts; none where there is no file."""
        file = self.path / name
        if not file.exists():
            return []
        with open(file) as rows:
            return list(csv.DictReader(rows))

    def plot_loss_rarely(self, seconds=30):
        """plot_loss, unless that was a moment ago."""
        if time.time() - self.plotted > seconds:
            self.plot_loss()

    def plot_loss(self):
        """Draw the losses, and validations and FIDs if there are any, as loss.png."""
        if rows := self.read_rows(METRICS):
            self.plotted = time.time()
            others = self.read_rows(VALIDATIONS), self.read_rows(EVALUATIONS)
            save_plot(self.path / "loss.png", self.path.name, rows, *others)
