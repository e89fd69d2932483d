"""Images in folders: one a class, one for all, or with a dataset.json that says each image's class."""

import os
from bisect import bisect_right
from collections import Counter
from pathlib import Path

from common.errors import UserError
from common.pixels import image_endings, in_words, is_image, other_files, scan, subfolders

from .images import DIGITS, Pictures
from .listing import LABELS, check_parts, read_labels
from .names import Names


class FolderDataset(Pictures):
    """One sub-folder a class, in sorted order; a class's images by folder and name. Names that start with a dot are none."""

    def __init__(self, root, image_size, channels=3):
        super().__init__(image_size, channels)
        root = Path(root)
        if not root.is_dir():
            found = "it is a file" if root.exists() else "there is no such folder"
            raise UserError(f"--data-path {root}: {found}; give a folder with one sub-folder of images a class, or {DIGITS}")
        self.classes = subfolders(root)
        check_parts(self.classes, root)
        self.folders, self.files, self.ends, passed_over = [str(root / name) for name in self.classes], Names(), [], Counter()
        for name, folder in zip(self.classes, self.folders):
            files, others = scan(folder)
            if not files:
                raise UserError(f"--data-path {root}: no images in the class folder {name}{in_words(others)}")
            self.files.extend(file[len(folder) :] for file in files)
            self.ends.append(len(self.files))
            passed_over += others
        if not self.files:
            raise UserError(f"--data-path {root}: no class folders of images in it")
        beside = [entry.name for entry in os.scandir(root) if entry.is_file()]
        passed_over += other_files(beside) + Counter("beside the class folders" for name in beside if is_image(name))
        self.note = f"passed over{in_words(passed_over)}" if passed_over else None

    def __len__(self):
        return len(self.files)

    def label(self, index):
        return bisect_right(self.ends, index)

    def name(self, index):
        return self.folders[self.label(index)] + self.files[index]

    source = name


class FlatFolder(Pictures):
    """Images of one folder, in sorted order, without classes."""

    def __init__(self, root, image_size, channels=3):
        super().__init__(image_size, channels)
        self.root = Path(root)
        names = [entry.name for entry in os.scandir(root) if entry.is_file()]
        self.files, others = Names(sorted(filter(is_image, names))), other_files(names)
        self.note = f"passed over{in_words(others)}" if others else None
        if not self.files:
            raise UserError(f"--data-path {root}: no images in it ({' '.join(sorted(image_endings()))})")

    def __len__(self):
        return len(self.files)

    def label(self, index):
        return 0

    def name(self, index):
        return str(self.root / self.files[index])

    source = name


class LabelledFolder(Pictures):
    """A folder with a dataset.json, as EDM prepares: the classes are its numbers, the images anywhere below the folder."""

    def __init__(self, root, image_size, channels=3):
        super().__init__(image_size, channels)
        self.root = str(root)
        paths, others = scan(self.root)
        names = [os.path.relpath(path, self.root).replace(os.sep, "/") for path in paths]
        if not names:
            then = "; encode_latents.py imports latents" if others[".npy"] else ""
            raise UserError(f"--data-path {root}: no images beside its {LABELS}{in_words(others)}{then}")
        try:
            text = (Path(root) / LABELS).read_bytes()
        except OSError as error:
            raise UserError(f"{Path(root) / LABELS}: cannot be read ({error.strerror})") from error
        self.classes, self.labels, order = read_labels(text, names, Path(root) / LABELS)
        self.files = Names(names[i] for i in order)
        others.pop(".json", None)
        self.note = f"passed over{in_words(others)}" if others else None

    def __len__(self):
        return len(self.files)

    def label(self, index):
        return self.labels[index]

    def name(self, index):
        return os.path.join(self.root, self.files[index])

    source = name
