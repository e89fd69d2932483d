"""Work cut into chunks by index, kept on disk so that it survives being killed and does not depend on who did it."""

import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .atomic import write_atomically
from .errors import UserError


class ChunkStore:
    """Items 0 to total - 1 in chunks of size by index; each finished chunk is one .npz of named arrays in folder."""

    def __init__(self, folder, total, size):
        self.folder, self.total, self.size = Path(folder), total, size
        self.count = -(-total // size)

    def indices(self, chunk):
        return range(chunk * self.size, min((chunk + 1) * self.size, self.total))

    def path(self, chunk):
        return self.folder / f"{chunk:07d}.npz"

    def missing(self):
        return [chunk for chunk in range(self.count) if not self.path(chunk).exists()]

    def save(self, chunk, **arrays):
        write_atomically(self.path(chunk), lambda file: np.savez(file, **arrays))

    def load(self, chunk, *names):
        """The named arrays of a finished chunk."""
        try:
            with np.load(self.path(chunk), allow_pickle=False) as arrays:
                return [arrays[name] for name in names]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path(chunk)} is damaged ({error}); delete it and run the same command again") from error

    def remove(self):
        """Delete the chunks and their folder, with whatever a killed process left there."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def written_behind():
    """Yields write(call, *args), which calls in a thread, in turn, so that the device goes on meanwhile.

    No more than one call waits; what one raises is raised by the next write, or at the end.
    """
    with ThreadPoolExecutor(1) as writer:
        pending = [writer.submit(bool)]

        def write(call, *args):
            pending.pop().result()
            pending.append(writer.submit(call, *args))

        yield write
        pending.pop().result()


def write_npz(path, shape, dtype, parts):
    """An uncompressed .npz whose arr_0 (shape, dtype) is the concatenation of parts, never held in memory as a whole.

    The same array gives the same bytes: the archive carries no time of day.
    """

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            entry = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as member:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(np.ascontiguousarray(part, dtype).tobytes())

    write_atomically(path, write)
