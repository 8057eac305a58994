"""A checksum of all rows of a data set: of their content, however it lies in memory or on disk."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset

# Rows are hashed in blocks of a fixed size, so that the chunks of a file do not matter. A million rows of prompt and
# completion, 121 bytes each, took 0.2 s on one busy core from memory, 0.7 s from files, 1.2 s from shuffled files.
_ROWS = 10_000
_GATHERED_ROWS = 200_000


def data_digest(dataset: Dataset) -> str:
    """Compute a checksum of all rows in order, as a custom transform returns them; columns may be in any order."""
    transformed = dataset.format["type"] == "custom"
    digests: dict[str, xxhash.xxh3_128] = {}
    for rows in dataset.iter(batch_size=_ROWS) if transformed else _arrow_rows(dataset):
        for name, values in rows.items():
            digest = digests.setdefault(name, xxhash.xxh3_128(name.encode()))
            _add_plain(digest, values) if transformed else _add(digest, values)
    return xxhash.xxh3_128(b"".join(digests[name].digest() for name in sorted(digests))).hexdigest()


def _arrow_rows(dataset: Dataset) -> Iterator[Mapping[str, Any]]:
    order = dataset._indices  # noqa: SLF001 - gathering rows one by one, as datasets does, takes 100 times as long
    many = _ROWS if order is None else _GATHERED_ROWS
    for start in range(0, len(dataset), many):
        if order is None:
            table = dataset.with_format("arrow")[start : start + many]
            columns = {name: _array(table.column(name)) for name in dataset.column_names}
        else:
            chosen = _array(order.column(0).slice(start, many))
            columns = {name: _array(dataset.data.column(name).take(chosen)) for name in dataset.column_names}
        for first in range(0, min(many, len(dataset) - start), _ROWS):
            yield {name: column.slice(first, _ROWS) for name, column in columns.items()}


def _array(column: Any) -> Any:
    whole = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _add(digest: "xxhash.xxh3_128", array: Any) -> None:
    """Add the values of an array, not its buffers: bits that no value reads may differ between equal arrays."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    digest.update(len(array).to_bytes(8, "little"))
    if array.null_count:
        digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).data)
    if pa.types.is_struct(kind):
        for field, values in sorted(zip(kind, array.flatten(), strict=True), key=lambda pair: str(pair[0].name)):
            digest.update(field.name.encode())
            _add(digest, values)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _add_numbers(digest, array.value_lengths().fill_null(0))
        _add(digest, array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        _add_texts(digest, array.fill_null("") if array.null_count else array)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        digest.update(str(kind).encode())
        _add_numbers(digest, array.fill_null(0) if array.null_count else array)
    else:
        digest.update(str(kind).encode())
        _add_plain(digest, array.to_pylist())


def _add_texts(digest: "xxhash.xxh3_128", array: Any) -> None:
    _, offsets, characters = array.buffers()
    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    bounds = np.frombuffer(offsets, width)[array.offset : array.offset + len(array) + 1] if len(array) else np.zeros(1)
    digest.update(np.diff(bounds).astype(np.int64).data)
    if characters is not None and len(array):
        digest.update(memoryview(characters)[int(bounds[0]) : int(bounds[-1])])


def _add_numbers(digest: "xxhash.xxh3_128", array: Any) -> None:
    digest.update(np.ascontiguousarray(array.to_numpy(zero_copy_only=False)).data)


def _add_plain(digest: "xxhash.xxh3_128", values: Any) -> None:
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
