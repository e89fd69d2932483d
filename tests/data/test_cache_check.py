"""A copied cache against its checksums."""

import json

import numpy as np
import pytest

from cli import ROOT, call, one_line
from data.folders import FolderDataset
from data.latent_cache import LatentCache
from pictures import write_folders, write_parquet

VAE = str(ROOT / "assets" / "digits-vae")


def encode(capsys, data, out, *more):
    flags = ["--data-path", data, "--out", out, "--vae", VAE, "--image-size", 16, "--batch-size", 4, "--num-workers", 0]
    result = call(capsys, "encode_latents", *flags, *more)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("images"), count=5, size=(16, 16))


@pytest.fixture
def cache(images, tmp_path, capsys):
    encode(capsys, images, tmp_path / "cache")
    return tmp_path / "cache"


def check(capsys, cache):
    return call(capsys, "encode_latents", "--out", cache, "--check")


def test_a_whole_cache_passes(cache, capsys):
    result = check(capsys, cache)
    assert result.code == 0 and "15 images, all as they were written" in result.out
    sums = json.loads((cache / "checksums.json").read_text())
    assert len(sums["moments.npy"]) == 4 and sums["images_a_chunk"] == 4


@pytest.mark.parametrize("file, where, words", [
    ("moments.npy", 128 + 2048 + 7, "1 of 4 chunks are not what was written, by their checksums; one holds images 4 to 7"),
    ("moments.npy", -1, "one holds images 12 to 14, "),
    ("labels.npy", -8, "labels.npy: "),
    ("names.npy", -3, "names.npy: not what was written"),
    ("cache.json", -14, "cache.json: not what was written"),
])  # fmt: skip
def test_a_flipped_bit_is_found_and_named(file, where, words, cache, capsys):
    data = bytearray((cache / file).read_bytes())
    data[where] ^= 1
    (cache / file).write_bytes(data)
    one_line(check(capsys, cache), 1, cache / file, words)


def test_a_cache_of_an_earlier_version_is_seen_to_have_numbers(cache, capsys):
    (cache / "checksums.json").unlink()
    result = check(capsys, cache)
    assert result.code == 0 and "all finite; an earlier version wrote it, without checksums" in result.out
    moments = np.load(cache / "moments.npy", mmap_mode="r+")
    moments[9, 0, 0] = np.nan
    moments.flush()
    one_line(check(capsys, cache), 1, "1 of 1 chunks hold what are no numbers")


def test_chunks_that_an_earlier_version_wrote_get_checksums_at_the_end(images, cache, tmp_path, capsys, monkeypatch):
    """Of an unfinished cache, whose chunks' own files have none."""
    from common.chunks import ChunkStore

    save = ChunkStore.save
    with monkeypatch.context() as patch:
        patch.setattr(ChunkStore, "save", lambda self, chunk, sha256, **arrays: save(self, chunk, **arrays))
        encode(capsys, images, tmp_path / "old")
    assert (tmp_path / "old" / "checksums.json").read_bytes() == (cache / "checksums.json").read_bytes()


def test_parquet_is_encoded_row_group_by_row_group(images, cache, tmp_path, capsys, monkeypatch):
    """Whatever order its rows are in: the cache is that of the same pictures in folders, and each group is read about once."""
    import pyarrow.parquet

    path = write_parquet(FolderDataset(images, 8), tmp_path / "p", rows=5)
    read, groups = pyarrow.parquet.ParquetFile.read_row_group, []
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", lambda *a, **k: groups.append(a[1]) or read(*a, **k))
    monkeypatch.setattr("data.parquet.KEPT", 1)
    encode(capsys, path, tmp_path / "of parquet")
    assert len(groups) == 3  # of 5 rows each
    for name in ("moments.npy", "labels.npy", "checksums.json"):
        ours, theirs = ((folder / name).read_bytes() for folder in (tmp_path / "of parquet", cache))
        if name == "checksums.json":
            ours, theirs = (json.loads(text)["moments.npy"] for text in (ours, theirs))
        assert ours == theirs, name
    assert check(capsys, tmp_path / "of parquet").code == 0


def test_wrong_input_is_one_line(cache, tmp_path, capsys):
    for text in ("[]", "{}", '{"images_a_chunk": 0}', '{"images_a_chunk": 4, "moments.npy": ["a"]}', "{"):
        (cache / "checksums.json").write_text(text)
        one_line(check(capsys, cache), 1, cache / "checksums.json")
    one_line(check(capsys, tmp_path / "none"), 1, tmp_path / "none", "there is no cache of latents")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "moments.npy").touch()
    one_line(check(capsys, tmp_path / "half"), 1, tmp_path / "half", "incomplete cache")
    one_line(call(capsys, "encode_latents", "--out", cache, "--check", "--vae", "ema"), 2, "--vae does not go with --check")
    one_line(call(capsys, "encode_latents", "--out", cache), 2, "--data-path is missing")


def test_pictures_without_classes_are_cached_and_trained_on(images, tmp_path, capsys):
    encode(capsys, images / "c" / "deep", tmp_path / "flat")
    cache = LatentCache(tmp_path / "flat")
    assert cache.classes == [] and set(cache.labels.tolist()) == {0} and len(cache) == 2
    flags = ["--data-path", tmp_path / "flat", "--vae", VAE, "--image-size", 16, "--model", "SiT-T/4", "--max-steps", 1]
    flags += ["--global-batch-size", 2, "--num-workers", 0, "--class-dropout-prob", 0, "--results-dir", tmp_path / "r"]
    assert call(capsys, "train", *flags).code == 0
