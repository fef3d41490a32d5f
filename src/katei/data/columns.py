"""Which column is the text and which the label: named by the user, or inferred."""

from __future__ import annotations

from collections.abc import Sequence

from katei.core.errors import DataError, nearest

TEXT_NAMES: tuple[str, ...] = (
    "text",
    "poem",
    "sentence",
    "content",
    "document",
    "review",
    "comment",
    "message",
    "tweet",
    "body",
)
TEXT_NAMES = (*TEXT_NAMES, "テキスト", "本文", "文章", "文", "詩")
LABEL_NAMES: tuple[str, ...] = ("label", "labels", "class", "category", "target", "sentiment", "intent")
LABEL_NAMES = (*LABEL_NAMES, "ラベル", "分類", "クラス", "カテゴリ")

_INDEX_COLUMNS = ("", "__index_level_0__")  # what pandas adds to a CSV and to a parquet file: nobody's text or label


def choose_columns(columns: Sequence[str], *, text: str | None, label: str | None, file: str) -> tuple[str, str]:
    """The text and the label column.

    With two columns, one that is given leaves the other; with none given a usual name decides, else the order
    text, label. With more columns each is given or has the usual name (`text` before its synonyms).
    """
    text, label = _checked(columns, text, "--text", file), _checked(columns, label, "--label", file)
    if text is not None and text == label:
        raise DataError(
            f"the column '{text}' is both text and label", file=file, hint=f"name two columns: {_flags(columns)}"
        )
    named = [c for c in columns if c not in _INDEX_COLUMNS]
    if len(named) < 2:
        raise DataError(
            f"only one column: {_list(named)}; a text and a label column are needed",
            file=file,
            hint=one_column_hint(columns),
        )
    if len(named) == 2:
        if label is None:
            label = (
                _other(named, text)
                or _usual(named, LABEL_NAMES)
                or _other(named, _usual(named, TEXT_NAMES))
                or named[1]
            )
        return text or _other(named, label) or named[0], label
    text = text or _usual([c for c in named if c != label], TEXT_NAMES)
    label = label or _usual([c for c in named if c != text], LABEL_NAMES)
    if text is None or label is None:
        which = " and ".join(name for name, column in (("text", text), ("label", label)) if column is None)
        raise DataError(f"{len(named)} columns: which is the {which}?", file=file, hint=_flags(columns))
    return text, label


def choose_text_column(columns: Sequence[str], *, text: str | None, file: str) -> str:
    """The text column of a table that needs no label: the one given, the only one, or the one with a usual name."""
    if text := _checked(columns, text, "--text", file):
        return text
    named = [c for c in columns if c not in _INDEX_COLUMNS]
    if len(named) == 1 or (len(named) == 2 and not _usual(named, TEXT_NAMES)):
        return _other(named, _usual(named, LABEL_NAMES)) or named[0]
    if found := _usual(named, TEXT_NAMES):
        return found
    raise DataError(f"{len(named)} columns: which is the text?", file=file, hint=_flags(columns, label=False))


def one_column_hint(header: Sequence[str]) -> str:
    """What to do when a header has one field: most often the separator is another than the name of the file says."""
    for separator, name in ((",", "comma"), (";", "semicolon"), ("\t", "tab")):
        if len(header) == 1 and separator in header[0]:
            kind = {"comma": "name the file .csv", "tab": "name the file .tsv"}.get(name, "save it with tabs, as .tsv")
            return f"the header looks separated by {name}s: {kind}"
    return "a .tsv separates its columns by tabs, a .csv by commas; the first line holds their names, such as text and label"


def _checked(columns: Sequence[str], name: str | None, flag: str, file: str) -> str | None:
    if name is None or name in columns:
        return name
    if name.strip() in columns:
        return name.strip()
    raise DataError(f"no column '{name}'", file=file, hint=f"{flag}: {nearest(name, [c for c in columns if c])}")


def _other(columns: Sequence[str], one: str | None) -> str | None:
    """The other of two columns; None without a first, or where `one` is none of them."""
    rest = [c for c in columns if c != one]
    return rest[0] if len(rest) == 1 else None


def _usual(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column with the first of `names`, or the only one with another of them; capitals don't matter."""
    found = [c for c in columns if c.casefold() in names]
    first = [c for c in found if c.casefold() == names[0]]
    return first[0] if len(first) == 1 else found[0] if len(found) == 1 else None


def _flags(columns: Sequence[str], *, label: bool = True) -> str:
    flags = "--text COLUMN and --label COLUMN" if label else "--text COLUMN"
    return f"give {flags}, of these: {_list(columns)}"


def _list(columns: Sequence[str]) -> str:
    return ", ".join(f"'{c}'" for c in columns)
