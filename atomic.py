"""Files that are whole or not there at all."""

import json
import os
from pathlib import Path


def write_atomically(path, write, mode="wb"):
    """write(file) under a temporary name, flush, rename: path holds a whole file or none."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too must survive a power cut
        finally:
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, values):
    write_atomically(path, lambda file: file.write(json.dumps(values, indent=2) + "\n"), "w")
