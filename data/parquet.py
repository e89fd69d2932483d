"""Images in parquet files, as the Hub has them: a column image, a struct of bytes and path, and a column label."""

import glob
import io
import json
import os
import re
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.errors import UsageError, UserError

from .images import Pictures
from .listing import SPLITS, number_classes

KEPT = 256 << 20  # bytes of row groups that a process keeps
DEAR = 1 << 20  # bytes of a row group from which on a person should know what an image costs
LARGEST = 1 << 32  # bytes of a row group, unpacked
SUSPECT, PACKED = 1 << 26, 100  # from so many bytes on, they may not be more than so many times the file's
LONGEST = 4096  # characters of a path
IMAGES, LABEL = ("image", "img"), "label"  # names of columns
KEY = r"^(?:(.*)/)?([^/]*)$"  # of a path: its folder and its name, which are sorted by in turn


def files_of(path):
    """The parquet files that a file, a folder or a pattern names, sorted; none where it names no such."""
    path = str(path)
    if os.path.isdir(path):
        return sorted(glob.glob(f"{glob.escape(path)}/*.parquet"))
    if os.path.exists(path) or not glob.has_magic(path):
        return [path] if path.endswith(".parquet") else []
    return sorted(file for file in glob.glob(path) if file.endswith(".parquet"))


def is_parquet(path):
    return bool(files_of(path)) or str(path).endswith(".parquet")


def import_pyarrow(path):
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"--data-path {path}: parquet needs pyarrow, which is not installed; pip install pyarrow") from error
    return pyarrow


class ParquetImages(Pictures):
    """Rows of parquet files: 12 bytes of index an image. A read costs its whole row group, of which the last are kept.

    Rows are in the order of class, then path, or where they have no path, of their place.
    """

    def __init__(self, path, image_size, channels=3):
        super().__init__(image_size, channels)
        self.path, self.files, self.groups = str(path), files_of(path), []  # a group: (file's number, its own, rows)
        self._prepare()
        self._check_files()
        table = self.arrow.concat_tables([self._list(number) for number in range(len(self.files))])
        if not len(table):
            raise UserError(f"--data-path {path}: no rows in it")
        order = self._order(table)
        labels = table["label"].to_numpy()[order]
        self.classes = self._name_classes(labels) if self.columns[1] else ()
        self.labels = labels.astype(np.int32)
        ends = np.cumsum([count for _, _, count in self.groups])
        self.group = np.searchsorted(ends, order, side="right").astype(np.int32)
        self.row = (order - np.concatenate([[0], ends])[self.group]).astype(np.int32)
        del table
        self.arrow.default_memory_pool().release_unused()
        largest = max(count for _, _, count in self.groups)
        size = sum(map(os.path.getsize, self.files)) / len(order) * largest
        notes = [] if self.columns[1] else [f"no column {LABEL}, so no classes; it has {', '.join(self.columns[2])}"]
        if size > DEAR:
            cost = f"row groups of {largest:,} images, {size / 1e6:,.0f} MB"
            notes.append(f"{cost}, of which training reads one for each image; encode_latents.py reads them in turn, once")
        self.note = "; ".join(notes) or None

    def _prepare(self):
        """What a process has for itself."""
        self.arrow, self.kept, self.reader = import_pyarrow(self.path), OrderedDict(), lru_cache(maxsize=64)(self._open)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("arrow", "kept", "reader")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._prepare()

    @property
    def _errors(self):
        """What pyarrow raises for a file that is damaged, or none of its own."""
        return OSError, ValueError, KeyError, MemoryError, self.arrow.ArrowException

    def _open(self, number):
        """The file of that number; not mapped, since one that is cut off under a map ends the process."""
        try:
            return self.arrow.parquet.ParquetFile(self.files[number])
        except self._errors as error:
            raise UserError(f"--data-path {self.files[number]}: not a readable parquet file ({_first(error)})") from error

    def _check_files(self):
        """Raises UserError where there are none, UsageError where they are several parts of a data set."""
        if not self.files:
            raise UserError(f"--data-path {self.path}: there is no such parquet file")
        found = (re.match(r"([a-z]+)[-.\d]", Path(file).name) for file in self.files)
        parts = sorted({match[1] for match in found if match} & SPLITS)
        if len(parts) > 1:
            example = os.path.join(os.path.dirname(self.files[0]), f"{'train' if 'train' in parts else parts[0]}-*.parquet")
            raise UsageError(f"--data-path {self.path}: {' and '.join(parts)} are parts of a data set; give '{example}'")

    def _list(self, number):
        """Labels and paths of a file's rows, a table; its row groups join the others."""
        file, reader = self.files[number], self.reader(number)
        columns = self._columns(reader.schema_arrow, file)
        if self.__dict__.setdefault("columns", columns)[:2] != columns[:2]:
            raise UserError(f"--data-path {file}: its columns are not those of {self.files[0]}")
        groups = _row_groups(reader.metadata, file)
        self.groups += [(number, own, count) for own, count in enumerate(groups)]
        try:
            table = self._labels_and_paths(reader, columns, sum(groups))
        except self._errors as error:
            raise UserError(f"--data-path {file}: its labels cannot be read ({_first(error)})") from error
        label = table["label"]
        if label.null_count:
            raise UserError(f"--data-path {file}: {label.null_count:,} of its {len(label):,} rows have no label")
        return table

    def _labels_and_paths(self, reader, columns, count):
        """A table of label, 0 where there are none, and path; read in parts, for a path that all rows share takes no room in a
        file."""
        arrow, tables = self.arrow, []
        schema = arrow.schema([("label", arrow.int64()), ("path", arrow.string())])
        kind = reader.schema_arrow.field(columns[0]).type
        wanted = [LABEL] * columns[1] + [f"{columns[0]}.path"] * (kind.get_field_index("path") >= 0)
        for batch in reader.iter_batches(4096, columns=wanted, use_threads=False) if wanted else ():
            found = arrow.Table.from_batches([batch]).flatten()
            found = dict(zip(found.column_names, found.columns))
            path = found.get(f"{columns[0]}.path", arrow.nulls(len(batch), arrow.string())).cast(arrow.string())
            if (arrow.compute.max(arrow.compute.binary_length(path)).as_py() or 0) > LONGEST:
                raise ValueError(f"a path of more than {LONGEST:,} characters")
            label = found.get(LABEL, arrow.array(np.zeros(len(batch), np.int64))).cast(arrow.int64())
            tables.append(arrow.table({"label": label, "path": path}, schema))
        if not wanted:
            tables = [arrow.table({"label": np.zeros(count, np.int64), "path": arrow.nulls(count, arrow.string())}, schema)]
        return arrow.concat_tables(tables) if tables else schema.empty_table()

    def _columns(self, schema, file):
        """(name of the images' column, whether there are labels, names of all columns)"""
        is_struct = self.arrow.types.is_struct
        for name in IMAGES:
            if (
                schema.names.count(name) == 1
                and is_struct(kind := schema.field(name).type)
                and kind.get_field_index("bytes") >= 0
            ):
                return name, schema.names.count(LABEL) == 1, tuple(schema.names)
        found = ", ".join(f"{field.name}: {field.type}"[:60] for field in list(schema)[:5])
        raise UserError(f"--data-path {file}: no column image, a struct with bytes, is in it; it has {found}")

    def _order(self, table):
        """Indices of rows, sorted by label, folder and name."""
        parts = self.arrow.compute.replace_substring_regex(table["path"], KEY, "\\1\0\\2")
        table = table.set_column(1, "path", parts).append_column("place", [np.arange(len(table))])
        keys = [(name, "ascending") for name in ("label", "path", "place")]
        return self.arrow.compute.sort_indices(table, keys).to_numpy()

    def _name_classes(self, labels):
        """By the Hub's own description in the first file, where it has one."""
        numbers = number_classes(labels, f"--data-path {self.path}")
        try:
            described = json.loads(self.reader(0).schema_arrow.metadata[b"huggingface"])
            names = list(map(str, described["info"]["features"][LABEL]["names"]))
        except (KeyError, TypeError, ValueError, RecursionError):
            return numbers
        return names if len(numbers) <= len(names) <= 100_000 else numbers

    @property
    def reading_order(self):
        """By their place in the files."""
        return np.lexsort((self.row, self.group))

    def __len__(self):
        return len(self.labels)

    def label(self, index):
        return self.labels[index]

    def name(self, index):
        number, own, _ = self.groups[self.group[index]]
        return f"{self.files[number]}, row {self.row[index]} of row group {own}"

    def source(self, index):
        data = self._rows(self.group[index])[int(self.row[index])].as_py()
        if not data:
            raise UserError(f"cannot read image {self.name(index)}: it has no bytes")
        return io.BytesIO(data)

    def _rows(self, group):
        """The bytes of a row group's images; the last groups are kept as far as they fit."""
        if group in self.kept:
            self.kept.move_to_end(group)
            return self.kept[group]
        number, own, count = self.groups[group]
        try:
            table = self.reader(number).read_row_group(own, columns=[f"{self.columns[0]}.bytes"], use_threads=False)
            rows = table.flatten()[f"{self.columns[0]}.bytes"]
        except self._errors as error:
            raise UserError(f"cannot read row group {own} of {self.files[number]}: {_first(error)}") from error
        if len(rows) != count:
            raise UserError(f"row group {own} of {self.files[number]} has {len(rows)} rows instead of {count}")
        self.kept[group] = rows
        while len(self.kept) > 1 and sum(kept.nbytes for kept in self.kept.values()) > KEPT:
            self.kept.popitem(last=False)
        return rows


def _row_groups(metadata, file):
    """How many rows each row group has. Raises UserError for claims that the file cannot hold."""
    groups, size = [metadata.row_group(i) for i in range(metadata.num_row_groups)], os.path.getsize(file)
    counts = [group.num_rows for group in groups]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows or metadata.num_rows > size:
        raise UserError(f"--data-path {file}: claims {metadata.num_rows:,} rows in {size:,} bytes")
    largest = max((group.total_byte_size for group in groups), default=0)
    if not 0 <= largest < LARGEST or largest > max(SUSPECT, PACKED * size):
        raise UserError(f"--data-path {file}: claims a row group of {largest:,} bytes in {size:,}, which no pictures have")
    return counts


def _first(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
