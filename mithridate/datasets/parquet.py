"""``parquet:GLOB``: image files and labels in columns of Parquet shards, as Hugging Face writes them."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mithridate.datasets.labelled import numbered_classes
from mithridate.datasets.sources import Item, Request
from mithridate.datasets.spec import selection_hint
from mithridate.errors import DatasetError

LABEL_NAMES: Final = ("label", "labels", "fine_label", "class")
BATCH_ROWS: Final = 256


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Rows ``start`` to ``stop`` of a row group, and the number in the file of the group's first row."""

    path: Path
    group: int
    first_row: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class ParquetRows:
    """The selected rows; a row group is read when iteration comes to it, and only the two columns of it."""

    pieces: tuple[_Piece, ...]
    image_column: str
    image_field: str | None  # of a struct
    label_column: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def __iter__(self) -> Iterator[Item]:
        for piece in self.pieces:
            row = piece.first_row + piece.start
            for data, label in self._read(piece):
                name = f"{piece.path} row {row}"
                if data is None or label is None:
                    raise DatasetError(f"{name}: has no {'image bytes' if data is None else 'label'}")
                yield Item(name=name, data=data, label=label)
                row += 1

    def _read(self, piece: _Piece) -> Iterator[tuple[bytes | None, int | None]]:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        pixels = self.image_column if self.image_field is None else f"{self.image_column}.{self.image_field}"
        with pq.ParquetFile(piece.path) as file:
            table = file.read_row_group(piece.group, columns=[pixels, self.label_column])
        for batch in table.slice(piece.start, piece.stop - piece.start).to_batches(max_chunksize=BATCH_ROWS):
            images = batch.column(self.image_column)
            if self.image_field is not None:
                images = pc.struct_field(images, self.image_field)
            yield from zip(images.to_pylist(), batch.column(self.label_column).to_pylist(), strict=True)


def open_parquet(request: Request) -> ParquetRows:
    """Rows of all files that match, sorted by path; a named split keeps the files whose name starts with it.

    Without a split all files count, ``default_split`` or not. The image column is the first struct with a
    binary field ``bytes``, or else the first binary column; the label column is ``label``, ``labels``,
    ``fine_label`` or ``class``, or else the only integer one. Class names come from the ``huggingface``
    metadata, or are the numbers up to the highest label of all files. Shards beyond the selection are not
    opened, except for their labels in that last case.
    """
    import pyarrow.parquet as pq

    files = _files(request)
    schema = pq.read_schema(files[0])
    image, field = _image_column(request, schema)
    label = _label_column(request, schema)
    classes = _class_names(schema, label) or _count_classes(request, files, label)
    pieces = tuple(_pieces(files, request.spec.start or 0, request.spec.stop))
    return ParquetRows(pieces=pieces, image_column=image, image_field=field, label_column=label, classes=classes)


def _files(request: Request) -> list[Path]:
    pattern, split = request.path, request.spec.split
    literal = Path(pattern).is_file()  # a name that happens to hold brackets
    names = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - may be absolute
    found = [path for path in map(Path, names) if path.is_file()]
    if not found:
        where = f"{pattern!r} from {Path.cwd()}"
        raise DatasetError(f"{request.spec}: no file matches {where}{selection_hint(pattern)}")
    kept = [path for path in found if split is None or path.name.startswith(split)]
    if not kept:
        seen = ", ".join(path.name for path in found[:5]) + (", ..." if len(found) > 5 else "")
        raise DatasetError(f"{request.spec}: no matching file has a name that starts with {split!r}: {seen}")
    return kept


def _image_column(request: Request, schema: Any) -> tuple[str, str | None]:
    import pyarrow.types as pt

    def is_bytes(kind: Any) -> bool:
        return bool(pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind))

    for column in schema:
        fields = list(column.type) if pt.is_struct(column.type) else []
        if any(field.name == "bytes" and is_bytes(field.type) for field in fields):
            return column.name, "bytes"
    for column in schema:
        if is_bytes(column.type):
            return column.name, None
    allowed = "a struct with a binary field 'bytes', or a binary column"
    raise DatasetError(f"{request.spec}: no image column among {_describe(schema)}; allowed are {allowed}")


def _label_column(request: Request, schema: Any) -> str:
    import pyarrow.types as pt

    integers = [column.name for column in schema if pt.is_integer(column.type)]
    named = [name for name in LABEL_NAMES if name in integers]
    if named or len(integers) == 1:
        return str((named or integers)[0])
    allowed = f"an integer column named {', '.join(LABEL_NAMES)}, or a single integer column"
    raise DatasetError(f"{request.spec}: no label column among {_describe(schema)}; allowed are {allowed}")


def _describe(schema: Any) -> str:
    return ", ".join(f"{column.name} ({column.type})" for column in schema)


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):  # written by something else
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _count_classes(request: Request, files: list[Path], label: str) -> tuple[str, ...]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    highest = [pc.max(pq.ParquetFile(path).read(columns=[label])[label]).as_py() for path in files]
    return numbered_classes(max((top for top in highest if top is not None), default=0), where=str(request.spec))


def _pieces(files: list[Path], start: int, stop: int | None) -> Iterator[_Piece]:
    import pyarrow.parquet as pq

    seen = 0  # rows of the groups before this one, over all files
    for path in files:
        if stop is not None and seen >= stop:
            return
        metadata = pq.read_metadata(path)
        first_row = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            low, high = max(start - seen, 0), rows if stop is None else min(rows, stop - seen)
            if low < high:
                yield _Piece(path=path, group=group, first_row=first_row, start=low, stop=high)
            seen += rows
            first_row += rows
