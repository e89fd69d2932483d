"""Pictures for a person's eye: enlarged by whole numbers, and named."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from inference.pictures import Layout, class_names, grid, save_gif, save_picture


def noise(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("count, height, width, columns, scale", [
    (10, 32, 32, 4, 5),
    (16, 32, 32, 4, 5),
    (1, 32, 32, 1, 8),
    (2, 32, 32, 4, 8),
    (200, 32, 32, 20, 1),
    (8, 64, 64, 4, 2),
    (4, 128, 128, 2, 2),
    (16, 128, 128, 4, 1),
    (1, 256, 256, 1, 1),
    (8, 256, 256, 4, 1),
    (1, 512, 512, 1, 1),
    (6, 32, 64, 4, 2),
    (6, 64, 32, 4, 4),
    (120, 16, 16, 2, 1),
    (3, 1, 1, 3, 240),
])  # fmt: skip
def test_the_number_by_which_images_are_enlarged(count, height, width, columns, scale):
    layout = Layout(count, height, width, columns)
    assert layout.scale == scale
    images = noise(count, height, width)
    picture = grid(images, columns)
    assert picture.size == layout.size
    pixels, white = np.asarray(picture), np.ones(picture.size[::-1], bool)
    for i, image in enumerate(images):
        x, y = layout.corner(i)
        square = np.kron(image, np.ones((scale, scale, 1), np.uint8))
        assert (pixels[y : y + height * scale, x : x + width * scale] == square).all()
        white[y : y + height * scale, x : x + width * scale] = False
    assert (pixels[white] == 255).all()
    assert (layout.cut(picture) == images).all()


def test_large_images_are_where_they_were_before_small_ones_were_enlarged():
    images = noise(5, 256, 256)
    pixels = np.asarray(grid(images, 4))
    assert pixels.shape == (2 * 258 + 2, 4 * 258 + 2, 3)
    assert (pixels[260:516, 2:258] == images[4]).all() and (pixels[260:, 260:] == 255).all()
    assert (np.asarray(grid(images[:1], 4)) == images[0]).all()  # one alone has no frame


def test_a_name_is_below_its_image_and_changes_none_of_its_pixels():
    images, names = noise(3, 32, 32), ["cat", "", "d" * 300]
    layout = Layout(3, 32, 32, 3, named=True)
    picture = grid(images, 3, names)
    assert picture.size == layout.size and (layout.cut(picture) == images).all()
    bottom, ink = layout.corner(0)[1] + 32 * layout.scale, []
    for i in range(3):
        left = layout.corner(i)[0]
        strip = np.asarray(picture)[bottom:, left : left + 32 * layout.scale]
        rows, columns = np.nonzero(strip.min(-1) < 128)
        ink.append((np.ptp(rows), np.ptp(columns), columns.mean() / strip.shape[1]) if len(rows) else None)
    (high, wide, middle), empty, (_, long, _) = ink
    assert high >= 9 and 15 < wide < 80 and abs(middle - 0.5) < 0.05  # legible, and in the middle
    assert empty is None and 0.8 * 32 * layout.scale < long <= 32 * layout.scale
    frame = np.asarray(picture).min(-1)[bottom:, [0, 1, *(layout.corner(i)[0] - 1 for i in (1, 2)), -1]]
    assert (frame == 255).all()  # a name that is cut leaves its neighbours alone


def test_neighbours_of_one_class_share_a_name():
    images = noise(4, 32, 32)
    apart, together = (np.asarray(grid(images, 2, names)) for names in (["a cat", "b", "c", "d"], ["a cat", "a cat", "c", "d"]))
    layout = Layout(4, 32, 32, 2, named=True)
    top = layout.corner(0)[1] + 32 * layout.scale
    strips = [pixels[top : layout.corner(2)[1] - 2].min(-1) < 128 for pixels in (apart, together)]
    assert [strip[:, :100].any() for strip in strips] == [False, False] and strips[0][:, 110:150].any()
    middle = np.nonzero(strips[1])[1].mean()
    assert abs(middle - layout.size[0] / 2) < 3 and not strips[1][:, :200].any()
    assert (apart[layout.corner(2)[1] :] == together[layout.corner(2)[1] :]).all()


def test_names_are_those_of_the_recipe():
    names = ["cat", "tęcza", "Собака", "猫", "two\n words", "\udcff", "x\x07"]
    recipe = SimpleNamespace(classes=names)
    written = ["cat", "tęcza", "Собака", "3", "two words", "5", "6"]
    assert class_names(recipe, range(7)) == written  # no font here has the letters of 3, 5 and 6
    assert class_names(recipe, [7, 0]) == ["", "cat"]  # of the null class
    assert class_names(SimpleNamespace(classes=["te\u0328cza"]), [0]) == ["tęcza"]  # as some file systems spell it
    assert class_names(SimpleNamespace(classes=[]), [0, 1]) is None


def test_names_of_any_letters_are_drawn_as_letters():
    """Not as the box that stands for those which a font lacks: two words look different."""
    images = noise(2, 32, 32)
    first, second = (np.asarray(grid(images, 2, [word, "a"])) for word in ("Собака", "Сабоко"))
    assert (first != second).any()


def test_frames_of_an_animation_are_enlarged_alike(tmp_path):
    frames = [np.full((2, 16, 16, 3), level, np.uint8) for level in (0, 100, 200)]
    save_gif(frames, tmp_path / "f.gif", 2, ["a", "b"])
    save_picture(frames[0], tmp_path / "f.png", 2, ["a", "b"])
    layout = Layout(2, 16, 16, 2, named=True)
    with Image.open(tmp_path / "f.gif") as gif, Image.open(tmp_path / "f.png") as picture:
        assert gif.n_frames == 3 and gif.size == picture.size == layout.size and layout.scale == 16
        for i, frame in enumerate(frames):
            gif.seek(i)
            assert (layout.cut(gif) == frame).all()
