"""Pictures of every kind that people have, as a person would see them."""

import io
import itertools
import struct
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageOps

from common.errors import UserError
from common.pixels import ORIENTATION, image_endings, is_image, scan, to_rgb
from data.folders import FolderDataset
from data.images import load_image
from data.sources import open_dataset
from metrics.image_files import open_images

GRADIENT = np.add.outer(np.arange(32) * 4, np.arange(32) * 3).astype(np.uint8)
RGB = np.stack([GRADIENT, 255 - GRADIENT, GRADIENT // 2], axis=-1)
ALPHA = np.where(np.arange(32)[:, None] < 16, 255, 0).astype(np.uint8).repeat(32, 1)  # the lower half is transparent
ON_WHITE = np.where(ALPHA[..., None] == 255, RGB, 255)
GREY = GRADIENT[..., None].repeat(3, -1)


def palette(transparent):
    image = Image.fromarray(RGB).quantize(8)
    if transparent:
        image.info["transparency"] = 0
    return image


def cmyk():
    return Image.fromarray(RGB).convert("CMYK")


# name: (image, the formats that hold it, what a person sees or None for Pillow's own conversion)
KINDS = {
    "L": (Image.fromarray(GRADIENT), ("PNG", "TIFF", "JPEG", "WebP", "GIF"), GREY),
    "LA": (Image.fromarray(np.dstack([GRADIENT, ALPHA])), ("PNG", "TIFF"), np.where(ALPHA[..., None] == 255, GREY, 255)),
    "P": (palette(False), ("PNG", "TIFF", "GIF"), None),
    "RGB": (Image.fromarray(RGB), ("PNG", "TIFF", "JPEG", "WebP"), RGB),
    "RGBA": (Image.fromarray(np.dstack([RGB, ALPHA])), ("PNG", "TIFF", "WebP"), ON_WHITE),
    "CMYK": (cmyk(), ("TIFF", "JPEG"), None),
    "1": (Image.fromarray(GRADIENT).convert("1"), ("PNG", "TIFF"), None),
    "I;16": (Image.fromarray(GRADIENT.astype(np.uint16) * 257), ("PNG", "TIFF"), GREY),
}
CASES = [(name, kind) for name, (_, kinds, _) in KINDS.items() for kind in kinds]
LOSSY = {"JPEG", "WebP", "GIF"}


@pytest.mark.parametrize("name, kind", CASES, ids=[f"{name} in {kind}" for name, kind in CASES])
def test_a_picture_is_what_a_person_sees(tmp_path, name, kind):
    image, _, seen = KINDS[name]
    file = tmp_path / f"x.{kind.lower()}"
    image.save(file, kind)
    loaded = load_image(file, 32).permute(1, 2, 0).numpy().astype(int)
    seen = np.asarray(image.convert("RGB")) if seen is None else seen
    assert np.abs(loaded - seen).mean() <= (6 if kind in LOSSY else 0)
    assert (open_images(tmp_path)[0:1][0] == loaded).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white(tmp_path, kind):
    image = palette(True)
    image.save(tmp_path / f"x.{kind.lower()}", kind, transparency=0)
    loaded = load_image(tmp_path / f"x.{kind.lower()}", 32).permute(1, 2, 0).numpy()
    hidden = np.asarray(image) == 0
    assert (
        hidden.any() and (loaded[hidden] == 255).all() and (loaded[~hidden] == np.asarray(image.convert("RGB"))[~hidden]).all()
    )


@pytest.mark.parametrize("levels", [np.float32, np.int32])
def test_levels_of_unknown_range_are_refused_by_name(tmp_path, levels):
    Image.fromarray(GRADIENT.astype(levels)).save(tmp_path / "deep.tiff")
    with pytest.raises(UserError, match=r"deep\.tiff.*range is not known; convert it"):
        load_image(tmp_path / "deep.tiff", 32)
    with pytest.raises(UserError, match=r"deep\.tiff.*range is not known"):
        open_images(tmp_path)


def test_all_of_16_bits_are_used():
    levels = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], dtype=np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(levels)))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright(tmp_path, orientation):
    """As a phone stores it: turned or mirrored, and its orientation beside it."""
    upright = Image.fromarray(RGB)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    assert (load_image(tmp_path / "x.png", 32).permute(1, 2, 0).numpy() == RGB).all()


@pytest.mark.parametrize("mode, quality", list(itertools.product(["RGB", "L", "CMYK"], [75, 95])))
def test_nothing_changes_for_the_files_of_imagenet(tmp_path, mode, quality):
    """JPEGs of 8 bits without an orientation: to the bit what Pillow's own conversion gives."""
    Image.fromarray(RGB).convert(mode).save(tmp_path / "x.JPEG", quality=quality)
    with Image.open(tmp_path / "x.JPEG") as image:
        expected = np.asarray(image.convert("RGB"))
    with Image.open(tmp_path / "x.JPEG") as image:
        assert (np.asarray(to_rgb(image)) == expected).all()


def test_which_files_are_pictures():
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm"} <= image_endings()
    assert is_image("a.JPEG") and is_image("a.b.png")
    assert not any(map(is_image, ("._a.png", "a.txt", "png", "a.eps", "a.h5", "a.mpg")))


def test_a_scan_passes_over_what_is_no_data_and_follows_no_circle(tmp_path):
    for name in (
        "a/0.png",
        "a/b/1.jfif",
        "a/._0.png",
        "a/.ipynb_checkpoints/2.png",
        "a/notes.txt",
        "a/b/more.txt",
        "a/Makefile",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "3.png").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "other")
    files, others = scan(tmp_path / "a")
    assert [file.removeprefix(f"{tmp_path}/a/") for file in files] == ["0.png", "b/1.jfif", "link/3.png"]
    assert others == {".txt": 2, "Makefile": 1}


def jpeg(orientation, more=b""):
    """A JPEG whose EXIF block has an orientation, and then bytes that make no sense, or some that do."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "JPEG", exif=exif.tobytes() + more, quality=95)
    return file


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_what_pillow_makes_of_it(orientation):
    with Image.open(jpeg(orientation)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    with Image.open(jpeg(orientation)) as image:
        assert (np.asarray(to_rgb(image)) == expected).all()


def test_a_damaged_exif_block_does_not_cost_the_picture():
    rng, turned = np.random.default_rng(0), 0
    with Image.open(jpeg(6)) as image:
        block, expected = image.info["exif"], np.asarray(image.convert("RGB"))
    for _ in range(300):
        damaged = bytearray(block)
        for place in rng.integers(6, len(block), 4):
            damaged[place] = rng.integers(256)
        file = io.BytesIO()
        Image.fromarray(RGB).save(file, "JPEG", exif=bytes(damaged), quality=95)
        with Image.open(file) as image:
            ours = np.asarray(to_rgb(image))
        turned += ours.shape != expected.shape or (ours != expected).any()
    assert turned < 300  # in some, the orientation itself was damaged


def test_whatever_is_wrong_with_a_file_names_it(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "x.png")
    for error in (RuntimeError("no AVIF"), NotImplementedError("BLP"), struct.error("unpack"), TypeError()):
        monkeypatch.setattr(Image.Image, "convert", Mock(side_effect=error))
        with pytest.raises(UserError, match=r"cannot read image .*x.png"):
            load_image(tmp_path / "x.png", 8)


def test_a_link_back_is_no_class_and_no_folder_of_one(tmp_path):
    for name in ("a/0.png", "b/1.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name)
    for link, to in {"data/a/up": "..", "data/self": ".", "data/up": "..", "data/a/again": "../../data/a"}.items():
        (tmp_path / link).symlink_to(to)
    (tmp_path / "data" / "c").symlink_to(tmp_path / "data" / "b")  # another name for a class is the user's own wish
    data = FolderDataset(tmp_path / "data", 8)
    assert data.classes == ["a", "b", "c"] and len(data) == 3 and [data.label(i) for i in range(3)] == [0, 1, 2]
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "0.png")
    (tmp_path / "flat" / "up").symlink_to("..")
    assert len(open_dataset(tmp_path / "flat", 8)) == 1


def test_what_is_passed_over_is_counted_everywhere(tmp_path):
    for name in ("data/a/0.png", "data/a/x.txt", "data/stray.png", "data/README", "flat/0.png", "flat/1.heic"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a" / "0.png")
    note = open_dataset(tmp_path / "data", 8).note
    assert note == "passed over: 1 .txt, 1 README, 1 beside the class folders"
    assert open_dataset(tmp_path / "flat", 8).note == "passed over: 1 .heic"
    assert "passed over: 1 .txt" in open_images(tmp_path / "data" / "a").note
