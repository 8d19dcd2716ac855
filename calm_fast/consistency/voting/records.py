"""Records of a file, whatever holds them: JSON lines, a JSON array, parquet or arrow, plain or compressed."""

from __future__ import annotations

import base64
import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, cast

# first bytes -> name of the compression
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# keys of an object that holds rows, as exports of datasets and of servers name them
_HOLDERS = ("rows", "data", "samples", "results", "instances", "examples")
# what pyarrow's and Python's own readers of a damaged value raise: dates out of range, impossible decimals, zones
_UNREADABLE = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def read_records(file: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for every record of a file, or of a folder with arrow or parquet files.

    place: the file's name and the line or row, for messages.

    Raises:
        ValueError: the file is damaged, not UTF-8, or holds no JSON; the message names the place.
        ImportError: parquet and arrow need pyarrow, zstd needs zstandard.
    """
    path = Path(file)
    if path.is_dir():
        yield from _folder(path)
        return
    with open(path, "rb") as raw:
        start = raw.read(8)
    if start.startswith(b"PAR1"):
        yield from _parquet(path)
    elif start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        yield from _arrow(path)
    else:
        yield from _json(path, next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None))


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _json(path: Path, packing: str | None) -> Iterator[tuple[str, Any]]:
    name, number = path.name, 0
    try:
        with _unpacked(path, packing) as stream:
            # utf-8-sig: some editors write a byte order mark
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig")
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if number == 1 and (whole := _whole(line, lines, name)) is not None:
                    yield from ((f"{name}, row {place}", record) for place, record in enumerate(whole, 1))
                    return
                yield f"{name}, line {number}", _parse(line, f"{name}, line {number}")
    except UnicodeDecodeError as problem:
        raise ValueError(
            f"{name}, after line {number}: the text must be UTF-8, got other bytes ({problem.reason})"
        ) from problem
    except _DAMAGED as problem:
        raise ValueError(
            f"{name}, after line {number}: the file must be complete {packing}, got a damaged one ({problem})"
        ) from problem
    except OSError as problem:
        if packing != "bzip2" or problem.errno is not None:  # bz2 knows damage by its message alone
            raise
        raise ValueError(
            f"{name}, after line {number}: the file must be complete bzip2, got a damaged one ({problem})"
        ) from problem


def _unpacked(path: Path, packing: str | None) -> IO[bytes]:
    if packing == "gzip":
        return cast(IO[bytes], gzip.open(path))
    if packing == "bzip2":
        return cast(IO[bytes], bz2.open(path))
    if packing == "xz":
        return cast(IO[bytes], lzma.open(path))
    if packing == "zstd":
        return _zstd(path)
    return open(path, "rb")


def _zstd(path: Path) -> IO[bytes]:
    zstandard = _package("zstandard", "zstd")
    packed, content = path.read_bytes(), io.BytesIO()
    try:
        while packed:
            frame = zstandard.ZstdDecompressor().decompressobj()
            content.write(frame.decompress(packed))
            if not frame.eof:
                raise EOFError("it ends within a frame")
            packed = frame.unused_data
    except (zstandard.ZstdError, EOFError) as problem:
        raise ValueError(f"{path.name}: the file must be complete zstd, got a damaged one ({problem})") from problem
    content.seek(0)
    return content


def _whole(first: str, rest: IO[str], name: str) -> list[Any] | None:
    """Return the records of a file that is one JSON value over several lines, or an array; None for JSON lines.

    Nothing of `rest` is read where the first line is a JSON object.
    """
    if not first.lstrip().startswith(("[", "{")):
        return None
    try:
        value = json.loads(first)
    except RecursionError:
        return None
    except ValueError:
        # a value that begins on the first line: only then is that line as short as an opening
        if len(first.strip()) > 200 and not first.lstrip().startswith("["):
            return None
        try:
            value = json.loads(first + rest.read())
        except RecursionError:
            return None
        except ValueError as problem:
            raise ValueError(f"{name}, line 1: a row must be JSON, got something else ({problem})") from problem
    if isinstance(value, list):
        return value
    held = next((value[key] for key in _HOLDERS if isinstance(value.get(key), list)), None)
    if held is not None and held and all(isinstance(row, dict) for row in held) and "question" not in value:
        # the server that shows datasets wraps each row
        return [row["row"] if set(row) >= {"row_idx", "row"} else row for row in held]
    return None


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{where}: a row must be JSON, got something else ({problem})") from problem


def _package(name: str, form: str) -> Any:
    """Import an optional package; ImportError says which file form needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        package = name.split(".")[0]
        raise ImportError(
            f"a {form} file needs the package {package} ({problem}): pip install {package}", name=package
        ) from problem


# ---- arrow ----------------------------------------------------------------------------------------------------------


def _folder(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a saved dataset: its arrow files, else its parquet files, in the order of their names."""
    for pattern, reader in (("**/*.arrow", _arrow), ("**/*.parquet", _parquet), ("**/*.jsonl*", read_records)):
        files = sorted(file for file in path.glob(pattern) if not file.name.startswith("cache-"))
        if files:
            for file in files:
                yield from reader(file)
            return
    raise ValueError(f"{path.name}: the folder must have files *.arrow, *.parquet or *.jsonl, got none")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    parquet = _package("pyarrow.parquet", "parquet")
    yield from _table(path, "parquet", lambda stream: parquet.ParquetFile(stream).iter_batches(batch_size=1024))


def _arrow(path: Path) -> Iterator[tuple[str, Any]]:
    ipc = _package("pyarrow.ipc", "arrow")

    def batches(stream: IO[bytes]) -> Iterator[Any]:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if not is_file:
            return iter(ipc.open_stream(stream))
        reader = ipc.open_file(stream)
        return (reader.get_batch(i) for i in range(reader.num_record_batches))

    yield from _table(path, "arrow", batches)


def _table(path: Path, form: str, batches: Callable[[IO[bytes]], Iterator[Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file's record batches."""
    arrow = _package("pyarrow", form)
    number = 0
    try:
        with open(path, "rb") as stream:
            for batch in batches(stream):
                # unchecked, damaged offsets would be read past the end of their buffers
                batch.validate(full=True)
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", _as_json(record)
    except (arrow.ArrowException, *_UNREADABLE) as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise ValueError(f"{path.name}: the file must be complete {form}, got a damaged one ({reason})") from problem


def _as_json(value: Any) -> Any:
    """Return a value of a table as JSON has it, so that rows can be written again; bytes are no text."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner) for inner in value]
    if isinstance(value, Decimal):
        number = float(value)
        return number if Decimal(str(number)) == value else format(value, "f")
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    return str(value)
