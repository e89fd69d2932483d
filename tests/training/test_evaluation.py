import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from cli import DIGITS, ENV, ROOT, call, launch, one_line
from metrics.features import extract_features, load_inception
from metrics.reference import measure_reference, open_reference
from metrics.results import evaluate

SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--max-steps", 2]


@pytest.fixture
def reference(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "ref.npz", arr_0=images)
    return tmp_path / "ref.npz"


@pytest.mark.slow
def test_evaluation_while_training_is_that_of_evaluate(reference, inception_weights, tmp_path):
    flags = ["--eval-every", 2, "--eval-samples", 6, "--eval-ref", reference, "--inception-weights", inception_weights]
    done = launch("train", *SMALL, *flags, "--results-dir", tmp_path / "r", processes=2)
    assert done.code == 0, done.err
    (run,) = (tmp_path / "r").iterdir()
    assert "(step=0000002) Evaluation of 6 samples: fid " in (run / "log.txt").read_text()
    with open(run / "evaluations.csv") as rows:
        (row,) = csv.DictReader(rows)

    # The same numbers from the checkpoint: its samples, drawn and measured by hand.
    import torch

    from common.checkpoint import load_checkpoint, weights_of
    from common.recipe import recipe_of
    from common.streams import SampleStreams
    from data.autoencoder import to_uint8
    from inference.chunked import Labels
    from transport import Sampler, create_transport

    content = load_checkpoint(next(run.glob("checkpoints/*.pt")))
    model = recipe_of(content, weights_of(content)).build().eval()
    model.load_state_dict(content["ema"])
    z, y = SampleStreams(0, range(6)).randn((3, 32, 32), "cpu"), torch.tensor([*map(Labels(10, 0, "balanced").of, range(6))])
    images = to_uint8(Sampler(create_transport()).sample_ode()(z, model, y=y)[-1])
    inception = load_inception(inception_weights)
    measured = measure_reference(open_reference(reference), lambda images, network: extract_features(images, inception))
    for name, value in evaluate({"inception": extract_features(images, inception)}, measured).items():
        assert float(row[name]) == pytest.approx(value, rel=1e-6, abs=1e-6), name


PIXELS = ["--eval-metrics", "fd-pixels", "kid-pixels,mind-pixels"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_number_that_the_samplers_give(processes, reference, tmp_path):
    """To the last digit, by the command that the log names; two batches, so that two processes have one each. No weights."""
    flags = ["--eval-every", 2, "--eval-samples", 70, "--eval-ref", reference, *PIXELS, "--global-seed", 5, "--lr", 1e-2]
    done = launch("train", *SMALL, *flags, "--ema-decay", 0.5, "--results-dir", tmp_path / "r", processes=processes)
    assert done.code == 0, done.err
    (run,) = (tmp_path / "r").iterdir()
    (command,) = re.findall(
        r"made again by evaluate.py of sample_ddp.py (.*) --ckpt CHECKPOINT\n", (run / "log.txt").read_text()
    )
    drawn = launch("sample_ddp", *command.split(), "--ckpt", next(run.glob("checkpoints/*.pt")), "--sample-dir", tmp_path)
    assert drawn.code == 0, drawn.err
    (samples,) = tmp_path.glob("SiT*.npz")
    measured = launch("evaluate", samples, "--ref", reference, "--metrics", *PIXELS[1:], "--out", tmp_path / "out.json")
    assert measured.code == 0, measured.err
    expected = json.loads((tmp_path / "out.json").read_text())
    with open(run / "evaluations.csv") as rows:
        (row,) = csv.DictReader(rows)
    found = {name: float(value) for name, value in row.items() if name != "step"}
    assert [*found] == ["fd_pixels", "kid_pixels", "mind_pixels"]
    assert found == {name: expected[name] for name in found}
    assert (run / "loss.png").stat().st_size > 0


def test_flags_of_an_evaluation_that_would_be_ignored(reference, tmp_path, capsys):
    flags = [*SMALL, "--results-dir", tmp_path / "r", "--eval-ref", reference]
    one_line(call(capsys, "train", *SMALL, *PIXELS), 2, "--eval-metrics goes with --eval-every")
    for unused in ("--inception-weights", "--dinov2-weights"):
        one_line(call(capsys, "train", *flags, "--eval-every", 2, *PIXELS, unused, "x"), 2, unused, "none of --eval-metrics")
    one_line(call(capsys, "train", *flags, "--eval-every", 2, "--eval-metrics", "fud"), 2, "there is no metric 'fud'")
    np.savez(tmp_path / "stats.npz", mu_pixels=np.zeros(256), sigma_pixels=np.eye(256))
    bare = [*SMALL, "--results-dir", tmp_path / "r", "--eval-ref", tmp_path / "stats.npz", "--eval-every", 2, *PIXELS]
    one_line(call(capsys, "train", *bare), 1, "--eval-ref", "stats.npz: it has no features_pixels for kid-pixels")
    missing = ["--eval-every", 2, "--eval-metrics", "mind-dinov2", "--dinov2-weights", tmp_path / "none.pth"]
    one_line(call(capsys, "train", *flags, *missing), 1, "--dinov2-weights", "none.pth")


def test_missing_weights_are_told_at_the_start(reference, tmp_path, capsys):
    flags = ["--eval-every", 2, "--eval-ref", reference, "--inception-weights", tmp_path / "none.pth"]
    one_line(call(capsys, "train", *SMALL, *flags, "--results-dir", tmp_path / "r"), 1, "--inception-weights", "none.pth")
    assert not list(tmp_path.glob("r/*/metrics.csv"))
    flags = ["--eval-every", 2]
    one_line(call(capsys, "train", *SMALL, *flags, "--results-dir", tmp_path / "r"), 2, "--eval-ref")
    one_line(call(capsys, "train", *SMALL, "--eval-ref", reference, "--results-dir", tmp_path / "r"), 2, "--eval-every")


@pytest.mark.slow
def test_samples_that_cannot_be_drawn_are_a_warning_on_all_processes(reference, tmp_path):
    """One rank fails alone, in the second batch; both pass over the evaluation, and the run goes on."""
    file = tmp_path / "broken_train.py"
    file.write_text(BROKEN.format(root=str(ROOT)))
    flags = ["--eval-every", 1, "--eval-samples", 70, "--eval-ref", reference, *PIXELS]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", file]
    argv = map(str, [*launcher, *SMALL, *flags, "--results-dir", tmp_path / "r"])
    done = subprocess.run(list(argv), capture_output=True, text=True, env=ENV, timeout=200)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "r").iterdir()
    log = (run / "log.txt").read_text()
    assert log.count("WARNING: no evaluation: [rank 1] dopri5 failed") == 2 and "Done at step 2" in log
    assert not (run / "evaluations.csv").exists()


BROKEN = """
import os, sys
sys.path.insert(0, {root!r})
import train, inference.pipeline
from train_utils import run
from transport import SolverError

draw = inference.pipeline.Pipeline.draw

def fails_on_rank_1(*args, **kwargs):
    if os.environ["RANK"] == "1":
        raise SolverError("dopri5 failed")
    return draw(*args, **kwargs)

inference.pipeline.Pipeline.draw = fails_on_rank_1
arguments = train.make_parser().parse_args()
run(lambda: train.main(arguments), "train.py")
"""
