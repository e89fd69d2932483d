import numpy as np

from metrics.reference import STATISTICS, measure_reference, open_reference
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
