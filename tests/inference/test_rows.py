import numpy as np
from PIL import ImageFont

from inference.rows import GAP, _lines, labelled

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)


def test_images_are_enlarged_by_the_largest_whole_number_that_fits():
    picture = np.asarray(labelled([IMAGES[:2], IMAGES[2:4]], width=2 * (6 * 3 + GAP) + 5))
    assert picture.shape == (2 * (8 * 3 + GAP), 2 * (6 * 3 + GAP), 3)
    for j in range(2):
        for i in range(2):
            top, left = j * (24 + GAP), i * (18 + GAP)
            tile = picture[top : top + 24, left : left + 18]
            assert (tile == IMAGES[2 * j + i].repeat(3, 0).repeat(3, 1)).all()
    assert (picture[24 : 24 + GAP] == 255).all()


def test_images_that_are_wider_stay_as_they_are():
    assert labelled([IMAGES], width=10).size == (5 * (6 + GAP), 8 + GAP)


def test_words_have_room_above_and_beside():
    plain = np.asarray(labelled([IMAGES[:2]] * 2))
    picture = np.asarray(labelled([IMAGES[:2]] * 2, above=["a", "two words" * 20], beside=["left", "of\nthem"]))
    top, left = picture.shape[0] - plain.shape[0], picture.shape[1] - plain.shape[1]
    assert top > 13 and left > 13 and (picture[top:, left:] == plain).all()
    for margin in (picture[:top], picture[:, :left]):
        assert (margin < 128).any()
        assert (margin[[0, -1]] == 255).all() and (margin[:, [0, -1]] == 255).all()  # no word is cut off


def test_lines_are_broken_where_the_column_ends_and_nowhere_else():
    font = ImageFont.load_default(13)
    room = font.getlength("golden retriever") + 1
    assert _lines("golden retriever", font, room) == "golden retriever"
    assert _lines("golden retriever: 1.23", font, room) == "golden\nretriever: 1.23"
    assert _lines("goldenest-retriever: 1.23", font, room) == "goldenest-retriever:\n1.23" and _lines("", font, room) == ""
    short, long = (labelled([IMAGES[:2]], above=["a\nb", word], width=160).size for word in ("c\nd", "two words " * 9))
    assert short[0] == long[0] and short[1] < long[1]
