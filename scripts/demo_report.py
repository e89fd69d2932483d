"""Judge the demo's samples: python scripts/demo_report.py demo

For each sampler's .npz: a labelled grid, the share of samples that a classifier of real digits gives the class that was
asked for, and their diversity within a class beside the real digits'.
"""

import json
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.images import read_digits
from digit_classifier import diversity, features, train_classifier

matplotlib.use("Agg")
import matplotlib.pyplot as plt


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


def main(folder):
    classifier, accuracy = train_classifier()
    real, real_labels = read_digits()
    # As many real digits of each class as the samples have, so that the two means are alike.
    some = np.concatenate([np.flatnonzero(real_labels == label)[::25][:20] for label in range(10)])
    real_diversity = diversity(real[some], real_labels[some])
    lines = [f"classifier: {accuracy:.1%} of held-out real digits recognised; real digits' diversity {real_diversity:.2f}"]
    for settings_file in sorted((folder / "samples").glob("*.json")):
        record = json.loads(settings_file.read_text())
        settings = record["settings"]
        with np.load(settings_file.with_suffix(".npz"), allow_pickle=False) as file:
            images = file["arr_0"]
        labels = np.array(settings["class_labels"])[np.arange(len(images)) % len(settings["class_labels"])]
        right = (classifier.predict(features(images)) == labels).mean()
        spread = diversity(images, labels)
        mode = settings["mode"]
        calls = record["network_calls_per_sample"]
        title = f"{mode}, {settings['sampling_method']}, guidance {settings['cfg_scale']:g}, {calls:g} network calls"
        draw_grid(images, labels, title, folder / f"samples-{mode}.png")
        lines.append(
            f"{mode}: {right:.1%} of {len(images)} samples recognised as the class asked for; diversity {spread:.2f}, "
            f"{spread / real_diversity:.2f} of the real digits'; {calls:g} network calls"
        )
    shutil.copy(sorted((folder / "results").glob("000-*/loss.png"))[0], folder / "loss.png")
    (folder / "report.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"see {folder}/: samples-ODE.png samples-SDE.png loss.png trajectory.gif report.txt samples/*.npz")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
