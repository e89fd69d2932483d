import os
import signal
from types import SimpleNamespace

import pytest
import torch

from common.distributed import World
from common.errors import UsageError, UserError
from common.recipe import Recipe
from common.signals import Stop
from common.unreadable import DataGuard
from data.tolerant import Tolerant
from train import make_parser
from training.draws import draw_step
from training.ema import update_ema
from training.guards import NumberGuard
from training.identity import check_data, differences
from training.optimizer import learning_rate, load_optimizer, step_of

ALONE = World(0, 1, torch.device("cpu"))


def test_draws_of_a_step_are_a_function_of_seed_and_step():
    a, b = (draw_step(0, 7, 8, (4, 2, 2), torch.device("cpu")) for _ in range(2))
    c = draw_step(0, 8, 8, (4, 2, 2), torch.device("cpu"))
    for x, y, z in zip(a, b, c):
        assert torch.equal(x, y) and not torch.equal(x, z)
    assert a.noise.shape == a.posterior.shape == (8, 4, 2, 2) and not torch.equal(a.noise, a.posterior)


@pytest.mark.parametrize("schedule, step, expected", [
    ("constant", 0, 0.1), ("constant", 9, 1.0), ("constant", 500, 1.0),
    ("cosine", 10, 1.0), ("cosine", 55, 0.5), ("cosine", 100, 0.0), ("cosine", 4, 0.5),
])  # fmt: skip
def test_learning_rate(schedule, step, expected):
    flags = make_parser().parse_args(["--data-path", "x", "--warmup-steps", "10", "--lr-schedule", schedule])
    assert learning_rate(step, 1.0, flags, 100) == pytest.approx(expected, abs=1e-12)


def test_ema_is_the_weighted_mean():
    ema, weights = [torch.zeros(3)], [torch.ones(3)]
    for _ in range(10):
        update_ema(ema, weights, 0.9)
    assert torch.allclose(ema[0], torch.full((3,), 1 - 0.9**10))


def test_differences_are_named():
    args = make_parser().parse_args(["--data-path", "x", "--lr", "1e-3", "--max-steps", "7"])
    saved = vars(args) | {"lr": 1e-4, "grad_clip": 1.0, "max_steps": 5, "log_every": 3}
    assert differences(args, saved) == "--lr 0.0001 (now 0.001), --grad-clip 1.0 (now 0.0)"
    assert differences(args, {}) == "--lr 0.0001 (now 0.001)"  # what a run of ours does not say came later
    assert differences(args, {}, whole=False) == differences(args, saved | {"lr": 1e-3, "grad_clip": 0.0}) == ""
    assert differences(args, saved | {"lr": 1e-3, "grad_clip": 0.0, "ema_decay": [0.9999]}) == ""


def one_step(weight, optimizer, guard, step, gradient, loss=1.0):
    weight.grad = torch.tensor([gradient])
    good = guard.watch(step, torch.tensor(loss), torch.tensor(gradient))
    if guard.may_step():
        optimizer.step()
    return good.item()


def test_a_bad_step_never_reaches_the_weights():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=True)
    guard, warnings = NumberGuard(optimizer, 1, torch.device("cpu")), []
    check = lambda: guard.check(ALONE, lambda step: [step * 10], warnings.append)  # noqa: E731
    assert one_step(weight, optimizer, guard, 1, 1.0) == 1.0
    check()
    before, moment = weight.item(), optimizer.state[weight]["exp_avg"].item()
    assert before != 1.0 and not warnings
    assert one_step(weight, optimizer, guard, 2, float("nan"), float("inf")) == 0.0
    assert weight.item() == before and optimizer.state[weight]["exp_avg"].item() == moment
    check()
    check()
    assert len(warnings) == 1 and "step 2: rank 0, images [20] (1 of 1" in warnings[0]
    one_step(weight, optimizer, guard, 3, 1.0)
    assert weight.item() != before
    one_step(weight, optimizer, guard, 4, float("inf"))
    one_step(weight, optimizer, guard, 5, float("nan"))  # the first one too many is the one to name
    with pytest.raises(UserError, match=r"step 4: every rank's gradient"):
        check()


def adamw_after_a_step(**settings):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, **settings)
    weight.grad = torch.ones(2)
    optimizer.step()
    return optimizer.state_dict()


def test_an_unfused_optimizer_state_goes_where_fused_kernels_read_it():
    """On the device of the weights, its step counts too, which other kernels keep on the host."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.param_groups[0].update(fused=True, foreach=None)  # which torch would refuse to make on this device
    load_optimizer(optimizer, {"opt": adamw_after_a_step(foreach=True)}, model, "c.pt")
    assert optimizer.param_groups[0]["fused"] and not optimizer.param_groups[0]["foreach"]
    assert {name: value.device.type for name, value in optimizer.state[model.weight].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )


@pytest.mark.parametrize("state", [{}, {"state": {}, "param_groups": []}, {"state": {}, "param_groups": [{"params": 3}]}, []])
def test_a_damaged_optimizer_state_is_named(state):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"c\.pt: its optimizer state"):
        load_optimizer(torch.optim.AdamW(model.parameters(), fused=True), {"opt": state}, model, "c.pt")


class Images(torch.utils.data.Dataset):
    def __init__(self, count, broken):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{index}.jpg"

    def __getitem__(self, index):
        if index in self.broken:
            raise UserError(f"cannot read {index}.jpg")
        return torch.tensor(index), index % 3


def test_an_unreadable_image_is_replaced_by_the_next_and_named_once():
    dataset, warnings = Images(300, {4, 5, 299}), []
    tolerant, guard = Tolerant(dataset), DataGuard(dataset, warnings.append)
    assert tolerant[3][2] == 3 and tolerant[4] == (torch.tensor(6), 0, 6) and tolerant[299][2] == 0
    guard.check([3, 4, 299], torch.tensor([3, 6, 0]))
    guard.check([4], torch.tensor([6]))
    assert [line.split()[-1] for line in warnings] == ["4.jpg", "299.jpg"]
    guard.check([5], torch.tensor([6]))
    with pytest.raises(UserError, match=r"4 of 300 images cannot be read, more than 1 % and more than 3; one is 7\.jpg"):
        guard.check([7], torch.tensor([8]))
    with pytest.raises(UserError, match="100 images in a row"):
        Tolerant(Images(200, set(range(150))))[0]


def test_other_data_are_refused():
    recipe = Recipe("SiT-T/2", {}, 32, classes=["cat", "dog"])
    data = lambda *classes: SimpleNamespace(classes=list(classes))  # noqa: E731
    with pytest.raises(UserError, match="dog is missing"):
        check_data(data("cat"), recipe, None, "c.pt")
    with pytest.raises(UserError, match="emu is new"):
        check_data(data("cat", "dog", "emu"), recipe, None, "c.pt")
    check_data(data("cat", "dog"), recipe, None, "c.pt")
    dataset = Images(300, ())
    dataset.classes = ["cat", "dog"]
    check_data(dataset, recipe, 300, "c.pt")
    with pytest.raises(UserError, match=r"300 images, but c\.pt was trained on 1,281,167"):
        check_data(dataset, recipe, 1_281_167, "c.pt")


def test_the_first_signal_is_noted_and_a_second_ctrl_c_leaves_at_once():
    stop = Stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.received == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_usage_errors_are_a_kind_of_user_error():
    assert UsageError.exit_code == 2 and UserError.exit_code == 1 and issubclass(UsageError, UserError)


@pytest.mark.parametrize("step, expected", [(5, 5), (torch.tensor(5), 5), (torch.tensor([5.0]), 5)])
def test_a_step_of_any_kind(step, expected):
    assert step_of({"step": step}) == expected


@pytest.mark.parametrize("step", [torch.tensor([5, 6]), "x", None, float("nan"), float("inf")])
def test_a_step_that_is_no_number_is_named(step):
    with pytest.raises(UserError, match=r"--ckpt some.pt: its step is no whole number"):
        step_of({"step": step}, "some.pt")
