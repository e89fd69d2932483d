"""The samples of sweep.Settings and what is measured of them: made once, kept in a folder, found again."""

import hashlib
import json
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from common.atomic import write_atomically, write_json, writing
from common.checkpoint import file_hash
from common.errors import UserError
from common.precision import set_precision
from metrics.features import shared_features, take
from metrics.image_files import open_images
from metrics.names import METRICS, networks_of
from metrics.networks import load_networks
from metrics.reference import measure_reference, open_reference
from metrics.results import evaluate
from metrics.scores import NEIGHBOURS

from .chunked import Labels, Samples, complete
from .records import identity_hash, identity_of, machine_of
from .sweep import Row, Setting

BATCH = 64  # images whose features are taken at once, as evaluate.py does
PLAIN = {entry.name: entry.default for entry in fields(Setting)}  # what a set's name does not depend on


class Judge:
    """The networks and the reference of some metrics, loaded when the first samples need them. strict: each of the metrics
    must be possible; else those for which the reference has nothing are None."""

    def __init__(self, path, image_size, words, weights, folder, warn, world, strict=True):
        self.path, self.image_size, self.words, self.weights, self.strict = path, image_size, words, weights, strict
        self.folder, self.warn, self.world = folder, warn, world
        found = world.from_main(lambda: [fingerprint(path), *(file and file_hash(file) for file in weights.values())])
        self.identity = {"path": str(path), "sha256": found[0], "weights_sha256": dict(zip(weights, found[1:]))}
        self.key = hashlib.sha256(repr((found, image_size if Path(path).is_dir() else None)).encode()).hexdigest()[:8]
        self.networks = self.references = None
        self.open()  # what is wrong with it is told before samples are drawn

    def open(self):
        """The reference as it was measured by an earlier call, or as it was given."""
        kept = self.folder / f"reference-{self.key}.npz"
        try:
            return open_reference(kept, words=self.words, strict=True) if kept.exists() else self._given()
        except UserError:  # of other metrics
            return self._given()

    def _given(self):
        opened = open_reference(self.path, self.image_size, self.warn, self.words, self.strict)
        if opened.images is not None and len(opened.images) <= NEIGHBOURS:
            raise UserError(f"--ref {self.path}: {len(opened.images)} images; the metrics need {NEIGHBOURS + 1} or more")
        return opened

    def load(self):
        if self.networks is not None:
            return
        world, opened = self.world, self.open()
        self.networks = world.main_first(lambda: load_networks(networks_of(self.words), self.weights, world.device))
        opened.check(self.networks)
        self.references = measure_reference(opened, partial(self.see, title="reference"))
        if world.is_main and opened.seers:
            self._keep()

    def _keep(self):
        """Write the reference as it was measured, beside what an earlier call measured of it for other metrics."""
        file, arrays = self.folder / f"reference-{self.key}.npz", {}
        if file.exists():
            with np.load(file, allow_pickle=False) as before:
                arrays |= before
        for network, reference in self.references.items():
            arrays |= reference.arrays(network) if reference else {}
        with writing(self.folder, "--out"):
            write_atomically(file, lambda out: np.savez(out, **arrays))

    def see(self, images, network, title="samples"):
        """Features in float32, as evaluate.py has them, whatever the samples were drawn in."""
        set_precision("fp32", self.world.device)
        return shared_features(images, self.networks[network], BATCH, self.world, title)

    def measure(self, path, counts, words):
        """{count: {metric: number}} of the first so many images of a file, on the main process."""
        self.load()
        images = open_images(path)
        seen = {network: self.see(images, network) for network in networks_of(words)}
        if not self.world.is_main:
            return None
        device, found = self.world.device, {}
        for count in counts:
            first = {network: take(features, slice(0, count)) for network, features in seen.items()}
            found[str(count)] = evaluate(first, self.references, words, device)
        return found


class Sets:
    """The sets of samples of a sweep's settings, one for each seed."""

    def __init__(self, folder, seeds, size, settings, judge, discard=False):
        self.folder, self.seeds, self.size, self.judge, self.discard = folder, seeds, size, judge, discard
        self.counts = {}
        for setting in settings:
            self.counts.setdefault(repr(setting.drawn), []).append(setting.num_fid_samples)

    def row(self, pipe, setting):
        """The Row of a setting, on every process; its samples are made and measured where that was not done."""
        records = [self._record(pipe, setting, seed) for seed in self.seeds]
        count, titles = str(setting.num_fid_samples), [t for word in self.judge.words for t in METRICS[word].titles]
        values = {title: [record["results"][count][title] for record in records] for title in titles}
        return Row(setting, values, float(np.mean([record["calls"] for record in records])))

    def _record(self, pipe, setting, seed):
        """{"calls", "results": {count: {metric: number}}} of one set of samples."""
        world, counts = self.judge.world, self.counts[repr(setting.drawn)]
        paths = {"model": pipe.path}
        drawn = setting.drawn | dict(seed=seed, chunk=self.size, state=pipe.weights, precision=pipe.precision)
        drawn |= {"compile": True} if pipe.compile else {}
        identity = world.from_main(lambda: identity_of(drawn, pipe, paths))
        name = f"{slug(setting)}-seed-{seed}-{identity_hash(identity, PLAIN)}"
        file = self.folder / "results" / f"{name}-{self.judge.key}.json"
        record = world.from_main(lambda: read(file))
        words = [word for word in self.judge.words if not self._knows(record, counts, word)]
        total = world.from_main(lambda: self._total(name, max(counts)))
        if not words:
            if self.discard and world.is_main:  # which a kill may have left
                (self.folder / "samples" / f"{name}-{total}.npz").unlink(missing_ok=True)
            return record
        labels = Labels(pipe.recipe.num_classes, seed, setting.labels)
        work = Samples(pipe, labels, seed, dict(solver=setting.solve(), guidance=setting.guide()), flag="--out")
        path, summary, _ = complete(work, total, self.size, self.folder / "samples" / f"{name}-{total}", identity, world)
        found = self.judge.measure(path, counts, words)
        if world.is_main:
            results = {str(count): record["results"].get(str(count), {}) | found[str(count)] for count in counts}
            results = record["results"] | results
            measured = {"torch_fidelity": version("torch-fidelity")} | machine_of(world)
            record = dict(calls=summary["network_calls_per_sample"], results=results, reference=self.judge.identity)
            record |= identity | measured
            with writing(self.folder, "--out"):
                write_json(file, record)
            if self.discard:
                path.unlink()
        return world.broadcast(record)

    def _total(self, name, wanted):
        """How many samples the set has that is there and large enough, or else is to have."""
        kept = (file.stem.rpartition("-")[2] for file in (self.folder / "samples").glob(f"{name}-*.npz"))
        return min((int(each) for each in kept if each.isdecimal() and int(each) >= wanted), default=wanted)

    def _knows(self, record, counts, word):
        return all(METRICS[word].titles.keys() <= record["results"].get(str(count), {}).keys() for count in counts)


def fingerprint(path):
    """SHA-256 of a file, or of the names, sizes and times of a folder's files."""
    path = Path(path)
    if path.is_file():
        return file_hash(path)
    files = sorted((str(file.relative_to(path)), file.stat()) for file in path.rglob("*") if file.is_file())
    told = repr([(name, about.st_size, about.st_mtime_ns) for name, about in files])
    return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()


def slug(setting):
    """A setting as a part of a file's name."""
    guided = f"-cfg-{setting.cfg_scale:g}" if setting.cfg_scale != 1 else ""
    steps = f"-{setting.num_sampling_steps}" if setting.num_sampling_steps else ""
    return f"{setting.solver.replace(':', '-')}{steps}{guided}-{setting.weights}"


def read(file):
    """The record of a set, or an empty one."""
    try:
        record = json.loads(file.read_text())
        return record if isinstance(record["results"], dict) else {"results": {}}
    except (OSError, ValueError, KeyError, TypeError):
        return {"results": {}}
