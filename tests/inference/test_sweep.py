"""Which settings a sweep has, and what it says of them."""

import pytest
from PIL import Image

from common.errors import UsageError
from inference import ODE, SDE, Guidance
from inference.sweep import LEVERS, Row, Setting, _lines, best, differences, draw, plan, table, varied

LEVELS = {name: [value] for name, value in vars(Setting("ODE:heun", 50)).items()}


def rows():
    """Guidance 1, 1.5 and 2 at two numbers of steps, two seeds each."""
    settings = plan(LEVELS | dict(num_sampling_steps=[50, 100], cfg_scale=[1.0, 1.5, 2.0]))
    values = [[9.0, 9.2], [2.0, 2.4], [4.0, 4.4], [8.0, 8.6], [2.1, 2.5], [3.0, 3.4]]
    return [Row(each, {"fid": found, "precision": [f / 10 for f in found]}, 98.0) for each, found in zip(settings, values)]


def test_every_combination_is_planned():
    settings = plan(LEVELS | dict(num_sampling_steps=[50, 100], cfg_scale=[1.0, 1.5], weights=["ema", "model"]))
    assert len(settings) == 8 == len(set(settings))
    assert varied(settings) == ["num_sampling_steps", "cfg_scale", "weights"]


def test_one_at_a_time_goes_from_the_first_values():
    settings = plan(LEVELS | dict(num_sampling_steps=[50, 100, 200], cfg_scale=[1.0, 1.5]), one_at_a_time=True)
    assert [(each.num_sampling_steps, each.cfg_scale) for each in settings] == [(50, 1.0), (100, 1.0), (200, 1.0), (50, 1.5)]


def test_what_is_the_same_is_measured_once():
    """Steps of an adaptive solver, and the channels and interval of no guidance, change nothing."""
    assert len(plan(LEVELS | dict(solver=["ODE:dopri5"], num_sampling_steps=[50, 100]))) == 1
    assert len(plan(LEVELS | dict(solver=["ODE:dopri5", "ODE:heun"], num_sampling_steps=[50, 100]))) == 3
    assert len(plan(LEVELS | dict(cfg_scale=[1.0, 2.0], cfg_channels=["3", "all"], guidance_low=[0.0, 0.3]))) == 5
    assert len(plan(LEVELS | dict(solver=["SDE:Euler", "SDE:Euler:sigma"]))) == 1  # which is the default


def test_a_setting_is_the_librarys_objects():
    setting = Setting("SDE:Multistep:SBDM", 60, cfg_scale=2.0, cfg_channels="all", guidance_low=0.3)
    assert setting.solve() == SDE("Multistep", form="SBDM", num_steps=60)
    assert setting.guide() == Guidance(2.0, None, 0.3, 1.0)
    assert Setting("ODE:dopri5", None).solve() == ODE() and Setting("ODE:heun", 50).guide() == Guidance()


@pytest.mark.parametrize("solver", ["heun", "ODE:", "ODE:rk5", "SDE:Euler:cubic", "PDE:heun", "SDE"])
def test_a_solver_that_there_is_not_is_told(solver):
    with pytest.raises(UsageError):
        plan(LEVELS | dict(solver=[solver]))


def test_the_table_marks_the_best_of_each_metric():
    text = table(rows(), {"fid": "FID", "precision": "Precision"}, ("precision",), {"fid": 2, "precision": 3})
    lines = text.splitlines()
    assert lines[0] == "| sampling steps | cfg scale | calls | FID | Precision |"
    assert lines[2] == "| 50 | 1 | 98 | 9.10 ± 0.10 | **0.910 ± 0.010** |"
    assert lines[3] == "| 50 | 1.5 | 98 | **2.20 ± 0.20** | 0.220 ± 0.020 |"
    assert text.count("**") == 4
    assert best(rows(), "fid", False).setting.cfg_scale == 1.5


def test_metrics_that_a_reference_lacks_are_a_dash():
    row = Row(Setting("ODE:heun", 50), {"fid": [1.0], "sfid": [None]}, 98.0)
    assert table([row], {"fid": "FID", "sfid": "sFID"}, (), {"fid": 1, "sfid": 1}).endswith("| 98 | **1.0** | - |")


def test_changes_are_those_of_one_lever_with_the_seeds_in_pairs():
    lines = differences(rows(), "fid", 2)
    assert lines == [
        "cfg scale 1 -> 1.5: -6.90 ± 0.10",
        "cfg scale 1 -> 2: -4.90 ± 0.10",
        "sampling steps 50 -> 100: -0.80 ± 0.20",
    ]


def test_the_plot_has_a_panel_for_each_lever(tmp_path):
    draw(rows(), "fid", "FID", tmp_path / "two.png")
    draw(rows()[:1], "fid", "FID", tmp_path / "one.png")
    widths = [Image.open(tmp_path / name).size[0] for name in ("one.png", "two.png")]
    assert widths[1] > 1.7 * widths[0]


def test_every_lever_is_a_flag():
    import sweep

    args = sweep.make_parser().parse_args(["x.pt", "--ref", "y"])
    assert all(hasattr(args, lever) for lever in LEVERS)


def test_what_a_setting_has_no_use_for_is_no_difference():
    """Channels of no guidance are a dash, and guidance on others is compared with it."""
    settings = plan(LEVELS | dict(cfg_scale=[1.0, 2.0], cfg_channels=["3", "all"]))
    found = [Row(each, {"fid": [value]}, 98.0) for each, value in zip(settings, (9.0, 3.0, 2.0))]
    lines = table(found, {"fid": "FID"}, (), {"fid": 1}).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [["| 1", "-"], ["| 2", "3"], ["| 2", "all"]]
    assert differences(found, "fid", 1) == [
        "cfg scale, cfg channels 1 -> 2 all: -7.0",
        "cfg scale, cfg channels 1 -> 2 3: -6.0",
    ]
    solvers = plan(LEVELS | dict(solver=["ODE:dopri5", "SDE:Euler"], num_sampling_steps=[20, 50]))
    found = [Row(each, {"fid": [value]}, 98.0) for each, value in zip(solvers, (9.0, 3.0, 2.0))]
    assert differences(found, "fid", 1) == [
        "solver, sampling steps ODE:dopri5 -> SDE:Euler 50: -7.0",
        "solver, sampling steps ODE:dopri5 -> SDE:Euler 20: -6.0",
    ]


def test_a_setting_without_a_lever_is_on_the_lines_of_all_its_values():
    settings = plan(LEVELS | dict(cfg_scale=[1.0, 1.5, 2.0], cfg_channels=["3", "all"]))
    found = [Row(each, {"fid": [1.0]}, 98.0) for each in settings]
    lines = _lines(found, ["cfg_channels"])
    assert {label: [row.setting.cfg_scale for row in line] for label, line in lines.items()} == {
        "3": [1.5, 2.0, 1.0],
        "all": [1.5, 2.0, 1.0],
    }
