"""Every test here runs on the GPU where there is one, and shows on the CPU what that can show."""

import re
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from train import make_parser
from train_utils import transport_settings

CUDA = torch.cuda.is_available()
PRECISIONS = ["fp32", pytest.param("tf32", marks=pytest.mark.skipif(not CUDA, reason="TF32 is a GPU's")), "bf16"]
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 3e-2}  # of a network's output, relative


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if CUDA else "cpu")


def error(ours, theirs):
    """Largest difference of two tensors over the largest number of the second."""
    ours, theirs = (torch.as_tensor(x).double().cpu() for x in (ours, theirs))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@contextmanager
def training(folder, *flags):
    """The Trainer and the Monitor of a run of train.py with these flags, ready for its first step."""
    from training.monitor import Monitor
    from training.run import begin_run, plan_run
    from training.trainer import Trainer

    args = make_parser().parse_args([*map(str, flags), "--results-dir", str(folder)])
    run = plan_run(args, transport_settings(args))
    begin_run(run)
    with Monitor(run) as monitor:
        trainer = Trainer(run, monitor)
        monitor.begin(trainer)
        with trainer.reading():
            yield trainer, monitor
        monitor.finish("over")


def held(trainer):
    """Copies of what this process holds of weights, averages and the optimizer's state."""
    from training.tensors import own

    tensors = [*trainer.objective.parameters(), *(p for model in trainer.averages.models.values() for p in model.parameters())]
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [own(tensor).clone() for tensor in (*tensors, *states)]


class Waits(TorchDispatchMode):
    """Fails where a number is read from a tensor, for which a GPU would be waited."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not re.match(r"aten\.(_local_scalar_dense|nonzero|equal|masked_select|unique)", str(function)), function
        return function(*args, **kwargs or {})


@contextmanager
def no_waiting():
    """A block in which nothing may wait for the device: as CUDA itself tells, or on a CPU, by the operators that read."""
    if not CUDA:
        with Waits():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
