"""The .metadata of torch.distributed.checkpoint (DCP), read without running code: its own reader would unpickle whatever a file
names."""

import pickle
from pathlib import PurePosixPath

import torch

from .errors import UserError

# All that the pickle .metadata of DCP names, in torch 2.6 to 2.14: values alone, which run no code. Not among them is
# BytesStorageMetadata, of things that DCP itself would unpickle.
_DCP = "torch.distributed.checkpoint"
NAMES = {(f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")}
NAMES |= {(f"{_DCP}.metadata", name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")}
NAMES |= {(f"{_DCP}.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
NAMES |= {("torch", str(value).split(".")[1]) for value in vars(torch).values() if isinstance(value, torch.dtype)}
NAMES |= {(module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "PurePosix")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in NAMES:
            raise UserError(f"--ckpt {self.path}: refused, loading it would run code from the file ({module}.{name})")
        return PurePosixPath if module.startswith("pathlib") else super().find_class(module, name)


def load_metadata(file, path):
    """DCP's Metadata of an open file. Raises UserError naming path where it names anything else, and what pickle raises."""
    unpickler = _Unpickler(file)
    unpickler.path = path
    return unpickler.load()
