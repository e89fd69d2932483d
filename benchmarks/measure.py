"""The stop-watches: of benchmark.py, which times pieces of work by turns, with their memory, a table and a .json; of gpu.py."""

import gc
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from tqdm import tqdm

from common.atomic import write_json
from common.machine import PeakMemory, matrix_peak, synchronize
from common.precision import set_precision

COLUMNS = "| {:11} | {:29} | {:>8} | {:>9} | {:>8} | {:>10} | {:>5} |"


@dataclass(frozen=True)
class Setting:
    """How a network runs: precision of its weights (of the products alone in training), compiled or not."""

    name: str
    precision: str = "fp32"
    compile: bool = False
    freezing: bool = False  # inductor may rearrange the weights, which are then constants

    @property
    def dtype(self):
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


PLAIN = Setting("eager float32")
TF32 = Setting("tf32", "tf32")
BF16 = Setting("bf16", "bf16")
COMPILED = Setting("compile", compile=True)
FAST = Setting("bf16 + compile", "bf16", compile=True)
FROZEN = Setting("bf16 + compile + freezing", "bf16", compile=True, freezing=True)


def compiled(function, setting):
    """The function as the setting wants it, for one shape of its inputs."""
    if not setting.compile:
        return function
    return torch.compile(function, dynamic=False, options={"freezing": True} if setting.freezing else None)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {torch.backends.cpu.get_cpu_capability()}" if names else platform.machine()


class Stopwatch:
    """Times pieces of work in turns on one device, prints a line for each, and keeps path's .json up to date.

    quick: a single turn and small matrices, to see that all runs.
    """

    def __init__(self, device, path, settings, quick):
        self.device, self.path, self.quick = device, path, quick
        self.progress = tqdm(disable=None, bar_format="{desc}{n_fmt} turns, {elapsed}")
        machine = dict(device=device_name(device), threads=torch.get_num_threads(), torch=torch.__version__)
        self.content = dict(machine=machine, settings=settings, peaks={}, results=[])
        self._print(", ".join(f"{name} {value}" for name, value in machine.items()))
        sizes = [512] if quick else [2048, 4096, 8192] if device.type == "cuda" else [1024, 2048, 3072, 4096]
        for precision in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16"):
            set_precision(precision, device)
            self.content["peaks"][precision] = peak = matrix_peak(device, precision, sizes, turns=8, seconds=60)
            self._print(f"matrix peak {precision}: {peak / 1e12:.3f} TFLOP/s")
        self._print("\n" + COLUMNS.format("work", "setting", "seconds", "images/s", "of peak", "memory, MB", "ratio"))
        self._print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")

    def _print(self, line):
        self.progress.write(line, file=sys.stdout)
        sys.stdout.flush()

    def seconds(self, work, setting=PLAIN):
        set_precision(setting.precision, self.device)
        synchronize(self.device)
        started = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - started

    def compare(self, section, works, images=None, flops=None, before=None, budget=60):
        """Time each of works, {Setting: function}, by turns, and add a line for each; the first is what the ratios are to.

        images, flops: of one call. before: {Setting: function}, called untimed before the work. Turns go on for budget
        seconds, but are 3 at least and 20 at most; the first call of each, which compiles, is not timed.
        """
        before, memory, turns = before or {}, {}, []
        for setting, work in works.items():
            self.progress.set_description_str(f"{section}, {setting.name}: ")
            before.get(setting, bool)()
            set_precision(setting.precision, self.device)
            work()
            peak = PeakMemory(self.device)
            work()
            memory[setting] = peak.read()
        started = time.time()
        while len(turns) < (1 if self.quick else 3) or (time.time() - started < budget and len(turns) < 20 and not self.quick):
            turn = {}
            for setting, work in works.items():
                before.get(setting, bool)()
                turn[setting] = self.seconds(work, setting)
            turns.append(turn)
            self.progress.update()
        plain = next(iter(works))
        for setting in works:
            seconds = statistics.median(turn[setting] for turn in turns)
            ratio = statistics.median(turn[plain] / turn[setting] for turn in turns)
            self.add(section, setting, seconds, memory[setting], images, flops, ratio, len(turns))
        gc.collect()

    def add(self, section, setting, seconds, memory, images=None, flops=None, ratio=None, turns=1):
        peak = self.content["peaks"][setting.precision]
        row = dict(section=section, setting=setting.name, turns=turns, seconds=seconds, memory_bytes=memory, ratio=ratio)
        row["images_per_second"] = images / seconds if images else None
        row["share_of_peak"] = flops / seconds / peak if flops else None
        self.content["results"].append(row)
        write_json(self.path, self.content)
        show = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
        rate, share = show(row["images_per_second"], ",.1f"), show(row["share_of_peak"], ".0%")
        cells = (show(seconds, ".4f"), rate, share, show(memory / 1e6, ",.1f"), show(ratio, ".2f"))
        self._print(COLUMNS.format(section, setting.name, *cells))


@dataclass
class Bench:
    """Where gpu.py's work is done; quick: in miniature, to see that all runs."""

    device: torch.device
    quick: bool = False

    @property
    def precisions(self):
        return ("fp32", "tf32", "bf16") if self.device.type == "cuda" else ("fp32", "bf16")

    @property
    def default(self):
        """The precision that the scripts take by themselves."""
        return "tf32" if self.device.type == "cuda" else "fp32"

    def small(self, large, small):
        return small if self.quick else large

    def seconds(self, work, turns=1):
        """Median of a call's time."""
        times = []
        for _ in range(turns):
            synchronize(self.device)
            started = time.perf_counter()
            work()
            synchronize(self.device)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def forget(self):
        """What the last setting has left in memory, and in the compiler."""
        torch._dynamo.reset()
        counters.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
