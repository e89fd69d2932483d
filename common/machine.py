"""What the machine reaches and holds: measured, where training/costs.py is on paper."""

import ctypes
import gc
import math
import os
import platform
import time
from pathlib import Path

import torch

FORCED = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"  # which NVIDIA's containers set


def synchronize(device):
    """Wait until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device, precision, sizes=None, turns=20, seconds=0.25):
    """FLOP/s of the best of turns products of square matrices of each of sizes, measured: what a share of peak is of.

    After a first product, which loads what all need, it takes no longer than seconds, whatever the arithmetic, but for the
    last product: sizes rise, and one that would not fit into the time that is left is not begun. precision: fp32, tf32 or
    bf16, of which set_precision has settled the first two.
    """
    dtype, best, until = torch.bfloat16 if precision == "bf16" else torch.float32, 0.0, None
    for size in sizes or ((1024, 8192) if device.type == "cuda" else (128, 512, 1024)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        if until is None:
            a @ b
            synchronize(device)
            until = time.perf_counter() + seconds
        for _ in range(turns):
            synchronize(device)
            started = time.perf_counter()
            if best and started + 2 * size**3 / best > until:
                return best
            a @ b
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def slow_bf16(device, peak=None):
    """One line where bf16 is much slower than fp32, as on CPUs without instructions for it, else None. peak: of bf16, where
    it has been measured."""
    fp32, bf16 = matrix_peak(device, "fp32"), peak or matrix_peak(device, "bf16")
    if fp32 < 1.5 * bf16:  # or near to it: both are measurements
        return None
    times = f"{fp32 / bf16:.3g} times slower in bf16 than in fp32"
    return f"this {device.type} multiplies matrices {times}; --precision fp32 is faster here"


def precision_warning(device, precision, peak=None):
    """One line where a precision is not what its name says here, or slow, else None. peak: where it has been measured."""
    if device.type == "cuda" and precision == "fp32" and os.environ.get(FORCED) == "1":
        return (
            f"{FORCED}=1 is in the environment: PyTorch's own builds do float32 for fp32 all the same, others may not; unset it"
        )
    if device.type == "cpu" and precision == "bf16":  # which no GPU is slow in
        return slow_bf16(device, peak)
    return None


def processor():
    """What this machine computes with, by the name that its maker gave."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def trim_memory():
    """Hand what the allocator of host memory holds, but nobody uses, back to the system. Raises OSError or AttributeError where
    there is no glibc."""
    ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """The most bytes in use since it was made, above what was in use then: by tensors on a GPU, else by the process.

    The latter is known where Linux tells it, elsewhere nan, and counts whole pages that the allocator may have held before.
    """

    def __init__(self, device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        try:
            trim_memory()
            Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
            self.before = self._resident("VmRSS")
        except (OSError, AttributeError):  # no glibc, or no /proc to write to
            self.before = math.nan

    @staticmethod
    def _resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))

    def read(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return self.before if math.isnan(self.before) else self._resident("VmHWM") - self.before
