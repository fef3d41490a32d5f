"""A file's bytes → lines of text, and what a user is told when the file is missing, shut or something else."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO

from katei.core.errors import DataError

_OTHER_FORMATS = (
    (b"\x1f\x8b", "compressed with gzip", "unpack it first: gunzip < FILE > NEW"),
    (b"PK\x03\x04", "a zip file or a spreadsheet", "unpack it, or save the sheet as CSV UTF-8"),
    (b"PAR1", "a parquet file", "name it .parquet"),
    (b"%PDF-", "a PDF", "give a table: .tsv, .csv, .jsonl or .parquet"),
    (b"SQLite format 3", "an SQLite database", "give a table: .tsv, .csv, .jsonl or .parquet"),
    (b"\xff\xfe", "UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8 FILE > NEW, or save it as UTF-8"),
    (b"\xfe\xff", "UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8 FILE > NEW, or save it as UTF-8"),
    (b"version https://git-lfs.github.com", "a pointer of Git LFS, not the data", "git lfs pull"),
    (b"<!doctype html", "a web page, not a table", "download the raw file"),
    (b"<!DOCTYPE html", "a web page, not a table", "download the raw file"),
    (b"<html", "a web page, not a table", "download the raw file"),
)


BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"


def lines_of(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without their LF and without the blank ones at the end."""
    return list(_lines(path, iter([path.read_bytes()])))


def stream_lines(path: Path) -> Iterator[str]:
    """The same lines and the same errors, in constant memory: a block's are checked before its first is given."""
    return _lines(path, _blocks(path))


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def lines_from(file: IO[bytes], name: Path) -> Iterator[str]:
    """The lines of a pipe, each as soon as it is there; errors call it `name`."""
    return _lines(name, iter(lambda: file.read1(BLOCK), b""))  # type: ignore[attr-defined]


def _lines(path: Path, blocks: Iterator[bytes]) -> Iterator[str]:
    done = 0  # lines given or held back
    rest = b""
    blank: list[str] = []  # held back: those at the end of the file are no rows
    found = False
    for block in chain(blocks, [None]):  # None: the end
        content = rest if block is None else rest + block
        if not done:
            content = content.removeprefix(_BOM)
            for magic, what, hint in _OTHER_FORMATS:
                if content.startswith(magic):
                    raise DataError(what, file=path, row=1, hint=to_type(hint, path))
        # cut behind the last line break, which is never half a character
        end = len(content) if block is None else content.rfind(b"\n") + 1
        rest = content[end:]
        if block is not None and not end:
            continue
        lines = _decoded(path, content[:end], done).split("\n")
        if block is not None:
            lines.pop()  # behind the last line break
        done += len(lines)
        for line in lines:
            if line and not line.isspace():
                yield from blank
                blank.clear()
                found = True
                yield line
            else:
                blank.append(line)
    if not found:
        raise empty_file(path)


def _decoded(path: Path, content: bytes, done: int) -> str:
    """Some whole lines as text; `done` stand before them."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        row = done + content.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8: byte 0x{content[error.start]:02x}"
        hint = f"save it as UTF-8, or: iconv -f {_encoding(content)} -t UTF-8 FILE > NEW"
        raise DataError(what, file=path, row=row, hint=to_type(hint, path)) from None
    if "\0" in text:
        row = done + text.count("\n", 0, text.index("\0")) + 1
        raise DataError("a NUL character: binary, or UTF-16", file=path, row=row, hint="save it as text in UTF-8")
    return text


def _encoding(content: bytes) -> str:
    """A guess: a Japanese encoding where it gives kana, else the western one."""
    for name in ("euc_jp", "cp932"):
        try:
            if re.search("[ぁ-んァ-ヶ]", content.decode(name)):
                return {"euc_jp": "EUC-JP", "cp932": "CP932"}[name]
        except UnicodeDecodeError:
            pass
    return "WINDOWS-1252"


def to_type(hint: str, path: Path) -> str:
    """A hint with the path in the place of FILE, ready for a shell."""
    return hint.replace("FILE", shlex.quote(str(path)))


def carriage_return(path: Path, row: int) -> DataError:
    hint = "lines must end in LF or CRLF; of an old Mac file, tr '\\r' '\\n' < FILE > NEW makes one"
    return DataError("a carriage return that ends no line", file=path, row=row, hint=to_type(hint, path))


def empty_file(path: Path) -> DataError:
    return DataError("the file is empty", file=path, hint="give a table with a header line and one row a text")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system refuses, as a DataError."""
    try:
        yield
    except PermissionError:
        hint = to_type("chmod u+r FILE, or copy it to where you may read", path)
        raise DataError("no permission to read it", file=path, hint=hint) from None
    except FileNotFoundError:
        raise not_found(path) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot be read: {reason}", file=path, hint="check the path and the disk") from None


def user_path(name: str | Path) -> Path:
    """The path a user typed, with ~ resolved where there is such a home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def not_found(path: Path, more: str = "") -> DataError:
    """No such file: with the names beside it that are nearest."""
    what, parent = "no such file or folder", path.parent
    if not parent.is_dir():
        return DataError(what, file=path, hint=f"there is no folder {parent} either; {more}".rstrip(" ;"))
    try:
        names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".") and entry.name != path.name]
    except OSError:
        names = []
    likeness = {name: difflib.SequenceMatcher(None, path.name.lower(), name.lower()).ratio() for name in names}
    close = sorted((name for name in names if likeness[name] > 0.6), key=lambda name: -likeness[name])[:3]
    guess = f"did you mean {' or '.join(str(parent / name) for name in close)}?" if close else "check the path;"
    return DataError(what, file=path, hint=f"{guess} {more}".rstrip(" ;"))
