import time

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UsageError, UserError
from common.recipe import Recipe
from common.spread import spread
from data.folders import FolderDataset
from data.images import DigitsDataset, center_crop, held_out_digits, load_image, to_pixels
from data.order import StepSampler
from data.sources import LabelledImages


def make_folder(root, classes=("a", "b"), count=3, size=(40, 50)):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def test_crop_halves_while_twice_too_large_then_bicubic_then_centre():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (130, 200, 3), dtype=np.uint8))  # 65 after a halving, short side
    mean_pairs = lambda pixels, axis: np.floor(pixels.mean(axis) + 0.5)  # noqa: E731  Pillow rounds after each axis
    halved = mean_pairs(np.asarray(image, dtype=np.float64).reshape(130, 100, 2, 3), 2)
    halved = Image.fromarray(mean_pairs(halved.reshape(65, 2, 100, 3), 1).astype(np.uint8))
    expected = np.asarray(halved.resize((round(100 * 60 / 65), 60), Image.Resampling.BICUBIC), dtype=np.int64)
    left = (expected.shape[1] - 60) // 2
    cropped = np.asarray(center_crop(image, 60), dtype=np.int64)
    assert cropped.shape == (60, 60, 3)
    assert np.abs(cropped - expected[:, left : left + 60]).max() == 0


def test_jpegs_are_decoded_in_full(tmp_path):
    """Draft mode would be twice as fast and halve by itself, but to other pixels than ADM's crop."""
    file, rng = tmp_path / "photo.jpg", np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8))
    coarse.resize((192, 128), Image.Resampling.BICUBIC).save(file, quality=90)
    with Image.open(file) as image:
        full = Image.fromarray(np.asarray(image))
    with Image.open(file) as image:
        image.draft("RGB", (96, 64))
        assert image.size == (96, 64)
        draft = image.convert("RGB")
    read, adm = (load_image(file, 64).permute(1, 2, 0).numpy(), np.asarray(center_crop(full, 64)))
    assert (read == adm).all()
    difference = np.asarray(center_crop(draft, 64)).astype(int) - adm
    assert -0.6 < difference.mean() < -0.3 and np.abs(difference).max() > 3


@pytest.mark.parametrize("size", [(32, 32), (33, 90), (500, 64), (31, 32)])
def test_crop_has_the_size_asked_for(size):
    assert center_crop(Image.new("RGB", size), 32).size == (32, 32)


def test_digits_are_balanced_and_framed_in_black():
    digits = DigitsDataset(32)
    assert len(digits) == 5000 and np.bincount(digits.labels).tolist() == [500] * 10
    image, label = digits[4999]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and label == 9
    assert image[:, :2].max() == 0 and image[:, :, -2:].max() == 0 and image.max() > 200
    assert torch.equal(image[0], image[2])
    assert np.bincount(digits.labels[held_out_digits()]).tolist() == [100] * 10
    with pytest.raises(UsageError, match="32 x 32"):
        DigitsDataset(64)


def test_folder_classes_are_sorted_and_errors_name_the_folder(tmp_path):
    dataset = FolderDataset(make_folder(tmp_path / "data", ("dog", "cat")), 16)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 6 and dataset[5][1] == 1 and dataset[0][0].shape == (3, 16, 16)
    for wrong in (tmp_path / "missing", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=str(wrong)):
            FolderDataset(wrong, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        FolderDataset(tmp_path / "empty", 16)


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a jpeg")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        load_image(tmp_path / "broken.jpg", 16)


def test_step_sampler_is_a_function_of_the_step():
    def batches(start, end, rank=0, size=1):
        return list(StepSampler(10, 4, seed=1, start_step=start, end_step=end, rank=rank, world_size=size))

    whole = batches(0, 10)
    assert batches(3, 10) == whole[3:]  # resumed
    halves = [a + b for a, b in zip(batches(0, 10, 0, 2), batches(0, 10, 1, 2))]
    assert halves == whole  # two processes share the same global batches
    flat = [i for batch in whole for i in batch]
    for epoch in range(4):  # every image once an epoch, though 4 does not divide 10
        assert sorted(flat[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]


def test_indices_of_a_step_take_no_time():
    """Twice a step, and as a list of tensors it would be milliseconds."""
    order = StepSampler(1_281_167, 256, 0, 0, 10_000)
    order.indices_of(1)  # draws the permutation
    started = time.perf_counter()
    for step in range(1, 101):
        order.indices_of(step)
    assert time.perf_counter() - started < 0.05


def test_flip_mirrors_only_where_asked():
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).reshape(2, 3, 2, 2)
    plain = to_pixels(images)
    flipped = to_pixels(images, torch.tensor([True, False]))
    assert torch.equal(flipped[0], plain[0].flip(-1)) and torch.equal(flipped[1], plain[1])
    assert to_pixels(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist() == [[[[-1.0, 1.0]]]]


def test_labels_of_images_for_a_checkpoint(tmp_path):
    make_folder(tmp_path / "data")
    recipe = Recipe("SiT-T/2", {"num_classes": 2, "class_dropout_prob": 0.1}, 16, classes=["a", "b"])
    labelled = LabelledImages(tmp_path / "data", recipe)
    assert labelled.batch([0, 5])[1].tolist() == [0, 1]
    recipe.classes = ["b", "c"]  # other classes: unconditional
    assert LabelledImages(tmp_path / "data", recipe).batch([0, 5])[1].tolist() == [2, 2]
    flat = LabelledImages(tmp_path / "data" / "a", recipe)  # no classes at all
    assert len(flat) == 3 and flat.batch([2])[1].tolist() == [2] and flat.name(2).endswith("2.png")
    one = Recipe("SiT-T/2", {"num_classes": 1, "class_dropout_prob": 0.1}, 16)  # which was trained on such a folder
    assert LabelledImages(tmp_path / "data" / "a", one).batch([2])[1].tolist() == [0]
    recipe.model_args["class_dropout_prob"] = 0
    with pytest.raises(UserError, match="no null class"):
        LabelledImages(tmp_path / "data", recipe)


def test_spread_is_even_and_within():
    assert spread(10, 5) == [0, 2, 4, 6, 8] and spread(3, 16) == [0, 1, 2] and spread(4, None) == [0, 1, 2, 3]


def test_class_folders_are_read_as_torchvision_reads_them(tmp_path):
    """The order decides which image a step sees: it stays what it was when torchvision found the files."""
    from torchvision.datasets import ImageFolder

    root = make_folder(tmp_path / "images", classes=("b", "a", "c d"))
    (root / "b" / "deep" / "er").mkdir(parents=True)
    for name in ("b/deep/0.png", "b/deep/er/9.png", "b/-1.PNG", "a/10.png"):
        Image.new("RGB", (8, 8)).save(root / name)
    ours, theirs = FolderDataset(root, 8), ImageFolder(root)
    assert (
        [(ours.name(i), ours.label(i)) for i in range(len(ours))] == theirs.samples
        and ours.classes == theirs.classes
        and ours.note is None
    )


def test_what_is_no_data_is_passed_over_and_counted(tmp_path):
    root = make_folder(tmp_path / "images")
    (root / ".ipynb_checkpoints").mkdir()
    (root / "a" / "._0.png").touch()
    for name in ("a/list.txt", "b/list.txt", "b/x.csv"):
        (root / name).touch()
    dataset = FolderDataset(root, 8)
    assert dataset.classes == ["a", "b"] and len(dataset) == 6 and dataset.note == "passed over: 2 .txt, 1 .csv"
    (root / "empty").mkdir()
    (root / "empty" / "readme.md").touch()
    with pytest.raises(UserError, match=r"no images in the class folder empty: 1 \.md"):
        FolderDataset(root, 8)


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    with pytest.raises(UserError, match="train and val are parts of a data set, not classes; give one of them"):
        FolderDataset(make_folder(tmp_path / "images", classes=("train", "val")), 8)
