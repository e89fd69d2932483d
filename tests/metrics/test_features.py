"""The features by hand and against torch-fidelity."""

import numpy as np
import pytest
import torch
import torch_fidelity

from common.errors import UserError
from metrics.features import extract_features, load_inception, take
from metrics.scores import frechet_distance, inception_score, precision_recall, statistics


def test_spatial_features_are_seven_channels_last(inception, sample_images, sample_features):
    block = inception.network.Mixed_6d
    seen = []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numpy()))
    inception.network(torch.from_numpy(sample_images[:1]).permute(0, 3, 1, 2))
    hook.remove()
    conv, bn = block.branch1x1.conv, block.branch1x1.bn
    kernel, x = conv.weight[:, :, 0, 0].numpy(), seen[0][0].astype(np.float64)
    maps = np.einsum("oi,ihw->ohw", kernel, x)
    maps = (maps - bn.running_mean.numpy()[:, None, None]) / np.sqrt(bn.running_var.numpy()[:, None, None] + bn.eps)
    expected = [max(maps[channel, row, column], 0) for row in range(17) for column in range(17) for channel in range(7)]
    assert sample_features.spatial.shape == (7, 2023) and np.ptp(expected) > 0.1
    np.testing.assert_allclose(sample_features.spatial[0], expected, rtol=1e-3, atol=1e-4)


def test_batches_and_shares_do_not_matter(inception, sample_images, sample_features):
    assert np.ptp(sample_features.pool.numpy(), axis=0).mean() > 0.05  # or nothing here would prove anything
    again = extract_features(torch.from_numpy(sample_images), inception, batch_size=2, start=3, stop=6)
    for part, whole in zip(again, sample_features):
        torch.testing.assert_close(part, whole[3:6], rtol=1e-4, atol=1e-4)
    assert [len(field) for field in extract_features(sample_images, inception, start=4, stop=4)] == [0, 0, 0]


def test_torch_fidelity_agrees(weights, sample_images, reference_images, sample_features, reference_features):
    datasets = [torch.from_numpy(images).permute(0, 3, 1, 2) for images in (sample_images, reference_images)]
    theirs = torch_fidelity.calculate_metrics(
        **{f"input{i + 1}": TensorImages(images) for i, images in enumerate(datasets)},
        **dict(fid=True, isc=True, prc=True, isc_splits=1, samples_shuffle=False, prc_neighborhood=3, batch_size=4),
        **dict(feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights)),
        **dict(cuda=False, verbose=False, save_cpu_ram=True),
    )
    arguments = *statistics(sample_features.pool), *statistics(reference_features.pool)
    # Theirs has rounding errors to this order where covariances are singular.
    assert frechet_distance(*arguments) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert inception_score(sample_features.logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    ours = precision_recall(sample_features.pool, reference_features.pool)
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


class TensorImages(torch.utils.data.Dataset):
    """uint8 images (N, 3, H, W) as torch-fidelity wants them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_without_a_network_the_mend_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    with pytest.raises(UserError, match=r"cannot read the Inception weights \(download https://.*--inception-weights"):
        load_inception()


def refuse(*args, **kwargs):
    raise OSError("no network")


def test_some_images_of_features(sample_features):
    part = take(sample_features, slice(1, None, 3))
    assert part.pool.tolist() == sample_features.pool[[1, 4]].tolist() and len(part.logits) == 2
    assert take(sample_features._replace(logits=None), [0]).logits is None
