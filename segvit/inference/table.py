"""The record of a bulk prediction as a Parquet file, which DuckDB, Spark, pandas and others read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from segvit.system.extras import require
from segvit.system.files import atomic_write

__all__ = ["write_parquet"]


def write_parquet(out: Path, place: tuple[int, int], lines: Iterable[Mapping[str, Any]]) -> Path:
    """Write `manifest-RANK-of-RANKS.parquet`, a row for each picture; files of other numbers of ranks go.

    Columns: picture, output, tar and error (string), width and height (int32), pixels (map of class name to
    int64); what a line lacks is null. Bytes of a file's name that are no UTF-8 stand as in JSON, \\udce9.

    Args:
        out: the folder of results.
        place: rank and number of ranks; each writes its own.
        lines: of the record, one for each picture.

    Raises:
        ImportError: pyarrow is not installed; OSError: the file cannot be written.
    """
    arrow: Any = require("pyarrow", extra="parquet")
    parquet: Any = require("pyarrow.parquet", extra="parquet")
    text, size = arrow.string(), arrow.int32()
    schema = arrow.schema(
        [
            ("picture", text),
            ("output", text),
            ("width", size),
            ("height", size),
            ("pixels", arrow.map_(text, arrow.int64())),
            ("tar", text),
            ("error", text),
        ]
    )
    rows = [{**line, "pixels": list(line["pixels"].items()) if "pixels" in line else None} for line in lines]
    columns = {name: [_encodable(row.get(name)) for row in rows] for name in schema.names}
    rank, ranks = place
    path = out / f"manifest-{rank:05d}-of-{ranks:05d}.parquet"
    table = arrow.table(columns, schema=schema)
    atomic_write(path, lambda temporary: parquet.write_table(table, temporary))
    for other in out.glob("manifest-*-of-*.parquet"):
        number, _, count = other.stem.removeprefix("manifest-").partition("-of-")
        if count != f"{ranks:05d}" and number.isdecimal() and int(number) % ranks == rank:
            other.unlink(missing_ok=True)
    return path


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
