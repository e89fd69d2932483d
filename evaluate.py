"""Measure samples against a reference: FID, sFID, Inception Score, precision and recall.

python evaluate.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz
torchrun --nproc-per-node=8 evaluate.py samples/ --ref photos/ --save-stats photos.npz

The metrics are those of ADM's evaluation suite (Dhariwal & Nichol, arXiv 2105.05233), on torch-fidelity's Inception.
"""

import hashlib
import io
import pickle
import sys
import time
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

import distributed
from atomic import write_atomically, write_json
from errors import UsageError, UserError
from image_files import open_images, open_npz, read_array
from train_utils import Parser, positive_int, run, set_precision, writable_folder

POOL, SPATIAL, LOGITS = 2048, 17 * 17 * 7, 1008  # numbers that the Inception gives for an image
NEIGHBOURS = 3  # a ball of precision and recall reaches to its centre's third neighbour
MANIFOLD_IMAGES = 10_000  # reference images that precision and recall use
STATISTICS = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}


class Features(NamedTuple):
    """What the Inception sees in N images: float32 on the CPU."""

    pool: torch.Tensor  # (N, 2048)
    spatial: torch.Tensor  # (N, 2023): 7 channels of a 17 x 17 map, channels last
    logits: torch.Tensor  # (N, 1008), without the bias


@dataclass
class Reference:
    """What samples are measured against: float64 means and covariances of pool and spatial features, and more."""

    mu: np.ndarray  # (2048,)
    sigma: np.ndarray  # (2048, 2048)
    mu_s: np.ndarray  # (2023,)
    sigma_s: np.ndarray  # (2023, 2023)
    features: np.ndarray = None  # float32 pool features (M, 2048) of up to 10,000 images; None: no precision and recall
    count: int = None  # images behind the statistics; None if the file does not say


def statistics(features):
    """Mean (D,) and covariance (D, D) of features (N, D), in float64, the covariance over N - 1."""
    mu = features.mean(0, dtype=torch.float64)
    centred = (chunk.double() - mu for chunk in features.split(4096))
    return mu.numpy(), (sum(chunk.T @ chunk for chunk in centred) / (len(features) - 1)).numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians, means (D,), covariances (D, D): |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^1/2).

    With S = F F^T, the trace of that root is the sum of the singular values of F1^T F2. This is exact where roots of the
    eigenvalues of S1 S2 turn rounding errors of 1e-16 into 1e-8 each: covariances of fewer images than dimensions.
    """

    def factor(sigma):
        values, vectors = np.linalg.eigh(sigma)
        kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
        return vectors[:, kept] * np.sqrt(values[kept])

    cross = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def inception_score(logits, split=5000):
    """Mean over consecutive splits, of which the last may be shorter, of exp(mean KL(p(y|x), p(y))); logits (N, C)."""
    scores = [isc_features_to_metric(part, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN] for part in logits.split(split)]
    return float(np.mean(scores))


def precision_recall(samples, reference, device="cpu", rows=1024):
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991) of features (N, D) against (M, D).

    Precision is the fraction of samples in the ball of some reference image, recall the other way around; a ball reaches
    to its centre's third neighbour. In float64, so that neither TF32 nor the chunks of rows decide who is inside.
    """

    def covered(points, centres):
        radii = [torch.cdist(part, centres).kthvalue(NEIGHBOURS + 1).values for part in centres.split(rows)]  # 1st: itself
        inside = [(torch.cdist(part, centres) <= torch.cat(radii)).any(1) for part in points.split(rows)]
        return torch.cat(inside).double().mean().item()

    samples, reference = (torch.as_tensor(x).to(device, torch.float64) for x in (samples, reference))
    return covered(samples, reference), covered(reference, samples)


def evaluate(samples, reference, device="cpu"):
    """All metrics, by name, of samples' Features against a Reference; precision and recall None if it has no features."""
    precision = recall = None
    if reference.features is not None:
        precision, recall = precision_recall(samples.pool, reference.features, device)
    return {
        "fid": frechet_distance(*statistics(samples.pool), reference.mu, reference.sigma),
        "sfid": frechet_distance(*statistics(samples.spatial), reference.mu_s, reference.sigma_s),
        "inception_score": inception_score(samples.logits),
        "precision": precision,
        "recall": recall,
    }


class Inception:
    """The network behind the features: uint8 images (N, 3, H, W) of any size -> Features, still on its device."""

    def __init__(self, network, device):
        self.network, self.device = network.to(device), device
        # Past its ReLU: TensorFlow's mixed_6/conv, of which sFID reads the first 7 channels.
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output):
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def __call__(self, images):
        pool, logits = self.network(images.to(self.device))
        return Features(pool, self._spatial, logits)


def load_inception(weights=None, device="cpu"):
    """Inception from a file of weights or from torch-fidelity's own download. Raises UserError naming the file."""
    name = f"--inception-weights {weights}"
    try:
        if weights is None:
            name = f"the Inception weights (download {URL_INCEPTION_V3} and give it as --inception-weights)"
            settings = dict(map_location="cpu", weights_only=True, check_hash=True, progress=sys.stderr.isatty())
            state = torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, **settings)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity would run whatever code a file holds: it gets a copy of what loads without running any.
        torch.save(state, copy := io.BytesIO())
        copy.seek(0)
        settings = dict(feature_extractor_weights_path=copy, cuda=False, verbose=False)
        network = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], **settings)
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{name}: refused, it is not a plain file of weights and might run code") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{name}: damaged, or not the weights of torch-fidelity's inception-v3-compat") from error
    return Inception(network, device)


@torch.no_grad()
def extract_features(images, inception, batch_size=64, start=0, stop=None, title=None):
    """Features of images[start:stop], uint8 (N, H, W, 3): a NumPy array, a CPU tensor, or what open_images gives.

    The arithmetic is that of train_utils.set_precision. title names a progress bar, which is shown on a terminal.
    """
    stop = len(images) if stop is None else stop
    features = Features(*(torch.empty(stop - start, width) for width in (POOL, SPATIAL, LOGITS)))
    with tqdm(total=stop - start, desc=title, unit=" images", leave=False, disable=None if title else True) as bar:
        for i in range(start, stop, batch_size):
            j = min(i + batch_size, stop)
            batch = torch.tensor(np.asarray(images[i:j])).permute(0, 3, 1, 2)
            for whole, part in zip(features, inception(batch)):
                whole[i - start : j - start] = part
            bar.update(j - i)
    return features


def gather_features(features, world):
    """All processes' Features as one, by rank: on rank 0, elsewhere None."""
    if not world.distributed:
        return features
    parts = [None] * world.size if world.is_main else None
    dist.gather_object(tuple(features), parts)
    return Features(*map(torch.cat, zip(*parts))) if world.is_main else None


def shared_features(images, inception, batch_size, world, title=None, limit=None):
    """gather_features of the first limit images, which all processes can read and extract a contiguous share of."""
    count = min(len(images), limit or len(images))
    start, stop = (count * rank // world.size for rank in (world.rank, world.rank + 1))
    title = title if world.is_main else None
    return gather_features(extract_features(images, inception, batch_size, start, stop, title), world)


def open_reference(path):
    """What a reference holds, checked and not yet measured: (a Reference's fields by name or {}, images or None)."""
    path = Path(path)
    archive = None if path.is_dir() else open_npz(path)
    if archive is None or not STATISTICS.keys() & set(archive.files):
        return {}, open_images(path, archive, f"arr_0, or {', '.join(STATISTICS)}")
    fields = {key: read_array(archive, path, key, shape).astype(np.float64) for key, shape in STATISTICS.items()}
    if "count" in archive.files:
        fields["count"] = int(read_array(archive, path, "count", ()))
    if "features" in archive.files:
        fields["features"] = read_array(archive, path, "features", (None, POOL)).astype(np.float32)
    has_images = "arr_0" in archive.files and "features" not in fields
    return fields, open_images(path, archive) if has_images else None


def measure_reference(opened, measure):
    """Reference of what open_reference gave; measure(images, limit=...) gives Features, or None to give None."""
    fields, images = opened
    if images is None:
        return Reference(**fields)
    features = measure(images, limit=MANIFOLD_IMAGES if fields else None)
    if features is None:
        return None
    if not fields:
        found = *statistics(features.pool), *statistics(features.spatial)
        fields = dict(zip(STATISTICS, found), count=len(features.pool))
    return Reference(**fields, features=features.pool[:MANIFOLD_IMAGES].numpy())


def make_parser():
    parser = Parser(prog="evaluate.py", description="FID, sFID, Inception Score, precision and recall of samples.")
    parser.add_argument("samples", metavar="SAMPLES", help=".npz with arr_0, uint8 (N, H, W, 3), or a folder of images")
    parser.add_argument("--ref", required=True, help=f"the same, or a .npz with {', '.join(STATISTICS)}")
    parser.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's Inception (its own download)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images at once, in each process")
    parser.add_argument(
        "--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of the Inception; published FIDs are fp32"
    )
    parser.add_argument("--save-stats", metavar="FILE.npz", help="also save the measured reference, for a later --ref")
    parser.add_argument("--out", metavar="FILE.json", help="results and settings (SAMPLES.eval.json beside the samples)")
    return parser


def check_outputs(args):
    """Settle --out and see that all can be written, before the work."""
    samples = Path(args.samples).resolve()
    if args.precision == "bf16" and args.save_stats:
        raise UsageError("--save-stats with --precision bf16: statistics to compare with must be those of float32 features")
    args.out = args.out or str(samples.with_name(f"{samples.name.removesuffix('.npz')}.eval.json"))
    for flag, path in (("--out", args.out), ("--save-stats", args.save_stats)):
        if path and Path(path).is_dir():
            raise UsageError(f"{flag} {path}: it is a folder; give a file")
        if path:
            writable_folder(Path(path).parent, flag)


def show(results, num_samples, reference, precision="fp32"):
    """Print what evaluate gives as a table, and one line for each thing that limits what it means."""
    warnings = {
        "features in bf16: their FID does not compare with that of float32 features": precision == "bf16",
        f"FID is biased upwards by few samples: {num_samples} do not compare with FID-50K": num_samples < 50_000,
        f"the covariance of {POOL} features of {num_samples} samples is singular": num_samples <= POOL,
        "no precision and recall: the reference has neither images nor their features": reference.features is None,
    }
    for warning in (line for line, holds in warnings.items() if holds):
        print(f"evaluate.py: warning: {warning}", file=sys.stderr)
    for name, value in zip(("FID", "sFID", "Inception Score", "Precision", "Recall"), results.values()):
        print(f"{name:15} {'-' if value is None else f'{value:.4f}':>10}")


def main(args):
    world = distributed.setup()
    set_precision(args.precision, world.device)
    samples, opened = open_images(args.samples), open_reference(args.ref)
    for path, images in ((args.samples, samples), (args.ref, opened[1])):
        if images is not None and len(images) <= NEIGHBOURS:
            raise UserError(f"{path}: {len(images)} images; the metrics need {NEIGHBOURS + 1} or more")
    check_outputs(args)
    inception = load_inception(args.inception_weights, world.device)
    measure = partial(shared_features, inception=inception, batch_size=args.batch_size, world=world)
    started = time.time()
    with torch.autocast(world.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        features = measure(samples, title="samples")
        speed = len(samples) / (time.time() - started)
        reference = measure_reference(opened, partial(measure, title="reference"))
    if world.is_main:
        results = evaluate(features, reference, world.device)
        show(results, len(samples), reference, args.precision)
        weights = args.inception_weights
        settings = {key: value for key, value in vars(args).items() if key != "given"}
        settings.update(
            num_samples=len(samples),
            num_reference=reference.count,
            inception_sha256=weights and hashlib.sha256(Path(weights).read_bytes()).hexdigest(),
            torch_fidelity=torch_fidelity.__version__,
            device=torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
            processes=world.size,
            seconds=time.time() - started,
            images_per_second=speed,
        )
        try:
            write_json(args.out, {**results, "settings": settings})
            if args.save_stats:
                fields = {key: value for key, value in vars(reference).items() if value is not None}
                write_atomically(args.save_stats, lambda file: np.savez(file, **fields))
        except OSError as error:
            raise UserError(f"cannot write {error.filename or 'the results'}: {error.strerror}") from error
    distributed.cleanup()
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "evaluate.py")
