"""Reference points against the libraries by hand: scikit-learn without a pipeline, transformers' full forward row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from transformers import AutoModelForCausalLM, AutoTokenizer

from katei.base.load import load_causal_lm
from katei.base.packed import Base
from katei.base.quiet import quiet
from katei.study.references import (
    C_GRID,
    PROMPTS,
    LanguageModel,
    Part,
    label_log_probabilities,
    majority,
    prompt_language,
    reference_outcomes,
    says_something,
    tfidf,
    zero_shot,
)
from tests.helpers.rows import some_texts
from tests.helpers.tiny import tiny_base_folder

TEXTS, LABELS = zip(*some_texts(40, seed=5), strict=True)
PARTS = [
    Part(
        0, fold, seed=fold, train=[i for i in range(40) if i % 4 != fold], test=[i for i in range(40) if i % 4 == fold]
    )
    for fold in (0, 3)
]


def language_model(folder: Path) -> LanguageModel:
    loaded = load_causal_lm(str(folder))
    return LanguageModel(Base(loaded.model.base_model, loaded.tokenizer), loaded.model.get_output_embeddings())


def test_majority_class_answers_the_training_rows_shares() -> None:
    part = Part(None, None, 0, train=[0, 1, 2, 4, 6], test=[3, 5])
    found = majority([0, 1, 0, 1, 0, 1, 0], 3, [part])
    assert found.probabilities is not None
    assert found.probabilities[0].tolist() == [[0.8, 0.2, 0.0]] * 2


def test_tfidf_is_scikit_learn_by_hand() -> None:
    """C is chosen by the mean held-out log loss, with the vocabulary made anew inside each fold."""
    y = np.array(LABELS)
    x = [text[:9] for text in TEXTS]  # what tells the classes apart is cut short, so that C matters

    def answers(train: list[int], test: list[int], c: float, seed: int) -> np.ndarray:
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
        words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
        train_x = hstack([v.fit_transform([x[i] for i in train]) for v in (characters, words)])
        test_x = hstack([v.transform([x[i] for i in test]) for v in (characters, words)])
        model = LogisticRegression(C=c, max_iter=5000, random_state=seed).fit(train_x, y[train])
        return np.asarray(model.predict_proba(test_x))

    found = tfidf(x, LABELS, 2, PARTS)
    assert found.probabilities is not None
    chosen = []
    for part, probability_EC in zip(PARTS, found.probabilities, strict=True):
        train = np.array(part.train)
        losses = {}
        for c in C_GRID:
            split = StratifiedKFold(5, shuffle=True, random_state=part.seed).split(train, y[train])
            inside = [
                log_loss(y[train[b]], answers(list(train[a]), list(train[b]), c, part.seed), labels=[0, 1])
                for a, b in split
            ]
            losses[c] = np.mean(inside)
        best = min(losses, key=lambda c: losses[c])
        chosen.append(best)
        np.testing.assert_allclose(
            probability_EC, answers(list(train), list(part.test), best, part.seed), rtol=0, atol=1e-9
        )
    assert len(set(losses.values())) == len(C_GRID)
    assert all(f"{c:g}" in found.note for c in chosen)


def test_tfidf_reads_japanese() -> None:
    """Words alone would see each text as one unknown word."""
    warm = ["春の風が吹く朝", "春の海を歩く", "春の日の庭", "やさしい春の夜", "春を待つ人", "遠い春の声"]
    cold = ["冬の氷の塔", "冬の夜の灰", "砕けた冬の鏡", "冬に閉ざす門", "凍る冬の川", "冬の影が走る"]
    part = Part(None, None, 0, train=[0, 1, 2, 3, 6, 7, 8, 9], test=[4, 5, 10, 11])
    found = tfidf([*warm, *cold], [1] * 6 + [0] * 6, 2, [part])
    assert found.probabilities is not None
    assert found.probabilities[0].argmax(1).tolist() == [1, 1, 0, 0]


def test_tfidf_on_too_few_rows_says_what_it_did() -> None:
    single = tfidf(["ab", "cd", "ce"], [0, 1, 1], 3, [Part(None, None, 0, [0, 1, 2], [0])])
    assert single.probabilities is not None
    assert "C = 1" in single.note
    assert single.probabilities[0][0, 2] == 0
    assert single.probabilities[0].sum() == pytest.approx(1)
    one_class = tfidf(["ab", "cd"], [1, 1], 2, [Part(None, None, 0, [0, 1], [0])])
    assert one_class.probabilities is not None
    assert one_class.probabilities[0].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("names", [("warm and soft", "iron"), ("暖かい", "冷たい", "普通")])
def test_zero_shot_is_transformers_row_by_row(tmp_path: Path, architecture: str, names: tuple[str, ...]) -> None:
    folder = tiny_base_folder(tmp_path, architecture)
    texts = [*TEXTS[:5], "朝", "the iron {label} gate " * 6]
    found = label_log_probabilities(language_model(folder), texts, names, token_budget=150)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, behind = PROMPTS["ja" if "暖かい" in names else "en"]
    for text, scores in zip(texts, found, strict=True):
        for name, score in zip(names, scores, strict=True):
            before = tokenizer(prompt.replace("{text}", text), return_tensors="pt")["input_ids"]
            whole = tokenizer(prompt.replace("{text}", text) + behind.replace("{label}", name), return_tensors="pt")[
                "input_ids"
            ]
            assert whole[0, : before.shape[1]].equal(before[0]), "this tokenizer does not join across the boundary"
            with torch.no_grad():
                log_p = torch.log_softmax(model(whole).logits[0], 1)
            own = [log_p[t - 1, whole[0, t]].item() for t in range(before.shape[1], whole.shape[1])]
            assert score == pytest.approx(np.mean(own), abs=2e-5)


def test_a_text_too_long_is_cut(tmp_path: Path) -> None:
    model = language_model(tiny_base_folder(tmp_path))
    long, short = (
        "the gate " * 300,
        model.base.tokenizer.decode(
            model.base.tokenizer("the gate " * 300, add_special_tokens=False)["input_ids"][:20]
        ),
    )
    found = label_log_probabilities(model, [long, short], ["warm", "cold"], max_length=20)
    assert found[0].tolist() == pytest.approx(found[1].tolist(), abs=1e-6)


def test_each_part_gets_its_own_rows(tmp_path: Path) -> None:
    model = language_model(tiny_base_folder(tmp_path))
    found = reference_outcomes(
        ["zero-shot", "tf-idf", "majority class"], TEXTS, LABELS, ["cold", "warm"], PARTS, lambda: model
    )
    assert [r.name for r in found] == ["majority class", "tf-idf", "zero-shot"]
    score_EC = label_log_probabilities(model, TEXTS, ["cold", "warm"])
    for reference in found:
        assert reference.probabilities is not None
        for part, p_EC in zip(PARTS, reference.probabilities, strict=True):
            assert p_EC.shape == (len(part.test), 2)
            np.testing.assert_allclose(p_EC.sum(1), 1)
            if reference.name == "zero-shot":
                np.testing.assert_allclose(
                    np.log(p_EC[:, 1] / p_EC[:, 0]), (score_EC[:, 1] - score_EC[:, 0])[list(part.test)], atol=1e-5
                )


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        *((name, False) for name in ("0", "A", "label_1", "class 2", "", "-1")),
        *((name, True) for name in ("warm", "春", "no", "group sports", "é")),
    ],
)
def test_labels_that_say_nothing(name: str, meaning: bool) -> None:
    assert says_something(name) is meaning


def test_zero_shot_is_left_out_where_labels_say_nothing() -> None:
    def nobody() -> LanguageModel:
        raise AssertionError("no model is loaded for it")

    found = zero_shot(nobody, TEXTS, ["0", "1"], PARTS)
    assert found.probabilities is None
    assert "'0', '1'" in found.note


def test_the_prompt_is_in_the_labels_language() -> None:
    assert prompt_language(["暖かい", "cold"]) == "ja"
    assert prompt_language(["ありがとう"]) == "ja"
    assert prompt_language(["warm", "cold"]) == "en"
