"""The formats of prompt files: records, one at a time, and where each of them stands."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_taopd.data.kinds import KNOWN, SUFFIXES
from megatron_taopd.formats.directory import check_fetched
from megatron_taopd.parallel import watchdog

ROWS = 1024  # of a table that are Python's at a time
CHUNK = 1 << 20  # characters of an array that are read at a time

Record = tuple[str, dict[str, Any]]  # where it stands, and what it says


def read_records(path: Path) -> Iterator[Record]:
    """Yield (where it stands, record), one at a time; each of them is a sign of life.

    The name says what a file is: JSON lines, or a JSON array in a .json file that begins with "[";
    Parquet; or a stream of Arrow, as `datasets` writes them.

    Raises:
        ValueError: the file is missing, damaged, of an unknown type or encoding; a record is no
            JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; prompts are read from {KNOWN}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: unknown type; {KNOWN} are read")
    try:
        check_fetched(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    read = {".parquet": _read_parquet, ".arrow": _read_arrow}.get(path.suffix, _read_json)
    for record in read(path):
        watchdog.heartbeat()
        yield record


def _read_json(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with _open_bytes(path) as file:
            start = file.peek(256).removeprefix(BOM_UTF8)
            if encoding := _utf16(start):
                raise ValueError(
                    f"{path} line 1: {encoding}; files are UTF-8: iconv -f {encoding} -t UTF-8"
                )
            if start.lstrip()[:1] == b"[" and ".json" in path.suffixes:
                yield from _read_array(path, file)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield where, _parse_line(line.removeprefix(BOM_UTF8), where)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: cannot be read after line {number}: {error}; fetch the file again"
        ) from None


def _open_bytes(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _utf16(start: bytes) -> str | None:
    """Name the encoding of text that is UTF-16: by its mark, or by the zeros beside ASCII."""
    if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        return "UTF-16"
    if start[1:2] == b"\0":
        return "UTF-16LE"
    return "UTF-16BE" if start[:1] == b"\0" else None


def _read_array(path: Path, file: Any) -> Iterator[Record]:
    """Yield the elements of an array without holding all of them."""
    text, read, decode = io.TextIOWrapper(file, "utf-8-sig"), CHUNK, json.JSONDecoder().raw_decode
    number, place, buffer = 1, 1, ""
    try:
        buffer = text.read(CHUNK).lstrip()
        while True:
            place = re.compile(r"[\s,]*").match(buffer, place).end()  # type: ignore[union-attr]
            if buffer[place : place + 1] == "]":
                break
            where = f"{path} row {number}"
            try:
                record, place = decode(buffer, place)
            except (ValueError, RecursionError) as error:
                if not (more := text.read(read)):
                    reason = getattr(error, "msg", None) or str(error)
                    whole = buffer.rstrip().endswith("]")
                    cut = "" if whole else "; the array has no end: fetch the file again"
                    raise ValueError(f"{where}: not JSON ({reason}){cut}") from None
                buffer, place, read = buffer[place:] + more, 0, 2 * read  # a long one, or no JSON
                continue
            yield where, _as_object(record, where, "each element of the array")
            number, read = number + 1, CHUNK
        if buffer[place + 1 :].strip() or text.read(CHUNK).strip():
            raise ValueError(f"{path}: there is more behind its array of {number - 1} records")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} row {number} or later: {_not_utf8(error)}") from None


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {_not_utf8(error)}") from None
    except (ValueError, RecursionError) as error:  # not JSON, or too deep or long for it
        reason = getattr(error, "msg", None) or str(error)
        raise ValueError(f"{where}: not JSON ({reason}); each line is a JSON object") from None
    return _as_object(record, where, "each line")


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return (
        f"not JSON ({error.reason} 0x{byte:02x}); files are UTF-8: iconv -f LATIN1 -t UTF-8 "
        "converts one of Latin-1"
    )


def _as_object(record: Any, where: str, what: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {json.dumps(record)[:40]!r}; {what} is a JSON object")
    return record


def _read_parquet(path: Path) -> Iterator[Record]:
    # Loading it takes a while, and most files are JSON.
    import pyarrow.parquet as pq

    return _rows(path, lambda: pq.ParquetFile(path).iter_batches(batch_size=ROWS))


def _read_arrow(path: Path) -> Iterator[Record]:
    import pyarrow as pa  # as above

    return _rows(path, lambda: pa.ipc.open_stream(pa.memory_map(str(path))))


def _rows(path: Path, open_tables: Any) -> Iterator[Record]:
    import pyarrow as pa  # as above

    row = 0
    try:
        for table in open_tables():
            for start in range(0, table.num_rows, ROWS):
                for record in table.slice(start, ROWS).to_pylist():
                    row += 1
                    yield f"{path} row {row}", record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: cannot be read after row {row}: {reason}; fetch the file again"
        ) from None


def content_of(files: Sequence[Path]) -> tuple[int, str]:
    """Return the bytes of files together, and the SHA-256 of what is in them, in hexadecimal.

    Of several files it is that of their own sums, one after the other.

    Raises:
        ValueError: a file cannot be read.
    """
    size, sums = 0, []
    with watchdog.file_io():
        for path in files:
            try:
                with open(path, "rb") as file:
                    sums.append(hashlib.file_digest(file, "sha256").hexdigest())
                    size += file.tell()
            except OSError as error:
                raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    together = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    return size, together
