"""Rows of parquet files."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import DataError
from data_prep.inputs import open_input
from data_prep.readers import Job, Malformed, Rows, Where, naming_damage, too_long

PARQUET_ROWS, BATCH_BYTES = 64, 8 << 20


def read_parquet(job: Job) -> Iterator[Rows]:
    number = 0
    with naming_damage(lambda: Where(job.path, "row", number), also=(pa.ArrowException,)), open_input(job.path) as stream:
        parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        _check_column(job.path, schema=parquet.schema_arrow, field=job.field)
        columns = [job.field, *(name for name in job.fields or () if name != job.field and name in parquet.schema_arrow.names)]
        job.counts.rows += parquet.metadata.num_rows
        for batch in parquet.iter_batches(batch_size=_rows_at_once(parquet), columns=columns):
            raws = list(zip(*(batch.column(name) for name in columns), strict=True))
            yield job.collect(raws, first=number + 1, unit="row", parse=functools.partial(_parquet_row, job, columns))
            number += len(raws)
        if number != parquet.metadata.num_rows:
            raise EOFError(f"its footer promises {parquet.metadata.num_rows:,} rows")


def _parquet_row(job: Job, columns: Sequence[str], values: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    buffer = values[0].as_buffer() if hasattr(values[0], "as_buffer") else None
    if buffer is not None and buffer.size > job.max_bytes:
        raise too_long(buffer.size, max_bytes=job.max_bytes)
    try:
        text, *others = (value.as_py() for value in values)
    except UnicodeDecodeError as error:
        raise Malformed(f"is not valid UTF-8: {error.reason} at byte {error.start}") from error
    if text is None:
        raise Malformed(f"has null in '{job.field}'; the rule is a string")
    if len(text) > job.max_bytes:
        raise too_long(len(text), max_bytes=job.max_bytes)
    return str(text), dict(zip(columns[1:], others, strict=True))


def _rows_at_once(parquet: pq.ParquetFile) -> int:
    """So that a batch stays small where rows are large, by what the footer says of them."""
    groups = [parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1.0)
    return max(1, min(PARQUET_ROWS, int(BATCH_BYTES / max(1.0, largest))))


def _check_column(path: str, *, schema: pa.Schema, field: str) -> None:
    if field not in schema.names:
        raise DataError(f"{path} has no column '{field}'; it has {', '.join(schema.names)}; set the source's text_field")
    kind = schema.field(field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{path}: column '{field}' holds {kind}; documents are strings; set the source's text_field")
