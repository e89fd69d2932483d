"""The same pictures in every kind of data set."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("a", "b b", "c")


def write_folders(root, count=10, size=(40, 50), seed=0):
    """Class folders of noise, some of them in deeper folders."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        for i in range(count):
            file = root / name / ("deep" if i % 3 == 0 else ".") / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    return root


def write_zip(folders, path, inside="", method=zipfile.ZIP_STORED, reverse=True):
    """The folders as an archive, in another order than theirs."""
    files = sorted((file for file in folders.rglob("*") if file.is_file()), reverse=reverse)
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in files:
            archive.write(file, inside + str(file.relative_to(folders)))
    return path


def write_labelled(dataset, root):
    """As EDM's tools prepare: numbered files and a dataset.json."""
    labels = []
    for i in range(len(dataset)):
        name = f"{i // 1000:05d}/img{i:08d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(dataset.name(i), root / name)
        labels.append([name, dataset.label(i)])
    (root / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return root


def write_parquet(dataset, root, rows=4, files=3, seed=0, names=CLASSES, **columns):
    """As the Hub has them: shuffled rows in several files, with the names of classes in the schema."""
    import pyarrow
    from pyarrow import parquet

    root.mkdir()
    order = np.random.default_rng(seed).permutation(len(dataset))
    described = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
    for number, part in enumerate(np.array_split(order, files)):
        images = [dict(bytes=Path(dataset.name(i)).read_bytes(), path=dataset.name(i)) for i in part]
        table = {"image": images, "label": [dataset.label(i) for i in part]}
        table |= {name: make(part) for name, make in columns.items()}
        table = {name: values for name, values in table.items() if values is not None}
        table = pyarrow.table(table).replace_schema_metadata({b"huggingface": json.dumps(described).encode()})
        parquet.write_table(table, root / f"train-{number:05d}-of-{files:05d}.parquet", row_group_size=rows)
    return root


def every_kind(folder, count=10, **more):
    """{kind: path} of the same pictures."""
    from data.folders import FolderDataset

    kinds = {"folders": write_folders(folder / "folders", count, **more)}
    dataset = FolderDataset(kinds["folders"], 8)
    kinds["zip"] = write_zip(kinds["folders"], folder / "plain.zip")
    kinds["zip in a folder"] = write_zip(kinds["folders"], folder / "nested.zip", "x/train/", zipfile.ZIP_DEFLATED)
    kinds["dataset.json"] = write_labelled(dataset, folder / "edm")
    kinds["dataset.json in a zip"] = write_zip(kinds["dataset.json"], folder / "edm.zip")
    kinds["parquet"] = write_parquet(dataset, folder / "parquet")
    kinds["parquet by pattern"] = folder / "parquet" / "train-*.parquet"
    return kinds
