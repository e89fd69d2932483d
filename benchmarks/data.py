"""How fast data are read and encoded: python benchmarks/data.py

    kinds      the same random JPEGs as class folders, .zip, folder with dataset.json and parquet (row groups of 100, as the
               Hub writes), read in random order by one process: images/s, and the median ratio to class folders over turns
    index      a .zip of empty members and parquet of empty images, as many as ImageNet has: seconds until the data set is
               open, what a process keeps of it, and the most that it took meanwhile
    encoding   images/s of reading alone, of encoding alone and of encode_latents.py's loop, which does both at once

Each in one run, by turns. Nothing is downloaded; the files lie in a temporary folder.
"""

import json
import statistics
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.chunks import ChunkStore
from common.distributed import World
from common.machine import PeakMemory
from data.autoencoder import load_autoencoder
from data.encoding import begin, encode, encode_chunks
from data.folders import FolderDataset
from data.loader import read_ahead
from data.sources import open_dataset
from train_utils import Parser, non_negative_int, positive_int, run

VAE = str(Path(__file__).resolve().parent.parent / "assets" / "digits-vae")


def make_kinds(folder, count, side):
    """{kind: path} of the same photographs, which is to say of smooth noise, in five classes."""
    from pyarrow import parquet, table

    rng, root = np.random.default_rng(0), folder / "folders"
    for i in range(count):
        file = root / f"class {i % 5}" / f"{i:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 12, 3), dtype=np.uint8))
        coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(file, quality=92)
    dataset, labels = FolderDataset(root, 32), []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(count):
            archive.write(dataset.name(i), Path(dataset.name(i)).relative_to(root))
    for i in range(count):
        name = f"{i // 1000:05d}/img{i:08d}.jpg"
        (folder / "edm" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "edm" / name).write_bytes(Path(dataset.name(i)).read_bytes())
        labels.append([name, dataset.label(i)])
    (folder / "edm" / "dataset.json").write_text(json.dumps({"labels": labels}))
    rows = [dict(bytes=Path(dataset.name(i)).read_bytes(), path=Path(dataset.name(i)).name) for i in rng.permutation(count)]
    labels = [int(row["path"].removesuffix(".jpg")) % 5 for row in rows]
    parquet.write_table(table({"image": rows, "label": labels}), folder / "images.parquet", row_group_size=100)
    return {name: folder / path for name, path in PATHS.items()}


PATHS = {"class folders": "folders", ".zip": "images.zip", "dataset.json": "edm", "parquet": "images.parquet"}


def measure_kinds(kinds, count, size, turns):
    """Print images/s of each kind, by turns in one run, each image once a turn."""
    datasets, seconds = {name: open_dataset(path, size) for name, path in kinds.items()}, {name: [] for name in kinds}
    for turn in range(turns):
        order = np.random.default_rng(turn).permutation(count)
        for name, dataset in datasets.items():
            started = time.perf_counter()
            for i in order:
                dataset[int(i)]
            seconds[name].append(time.perf_counter() - started)
    print("| kind | images/s | ratio to class folders |\n|---|---|---|")
    for name, taken in seconds.items():
        ratio = statistics.median(first / own for first, own in zip(seconds["class folders"], taken))
        print(f"| {name} | {count / statistics.median(taken):.0f} | {ratio:.2f} |", flush=True)


def make_large(folder, entries):
    """{kind: path} of many images without content, in 1,000 classes."""
    from pyarrow import array, parquet, struct, table
    from pyarrow import binary as bytes_type
    from pyarrow import string as string_type

    with zipfile.ZipFile(folder / "large.zip", "w") as archive:
        for i in range(entries):
            archive.writestr(zipfile.ZipInfo(f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG"), b"")
    kind, step = struct({"bytes": bytes_type(), "path": string_type()}), 100_000
    (folder / "large").mkdir()
    for number, first in enumerate(range(0, entries, step)):
        which = range(first, min(first + step, entries))
        images = array([dict(bytes=b"x", path=f"n{i % 1000:08d}_{i}.JPEG") for i in which], kind)
        file = folder / "large" / f"train-{number:05d}.parquet"
        parquet.write_table(table({"image": images, "label": [i % 1000 for i in which]}), file, row_group_size=100)
    return {".zip": folder / "large.zip", "parquet": folder / "large"}


def measure_index(kinds, entries):
    print(f"\n| {entries:,} images | until it is open, s | kept, MB | in arrays, bytes an image | the most, MB |")
    print("|---|---|---|---|---|")
    for name, path in kinds.items():
        memory, started = PeakMemory(torch.device("cpu")), time.perf_counter()
        dataset = open_dataset(path, 256)
        seconds, most = time.perf_counter() - started, memory.read()
        kept = PeakMemory(torch.device("cpu")).before - memory.before
        arrays = sum(value.nbytes for value in vars(dataset).values() if isinstance(value, np.ndarray)) / entries
        print(f"| {name} | {seconds:.1f} | {kept / 1e6:.0f} | {arrays:.0f} | {most / 1e6:.0f} |", flush=True)
        del dataset


@contextmanager
def timed(count, rates):
    started = time.perf_counter()
    yield
    rates.append(count / (time.perf_counter() - started))


def measure_encoding(path, folder, count, size, turns, workers, device):
    dataset, autoencoder = open_dataset(path, size), load_autoencoder(VAE).to(device)
    shape = (count, 2, 2, autoencoder.channels, size // autoencoder.factor, size // autoencoder.factor)
    rates = {"reading alone": [], "encoding alone": [], "encode_latents.py": []}
    for turn in range(turns):
        store = ChunkStore(folder / f"cache {turn}" / "chunks", count, 32)
        begin(store.folder.parent, {"format": 1}, store, shape)
        batches = [list(store.indices(chunk)) for chunk in range(store.count)]
        with timed(count, rates["reading alone"]), read_ahead(dataset, batches, workers, device) as loaded:
            images = [batch[0] for batch in loaded]
        with timed(count, rates["encoding alone"]):
            for batch in images:
                encode(autoencoder, batch.to(device), 2).cpu()
        with timed(count, rates["encode_latents.py"]):
            chunks = range(store.count)
            encode_chunks(store.folder.parent, World(0, 1, device), dataset, autoencoder, store, chunks, 2, workers)
    print(f"\n| {size} px, {workers} loading processes | images/s | ratio to encoding alone |\n|---|---|---|")
    for name, own in rates.items():
        ratio = statistics.median(rate / alone for rate, alone in zip(own, rates["encoding alone"]))
        print(f"| {name} | {statistics.median(own):.0f} | {ratio:.2f} |", flush=True)


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = make_kinds(folder, args.images, 375)
        measure_kinds(kinds, args.images, 256, args.turns)
        measure_encoding(kinds["class folders"], folder, args.images, args.encode_size, args.turns, args.num_workers, device)
        measure_index(make_large(folder, args.entries), args.entries)
    return 0


def make_parser():
    parser = Parser(prog="benchmarks/data.py", description="How fast data are read and encoded.")
    parser.add_argument("--images", type=positive_int, default=1000, help="JPEGs of 500 x 375 pixels")
    parser.add_argument("--entries", type=positive_int, default=1_281_167, help="images of the large index")
    parser.add_argument("--encode-size", type=positive_int, default=64, help="pixels a side that are encoded")
    parser.add_argument("--turns", type=positive_int, default=3, help="times that each is measured")
    parser.add_argument("--num-workers", type=non_negative_int, default=1, help="loading processes while encoding")
    return parser


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "benchmarks/data.py")
