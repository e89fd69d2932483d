import csv
import errno
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import sample_utils
from cli import ENV, call, command, kill_tree, launch, one_line
from common.chunks import ChunkStore
from sample_ddp import apply_preset, make_parser

SIZE = 32
RUNS = {
    "dopri5": ["ODE", "--guidance-low", 0.1, "--guidance-high", 0.8],
    "heun": ["ODE", "--sampling-method", "heun", "--num-sampling-steps", 12],
    "sde": ["SDE", "--num-sampling-steps", 20],
}


def flags(trained, folder, mode):
    common = ["--ckpt", trained, "--sample-dir", folder, "--num-fid-samples", 62, "--per-proc-batch-size", 2]
    return [*RUNS[mode], *common, "--cfg-scale", 2]


def outputs(folder):
    (npz,) = folder.glob("*.npz")
    record = json.loads(npz.with_suffix(".json").read_text())
    assert not list(folder.glob("*.chunks")) and not list(folder.rglob("*.tmp"))
    return npz.read_bytes(), record


@pytest.mark.parametrize("mode", ["heun", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("sde", "dopri5"))])
def test_one_process_two_and_killed_ones_make_the_same_npz(trained, tmp_path, capsys, mode):
    result = call(capsys, "sample_ddp", *flags(trained, tmp_path / "one", mode))
    assert result.code == 0, result.err
    one, record = outputs(tmp_path / "one")

    done = launch("sample_ddp", *flags(trained, tmp_path / "two", mode), processes=2)
    assert done.code == 0, done.err
    assert outputs(tmp_path / "two")[0] == one

    rng = random.Random(mode)
    for attempt in range(3):  # killed at a random chunk, with and without torchrun
        processes = 1 + attempt % 2
        argv = [*flags(trained, tmp_path / "killed", mode), "--no-png"]
        stop_at = rng.randint(2 + 2 * attempt, 4 + 2 * attempt)
        victim = subprocess.Popen(
            command("sample_ddp", *argv, processes=processes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENV,
            start_new_session=True,
        )
        while victim.poll() is None and len(list((tmp_path / "killed").glob("*.chunks/*.npz"))) < stop_at:
            time.sleep(0.002)
        alive = victim.poll() is None
        kill_tree(victim)
        assert alive, "it was to be killed before it had finished"
    left = len(list((tmp_path / "killed").glob("*.chunks/*.npz")))
    result = call(capsys, "sample_ddp", *argv)
    assert result.code == 0, result.err
    killed, killed_record = outputs(tmp_path / "killed")
    assert killed == one and 0 < killed_record["made_in_this_run"] == 62 - 2 * left < 62
    assert record["network_calls_per_sample"] == killed_record["network_calls_per_sample"]


def test_the_npz_is_whole_and_described(trained, tmp_path, capsys):
    argv = [*flags(trained, tmp_path, "heun"), "--class-labels", 3, 1, 4]
    assert call(capsys, "sample_ddp", *argv).code == 0
    (npz,) = tmp_path.glob("*.npz")
    with np.load(npz, allow_pickle=False) as file:
        images = file["arr_0"]
        assert file.files == ["arr_0"] and images.shape == (62, SIZE, SIZE, 3) and images.dtype == np.uint8
    pictures = sorted(tmp_path.glob("*/*.png"))
    assert len(pictures) == 62 and (np.asarray(Image.open(pictures[7])) == images[7]).all()
    record = json.loads(npz.with_suffix(".json").read_text())
    assert record["checkpoints"]["model"]["sha256"] == hashlib.sha256(trained.read_bytes()).hexdigest()
    assert record["network_calls_per_sample"] == 22 and record["solver_steps_per_sample"] == 11
    assert record["settings"]["class_labels"] == [3, 1, 4] and record["settings"]["cfg_scale"] == 2
    assert record["settings"]["global_seed"] == 0 and record["settings"]["precision"] == "fp32"
    assert record["recipe"]["transport"]["prediction"] == "velocity" and record["recipe"]["vae"] == "none"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"] == torch.__version__
    assert record["wall_seconds"] > 0 and record["images_per_second"] > 0 and record["device"]
    again = call(capsys, "sample_ddp", *argv)
    assert again.code == 0 and "was complete already" in again.out
    other = call(capsys, "sample_ddp", *argv, "--global-seed", 1)  # another run, beside it
    assert other.code == 0 and len(list(tmp_path.glob("*.npz"))) == 2


def test_sample_i_does_not_depend_on_how_many_there_are(trained, tmp_path, capsys):
    argv = flags(trained, tmp_path, "sde")
    for count in (4, 6):
        argv[argv.index("--num-fid-samples") + 1] = count
        assert call(capsys, "sample_ddp", *argv).code == 0
    few, many = sorted((np.load(npz)["arr_0"] for npz in tmp_path.glob("*.npz")), key=len)
    assert (many[:4] == few).all()


def images_of(folder):
    (npz,) = folder.glob("*.npz")
    return np.load(npz)["arr_0"].astype(int)


@pytest.mark.slow
def test_compiled_samples_are_the_same(trained, tmp_path, capsys):
    argv = ["SDE", "--ckpt", trained, "--num-sampling-steps", 4, "--num-fid-samples", 4, "--no-png"]
    argv += ["--cfg-scale", 2, "--guidance-low", 0.5]  # on twice the images, from there on
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        result = call(capsys, "sample_ddp", *argv, *more, "--sample-dir", tmp_path / name)
        assert result.code == 0, result.err
    assert np.abs(images_of(tmp_path / "eager") - images_of(tmp_path / "compiled")).max() <= 1


def test_a_later_version_goes_on_with_what_was_begun(trained, tmp_path, capsys, monkeypatch):
    """A flag that is added, at its default, changes no name; with another value it does."""
    save = ChunkStore.save

    def stop(store, chunk, **arrays):
        if chunk == 3:
            raise KeyboardInterrupt
        save(store, chunk, **arrays)

    argv = ["SDE", "--ckpt", trained, "--num-sampling-steps", 3, "--num-fid-samples", 12, "--per-proc-batch-size", 2]
    argv += ["--sample-dir", tmp_path, "--no-png"]
    with monkeypatch.context() as patch:
        patch.setattr(ChunkStore, "save", stop)
        assert call(capsys, "sample_ddp", *argv).code == 130
    assert len(list(tmp_path.glob("*.chunks/*.npz"))) == 3

    parse_speed_args = sample_utils.parse_speed_args

    def more_flags(parser):
        parse_speed_args(parser)
        parser.add_argument("--new-idea", type=float, default=0.5, help="of a later version")

    monkeypatch.setattr(sample_utils, "parse_speed_args", more_flags)
    result = call(capsys, "sample_ddp", *argv, "--cfg-scale", 1)  # typed, but the default
    assert result.code == 0, result.err
    _, record = outputs(tmp_path)
    assert record["made_in_this_run"] == 6 and record["settings"]["new_idea"] == 0.5
    assert "was complete already" in call(capsys, "sample_ddp", *argv, "--new-idea", 0.5).out
    assert call(capsys, "sample_ddp", *argv, "--new-idea", 0.7).code == 0
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_what_decides_the_images_has_a_name_of_its_own(trained, tmp_path, capsys):
    argv = ["ODE", "--ckpt", trained, "--sampling-method", "euler", "--num-sampling-steps", 2, "--num-fid-samples", 2]
    argv += ["--sample-dir", tmp_path, "--no-png"]
    runs = [[], ["--weights", "model"], ["--sample-eps", 0.1], ["--global-seed", 1], ["--cfg-scale", 2]]
    runs += [["--cfg-scale", 2, "--guidance-weights", "model"], ["--class-labels", "1,2"], ["--labels", "balanced"]]
    for more in runs:
        assert call(capsys, "sample_ddp", *argv, *more).code == 0
    assert len(list(tmp_path.glob("*.npz"))) == len(runs)
    for more in (["--model", "SiT-T/8"], ["--path-type", "Linear"], ["--image-size", 32]):  # what the checkpoint says anyway
        assert "was complete already" in call(capsys, "sample_ddp", *argv, *more).out


def test_a_full_disk_is_one_line(trained, tmp_path, capsys, monkeypatch):
    """Chunks are written in a thread: what goes wrong there must not get lost."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ChunkStore, "save", full)
    argv = ["SDE", "--ckpt", trained, "--num-sampling-steps", 2, "--num-fid-samples", 9, "--sample-dir", tmp_path]
    one_line(call(capsys, "sample_ddp", *argv), 1, "--sample-dir", "No space left")
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.slow
def test_memory_does_not_grow_with_steps(trained, tmp_path):
    """Peak memory of the whole process, a long SDE beside a short one."""
    script = (
        "import resource, sys, sample_ddp; "
        "sample_ddp.main(sample_ddp.make_parser().parse_args(sys.argv[1:])); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for steps in (10, 250):
        argv = ["SDE", "--ckpt", trained, "--sample-dir", tmp_path, "--num-fid-samples", 256, "--per-proc-batch-size", 256]
        argv += ["--num-sampling-steps", steps, "--no-png"]
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, argv)], capture_output=True, text=True, env=ENV, check=True
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.05 * peaks[0]


def test_presets_fill_what_was_not_typed():
    from inference.presets import PRESETS

    args = make_parser().parse_args(["SDE", "--preset", "XL-2-7m-cfg", "--num-fid-samples", "10"])
    assert apply_preset(args) is None  # ten samples are no FID-50K
    assert (args.cfg_scale, args.num_sampling_steps, args.last_step_size, args.num_fid_samples) == (1.5, 250, 0.04, 10)
    args = make_parser().parse_args(["ODE", "--preset", "B-2-400k", "--cfg-scale", "4"])
    assert apply_preset(args) is None
    assert apply_preset(make_parser().parse_args(["ODE", "--preset", "B-2-400k"])) == 34.84
    assert (args.model, args.sampling_method, args.num_sampling_steps, args.cfg_scale) == ("SiT-B/2", "heun", 126, 4.0)
    args = make_parser().parse_args(["ODE", "--preset", "B-2-400k", "--tf32"])
    assert apply_preset(args) is None and args.precision == "tf32"
    args = make_parser().parse_args(["ODE", "--preset", "B-2-400k", "--no-tf32"])
    assert apply_preset(args) == 34.84 and args.precision == "fp32"
    args = make_parser().parse_args(["SDE", "--preset", "DiT-XL-2-7m-cfg"])
    assert apply_preset(args) == 2.27 and (args.kind, args.diffusion_form, args.cfg_channels) == ("dit", "SBDM", "3")
    assert {preset.model for preset in PRESETS.values()} == {"SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2"}


def scores(folder):
    (file,) = folder.glob("*.csv")
    with open(file) as rows:
        return list(csv.DictReader(rows)), json.loads(file.with_suffix(".json").read_text())


def test_likelihood_of_a_data_set(trained, tmp_path, capsys):
    argv = ["ODE", "--likelihood", "--data-path", "builtin:digits", "--num-images", 6, "--ckpt", trained]
    argv += ["--dequantize", "uniform", "--num-probes", 2, "--per-proc-batch-size", 2]
    result = call(capsys, "sample_ddp", *argv, "--sample-dir", tmp_path / "one")
    assert result.code == 0, result.err
    rows, record = scores(tmp_path / "one")
    bits = np.array([float(row["bits_per_dim"]) for row in rows])
    nats = np.array([float(row["nats"]) for row in rows])
    assert [row["label"] for row in rows] == ["0", "1", "3", "5", "6", "8"]
    assert np.allclose(nats, -bits * 3 * SIZE * SIZE * math.log(2))
    assert record["bits_per_dim"] == pytest.approx(bits.mean())
    assert record["bits_per_dim_standard_error"] == pytest.approx(bits.std(ddof=1) / math.sqrt(6))
    done = launch("sample_ddp", *argv, "--sample-dir", tmp_path / "two", processes=2)
    assert done.code == 0, done.err
    assert scores(tmp_path / "two")[0] == rows
