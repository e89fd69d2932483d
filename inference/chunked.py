"""Many samples or likelihoods, in chunks by index that survive being killed: what sample_ddp.py does with a pipeline."""

import csv
import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.atomic import writable_folder, write_atomically, write_json, writing
from common.chunks import ChunkStore, write_npz, written_behind
from common.spread import mean_and_error
from common.streams import generator

from .records import machine_of

WRITERS = 8  # threads that compress PNGs


@dataclass
class Labels:
    """The class of each sample: a function of the seed and the sample's index alone.

    classes: sample i gets classes[i mod their number]. Without, rule says: random, or balanced, in which each run of
    num_classes samples has every class once, shuffled.
    """

    num_classes: int
    seed: int
    rule: str = "random"
    classes: list = None

    def of(self, index):
        if self.classes:
            return self.classes[index % len(self.classes)]
        if self.rule == "random":
            return int(torch.randint(self.num_classes, (), generator=generator("cpu", self.seed, "label", index)))
        block, place = divmod(index, self.num_classes)
        return int(torch.randperm(self.num_classes, generator=generator("cpu", self.seed, "balanced", block))[place])


@dataclass
class Samples:
    """Images of Labels' classes, drawn by one solver: settings are those of Pipeline.draw."""

    pipeline: object
    labels: Labels
    seed: int
    settings: dict
    png_folder: Path = None  # where each image goes as a file too
    expected_fid: float = None
    flag: str = "--sample-dir"  # under which a person gave the folder
    ending = ".npz"

    def make(self, indices):
        """A chunk: dict of arrays for its file, of which the images are still on the device."""
        labels, steps, before = [self.labels.of(i) for i in indices], [], self.pipeline.calls
        draws = dict(seed=self.seed, indices=indices, on_step=lambda: steps.append(1))
        images = self.pipeline.to_images(self.pipeline.draw(labels, **draws, **self.settings)[-1])
        return dict(images=images, labels=np.array(labels), calls=self.pipeline.calls - before, steps=len(steps))

    def finish(self, store, result):
        """Assemble the .npz from the chunks, one at a time; returns what the .json says of it."""
        calls = [store.load(chunk, "calls", "steps") for chunk in range(store.count)]
        sizes = [len(store.indices(chunk)) for chunk in range(store.count)]
        shape = store.load(0, "images")[0].shape[1:]
        parts = (store.load(chunk, "images")[0] for chunk in range(store.count))
        write_npz(result, (store.total, *shape), np.uint8, parts)
        return {
            "samples": store.total,
            "network_calls_per_sample": sum(int(c) * n for (c, _), n in zip(calls, sizes)) / store.total,
            "solver_steps_per_sample": sum(int(s) * n for (_, s), n in zip(calls, sizes)) / store.total or None,
            "expected_fid_50k": self.expected_fid,
        }


@dataclass
class Scores:
    """Likelihoods of some of a data set's images: settings are those of Pipeline.likelihood."""

    pipeline: object
    dataset: object  # LabelledImages
    chosen: list  # indices into it
    seed: int
    settings: dict = field(default_factory=dict)
    flag, ending = "--sample-dir", ".csv"

    def make(self, indices):
        """A chunk: dict of arrays for its file."""
        before, chosen = self.pipeline.calls, [self.chosen[i] for i in indices]
        images, labels = self.dataset.batch(chosen)
        draws = dict(seed=self.seed, indices=chosen)
        nats, bits = self.pipeline.likelihood(images.permute(0, 2, 3, 1), labels, **draws, **self.settings)
        return dict(nats=nats, bits=bits, labels=labels.numpy(), calls=self.pipeline.calls - before)

    def finish(self, store, result):
        """Write every image's likelihood as .csv; returns means and standard errors."""
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(["image", "label", "bits_per_dim", "nats"])
        chunks = [store.load(chunk, "labels", "bits", "nats", "calls") for chunk in range(store.count)]
        labels, bits, nats = (np.concatenate([chunk[k] for chunk in chunks]) for k in range(3))
        names = (self.dataset.name(i) for i in self.chosen)
        rows.writerows(zip(names, labels.tolist(), bits.tolist(), nats.tolist()))
        write_atomically(result, lambda out: out.write(text.getvalue()), "w")
        (bits_mean, bits_error), (nats_mean, nats_error) = mean_and_error(bits), mean_and_error(nats)
        return {
            "images": store.total,
            "bits_per_dim": bits_mean,
            "bits_per_dim_standard_error": bits_error,
            "nats": nats_mean,
            "nats_standard_error": nats_error,
            "network_calls_per_image": sum(int(c[3]) * len(c[0]) for c in chunks) / store.total,
        }


def keep_chunk(store, chunk, arrays, png_folder, flag="--sample-dir"):
    """Write a chunk's file and pictures. flag: under which a person gave the folder."""
    if "images" in arrays:
        arrays["images"] = arrays["images"].cpu().numpy()
    with writing(store.folder, flag):
        if png_folder:
            save = lambda index, image: Image.fromarray(image).save(png_folder / f"{index:06d}.png")  # noqa: E731
            with ThreadPoolExecutor(WRITERS) as writers:
                list(writers.map(save, store.indices(chunk), arrays["images"]))
        store.save(chunk, **arrays)


def make_chunk(work, store, chunk):
    """The arrays of a chunk. For a compiled network a last one that is smaller is filled up with its last item, which is
    thrown away: another size of batch would be compiled anew."""
    indices = list(store.indices(chunk))
    fill = store.size - len(indices) if work.pipeline.compile and store.count > 1 else 0
    arrays = work.make(indices + indices[-1:] * fill)
    return {name: value[: len(indices)] if np.ndim(value) else value for name, value in arrays.items()}


def make_chunks(work, store, own, show):
    """Make the chunks called own and write them in a thread, so that the device does the next one meanwhile."""
    progress = tqdm(total=sum(len(store.indices(c)) for c in own), disable=None if show else True, unit="image")
    with written_behind() as write, progress:
        for chunk in own:
            write(keep_chunk, store, chunk, make_chunk(work, store, chunk), getattr(work, "png_folder", None), work.flag)
            progress.update(len(store.indices(chunk)))


def complete(work, total, size, base, identity, world):
    """Make a work's file, BASE.npz or BASE.csv, and BASE.json with all that it was made of, or what is missing of them.

    size: items of a chunk, which go to the processes by their number. base: a path without its ending. Returns (the file, the
    .json's content, whether it was there already).
    """
    result = base.with_name(f"{base.name}{work.ending}")
    settings_file = base.with_name(f"{base.name}.json")
    store = ChunkStore(base.with_name(f"{base.name}.chunks"), total, size)

    def start():
        for path in filter(None, (base.parent, store.folder, getattr(work, "png_folder", None))):
            writable_folder(path, work.flag)
        done = settings_file.exists() and result.exists()
        return done, [] if done else store.missing()

    (done, missing), started = world.from_main(start), time.time()
    make_chunks(work, store, missing[world.rank :: world.size], show=world.is_main)
    world.barrier()

    def finish():
        if not done:
            with writing(base.parent, work.flag):
                summary = work.finish(store, result)
                made, seconds = sum(len(store.indices(chunk)) for chunk in missing), time.time() - started
                speed = {"made_in_this_run": made, "wall_seconds": seconds, "images_per_second": made / seconds}
                write_json(settings_file, {"command": sys.argv} | summary | identity | speed | machine_of(world))
        if store.folder.is_dir():
            store.remove()
        return json.loads(settings_file.read_text())

    return result, world.from_main(finish), done  # the others wait: the file is there for them too
