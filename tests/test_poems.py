"""The bundled poems: sizes, shape, no copies, and neither too easy nor hopeless for TF-IDF."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import pytest

import katei.data

FOLDER = Path(katei.data.__file__).parent / "poems"
SIZES = {"train": (42, 120), "valid": (16, 38), "test": (16, 38)}
LANGUAGES = ("ja", "en")
LONGEST = {"ja": 60, "en": 90}  # characters in one poem
SHARED = {"ja": 8, "en": 18}  # a run of this many characters...
SHARED_ROWS = 3  # ...stands in at most this many poems

Rows = list[tuple[str, int]]


def read(language: str, split: str) -> Rows:
    """The rows of one file, read as strictly as the format is described."""
    text = (FOLDER / language / f"{split}.tsv").read_bytes().decode("utf-8")
    assert not text.startswith("\ufeff")
    assert "\r" not in text
    assert text.endswith("\n")
    header, *lines = text.removesuffix("\n").split("\n")
    assert header == "poem\tlabel"
    rows: Rows = []
    for line in lines:
        poem, label = line.split("\t")
        assert label in ("0", "1"), line
        rows.append((poem, int(label)))
    return rows


def everything(language: str) -> Rows:
    return [row for split in SIZES for row in read(language, split)]


def bigrams(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text) - 1)}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", SIZES)
def test_sizes(language: str, split: str) -> None:
    counts = Counter(label for _, label in read(language, split))
    assert (counts[0], counts[1]) == SIZES[split]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", SIZES)
def test_rows_are_shuffled(language: str, split: str) -> None:
    labels = [label for _, label in read(language, split)]
    changes = sum(a != b for a, b in pairwise(labels))
    assert changes > len(labels) // 5


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_row_is_one_clean_short_line(language: str) -> None:
    for poem, _ in everything(language):
        assert poem == poem.strip()
        assert 8 <= len(poem) <= LONGEST[language], poem
        assert '"' not in poem, poem
        assert poem.isprintable() or "\u3000" in poem, poem


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_poem_twice_nor_nearly(language: str) -> None:
    """Over all three files at once, so within a split and across splits."""
    poems = [poem for poem, _ in everything(language)]
    assert len(set(poems)) == len(poems)
    sets = [(poem, bigrams(poem)) for poem in poems]
    for (one, a), (other, b) in combinations(sets, 2):
        assert len(a & b) / len(a | b) < 0.5, (one, other)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_template(language: str) -> None:
    """No long run of characters returns in poem after poem."""
    width = SHARED[language]
    seen = Counter(
        piece
        for poem, _ in everything(language)
        for piece in {poem[i : i + width] for i in range(len(poem) - width + 1)}
    )
    assert [piece for piece, rows in seen.items() if rows > SHARED_ROWS] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_tfidf_is_above_the_majority_and_not_perfect(language: str) -> None:
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=3000),
    )
    model.fit(*zip(*read(language, "train"), strict=True))
    accuracy = model.score(*zip(*read(language, "test"), strict=True))
    majority = SIZES["test"][1] / sum(SIZES["test"])
    assert majority < accuracy < 0.95
