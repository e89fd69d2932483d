"""A judge of drawn digits: a support vector machine on real ones, independent of everything that SiT learns."""

import sys
from pathlib import Path

import numpy as np
from sklearn.svm import SVC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.images import held_out_digits, read_digits


def features(images):
    """uint8 images (N, 28, 28) or (N, 32, 32, 3) -> (N, 784) in [0, 1]."""
    if images.ndim == 4:
        images = images[:, 2:-2, 2:-2].mean(-1)
    return images.reshape(len(images), -1) / 255.0


def train_classifier():
    """(classifier, its accuracy on held-out digits). Fitted twice: the second time on the support vectors of the
    first, each also moved by a pixel in four directions (virtual support vectors, Schölkopf et al., 1996)."""
    images, labels = read_digits()
    held = held_out_digits()
    train, train_labels = images[~held], labels[~held]
    support = SVC(C=10, gamma=0.03).fit(features(train), train_labels).support_
    train, train_labels = train[support], train_labels[support]
    moved = [train] + [np.roll(train, step, axis) for axis in (1, 2) for step in (-1, 1)]
    classifier = SVC(C=10, gamma=0.03).fit(features(np.concatenate(moved)), np.tile(train_labels, 5))
    return classifier, classifier.score(features(images[held]), labels[held])


def diversity(images, labels):
    """Mean distance between two images of the same class, over classes."""
    x = features(images)
    means = []
    for label in np.unique(labels):
        own = x[labels == label]
        distance = np.sqrt(np.maximum(((own[:, None] - own[None]) ** 2).sum(-1), 0))
        means.append(distance.sum() / (len(own) * (len(own) - 1)))
    return float(np.mean(means))
