"""Unreadable images while training: the next one is read in their place."""

from torch.utils.data import Dataset

from common.errors import UserError


class Tolerant(Dataset):
    """A data set whose unreadable images are replaced by the next readable one: (image, label, index that was read)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        for tried in range(100):
            read = (index + tried) % len(self)
            try:
                return *self.dataset[read], read
            except UserError:
                continue
        raise UserError(f"100 images in a row cannot be read, the first is {self.dataset.name(index)}")
