"""Reference points: what a tuned method must beat to be worth its tuning, on the same rows, folds and seeds.

    majority class   the commonest label of a part's training rows
    tf-idf           TF-IDF of character 1- to 4-grams and of words → logistic regression; C by cross-validation inside the training rows
    zero-shot        the frozen base, untrained: log p(label | "Text: … Label:") per token, softmax over the labels

    texts, labels, parts → reference_outcomes → Reference(name, probabilities of each part's test rows, note)

The head alone on the frozen base is trained like any method (`head`); only its name makes it a reference.

Dimensions: E rows · C classes · T tokens · D width · V vocabulary.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from katei.base.packed import Base
from katei.base.stream import PackedRow, passes
from katei.methods.head_only import HeadOnlyStack
from katei.ship.generate import prompt_ids
from katei.ship.models import capped
from katei.study.comparison import MAJORITY, TFIDF, ZERO_SHOT

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

Floats = NDArray[np.float64]

C_GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)
CV_FOLDS = 5


@dataclass(frozen=True)
class Part:
    """One fit: which rows are learned from, and which are answered. Indices into the texts."""

    repeat: int | None
    fold: int | None
    seed: int
    train: Sequence[int]
    test: Sequence[int]


@dataclass(frozen=True)
class LanguageModel:
    """A frozen base and what maps its (T, D) hidden states to (T, V) scores."""

    base: Base
    lm_head: Any


@dataclass(frozen=True)
class Reference:
    """One reference point's answers: (E, C) for each part, in the order of its test rows; None where it was left out."""

    name: str
    probabilities: tuple[Floats, ...] | None
    note: str


def reference_outcomes(
    names: Sequence[str],
    texts: Sequence[str],
    labels: Sequence[int],
    label_names: Sequence[str],
    parts: Sequence[Part],
    open_model: Callable[[], LanguageModel],
    *,
    max_length: int = 200,
    token_budget: int = 1024,
) -> list[Reference]:
    """Those of the reference points in `names` that are no methods, on every part. `open_model` is called if zero-shot needs it."""
    found = []
    if MAJORITY in names:
        found.append(majority(labels, len(label_names), parts))
    if TFIDF in names:
        found.append(tfidf(texts, labels, len(label_names), parts))
    if ZERO_SHOT in names:
        found.append(zero_shot(open_model, texts, label_names, parts, max_length, token_budget))
    return found


# -------------------------------------------------------------------- majority class


def majority(labels: Sequence[int], classes: int, parts: Sequence[Part]) -> Reference:
    """The training rows' shares of each label as the probabilities of every row."""
    label_E = np.asarray(labels)
    share = [np.bincount(label_E[list(p.train)], minlength=classes) / len(p.train) for p in parts]
    note = "answers the commonest label of the training rows; its probabilities are the labels' shares there"
    return Reference(MAJORITY, tuple(np.tile(s, (len(p.test), 1)) for s, p in zip(share, parts, strict=True)), note)


# -------------------------------------------------------------------- TF-IDF + logistic regression


def tfidf_pipeline(seed: int) -> Pipeline:
    """Character n-grams know Japanese, whose words have no spaces between them; words help where there are."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    features = make_union(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True),
        TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True),
    )
    return make_pipeline(features, LogisticRegression(max_iter=5000, random_state=seed))


def tfidf(texts: Sequence[str], labels: Sequence[int], classes: int, parts: Sequence[Part]) -> Reference:
    label_E = np.asarray(labels)
    answers, chosen = [], []
    for part in parts:
        train_y = label_E[list(part.train)]
        probability_EC = np.zeros((len(part.test), classes))
        known = np.unique(train_y)
        if len(known) == 1:  # nothing to tell apart
            probability_EC[:, known[0]] = 1.0
        else:
            model, c = _fit(texts, part, train_y)
            probability_EC[:, known] = model.predict_proba([texts[i] for i in part.test])
            chosen.append(c)
        answers.append(probability_EC)
    values = ", ".join(f"{c:g}" for c in sorted({c for c in chosen if c is not None}))
    how = f"C by cross-validation inside the training rows: {values}" if values else "C = 1: too few rows to choose it"
    note = f"character 1- to 4-grams and words, logistic regression; {how}"
    return Reference(TFIDF, tuple(answers), note)


def _fit(texts: Sequence[str], part: Part, train_y: NDArray[np.int_]) -> tuple[Any, float | None]:
    """The fitted pipeline, and the C that was chosen; None where a class has a single row, so that nothing can be held out."""
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    pipeline, train_x = tfidf_pipeline(part.seed), [texts[i] for i in part.train]
    folds = min(CV_FOLDS, int(np.bincount(train_y)[np.unique(train_y)].min()))
    if folds < 2:
        return pipeline.fit(train_x, train_y), None
    search = GridSearchCV(
        pipeline,
        {"logisticregression__C": C_GRID},
        scoring="neg_log_loss",
        cv=StratifiedKFold(folds, shuffle=True, random_state=part.seed),
    ).fit(train_x, train_y)
    return search.best_estimator_, float(search.best_params_["logisticregression__C"])


# -------------------------------------------------------------------- zero-shot

NUMBERED = re.compile(r"(label|class|category|group|type|クラス|ラベル)?[\W_]*\d*", re.IGNORECASE)
PROMPTS = {"en": ("Text: {text}\nLabel:", " {label}"), "ja": ("文章：{text}\n分類：", "{label}")}
"""A prompt, and how a label goes on."""


def says_something(label: str) -> bool:
    """A label with a meaning of its own: not 0, A or class_1."""
    letters = [letter for letter in label if letter.isalpha()]
    return not NUMBERED.fullmatch(label.strip()) and (len(letters) > 1 or any(not x.isascii() for x in letters))


def mute_labels(label_names: Sequence[str]) -> list[str]:
    """Those that leave zero-shot out."""
    return [name for name in label_names if not says_something(name)]


def prompt_language(label_names: Sequence[str]) -> str:
    """Japanese where a label is written with kana or kanji."""
    letters = (unicodedata.name(letter, "") for label in label_names for letter in label)
    return "ja" if any(name.startswith(("HIRAGANA", "KATAKANA", "CJK")) for name in letters) else "en"


def zero_shot(
    open_model: Callable[[], LanguageModel],
    texts: Sequence[str],
    label_names: Sequence[str],
    parts: Sequence[Part],
    max_length: int = 200,
    token_budget: int = 1024,
) -> Reference:
    """The base's own opinion of each label. It learns nothing, so each row is scored once, whatever parts it is in."""
    mute = mute_labels(label_names)
    if mute:
        named = ", ".join(f"'{name}'" for name in mute)
        note = f"left out: a base that was told nothing cannot know what {named} {'mean' if len(mute) > 1 else 'means'}"
        return Reference(ZERO_SHOT, None, note)
    rows = sorted({i for part in parts for i in part.test})
    score_EC = label_log_probabilities(open_model(), [texts[i] for i in rows], label_names, max_length, token_budget)
    power_EC = np.exp(score_EC - score_EC.max(1, keepdims=True))
    probability = dict(zip(rows, power_EC / power_EC.sum(1, keepdims=True), strict=True))
    prompt, _ = PROMPTS[prompt_language(label_names)]
    shown = prompt.replace("\n", " ⏎ ").format(text="…")
    note = f"the untrained base: each label's mean log-probability per token behind “{shown}”"
    return Reference(ZERO_SHOT, tuple(np.array([probability[i] for i in part.test]) for part in parts), note)


def label_log_probabilities(
    model: LanguageModel,
    texts: Sequence[str],
    label_names: Sequence[str],
    max_length: int = 200,
    token_budget: int = 1024,
) -> Floats:
    """Mean log-probability per token of every label as the continuation of every text's prompt: (E, C)."""
    wanted = [_continuations(model.base, text, label_names, max_length) for text in texts]
    # the last token is judged, not read: labels of one token share one row
    inputs = list(dict.fromkeys(tuple(ids[:-1]) for sequences, _ in wanted for ids in sequences))
    places: dict[tuple[int, ...], dict[int, dict[int, float]]] = {ids: {} for ids in inputs}
    for sequences, start in wanted:
        for ids in sequences:
            for t in range(start, len(ids)):
                places[tuple(ids[:-1])].setdefault(t, {})[ids[t]] = np.nan
    for rows in passes([len(ids) for ids in inputs], token_budget):
        _judge(model, [inputs[r] for r in rows], places)
    return np.array(
        [
            [np.mean([places[tuple(ids[:-1])][t][ids[t]] for t in range(start, len(ids))]) for ids in sequences]
            for sequences, start in wanted
        ]
    )


JUDGED = 32
"""Tokens at once: each has a score for every token of the vocabulary, a quarter of a million in some."""


def _judge(
    model: LanguageModel, inputs: Sequence[tuple[int, ...]], places: dict[tuple[int, ...], dict[int, dict[int, float]]]
) -> None:
    """Fill in the log-probability of each wanted (position, token) of one pass; position t is judged by what stands before it."""
    base, stacks = model.base, [HeadOnlyStack(model.base, 2, [0])]
    stream = base.stream([PackedRow(0, 0, ids) for ids in inputs], stacks, trunks=False)
    starts = np.cumsum([0, *(len(ids) for ids in inputs)])
    asked = [(ids, t, int(first) + t - 1) for ids, first in zip(inputs, starts, strict=False) for t in places[ids]]
    with torch.no_grad(), base.running(stream, stacks):
        h_TD = base.hidden_at(stream, stacks, [base.depth])[base.depth]
        h_TD = base.norm(h_TD[[place for _, _, place in asked]][None])[0]
        for start in range(0, len(asked), JUDGED):
            score_TV = capped(base.config, model.lm_head(h_TD[start : start + JUDGED]).float())
            for (ids, t, _), score_V in zip(asked[start : start + JUDGED], score_TV, strict=True):
                log_p_V = torch.log_softmax(score_V.double(), 0)
                for token in places[ids][t]:
                    places[ids][t][token] = float(log_p_V[token])


def _continuations(base: Base, text: str, label_names: Sequence[str], max_length: int) -> tuple[list[list[int]], int]:
    """Tokens of the prompt with each label behind it, and where the labels begin: at the first token that is not the prompt's alone."""
    prompt, behind = PROMPTS[prompt_language(label_names)]
    cut = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(cut) > max_length:
        text = base.tokenizer.decode(cut[:max_length])
    before = prompt.format(text=text)
    alone = prompt_ids(base, before)
    sequences = [prompt_ids(base, before + behind.format(label=label)) for label in label_names]
    # a tokenizer may join the prompt's end to a label's first letters
    start = min(
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, ids, strict=False))) for ids in sequences
    )
    return sequences, max(start, 1)
