"""Folders that many processes wrote: read by any number of them, whole or not there, and never run."""

import os
import pickle
import shutil
import signal
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from cli import call, launch, one_line
from common import sharded
from common.atomic import write_json
from common.checkpoint import DamagedFile, file_hash, load_checkpoint, save_checkpoint
from common.errors import UserError
from common.nested import join, keys_of, name_of, split
from common.sharded import is_sharded, load_whole, open_sharded, read_into, verify, write_sharded
from training.run_folder import RunFolder

from .sharded_job import content


def equal(ours, theirs):
    """Two contents: kinds, keys, and every number of the tensors."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.device == theirs.device and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return ours == theirs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of the same content: alone, by one process; two, four and grid, by the job, which has read them all."""
    folder = tmp_path_factory.mktemp("written")
    write_sharded(content(), folder / "alone")
    done = launch("tests/common/sharded_job", folder, timeout=120)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written / "two", tmp_path / "0000050")


def with_metadata(folder, metadata):
    """Put a .metadata into a folder, with a manifest that agrees."""
    (folder / ".metadata").write_bytes(metadata if isinstance(metadata, bytes) else pickle.dumps(metadata))
    files = {file.name: sharded._measure(file) for file in folder.iterdir() if file.name != "manifest.json"}
    write_json(folder / "manifest.json", {"format": 1, "files": files})
    verify(folder)


@pytest.mark.parametrize("name, files", [("alone", 1), ("two", 2), ("four", 4), ("grid", 4)])
def test_whoever_wrote_it_one_process_reads_it(written, name, files):
    assert is_sharded(written / name) and equal(load_checkpoint(written / name), content())
    sizes = [file.stat().st_size for file in (written / name).glob("*.distcp")]
    assert len(sizes) == files and sum(sizes) < 80_000  # replicas are written once
    paper = open_sharded(written / name)
    assert equal(split(paper)[1], split(content())[1])
    assert all(tensor.device.type == "meta" for tensor in split(paper)[0].values())


def test_a_process_that_cannot_write_is_heard_of_by_all_and_leaves_nothing(written):
    assert not list(written.glob(".*"))
    assert not (written / "full").exists() and not (written / "unread").exists()
    assert {(written / f"full.{rank}.txt").read_text() for rank in range(4)} == {"OSError: [Errno 27] File too large"}
    assert {(written / f"unread.{rank}.txt").read_text()[:18] for rank in range(4)} == {"NotADirectoryError"}


def test_names_can_be_undone():
    for keys in [("opt", "state", 0, "a.b"), (0, "0", -1, "-1", "٣"), ("~2", "~", "/", "a/~1b", "~27"), ("",), ("", "")]:
        assert keys_of(name_of(*keys)) == keys
    assert name_of("opt", "state", 0, "step") == "opt/state/0/step"
    with pytest.raises(TypeError, match="not True"):
        name_of("a", True)
    state = OrderedDict(a=torch.ones(2))
    state._metadata = {"": 1}
    tensors, rest = split({"x": [state, (1, torch.zeros(3))], "y": {}})
    assert list(tensors) == ["x/0/a", "x/1/1"]
    again = join(rest, lambda name, shape, dtype: tensors[name])
    assert again["x"][0]._metadata == {"": 1} and equal(again, {"x": [state, (1, torch.zeros(3))], "y": {}})


def test_what_is_there_is_written_over(tmp_path):
    path = tmp_path / "0000001"
    for value in (1.0, 2.0):
        write_sharded({"a": torch.tensor([value])}, path)
        assert equal(load_whole(path), {"a": torch.tensor([value])})
    assert os.listdir(tmp_path) == ["0000001"]
    with pytest.raises(UserError, match=r"0000001: it has no tensor b"):
        read_into(path, {"b": torch.ones(1)})
    with pytest.raises(AttributeError, match="pickle"):
        write_sharded({"a": torch.ones(1), "b": lambda: None}, path)  # cannot be pickled
    assert equal(load_whole(path), {"a": torch.tensor([2.0])}) and os.listdir(tmp_path) == ["0000001"]


def test_a_damaged_file_is_named(copied):
    before = file_hash(copied)
    for file in sorted(copied.iterdir()):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0x10
        if file.name == "manifest.json":
            flipped = whole.replace(b'"size": ', b'"size": 1', 1)
        for damaged in (bytes(flipped), whole[:-20], None):
            flipped_size = file.name == "manifest.json" and damaged == flipped
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(DamagedFile, match=r"--ckpt .*0000050/") as raised:
                load_checkpoint(copied)
            assert (".metadata" if flipped_size else file.name) in str(raised.value)
            file.write_bytes(whole)
    assert equal(load_checkpoint(copied), content()) and file_hash(copied) == before
    (copied / "__1_0.distcp").unlink()
    with pytest.raises(DamagedFile, match=r"__1_0\.distcp: it is missing"):
        verify(copied)


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_code_of_a_folder_is_run(copied, tmp_path):
    mark = tmp_path / "was here"
    with_metadata(copied, Hostile(mark))
    with pytest.raises(UserError, match=r"\.metadata: refused, loading it would run code from the file \(posix.mkdir\)"):
        load_checkpoint(copied)
    names = [b"\x8c" + bytes([len(name)]) + name for name in (BytesStorageMetadata.__module__.encode(), b"os.getpid")]
    with_metadata(copied, b"\x80\x04" + b"".join(names) + b"\x93)R.")  # what an allowed module imports
    with pytest.raises(UserError, match=r"run code from the file \(torch.distributed.checkpoint.metadata.os.getpid\)"):
        load_checkpoint(copied)
    torch.save({"model": Hostile(mark)}, copied / "content.pt")
    with pytest.raises(UserError, match=r"content\.pt: refused, loading it would run code from the file"):
        open_sharded(copied)
    assert not mark.exists()


def test_metadata_that_lies_is_refused(copied, monkeypatch):
    with open(copied / ".metadata", "rb") as file:
        whole = file.read()
    for lie, words in [
        (lambda m: m.state_dict_metadata.update({"model/ten": BytesStorageMetadata()}), "BytesStorageMetadata"),
        (lambda m: m.state_dict_metadata["model/ten"].chunks.pop(), "not all of model/ten is there"),
        (lambda m: vars(next(iter(m.storage_data.values()))).update(relative_path="../x"), r"\.\./x is no file of the folder"),
        (
            lambda m: vars(next(iter(m.storage_data.values()))).update(transform_descriptors=["zstd"]),
            "is no file of the folder",
        ),
        (lambda m: m.storage_data.clear(), "0000050: not of a checkpoint, or a damaged one"),
    ]:
        metadata = pickle.loads(whole)
        lie(metadata)
        with_metadata(copied, metadata)
        with pytest.raises(UserError, match=words):
            load_checkpoint(copied)
    with_metadata(copied, whole)
    rest = split(content())[1]
    rest["model"]["ten"]["shape"] = (1 << 40, 1 << 10)  # of memory that no machine has
    save_checkpoint(rest, copied / "content.pt")
    with_metadata(copied, whole)
    with pytest.raises(DamagedFile, match=r"content\.pt: .*its tensors are larger than the files"):
        load_checkpoint(copied)
    with pytest.raises(DamagedFile, match=r"content\.pt: .*its tensors are larger than the files"):
        open_sharded(copied)


def test_a_kill_leaves_what_a_continued_run_clears(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "000-x")
    if not (child := os.fork()):
        sharded._measure = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        write_sharded(content(), run.checkpoint_path(50, ""))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = run.checkpoints.iterdir()
    assert left.name == f".0000050.{child}.tmp" and (left / ".metadata").exists()
    assert run.saved() == {} and run.newest_checkpoint(print) == (None, None)
    run.rewind(0)
    assert not list(run.checkpoints.iterdir())


def test_one_file_is_made_of_a_folder(copied, capsys, tmp_path):
    direct = tmp_path / "direct.pt"
    save_checkpoint(content(), direct)
    done = call(capsys, "gather", copied)
    size = os.path.getsize(f"{copied}.pt")
    assert done.code == 0 and f"{copied}.pt: {size / 1e9:.3g} GB, " in done.out, done.err
    assert equal(torch.load(f"{copied}.pt", weights_only=True), torch.load(direct, weights_only=True))
    one_line(call(capsys, "gather", copied), 2, f"{copied}.pt", "it is there already")
    one_line(call(capsys, "gather", tmp_path), 2, tmp_path, "no folder that train.py --ckpt-format sharded wrote")
    assert call(capsys, "gather", copied, "--out", tmp_path / "new" / "x.pt").code == 0
    assert (tmp_path / "new" / "x.pt").stat().st_size == direct.stat().st_size


def test_a_folder_is_sampled_from_as_a_file_is(trained, tmp_path, capsys):
    path = tmp_path / "checkpoints" / "0000006"
    path.parent.mkdir()
    write_sharded(load_checkpoint(trained), path)
    pictures = []
    for ckpt in (trained, path):
        out = tmp_path / f"{len(pictures)}.png"
        flags = ["--ckpt", ckpt, "--sampling-method", "euler", "--num-sampling-steps", 3, "--out", out]
        done = call(capsys, "sample", "ODE", *flags)
        assert done.code == 0, done.err
        pictures.append(np.asarray(Image.open(out)))
    assert np.array_equal(*pictures)
    (path / "__0_0.distcp").write_bytes(b"")
    one_line(call(capsys, "sample", "ODE", "--ckpt", path, "--out", out), 1, path / "__0_0.distcp", "damaged")
