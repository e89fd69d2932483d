import csv

import numpy as np
import pytest

from cli import DIGITS, call, launch, one_line
from metrics.features import extract_features, load_inception
from metrics.reference import measure_reference, open_reference
from metrics.scores import evaluate

SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--max-steps", 2]


@pytest.fixture
def reference(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "ref.npz", arr_0=images)
    return tmp_path / "ref.npz"


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
    from transport import Sampler, create_transport

    content = load_checkpoint(next(run.glob("checkpoints/*.pt")))
    model = recipe_of(content, weights_of(content)).build().eval()
    model.load_state_dict(content["ema"])
    z, y = SampleStreams(0, range(6)).randn((3, 32, 32), "cpu"), torch.arange(6)
    sample = Sampler(create_transport()).sample_ode()
    images = torch.cat([to_uint8(sample(z[part], model, y=y[part])[-1]) for part in (slice(0, 3), slice(3, 6))])
    inception = load_inception(inception_weights)
    measured = measure_reference(open_reference(reference), lambda images, limit: extract_features(images, inception))
    for name, value in evaluate(extract_features(images, inception), measured).items():
        assert float(row[name]) == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_missing_weights_are_told_at_the_start(reference, tmp_path, capsys):
    flags = ["--eval-every", 2, "--eval-ref", reference, "--inception-weights", tmp_path / "none.pth"]
    one_line(call(capsys, "train", *SMALL, *flags, "--results-dir", tmp_path / "r"), 1, "--inception-weights", "none.pth")
    assert not list(tmp_path.glob("r/*/metrics.csv"))
    flags = ["--eval-every", 2]
    one_line(call(capsys, "train", *SMALL, *flags, "--results-dir", tmp_path / "r"), 2, "--eval-ref")
    one_line(call(capsys, "train", *SMALL, "--eval-ref", reference, "--results-dir", tmp_path / "r"), 2, "--eval-every")
