"""Judge the demo's samples: python scripts/demo_report.py demo

For each sampler's .npz: a labelled grid, the share of samples that a classifier of real digits gives the class that was
asked for, and their diversity within a class beside the real digits'. All of it, with the curves and the way from noise, is on
one page: demo/index.html.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.images import read_digits
from demo_page import write_page
from digit_classifier import diversity, features, train_classifier

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Judged:
    """A sampler's samples, uint8 images (N, 32, 32, 3) with labels (N,), and what was found of them."""

    record: dict  # what sample_ddp.py wrote of how they were made
    images: np.ndarray
    labels: np.ndarray
    right: float  # the share that the classifier recognises
    spread: float  # their diversity

    @property
    def mode(self):
        return self.record["settings"]["mode"]

    @property
    def calls(self):
        return self.record["network_calls_per_sample"]

    @property
    def title(self):
        settings = self.record["settings"]
        method, scale = settings["sampling_method"], settings["cfg_scale"]
        return f"{self.mode}, {method}, guidance {scale:g}, {self.calls:g} network calls"


def draw_grid(images, labels, title, path):
    """One row a class, its label beside it: images uint8 (N, H, W, 3)."""
    classes = np.unique(labels)
    rows = [np.concatenate(list(images[labels == label]), axis=1) for label in classes]
    height = images.shape[1]
    figure, axes = plt.subplots(figsize=(rows[0].shape[1] / 64 + 0.6, len(rows) * height / 64 + 0.6), dpi=110)
    axes.imshow(np.concatenate(rows))
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], [str(label) for label in classes])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def judge(settings_file, classifier):
    """The Judged samples of a .json of sample_ddp.py and the .npz beside it."""
    record = json.loads(settings_file.read_text())
    asked = record["settings"]["class_labels"]
    with np.load(settings_file.with_suffix(".npz"), allow_pickle=False) as file:
        images = file["arr_0"]
    labels = np.array(asked)[np.arange(len(images)) % len(asked)]
    right = (classifier.predict(features(images)) == labels).mean()
    return Judged(record, images, labels, right, diversity(images, labels))


def main(folder):
    print(
        "\n3 of 3: judging them. A classifier that has seen real digits alone says which samples it recognises as the class "
        "that was\nasked for; diversity is the mean distance between two samples of a class; network calls are what a sample "
        "costs.\n",
        flush=True,
    )
    classifier, accuracy = train_classifier()
    real, real_labels = read_digits()
    # As many real digits of each class as the samples have, so that the two means are alike.
    some = np.concatenate([np.flatnonzero(real_labels == label)[::25][:20] for label in range(10)])
    real_diversity = diversity(real[some], real_labels[some])
    lines = [f"classifier: {accuracy:.1%} of held-out real digits recognised; real digits' diversity {real_diversity:.2f}"]
    judged = [judge(settings_file, classifier) for settings_file in sorted((folder / "samples").glob("*.json"))]
    for each in judged:
        draw_grid(each.images, each.labels, each.title, folder / f"samples-{each.mode}.png")
        lines.append(
            f"{each.mode}: {each.right:.1%} of {len(each.images)} samples recognised as the class asked for; "
            f"diversity {each.spread:.2f}, {each.spread / real_diversity:.2f} of the real digits'; {each.calls:g} network calls"
        )
    run = sorted((folder / "results").glob("000-*"))[0]
    shutil.copy(run / "loss.png", folder / "loss.png")
    (folder / "report.txt").write_text("\n".join(lines) + "\n")
    page = write_page(folder, run, judged, classifier, accuracy, real_diversity)
    print("\n".join(lines))
    print(f"see {folder}/: samples-ODE.png samples-SDE.png loss.png trajectory.gif report.txt samples/*.npz")
    print(f"open {page.resolve()} in a browser: all of it on one page")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
