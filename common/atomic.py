"""Files that are whole or not there at all, and folders that can be written to."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

# A file's name need not be text that the locale, or UTF-8, can write: it goes into a file as the bytes that it is.
ANY_TEXT = dict(encoding="utf-8", errors="surrogateescape")


def write_atomically(path, write, mode="wb"):
    """write(file) under a temporary name, flush, rename: path holds a whole file or none."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else ANY_TEXT)) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)  # the new name too must survive a power cut
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path):
    """Have the names of a folder's files on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def as_bytes(values):
    """What write_json writes."""
    return (json.dumps(values, indent=2) + "\n").encode(**ANY_TEXT)


def write_json(path, values):
    write_atomically(path, lambda file: file.write(as_bytes(values)))


def writable_folder(path, flag):
    """Make a folder and see that it can be written to. Raises UserError naming the flag and the folder."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot write there ({error.strerror})") from error
    return path


@contextmanager
def writing(path, flag):
    """A full disk becomes a UserError naming the flag and the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot write there ({error.strerror or error})") from error
