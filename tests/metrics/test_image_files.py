import numpy as np
import pytest

from common.errors import UserError
from metrics.image_files import open_images


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images_are_read_in_slices(tmp_path, sample_images, save):
    save(tmp_path / "images.npz", arr_0=sample_images, other=np.array([None, {}], dtype=object))
    images = open_images(tmp_path / "images.npz")
    assert len(images) == 7
    for rows in (slice(0, 4), slice(4, 20), slice(1, 3)):
        np.testing.assert_array_equal(images[rows], sample_images[rows])


def test_damage_inside_an_npz_is_named(tmp_path, sample_images):
    np.savez(tmp_path / "images.npz", arr_0=sample_images)
    content = bytearray((tmp_path / "images.npz").read_bytes())
    content[5000] ^= 255
    (tmp_path / "images.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"images\.npz: Bad CRC"):
        open_images(tmp_path / "images.npz")[0:7]


def test_folder_images_are_read_in_sorted_order(samples, sample_images):
    np.testing.assert_array_equal(open_images(samples)[2:5], sample_images[2:5])
