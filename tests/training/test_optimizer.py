"""The optimizer's room: the contract with the guard against bad numbers, for any optimizer, and what survives a resume."""

from types import SimpleNamespace

import pytest
import torch

from cli import DIGITS, call, one_line
from common.checkpoint import load_checkpoint, save_checkpoint
from common.distributed import World
from common.errors import UserError
from training import trainer
from training.guards import NumberGuard
from training.optimizer import holds_contract, load_optimizer, make_optimizer, step_of

CPU = torch.device("cpu")
OPTIMIZERS = {
    "AdamW, fused": (True, lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "SGD, fused": (True, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True)),
    "AdamW": (False, lambda p: torch.optim.AdamW(p, lr=0.1)),
    "AdamW, foreach": (False, lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "SGD": (False, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "RMSprop": (False, lambda p: torch.optim.RMSprop(p, lr=0.1)),
    "Muon": (False, lambda p: torch.optim.Muon(p, lr=0.1)),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Quirky(torch.optim.Optimizer):
    """A user's own, whose constructor is its own too."""

    def __init__(self, params, factor):
        super().__init__(params, {})
        self.factor = factor

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(self.factor * p.grad)


def make(name):
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        return None, None, None  # torch before 2.9
    weight = torch.nn.Parameter(torch.ones(3, 2))
    holds, build = OPTIMIZERS[name]
    return weight, build([weight]), holds


def states(optimizer):
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for s in optimizer.state.values()
        for key, value in s.items()
    }


@every_optimizer
def test_a_bad_step_changes_neither_weights_nor_state(name):
    weight, optimizer, holds = make(name)
    if weight is None:
        return
    guard = NumberGuard(optimizer, 5, CPU)
    assert guard.waits is not holds

    def step(number, gradient):
        weight.grad = torch.full_like(weight, gradient)
        good = guard.watch(number, torch.tensor(1.0), weight.grad.norm())
        if guard.may_step():
            optimizer.step()
        return good.item()

    assert step(1, 0.5) == 1.0
    before, state = weight.detach().clone(), states(optimizer)
    for number, bad in ((2, float("nan")), (3, float("inf"))):
        assert step(number, bad) == 0.0
        assert torch.equal(weight, before)
        assert all(torch.equal(states(optimizer)[key], value) for key, value in state.items())
    assert step(4, 0.5) == 1.0 and not torch.equal(weight, before)
    warnings = []
    guard.check(World(0, 1, CPU), lambda number: [number], warnings.append)
    assert "step 3" in warnings[0] and "(2 of 5" in warnings[0]


def test_an_optimizer_that_cannot_be_tried_waits():
    weight = torch.nn.Parameter(torch.ones(2))
    assert not holds_contract(Quirky([weight], 0.1), CPU)


def test_a_claim_is_tried_and_not_believed():
    class Liar(torch.optim.SGD):
        _step_supports_amp_scaling = True

    assert not holds_contract(Liar([torch.nn.Parameter(torch.ones(2))], lr=0.1), CPU)


def groups_of(model, lr=1e-3):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "lr": lr / 10, "weight_decay": 0.0}], lr=lr, fused=True)


def stepped(model, optimizer):
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.1 * (i + 1))
    optimizer.step()
    return optimizer


def test_groups_of_parameters_survive():
    model, twin = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    content = {"opt": stepped(model, groups_of(model)).state_dict()}
    optimizer = groups_of(twin)
    load_optimizer(optimizer, content, twin, "c.pt")
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    torch.testing.assert_close(optimizer.state[twin.bias]["exp_avg"], torch.full((2,), 0.02))
    one = torch.optim.AdamW(twin.parameters(), fused=True)
    with pytest.raises(UserError, match=r"c\.pt: its optimizer state .* \(groups of 1, 1 parameters, not of 2"):
        load_optimizer(one, content, twin, "c.pt")


def test_moments_never_go_to_another_weight():
    """The same numbers of groups and parameters, but not the same parameters in them."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    a, b, c, d = model.parameters()
    build = lambda *groups: torch.optim.AdamW([{"params": group} for group in groups], fused=True)  # noqa: E731
    content = {"opt": stepped(model, build([a], [b, c, d])).state_dict()}
    with pytest.raises(UserError, match="groups of 1, 3 parameters, not of 2, 2"):
        load_optimizer(build([a, b], [c, d]), content, model, "c.pt")
    with pytest.raises(UserError, match=r"exp_avg of shape \(2, 2\) for a weight of shape \(2,\)"):
        load_optimizer(build([b], [a, c, d]), content, model, "c.pt")


def test_a_group_of_its_own_kernels_is_asked_each_step():
    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "fused": False}]
    assert not holds_contract(torch.optim.AdamW(groups, fused=True), CPU)


def test_the_state_of_another_optimizer_is_refused_by_name():
    model = torch.nn.Linear(2, 2)
    content = {"opt": stepped(model, torch.optim.SGD(model.parameters(), lr=0.1)).state_dict(), "optimizer": "SGD"}
    with pytest.raises(UserError, match="trained with SGD, this run has AdamW"):
        load_optimizer(torch.optim.AdamW(model.parameters(), fused=True), content, model, "c.pt")


@pytest.mark.parametrize("content, step", [
    ({"step": 7, "opt": {"state": {}}}, 7),
    ({"opt": {"state": {0: {"step": torch.tensor(5.0)}}}}, 5),
    ({"opt": {"state": {0: {"momentum_buffer": torch.ones(2)}}}}, 0),
    ({"opt": {"state": {}}}, 0),
    ({"opt": {}}, 0),
    ({}, 0),
])  # fmt: skip
def test_the_step_of_a_checkpoint(content, step):
    assert step_of(content) == step


SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--lr", 1e-3]
SMALL += ["--log-every", 1, "--sample-every", 1000]


@pytest.fixture
def two_groups(monkeypatch):
    """train.py with plain SGD on two groups of parameters, as a user would have it."""

    def build(objective, flags):
        trained = [p for p in objective.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if p.dim() > 1]}, {"params": [p for p in trained if p.dim() == 1], "lr": 0.5}]
        return torch.optim.SGD(groups, lr=flags.lr, momentum=0.9)

    monkeypatch.setattr(trainer, "make_optimizer", build)


def test_two_groups_of_plain_sgd_resume_bit_for_bit(two_groups, tmp_path, capsys):
    schedule = ["--lr-schedule", "cosine", "--max-steps", 4, "--ckpt-every", 2]
    straight = call(capsys, "train", *SMALL, *schedule, "--results-dir", tmp_path / "a")
    assert straight.code == 0, straight.err
    assert "SGD does not skip bad steps by itself" in straight.out
    half = next(tmp_path.glob("a/*/checkpoints/0000002.pt"))
    again = call(capsys, "train", *SMALL, *schedule, "--results-dir", tmp_path / "b", "--ckpt", half)
    assert again.code == 0, again.err
    ours, theirs = (load_checkpoint(next(tmp_path.glob(f"{name}/*/checkpoints/0000004.pt"))) for name in "ab")
    assert all(torch.equal(ours["model"][key], value) for key, value in theirs["model"].items())
    lrs = [group["lr"] for group in ours["opt"]["param_groups"]]
    assert lrs[1] == pytest.approx(500 * lrs[0])  # each from its own peak along the schedule
    del theirs["step"]
    save_checkpoint(theirs, tmp_path / "no_step.pt")
    result = call(capsys, "train", *SMALL, *schedule, "--results-dir", tmp_path / "c", "--ckpt", tmp_path / "no_step.pt")
    assert result.code == 0 and "no_step.pt, step 0" in result.out, result.err


def test_bad_numbers_never_reach_the_weights_of_plain_sgd(two_groups, tmp_path, capsys, monkeypatch):
    draw_step = trainer.draw_step

    def poisoned(seed, step, *more):
        draws = draw_step(seed, step, *more)
        draws.noise[0] = float("nan") if step == 2 else draws.noise[0]
        return draws

    monkeypatch.setattr(trainer, "draw_step", poisoned)
    flags = [*SMALL, "--max-steps", 4, "--results-dir", tmp_path]
    one_line(call(capsys, "train", *flags), 1, "non-finite loss or gradient at step 2")
    result = call(capsys, "train", *flags, "--skip-nonfinite", 1)
    assert result.code == 0, result.err
    (path,) = tmp_path.glob("*/checkpoints/*.pt")
    assert all(value.isfinite().all() for value in load_checkpoint(path)["model"].values())


def test_the_default_is_the_papers():
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model, SimpleNamespace(lr=1e-4))
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (1e-4, (0.9, 0.999), 0.0, True)
    assert holds_contract(optimizer, CPU)
