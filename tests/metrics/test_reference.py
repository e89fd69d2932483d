import numpy as np
import pytest

from common.errors import UserError
from metrics import reference as reference_module
from metrics.features import extract_features
from metrics.networks import Pixels
from metrics.reference import STATISTICS, Reference, measure_reference, open_reference
from small_features import small_features


def test_statistics_and_images_in_one_file(tmp_path, reference_images):
    shapes = STATISTICS
    arrays = {
        key: np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, (key, shape) in enumerate(shapes.items())
    }
    np.savez(tmp_path / "adm.npz", arr_0=reference_images, **arrays)

    def measure(images, network):
        np.testing.assert_array_equal(images[0:8], reference_images)
        assert network == "inception"
        return small_features(8, seed=1, dims=(2048, 2023, 1008))

    found = measure_reference(open_reference(tmp_path / "adm.npz"), measure)["inception"]
    assert found.features.shape == (8, 2048) and found.count is None
    for key, array in arrays.items():
        assert getattr(found, key).dtype == np.float64
        np.testing.assert_array_equal(getattr(found, key), array)


def pixels_of(images, network):
    assert network == "pixels"
    return extract_features(images, Pixels("cpu"))


def test_features_are_kept_of_images_of_all_classes(tmp_path, monkeypatch):
    """Class folders lie one after another: the first 10,000 of more would be of the first classes alone."""
    monkeypatch.setattr(reference_module, "MANIFOLD_IMAGES", 4)
    images = np.repeat(np.arange(0, 250, 25, dtype=np.uint8), 32 * 32 * 3).reshape(10, 32, 32, 3)
    np.savez(tmp_path / "images.npz", arr_0=images)
    found = measure_reference(open_reference(tmp_path / "images.npz", words=["kid-pixels"]), pixels_of)["pixels"]
    assert found.count == 10 and (255 * found.features[:, 0]).round().tolist() == [0, 50, 125, 175]
    np.savez(tmp_path / "both.npz", arr_0=images, mu_pixels=found.mu, sigma_pixels=found.sigma)
    again = measure_reference(open_reference(tmp_path / "both.npz", words=["kid-pixels"]), pixels_of)["pixels"]
    np.testing.assert_array_equal(again.features, found.features)
    statistics_alone = measure_reference(open_reference(tmp_path / "both.npz", words=["fd-pixels"]), None)["pixels"]
    assert statistics_alone.features is None  # which no metric needs


def test_what_is_saved_for_each_network_is_read_again(tmp_path):
    numbers = np.random.default_rng(0)
    whole = Reference(*(numbers.normal(size=s) for s in ((5,), (5, 5))), features=np.ones((3, 5), np.float32), count=7)
    arrays = whole.arrays("dinov2")
    assert {*arrays} == {"mu_dinov2", "sigma_dinov2", "features_dinov2", "count_dinov2"}
    assert {*whole.arrays("inception")} == {"mu", "sigma", "features", "count"}
    np.savez(tmp_path / "stats.npz", **arrays)
    opened = open_reference(tmp_path / "stats.npz", words=["kid-dinov2", "fd-dinov2"], strict=True)
    again = measure_reference(opened, None)["dinov2"]
    assert again.count == 7 and all(np.array_equal(getattr(again, key), getattr(whole, key)) for key in ("mu", "features"))
    with pytest.raises(UserError, match="mu_dinov2 has 5 numbers, but the weights give 256 features"):
        opened.check({"dinov2": Pixels("cpu")})
    np.savez(tmp_path / "bad.npz", **arrays | {"sigma_dinov2": np.ones((5, 4))})
    with pytest.raises(UserError, match="mu_dinov2 has 5 numbers, but sigma_dinov2 is of shape"):
        open_reference(tmp_path / "bad.npz", words=["fd-dinov2"])


@pytest.mark.parametrize(
    "words, lacks",
    [
        (["kid-pixels"], "no features_pixels for kid-pixels, and no images"),
        (["fd-pixels", "fid"], "no mu and sigma for fid, and no images"),
        (["sfid", "fd-pixels"], "no mu_s and sigma_s for sfid"),
    ],
)
def test_a_reference_that_lacks_what_was_asked_for(tmp_path, words, lacks):
    np.savez(tmp_path / "stats.npz", mu_pixels=np.zeros(256), sigma_pixels=np.zeros((256, 256)))
    with pytest.raises(UserError, match=f"stats.npz: it has {lacks}"):
        open_reference(tmp_path / "stats.npz", words=words, strict=True)
    assert open_reference(tmp_path / "stats.npz", words=["fd-pixels", "is"], strict=True).fields.keys() == {"pixels"}


def test_images_do_not_mend_statistics_that_are_there_in_part(tmp_path, reference_images):
    """They may be of more images than the file has: FID and sFID would be against different ones."""
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)), arr_0=reference_images)
    with pytest.raises(UserError, match=r"it has no mu_s and sigma_s for sfid$"):
        open_reference(tmp_path / "stats.npz", words=["fid", "sfid"], strict=True)
    opened = open_reference(tmp_path / "stats.npz", words=["fid", "kid"], strict=True)
    assert opened.seers == {"inception"} and len(opened.images) == 8
    assert open_reference(tmp_path / "stats.npz", words=["fid", "sfid"]).images is None
