"""Designs: every row judged once per repeat, nothing that judges ever trained on or chosen by, all from one seed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katei.core.errors import RecipeError
from katei.study.design import StudyDesign, design_study
from katei.study.learning_curve import SHARES, nested_subset, subset_trials
from katei.study.recipe import Recipe
from katei.study.trials import Ended, planned_trials

NAMES = ("a", "b", "c")


def recipe(**more: Any) -> Recipe:
    return Recipe(model="gemma3-270m", data="poems", **more)


def labels_of(counts: list[int], seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return list(rng.permutation(np.repeat(np.arange(len(counts)), counts)).tolist())


def in_folds(counts: list[int], folds: int, repeats: int, seed: int, valid: int = 0, test: int = 0) -> StudyDesign:
    labels = labels_of(counts, seed)
    splits = {"train": labels[valid:], "valid": labels[:valid], "test": [0] * test}
    wanted = recipe(folds=folds, repeats=repeats, seeds=(seed,))
    return design_study(wanted, {name: own for name, own in splits.items() if own}, NAMES[: len(counts)])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(8, 30), min_size=2, max_size=3),
    folds=st.integers(2, 6),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 1000),
    valid=st.integers(0, 5),
    test=st.integers(0, 4),
)
def test_folds_test_each_row_once_per_repeat_and_leak_nothing(
    counts: list[int], folds: int, repeats: int, seed: int, valid: int, test: int
) -> None:
    design, rows = in_folds(counts, folds, repeats, seed, valid, test), sum(counts)
    label_E = np.array([*labels_of(counts, seed)[valid:], *labels_of(counts, seed)[:valid]])
    assert [(c.repeat, c.fold) for c in design.cells] == [(r, f) for r in range(repeats) for f in range(folds)]
    assert len({c.seed for c in design.cells}) == len(design.cells)
    for repeat in range(repeats):
        tested = [row for c in design.cells if c.repeat == repeat for row in c.test]
        assert sorted(tested) == list(range(rows)), "the data's own test rows, behind these, are left alone"
    for cell in design.cells:
        parts = [set(cell.train), set(cell.valid), set(cell.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == rows
        for part in (cell.train, cell.test):
            assert set(label_E[list(part)]) == set(range(len(counts)))
        assert len(cell.valid) >= len(counts)
        share = np.bincount(label_E[list(cell.test)], minlength=len(counts)) * folds
        assert np.abs(share - counts).max() <= folds, "stratified"
    assert design == in_folds(counts, folds, repeats, seed, valid, test)
    if repeats > 1:
        assert design.cells[0].test != design.cells[folds].test


def test_the_given_split_and_seeds_are_the_datas_own_rows() -> None:
    labels = {"train": [0, 1, 0, 1], "valid": [0, 1], "test": [1, 0, 1]}
    one = design_study(recipe(), labels, NAMES[:2])
    assert (one.kind, one.rows, one.scored) == ("given", 3, (6, 7, 8))
    assert one.cells[0].train == (0, 1, 2, 3)
    assert one.cells[0].valid == (4, 5)
    three = design_study(recipe(seeds=(4, 5, 9)), labels, NAMES[:2])
    assert (three.kind, [c.seed for c in three.cells]) == ("seeds", [4, 5, 9])
    assert len({(c.train, c.valid, c.test) for c in three.cells}) == 1
    assert [three.suffix(c) for c in three.cells] == ["-seed4", "-seed5", "-seed9"]
    assert "Without test rows" in design_study(recipe(), {"train": [0, 1]}, NAMES[:2]).text


@pytest.mark.parametrize(("rarest", "folds", "hint"), [(4, 5, "--folds 4"), (2, 2, "more rows of 'b'")])
def test_too_few_rows_of_a_class_say_what_to_type(rarest: int, folds: int, hint: str) -> None:
    with pytest.raises(RecipeError, match=f"the class 'b' has {rarest} row") as caught:
        in_folds([20, rarest], folds, 1, 0)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"folds": 1}, "folds is 1"),
        ({"folds": 5, "seeds": (0, 1)}, "--folds 5 --repeats 2"),
        ({"repeats": 2}, "--seeds 2"),
        ({"folds": 3, "repeats": 0}, "repeats is 0"),
        ({"tune": 1}, "--tune 8"),
        ({"margin": 1.5}, "--margin 0.05"),
        ({"references": ("tfidf",)}, "did you mean 'tf-idf'"),
    ],
)
def test_settings_that_make_no_design_are_refused(settings_: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**settings_)
    assert says in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=3), seed=st.integers(0, 1000))
def test_subsets_are_nested_stratified_and_hold_every_class(counts: list[int], seed: int) -> None:
    labels = labels_of(counts, seed)
    rows = tuple(range(3, len(labels)))
    there = {labels[row] for row in rows}
    found = [set(nested_subset(rows, labels, share, seed)) for share in (*SHARES, 1.0)]
    for smaller, larger in itertools.pairwise(found):
        assert smaller <= larger
    assert found[-1] == set(rows)
    for subset, share in zip(found, SHARES, strict=False):
        assert {labels[row] for row in subset} == there
        for c in there:
            whole = sum(labels[row] == c for row in rows)
            assert abs(sum(labels[row] == c for row in subset) - share * whole) <= 1


def test_a_designs_sentence_names_the_smallest_difference_it_shows() -> None:
    few, many = in_folds([100, 100], 5, 1, 0), in_folds([1000, 1000], 5, 2, 0)
    assert few.detectable is not None
    assert many.detectable is not None
    assert many.detectable < few.detectable / 2
    assert f"differences of {few.detectable:.2f} and more" in few.text
    two_seeds = design_study(recipe(seeds=(0, 1)), {"train": [0, 1], "test": [0, 1]}, NAMES[:2])
    assert two_seeds.detectable is None
    assert "no difference" in two_seeds.text


@pytest.mark.parametrize("counts", [[6, 5, 4], [9, 8], [40, 9]])
def test_every_cell_is_in_every_subset_of_the_learning_curve_or_none_is(counts: list[int]) -> None:
    labels = labels_of(counts, 1)
    wanted = recipe(folds=2, methods=("ia3", "head"))
    design = design_study(wanted, {"train": labels}, NAMES[: len(counts)])
    chosen = [Ended(p, [], "done", 1, 1, 1, chosen=True) for p in planned_trials(wanted, design)]
    subsets = subset_trials(chosen, labels)
    assert len({p.trial.name for p in subsets}) == len(subsets) > 0
    for share in {p.share for p in subsets}:
        assert [p.cell for p in subsets if p.share == share] == [e.planned.cell for e in chosen]
