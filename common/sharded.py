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
import shutil
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from .atomic import sync_folder, write_json
from .checkpoint import DamagedFile, load_checkpoint, save_checkpoint
from .dcp_metadata import load_metadata
from .errors import UserError
from .nested import join, split

CONTENT, MANIFEST, METADATA = "content.pt", "manifest.json", ".metadata"


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# Writing.


def _together(call, group):
    """[call()'s value on each process of group]. What one of them runs into, all of them raise: OSError or RuntimeError, as
    files give them, or what is nobody's file's fault: by itself where it comes from, elsewhere as an Exception."""
    value = error = fault = None
    try:
        value = call()
    except OSError as raised:
        error = OSError(raised.errno, raised.strerror or str(raised))
    except RuntimeError as raised:
        error = RuntimeError(_first_line(raised))
    except Exception as raised:
        fault, error = raised, Exception(f"another process: {type(raised).__name__}: {_first_line(raised)}")
    said = [(value, error)]
    if dist.is_initialized():
        said = [None] * dist.get_world_size(group)
        dist.all_gather_object(said, (value, error), group=group)
    if fault is not None:
        raise fault
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
        own = lambda name: name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))  # noqa: E731
        found = _together(lambda: {name: _measure(folder / name) for name in os.listdir(folder) if own(name)}, group)
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
    old = _put_aside(path) if path.exists() else None
    os.rename(folder, path)
    sync_folder(path.parent)
    if old:
        shutil.rmtree(old)


def _put_aside(path):
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def remove_sharded(path):
    """Remove such a folder; one that is half removed has another name already, which no one takes for a checkpoint's."""
    shutil.rmtree(_put_aside(path))


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


def verify(path):
    """Raise DamagedFile, naming the file, where one is missing, short, or does not match its CRC-32."""
    path = Path(path)
    files = _manifest(path)
    for name in sorted(files):
        with _reading(path / name):
            if _measure(path / name) != files[name]:
                raise ValueError("it does not match its size and checksum")


def _metadata(path):
    """What DCP knows of a folder's tensors, which its own reader would unpickle with whatever code the file names."""
    files = _manifest(path)
    with _reading(path / METADATA), open(path / METADATA, "rb") as file:
        metadata = load_metadata(file, path / METADATA)
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
        content = join(load_checkpoint(file), lambda _, shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))
        if sum(t.nbytes for t in split(content)[0].values()) > sum(about["size"] for about in _manifest(file.parent).values()):
            raise ValueError("its tensors are larger than the files")
    return content


def load_whole(path):
    """The content of the folder path, tensors on the CPU, whoever wrote it. Raises UserError naming the file."""
    path = Path(path)
    tensors, rest = split(open_sharded(path))
    try:
        tensors = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    except RuntimeError as error:
        raise UserError(f"--ckpt {path}: cannot be read ({_first_line(error)})") from error
    read_into(path, tensors)
    return join(rest, lambda name, *_: tensors[name])
