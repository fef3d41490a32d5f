"""Small labelled tables in both languages, and studies over them that take a second or two."""

from __future__ import annotations

import random
from pathlib import Path

WARM = ("うみ", "ひかり", "朝の風", "the warm light", "やさしい手", "spring rain", "ありがとう", "a soft song")
COLD = ("氷の塔", "夜", "the iron gate", "影が走る", "cold stone", "砕けた鏡", "no way back", "灰")

EVERY_METHOD = (
    "lora",
    "adalora",
    "prompt-tuning",
    "p-tuning",
    "prefix-tuning",
    "ia3",
    "llama-adapter",
    "head",
    "full",
)


def some_texts(rows: int, *, seed: int = 0, classes: int = 2) -> list[tuple[str, int]]:
    """`rows` (text, class) pairs of 3 to 40 tokens, no two texts alike."""
    rng = random.Random(seed)
    made: dict[str, int] = {}
    while len(made) < rows:
        c = len(made) % classes
        words = (WARM, COLD)[c % 2]
        text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 4))) + ("" if c < 2 else f" {c}")
        made.setdefault(f"{text}。{len(made)}", c)
    return list(made.items())


def write_tsv(path: Path, rows: list[tuple[str, int]], labels: tuple[str, ...] = ("0", "1")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("poem\tlabel\n" + "".join(f"{text}\t{labels[c]}\n" for text, c in rows), encoding="utf-8")
    return path


def data_folder(
    folder: Path, *, train: int = 12, valid: int = 6, test: int = 8, labels: tuple[str, ...] = ("0", "1")
) -> Path:
    """train.tsv, valid.tsv and test.tsv; a split of 0 rows is left out."""
    rows = some_texts(train + valid + test, classes=len(labels))
    for name, count in (("train", train), ("valid", valid), ("test", test)):
        mine, rows = rows[:count], rows[count:]
        if mine:
            write_tsv(folder / f"{name}.tsv", mine, labels)
    return folder
