"""What the samples are judged by: a small classifier of the same images, which no SiT has seen anything of."""

import numpy as np
import torch
import torch.nn as nn
from torch.nn.functional import cross_entropy, interpolate

from common.streams import generator

SIDE = 64  # pixels that it sees a side, at most
WIDTHS = (32, 64, 64, 64)  # channels; the last are the features
EPOCHS, BATCH, RATE = 12, 128, 4e-3
SHIFT = 2  # pixels by which training moves images


class Judge(nn.Module):
    """uint8 images (N, 3, H, W) -> features (N, 64); head(features) are the logits of classes."""

    def __init__(self, classes):
        super().__init__()
        layers = []
        for before, after in zip((3, *WIDTHS), WIDTHS):
            stride = 1 if before == 3 else 2
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTHS[-1], classes)

    def forward(self, images):
        x = images.float() / 127.5 - 1
        if scale := max(0, max(x.shape[-2:]) - SIDE):
            x = interpolate(x, scale_factor=SIDE / (SIDE + scale), mode="area")
        return self.layers(x).mean((2, 3))

    @torch.no_grad()
    def see(self, images):
        """(features (N, 64), classes that it takes them for (N,)) of images (N, 3, H, W), in evaluation mode."""
        features = torch.cat([self.eval()(part) for part in images.split(BATCH)])
        return features, self.head(features).argmax(1)


def train_judge(images, labels, classes, mirrors, seed=0):
    """A Judge of uint8 images (N, 3, H, W) with labels (N,), moved by up to two pixels, and mirrored where one may."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(classes)
    steps = EPOCHS * (len(images) // BATCH or 1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    numbers, order = generator("cpu", seed, "judge"), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < min(BATCH, len(images)):
            order = torch.randperm(len(images), generator=numbers)
        rows, order = order[:BATCH], order[BATCH:]
        down, right, mirror = (int(torch.randint(n, (), generator=numbers)) for n in (2 * SHIFT + 1, 2 * SHIFT + 1, 2))
        batch = images[rows].roll((down - SHIFT, right - SHIFT), (2, 3))
        batch = batch.flip(3) if mirror and mirrors else batch
        loss = cross_entropy(judge.train().head(judge(batch)), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def diversity(features, labels):
    """Mean distance between the features of two images of one class, over the classes that have two."""
    means = []
    for label in np.unique(labels):
        own = features[torch.as_tensor(labels == label)].double()
        if len(own) > 1:
            means.append(torch.pdist(own).mean().item())
    return float(np.mean(means))
