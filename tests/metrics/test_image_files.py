import contextlib

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from metrics.features import extract_features
from metrics.image_files import open_images


class Red:
    """A network that sees the first pixel's red."""

    widths = (1,)

    def __call__(self, images):
        return (images[:, :1, 0, 0],)


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


@pytest.mark.parametrize("broken, told", [(1, True), (3, True), (4, False)])
def test_a_reference_may_lack_the_odd_picture(tmp_path, broken, told):
    """As the folder that one trains on may: passed over, and told; more than 1 % and three are an error."""
    for i in range(50):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    for i in range(broken):
        (tmp_path / f"{7 * i:02d}.png").write_bytes(b"broken")
    lines, kept = [], [i for i in range(50) if i not in [7 * j for j in range(broken)]]
    images = open_images(tmp_path, warn=lines.append)
    with contextlib.nullcontext() if told else pytest.raises(UserError, match="4 of 50 images cannot be read"):
        features = extract_features(images, Red(), batch_size=7)
        assert features.pool[:, 0].tolist() == kept
        assert len(lines) == broken and all("WARNING: skipped unreadable image" in line for line in lines)
    with pytest.raises(UserError, match="cannot read image"):  # samples are all there, or there is no FID
        open_images(tmp_path)
