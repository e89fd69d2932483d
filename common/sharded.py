"""Checkpoints that many processes write together, each its share: a folder that is whole or not there, read without running
code, by any number of processes.

    content.pt       what is no tensor, as nested as it was, with the name, shape and dtype of each tensor in its place
    __0_0.distcp     tensors, or shards of them, one such file a process; with .metadata, which says where each shard is:
                     the format of torch.distributed.checkpoint (DCP)
    manifest.json    size and CRC-32 of each of these files

A content is what save_checkpoint takes: dicts, lists and tuples of tensors and plain values. Tensors go by the names of
nested.py.
"""

import json
import math
import os
import pickle
import shutil
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
import torch.distributed as dist

from .atomic import sync_folder, write_json
from .checkpoint import DamagedFile, load_checkpoint, save_checkpoint
from .errors import UserError
from .nested import join, split

CONTENT, MANIFEST, METADATA = "content.pt", "manifest.json", ".metadata"
# All that the pickle .metadata of DCP names, in torch 2.6 to 2.14: values alone, which run no code. Not among them is
# BytesStorageMetadata, of things that DCP itself would unpickle.
_DCP = "torch.distributed.checkpoint"
NAMES = {(f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")}
NAMES |= {(f"{_DCP}.metadata", name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")}
NAMES |= {(f"{_DCP}.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
NAMES |= {("torch", str(value).split(".")[1]) for value in vars(torch).values() if isinstance(value, torch.dtype)}
NAMES |= {(module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "PurePosix")}


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# Writing.


def _together(call, group):
    """[call()'s value on each process of group]. What one of them runs into, all of them raise: OSError or RuntimeError."""
    value = error = None
    try:
        value = call()
    except OSError as raised:
        error = OSError(raised.errno, raised.strerror or str(raised))
    except Exception as raised:
        error = RuntimeError(_first_line(raised))
    said = [(value, error)]
    if dist.is_initialized():
        said = [None] * dist.get_world_size(group)
        dist.all_gather_object(said, (value, error), group=group)
    for _, error in said:
        if error is not None:
            raise error
    return [value for value, _ in said]


def write_sharded(content, path, group=None):
    """Write content to the folder path, so that path is always a whole one, or not there.

    Every process of group calls it (of gloo; none where torch.distributed is not initialised), on one file system. A tensor
    on the CPU is the same on all of them and written once; of a DTensor each process writes its shard. Raises OSError or
    RuntimeError, on every process the same, with nothing left behind.
    """
    path = Path(path)
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # the main process's, once it has told the others

    def on_main(call):
        return _together(lambda: call() if rank == 0 else None, group)[0]

    try:
        tensors, rest = split(content)
        folder = on_main(lambda: _begin(folder, rest))
        _together(lambda: _write_tensors(tensors, folder, group), group)
        names = on_main(lambda: sorted(os.listdir(folder)))
        own = [name for name in names if name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))]
        found = _together(lambda: {name: _measure(folder / name) for name in own}, group)
        files = {name: about for some in found for name, about in some.items()}
        on_main(lambda: _end(folder, path, {"format": 1, "files": dict(sorted(files.items()))}))
    except BaseException:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _begin(folder, rest):
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed and had the same number
    folder.mkdir()
    save_checkpoint(rest, folder / CONTENT)
    return folder


def _write_tensors(tensors, folder, group):
    from torch.distributed import checkpoint as dcp  # slow to import
    from torch.distributed.checkpoint.api import CheckpointException

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that a process is alone
    # Nothing is copied ahead: what is on the CPU already needs no stream of a GPU, which this thread has not chosen.
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # no Exception; every process raises it
        raise next(iter(error.failures.values()))[0] from error


def _measure(file):
    """Size and CRC-32 of a file."""
    size = crc = 0
    with open(file, "rb") as opened:
        while part := opened.read(1 << 24):
            size, crc = size + len(part), zlib.crc32(part, crc)
    return {"size": size, "crc32": f"{crc:08x}"}


def _end(folder, path, manifest):
    """The manifest, and the name; all of it must survive a power cut."""
    write_json(folder / MANIFEST, manifest)
    if path.exists():  # as a file is written over
        remove_sharded(path)
    os.rename(folder, path)
    sync_folder(path.parent)


def remove_sharded(path):
    """Remove such a folder; one that is half removed has another name already, which no one takes for a checkpoint's."""
    leaving = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    path.rename(leaving)
    shutil.rmtree(leaving)


# Reading. What is read may come from anywhere.


def is_sharded(path):
    """Whether path is such a folder, be it a damaged one."""
    return any((Path(path) / name).is_file() for name in (MANIFEST, CONTENT))


@contextmanager
def _reading(file):
    """What goes wrong with a file of a checkpoint becomes a UserError naming it: a DamagedFile if another day is no help."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise DamagedFile(f"--ckpt {file}: it is missing") from error
    except (OSError, MemoryError) as error:
        reason = "out of memory" if isinstance(error, MemoryError) else error.strerror or error
        raise UserError(f"--ckpt {file}: cannot be read ({reason})") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise DamagedFile(f"--ckpt {file}: not of a checkpoint, or a damaged one ({_first_line(error)})") from error


def _manifest(path):
    """{file: its size and CRC-32} of a folder."""
    with _reading(path / MANIFEST):
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        if not {CONTENT, METADATA} <= files.keys() or any(Path(name).name != name for name in files):
            raise ValueError("it does not list one's files")
    return files


def verify(path, part=(0, 1)):
    """Raise DamagedFile, naming the file, where one is missing, short, or does not match its CRC-32. part: (rank, size) of a
    process that looks at its share of the files alone."""
    path, (rank, size) = Path(path), part
    files = _manifest(path)
    for name in sorted(files)[rank::size]:
        with _reading(path / name):
            if _measure(path / name) != files[name]:
                raise ValueError("it does not match its size and checksum")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in NAMES:
            raise UserError(f"--ckpt {self.path}: refused, loading it would run code from the file ({module}.{name})")
        return PurePosixPath if module.startswith("pathlib") else super().find_class(module, name)


def _metadata(path):
    """What DCP knows of a folder's tensors, which its own reader would unpickle with whatever code the file names."""
    files = _manifest(path)
    with _reading(path / METADATA), open(path / METADATA, "rb") as file:
        unpickler = _Unpickler(file)
        unpickler.path = path / METADATA
        metadata = unpickler.load()
        for name, tensor in metadata.state_dict_metadata.items():
            if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
                raise ValueError(f"not all of {name} is there")
        for place in metadata.storage_data.values():
            if place.relative_path not in files or getattr(place, "transform_descriptors", None):
                raise ValueError(f"{place.relative_path} is no file of the folder, or not as it was written")
    return metadata


def read_into(path, tensors):
    """Fill tensors, a dict by name, from the folder path in place: plain ones or DTensors, on any device. A process reads what
    its shards need, and asks no other. Raises UserError for a name, shape or dtype that is not the folder's."""
    from torch.distributed import checkpoint as dcp  # slow to import

    path = Path(path)
    metadata = _metadata(path)
    for name, tensor in tensors.items():
        if (there := metadata.state_dict_metadata.get(name)) is None:
            raise UserError(f"--ckpt {path}: it has no tensor {name}")
        found, wanted = (tuple(there.size), there.properties.dtype), (tuple(tensor.shape), tensor.dtype)
        if found != wanted:
            raise UserError(f"--ckpt {path}: {name} is {found[0]}, {found[1]}, and not {wanted[0]}, {wanted[1]}")
    planner, reader = dcp.DefaultLoadPlanner(), dcp.FileSystemReader(path)
    with _reading(path):  # what dcp.load does, but for reading .metadata, and for asking others
        planner.set_up_planner(dict(tensors), metadata, True)
        reader.set_up_storage_reader(metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
        reader.read_data(planner.finish_plan(plan), planner).wait()


def open_sharded(path):
    """The content of the folder path, tensors on the meta device: they hold no data. Raises UserError naming the file."""
    file = Path(path) / CONTENT
    with _reading(file):
        return join(load_checkpoint(file), lambda _, shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))


def load_whole(path):
    """The content of the folder path, tensors on the CPU, whoever wrote it. Raises UserError naming the file."""
    path = Path(path)
    tensors, rest = split(open_sharded(path))
    if sum(tensor.nbytes for tensor in tensors.values()) > sum(about["size"] for about in _manifest(path).values()):
        raise DamagedFile(f"--ckpt {path / CONTENT}: damaged (its tensors are larger than the files)")
    try:
        tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    except RuntimeError as error:
        raise UserError(f"--ckpt {path}: cannot be read ({_first_line(error)})") from error
    read_into(path, tensors)
    return join(rest, lambda name, *_: tensors[name])
