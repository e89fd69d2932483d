"""Data sets of every kind: the same pictures are the same data, and what is none is one line."""

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli import ROOT, call, launch, one_line
from common.checkpoint import load_checkpoint
from common.errors import UserError
from data.archives import ZipImages
from data.folders import FolderDataset
from data.parquet import ParquetImages
from data.parts import Part, split
from data.sources import open_dataset
from pictures import CLASSES, every_kind, write_parquet, write_zip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return every_kind(tmp_path_factory.mktemp("kinds"))


KINDS = ["zip", "zip in a folder", "dataset.json", "dataset.json in a zip", "parquet", "parquet by pattern"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pictures_are_the_same_items_in_the_same_order(kind, channels, kinds):
    """Also in a process that got a copy."""
    theirs = FolderDataset(kinds["folders"], 32, channels)
    ours = pickle.loads(pickle.dumps(open_dataset(kinds[kind], 32, channels)))
    assert len(ours) == len(theirs) == 30 and ours.mirrors
    for i in range(30):
        (image, label), (expected, expected_label) = ours[i], theirs[i]
        assert torch.equal(image, expected) and image.shape == (channels, 32, 32)
        assert label == expected_label and type(label) is int
        assert str(kinds[kind]).split("*")[0] in ours.name(i)
    named = list(CLASSES) if "json" not in kind else ["0", "1", "2"]
    assert list(ours.classes) == named
    assert ours.note == ("its classes are the folders of x/train/" if kind == "zip in a folder" else None)


def test_grey_is_the_luma_that_pillow_makes(kinds):
    grey, colour = (open_dataset(kinds["folders"], 32, channels)[3][0] for channels in (1, 3))
    expected = np.asarray(Image.fromarray(colour.permute(1, 2, 0).numpy()).convert("L"))
    assert np.array_equal(grey[0], expected)


SMALL = ["--vae", "none", "--image-size", 16, "--model", "SiT-T/8", "--global-batch-size", 8, "--log-every", 1]


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from train_utils import run
from training.monitor import Monitor

save = Monitor.save

def dying(self, trainer):
    save(self, trainer)
    self.written()
    os.kill(os.getpid(), signal.SIGKILL)

Monitor.save = dying
arguments = train.make_parser().parse_args()
run(lambda: train.main(arguments), "train.py")
"""


def steps(path, results, *more, processes=1, script="train"):
    flags = ["--data-path", path, "--results-dir", results, *SMALL, "--max-steps", 4, "--ckpt-every", 2, "--sample-every", 1000]
    return launch(script, *flags, *more, processes=processes)


def newest(results):
    return load_checkpoint(sorted(results.glob("*/checkpoints/*.pt"))[-1])


def weights_equal(a, b):
    return all(torch.equal(value, b[part][key]) for part in ("model", "ema") for key, value in a[part].items())


@pytest.mark.slow
@pytest.mark.parametrize("workers, processes", [(0, 1), (2, 1), (0, 2)])
def test_five_hundred_pictures_train_alike_in_every_kind(workers, processes, tmp_path_factory):
    """Bit for bit, also killed after two steps and resumed."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "dying.py").write_text(DYING.format(root=str(ROOT)))
    kinds, first = every_kind(folder, count=167, size=(20, 24)), None
    del kinds["parquet by pattern"]
    for kind, path in kinds.items():
        results, more = folder / f"results of {kind}", ["--num-workers", workers]
        if kind != "folders":
            killed = steps(path, results, *more, processes=processes, script=folder / "dying")
            assert killed.code != 0 and newest(results)["step"] == 2, killed.err
            more.append("--resume")
        done = steps(path, results, *more, processes=processes)
        assert done.code == 0, done.err
        content = newest(results)
        first = first or content
        assert content["step"] == 4 and weights_equal(first, content), kind
        assert content["args"]["num_classes"] == 3  # as nobody told


def test_pictures_without_classes_make_an_unconditional_model(kinds, tmp_path, capsys):
    """In a plain folder, a plain .zip, parquet without labels and a dataset.json with none."""
    folder = kinds["folders"] / "c" / "deep"
    names = sorted(os.listdir(folder))
    write_zip(folder, tmp_path / "flat.zip")
    (tmp_path / "edm").mkdir()
    for name in names:
        (tmp_path / "edm" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "edm" / "dataset.json").write_text('{"labels": null}')
    write_parquet(FolderDataset(kinds["folders"], 8), tmp_path / "parquet", label=lambda part: None)
    flat = open_dataset(folder, 16)
    for path in (folder, tmp_path / "flat.zip", tmp_path / "edm", tmp_path / "parquet"):
        dataset = open_dataset(path, 16)
        assert not dataset.classes and {dataset[i][1] for i in range(len(dataset))} == {0}
        if path.name != "parquet":
            assert all(torch.equal(dataset[i][0], flat[i][0]) for i in range(len(names)))
    flags = [*SMALL, "--class-dropout-prob", 0, "--global-batch-size", 2, "--num-workers", 0, "--results-dir", tmp_path / "r"]
    result = call(capsys, "train", "--data-path", tmp_path / "flat.zip", *flags, "--max-steps", 2)
    assert result.code == 0, result.err
    (path,) = tmp_path.glob("r/*/checkpoints/*.pt")
    content = load_checkpoint(path)
    assert content["ema"]["y_embedder.embedding_table.weight"].shape[0] == 1
    for script, more in (
        ("sample", ["--out", tmp_path / "s.png"]),
        ("sample_ddp", ["--sample-dir", tmp_path, "--num-fid-samples", 4]),
    ):
        drawn = call(capsys, script, "ODE", "--ckpt", path, "--sampling-method", "euler", "--num-sampling-steps", 3, *more)
        assert drawn.code == 0, drawn.err
    few = ["--ckpt", path, "--sampling-method", "euler", "--num-sampling-steps", 3, "--data-path", folder, "--num-images", 2]
    for what in (["--likelihood"], ["--reverse", "--out", tmp_path / "z.png"]):
        result = call(capsys, "sample", "ODE", *few, *what)
        assert result.code == 0, result.err
    one_line(call(capsys, "train", "--data-path", folder, *flags, "--num-classes", 5, "--max-steps", 2), 2, "without classes")


def test_the_number_of_classes_is_the_data_s(kinds, tmp_path, capsys):
    flags = ["--data-path", kinds["zip"], *SMALL, "--num-workers", 0, "--results-dir", tmp_path / "r", "--max-steps"]
    assert call(capsys, "train", *flags, 1).code == 0
    assert call(capsys, "train", *flags, 2, "--num-classes", 3, "--resume").code == 0  # the same run
    assert len(list((tmp_path / "r").iterdir())) == 1
    one_line(call(capsys, "train", *flags, 1, "--num-classes", 4), 2, "--num-classes 4", "has 3 classes")


def test_a_broken_member_or_row_is_named_and_others_are_read(kinds, tmp_path):
    data = bytearray(kinds["zip"].read_bytes())
    (tmp_path / "damaged.zip").write_bytes(data)
    whole = ZipImages(tmp_path / "damaged.zip", 16)
    where = int(whole.offsets[4]) + 200
    data[where] ^= 255
    (tmp_path / "damaged.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read image .*damaged.zip/a/7.png: it does not match its checksum"):
        whole[4]
    assert whole[3][0].shape == (3, 16, 16)
    (tmp_path / "damaged.zip").write_bytes(data[: len(data) // 2])  # cut off while it is read
    assert any("ends within a member" in str(error) for error in failures(whole))
    source = FolderDataset(kinds["folders"], 8)
    broken = [b"no picture", b"", None]
    write_parquet(
        source,
        tmp_path / "p",
        image=lambda part: [
            dict(bytes=broken[j] if j < 3 else Path(source.name(i)).read_bytes(), path=None) for j, i in enumerate(part)
        ],
    )
    found = failures(ParquetImages(tmp_path / "p", 16))
    assert len(found) == 9 and sum("it has no bytes" in str(error) for error in found) == 6
    assert all("row group" in str(error) and str(tmp_path / "p") in str(error) for error in found)


def failures(dataset):
    found = []
    for i in range(len(dataset)):
        try:
            dataset[i]
        except UserError as error:
            found.append(error)
    return found


def png():
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(file, "png")
    return file.getvalue()


def zip_of(path, members, **changes):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = changes.get("compress_type", zipfile.ZIP_STORED)
            archive.writestr(info, content)
    return path


def with_entry(path, offset, form, value):
    """The archive's first entry of the central directory, changed."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(b"PK\1\2") + offset, value)
    path.write_bytes(data)
    return path


def hostile_zips(folder):
    """(name, path, exit code's kind, words of the line)"""
    z = lambda name, members, **more: zip_of(folder / f"{name}.zip", members, **more)  # noqa: E731
    image = png()
    bomb = b"\0" * 3_000_000
    yield z("up", {"a/../../x.png": image}), "leads out of the archive"
    yield z("absolute", {"/etc/x.png": image}), "leads out of the archive"
    yield z("windows", {"..\\..\\x.png": image}), "leads out of the archive"
    yield z("drive", {"C:/x.png": image}), "leads out of the archive"
    yield with_entry(z("encrypted", {"a/x.png": image}), 8, "<H", 1), "is encrypted"
    yield with_entry(z("of the future", {"a/x.png": image}), 6, "<H", 99), "not a readable .zip (zip file version 9.9)"
    yield with_entry(z("huge", {"a/x.png": image}), 24, "<L", 2**31), "2,147,483,648 bytes, which no picture has"
    yield z("lzma", {"a/x.png": image}, compress_type=zipfile.ZIP_LZMA), "is compressed by method 14"
    yield z("empty", {}), "no images in it"
    yield z("texts", {"a/readme.md": b"x"}), "no images in it: 1 .md"
    yield z("splits", {"x/train/a/1.png": image, "x/val/a/1.png": image}), "train and val are parts of a data set"
    yield z("deep", {"a/" * 3000 + "1.png": image}), "a member has a name of 6,005 characters"
    yield z("nothing in b", {"a/1.png": image, "b/readme.txt": b"", "c/1.png": image}), "no images in the class folder b"
    yield z("twice", {"dataset.json": b'{"labels": [["1.png", 1], ["1.png", 2]]}', "1.png": image}), "gives 1.png two labels"
    yield z("pairs", {"dataset.json": b" " * 1_100_000, "1.png": image}), "bytes are more than labels of 1 images need"
    yield z("json of nothing", {"dataset.json": b"[1]", "1.png": image}), "dataset.json: cannot be read"
    yield z("json of json", {"dataset.json": b"{" * 100_000, "1.png": image}), "dataset.json: cannot be read"
    yield z("no label", {"dataset.json": b'{"labels": [["2.png", 1]]}', "1.png": image}), "1 of 1 images have no label"
    labels = lambda label: json.dumps({"labels": [["1.png", label]]}).encode()  # noqa: E731
    yield z("too many", {"dataset.json": labels(10**8), "1.png": image}), "100000000 is no class of 1 images"
    yield z("negative", {"dataset.json": labels(-1), "1.png": image}), "-1 is no class"
    yield z("vector", {"dataset.json": labels([0, 1]), "1.png": image}), "a label is [0, 1]"
    more = b'{"labels": [["1.png", 0], ["gone.png", 0]]}'
    yield z("more", {"dataset.json": more, "1.png": image}), "1 labels are of images that are not there, one is gone.png"
    (folder / "text.zip").write_text("no archive")
    yield folder / "text.zip", "not a readable .zip"
    cut = z("cut", {"a/x.png": image, "b/x.png": image})
    cut.write_bytes(cut.read_bytes()[:-30])
    yield cut, "not a readable .zip"
    members = {f"a/{i}x.png": bomb for i in range(6)} | {"b/x.png": image}
    path = zip_of(folder / "bomb.zip", members, compress_type=zipfile.ZIP_DEFLATED)
    yield with_entry(path, 24, "<L", 10), "images cannot be read, more than 1 %"  # as pictures, whatever they claim
    yield folder / "gone.zip", "not a readable .zip (No such file or directory)"


def hostile_folders(folder):
    def make(name, text, files=("1.png",)):
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).write_bytes(png())
        (folder / name / "dataset.json").write_text(text)
        return folder / name

    yield make("outside", '{"labels": [["../x.png", 0]]}'), "1 of 1 images have no label, one is 1.png"
    yield make("number", '{"labels": 3}'), "dataset.json: cannot be read"
    yield make("pair", '{"labels": [["1.png"]]}'), "dataset.json: cannot be read"
    yield make("float", '{"labels": [["1.png", 0.5]]}'), "a label is 0.5"
    yield make("none", '{"labels": null}', ()), "no images beside its dataset.json"
    yield make("key", '{"label": null}'), "no labels in it"


def hostile_parquets(folder):
    import pyarrow
    from pyarrow import parquet

    def make(name, table, **more):
        parquet.write_table(pyarrow.table(table), folder / f"{name}.parquet", **more)
        return folder / f"{name}.parquet"

    images = [dict(bytes=png(), path=f"{i}.png") for i in range(2)]
    yield make("columns", {"text": ["a"], "label": [1]}), "no column image, a struct with bytes, is in it; it has text: string"
    yield make("raw", {"image": [png()], "label": [1]}), "no column image, a struct with bytes"
    yield make("words", {"image": images, "label": ["cat", "dog"]}), "its labels cannot be read"
    yield make("null", {"image": images, "label": [0, None]}), "1 of its 2 rows have no label"
    yield make("unlabelled", {"image": images, "label": [0, -1]}), "-1 is no class of 2 images"
    yield make("absurd", {"image": images, "label": [0, 2**31 - 1]}), "2147483647 is no class of 2 images"
    yield make("large labels", {"image": images, "label": [0, 2**32]}), "4294967296 is no class of 2 images"
    long = [dict(bytes=png(), path="y" * 20_000)] * 2
    yield make("long paths", {"image": long, "label": [0, 1]}), "a path of more than 4,096 characters"
    both = pyarrow.Table.from_arrays([pyarrow.array(images)] * 2 + [pyarrow.array([0, 1])], names=["image", "image", "label"])
    parquet.write_table(both, folder / "both.parquet")
    yield folder / "both.parquet", "no column image, a struct with bytes, is in it"
    bomb = [dict(bytes=b"\0" * 70_000_000, path=f"{i}.png") for i in range(4)]
    yield make("bomb", {"image": bomb, "label": [0, 1, 0, 1]}, compression="zstd"), "claims a row group of"
    yield make("rowless", {"image": pyarrow.array([], pyarrow.struct({"bytes": pyarrow.binary()}))}), "no rows in it"
    (folder / "text.parquet").write_text("no parquet")
    yield folder / "text.parquet", "not a readable parquet file"
    (folder / "nothing.parquet").touch()
    yield folder / "nothing.parquet", "not a readable parquet file"
    yield folder / "gone.parquet", "not a readable parquet file"
    cut = make("cut", {"image": images, "label": [0, 1]})
    cut.write_bytes(cut.read_bytes()[:-200])
    yield cut, "not a readable parquet file"
    (folder / "splits").mkdir()
    for part in ("train", "test"):
        (folder / "splits" / f"{part}-00000-of-00001.parquet").touch()
    yield folder / "splits", "test and train are parts of a data set; give '"
    (folder / "differ").mkdir()
    make("differ/a", {"image": images, "label": [0, 1]})
    make("differ/b", {"image": images})
    yield folder / "differ", "its columns are not those of"
    garbled = make("garbled", {"image": [dict(bytes=png() * 50, path="x")] * 4, "label": [0, 1, 0, 1]}, compression="gzip")
    data = bytearray(garbled.read_bytes())
    data[60:400] = bytes(340)
    garbled.write_bytes(data)
    yield garbled, "cannot"


@pytest.mark.parametrize("kind", [hostile_zips, hostile_folders, hostile_parquets])
def test_wrong_and_hostile_data_is_one_line(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path, words in kind(tmp_path / "data"):
        flags = [*SMALL, "--global-batch-size", 1, "--num-workers", 0, "--results-dir", tmp_path / "r", "--max-steps", 12]
        result = call(capsys, "train", "--data-path", path, *flags)
        lines = [line for line in result.err.splitlines() if "error: " in line]
        assert result.code in (1, 2) and len(lines) == 1 and "Traceback" not in result.err, (path, result.err)
        assert words in lines[0] and (path.name.split(".")[0] in lines[0] or "x.png" in lines[0]), (path, lines)
    assert not (tmp_path / "x.png").exists()


def test_a_member_that_unpacks_to_more_than_it_may_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("data.archives.LIMIT", 10_000)
    path = zip_of(tmp_path / "z.zip", {"a/x.png": b"\0" * 5_000_000, "b/x.png": png()}, compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"its member a/x.png has 5,000,000 bytes"):
        ZipImages(path, 8)
    dataset = ZipImages(with_entry(path, 24, "<L", 10), 8)
    with pytest.raises(UserError, match=r"z.zip/a/x.png: it does not match its checksum"):
        dataset[0]
    assert dataset[1][0].shape == (3, 8, 8)


def test_without_pyarrow_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="parquet needs pyarrow, which is not installed; pip install pyarrow"):
        open_dataset(tmp_path / "x.parquet", 8)


def test_large_row_groups_are_told_and_few_are_kept(kinds, tmp_path, monkeypatch):
    monkeypatch.setattr("data.parquet.KEPT", 40_000)
    monkeypatch.setattr("data.parquet.DEAR", 40_000)
    dataset = ParquetImages(write_parquet(FolderDataset(kinds["folders"], 8), tmp_path / "p", rows=10), 8)
    assert "row groups of 10 images" in dataset.note
    for i in range(30):
        dataset[i]
        assert len(dataset.kept) == 1  # each group has more than may be kept
    assert len({id(reader) for reader in map(dataset.reader, range(3))}) == 3


def test_the_index_takes_sixteen_bytes_an_image(kinds):
    for kind in ("zip", "parquet"):
        held = vars(open_dataset(kinds[kind], 8)).items()
        arrays = [value for name, value in held if isinstance(value, np.ndarray) and name != "ends"]  # of each class
        assert sum(array.nbytes for array in arrays) <= 16 * 30


def test_a_share_of_the_data_is_held_out_evenly(kinds):
    dataset = open_dataset(kinds["zip"], 8)
    rest, held_out = split(dataset, 0.2)
    assert len(held_out) == 6 and len(rest) == 24 and rest.classes == dataset.classes
    assert not set(rest.indices) & set(held_out.indices)
    assert np.bincount([held_out[i][1] for i in range(6)]).tolist() == [2, 2, 2]
    assert torch.equal(held_out[5][0], dataset[int(held_out.indices[5])][0]) and held_out.name(5) == dataset.name(25)
    assert isinstance(pickle.loads(pickle.dumps(rest)), Part)
    for fraction in (0.001, 0.999):
        with pytest.raises(UserError, match="leaves nothing to train or to validate on"):
            split(dataset, fraction)


def members(path):
    dataset = open_dataset(path, 8)
    return list(dataset.classes), [dataset.name(i).removeprefix(f"{path}/") for i in range(len(dataset))], dataset.note


def test_names_of_any_tool_are_what_the_folder_has(tmp_path):
    """Info-ZIP and macOS write UTF-8 without saying so; old tools of Windows write backslashes."""
    names = ("été/0.png", "zèbre/1.png", "猫/2.png", "a/shot 12:30.png")
    for name in names:
        (tmp_path / "u" / name).parent.mkdir(parents=True)
        (tmp_path / "u" / name).write_bytes(png())
    placeholders = [str(i) * len(name.encode()) for i, name in enumerate(names)]  # as long, and of ASCII: no flag is set
    data = zip_of(tmp_path / "u.zip", {f"{name}": png() for name in placeholders}).read_bytes()
    for placeholder, name in zip(placeholders, names):
        data = data.replace(placeholder.encode(), name.encode())
    (tmp_path / "u.zip").write_bytes(data)
    folder = FolderDataset(tmp_path / "u", 8)
    assert folder.classes == ["a", "zèbre", "été", "猫"]
    classes, listed, _ = members(tmp_path / "u.zip")
    assert classes == folder.classes and listed == [os.path.relpath(folder.name(i), tmp_path / "u") for i in range(4)]


@pytest.mark.parametrize("names, classes, first, note", [
    (["a\\0.png", "b\\0.png"], ["a", "b"], "a/0.png", None),
    (["./a/0.png", "./b/0.png"], ["a", "b"], "a/0.png", None),
    (["a/shot 12:30.png", "b/notes: 1.png"], ["a", "b"], "a/shot 12:30.png", None),
    (["preview.png", "x/a/0.png", "x/b/0.png"], ["a", "b"], "x/a/0.png",
     "its classes are the folders of x/; passed over: 1 beside the class folders"),
    (["a/0.png", "a/dataset.json", "b/1.png"], ["a", "b"], "a/0.png", "passed over: 1 .json"),
    (["cats/0.png", "cats/1.png"], ["cats"], "cats/0.png", None),
    (["cats/deep/er/0.png", "cats/1.png"], ["cats"], "cats/1.png", None),
    (["0.png", "1.png", "__MACOSX/._0.png", ".DS_Store"], [], "0.png", None),
])  # fmt: skip
def test_trees_as_people_have_them(names, classes, first, note, tmp_path):
    path = zip_of(tmp_path / "z.zip", {name: png() for name in names})
    found, listed, told = members(path)
    assert (found, listed[0], told) == (classes, first, note)


def test_what_is_no_picture_is_not_judged(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a/0.png", png())
        archive.writestr("README.txt", "text", zipfile.ZIP_BZIP2)
    assert members(tmp_path / "z.zip") == (["a"], ["a/0.png"], "passed over: 1 .txt")


def test_damage_in_a_streamed_archive_is_found(tmp_path):
    """Whose members' own headers have no checksum."""

    class Stream(io.RawIOBase):
        def __init__(self):
            self.data = bytearray()

        def writable(self):
            return True

        def write(self, data):
            self.data += data
            return len(data)

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in "ab":
            archive.writestr(f"{name}/0.png", png())
    (tmp_path / "s.zip").write_bytes(stream.data)
    dataset = ZipImages(tmp_path / "s.zip", 8)
    assert dataset[0][0].shape == (3, 8, 8)
    stream.data[int(dataset.offsets[0]) + 60] ^= 1
    (tmp_path / "s.zip").write_bytes(stream.data)
    with pytest.raises(UserError, match=r"a/0.png: it does not match its checksum"):
        ZipImages(tmp_path / "s.zip", 8)[0]


def test_columns_that_are_no_labels_are_told(kinds, tmp_path):
    source = FolderDataset(kinds["folders"], 8)
    more = dict(label=lambda part: None, fine_label=lambda part: [1] * len(part))
    dataset = ParquetImages(write_parquet(source, tmp_path / "p", **more), 8)
    assert dataset.note == "no column label, so no classes; it has image, fine_label" and not dataset.classes
