"""Recipes: defaults, file, flags, in that order; what is resolved is written out whole and reads back the same."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katei.core.errors import RecipeError
from katei.methods import BOOK, METHODS
from katei.study.recipe import Recipe, load_recipe

GIVEN = {"model": "m", "data": "d"}


def recipe_of(text: str, tmp_path: Path, **flags: Any) -> Recipe:
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    return load_recipe(tmp_path / "r.toml", GIVEN | flags)


def test_nothing_given_is_the_books_six_at_their_defaults() -> None:
    recipe = load_recipe(None, GIVEN)
    assert recipe.methods == BOOK
    method, training = recipe.resolved("lora")
    assert method == METHODS["lora"]()
    assert (training.epochs, training.batch_size, training.learning_rate) == (10, 1, METHODS["lora"].learning_rate)


def test_a_table_wins_over_training_and_a_flag_over_both(tmp_path: Path) -> None:
    text = "[training]\nepochs = 5\nlearning_rate = 0.5\n[lora]\nepochs = 7\nrank = 2\n[ia3]\n"
    recipe = recipe_of(text, tmp_path)
    assert [recipe.resolved(name)[1].epochs for name in ("lora", "ia3")] == [7, 5]
    assert recipe.resolved("lora")[1].learning_rate == 0.5
    assert recipe.resolved("lora")[0].settings()["rank"] == 2
    flagged = recipe_of(text, tmp_path, epochs=3)
    assert [flagged.resolved(name)[1].epochs for name in ("lora", "ia3")] == [3, 3]


def test_one_rate_for_all_leaves_no_methods_default(tmp_path: Path) -> None:
    recipe = recipe_of("", tmp_path, learning_rate=1e-4)
    assert {recipe.resolved(name)[1].learning_rate for name in BOOK} == {1e-4}


def test_settings_of_the_one_method(tmp_path: Path) -> None:
    recipe = load_recipe(None, GIVEN | {"methods": ["lora"]}, method_overrides={"rank": 3, "targets": ["k_proj"]})
    assert recipe.resolved("lora")[0] == METHODS["lora"](rank=3, targets=("k_proj",))  # type: ignore[call-arg]
    with pytest.raises(RecipeError, match="several"):
        load_recipe(None, GIVEN, method_overrides={"rank": 3})


def test_all_is_the_six(tmp_path: Path) -> None:
    assert recipe_of('methods = ["all"]', tmp_path).methods == BOOK
    assert load_recipe(None, GIVEN | {"methods": ["all"]}).methods == BOOK


@pytest.mark.parametrize("name", ["book", "demo"])
def test_the_packaged_recipes_resolve(name: str) -> None:
    import katei

    recipe = load_recipe(Path(katei.__file__).parent / "recipes" / f"{name}.toml", {})
    assert recipe.methods == BOOK
    assert tomllib.loads(recipe.to_toml())["methods"] == list(BOOK)


def test_the_book_is_the_book() -> None:
    import katei

    recipe = load_recipe(Path(katei.__file__).parent / "recipes" / "book.toml", {})
    assert recipe.max_length == 200
    for name in BOOK:
        _, training = recipe.resolved(name)
        assert (training.epochs, training.batch_size, training.learning_rate, training.weight_decay) == (
            10,
            1,
            1e-4,
            1.0,
        )
    assert recipe.resolved("lora")[0].settings()["rank"] == 1
    assert recipe.resolved("llama-adapter")[0].settings() == {"layers": 8, "length": 10}


@pytest.mark.parametrize("name", METHODS)
def test_the_resolved_recipe_holds_every_setting_and_reads_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(None, GIVEN | {"methods": [name], "seeds": [3, 1], "epochs": 2, "keep": "best"})
    written = tomllib.loads(recipe.to_toml())
    method, training = recipe.resolved(name)
    for key, value in {**method.settings(), **vars(training)}.items():
        if value is not None:
            assert written[name][key] == (list(value) if isinstance(value, tuple) else value)
    again = recipe_of(recipe.to_toml(), tmp_path)
    assert again.resolved(name) == recipe.resolved(name)
    assert again.to_toml() == recipe.to_toml()
    assert (again.seeds, again.methods) == ((3, 1), (name,))


def test_the_error_names_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r\.toml: unknown key 'sedes'") as refused:
        recipe_of("sedes = [1]", tmp_path)
    assert "did you mean 'seeds'" in (refused.value.hint or "")
    with pytest.raises(RecipeError, match=r"\[lora\]: unknown key 'rnak'") as refused:
        recipe_of("[lora]\nrnak = 1", tmp_path)
    assert "did you mean 'rank'" in (refused.value.hint or "")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from(["methods", "seeds", "max_length", "precision", "device", "text", "epochs", "keep", "model"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, JUNK, max_size=3))
def test_junk_is_a_recipe_error_or_a_recipe(flags: dict[str, Any]) -> None:
    try:
        recipe = load_recipe(None, {**GIVEN, **flags})
    except RecipeError as error:
        assert error.hint  # noqa: PT017 (an error is allowed, not required)
    else:
        assert recipe.to_toml()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.data())
def test_junk_in_a_methods_table_is_a_recipe_error_or_a_recipe(name: str, data: st.DataObject) -> None:
    keys = st.sampled_from([*METHODS[name]().settings(), "epochs", "learning_rate", "weight_decay", "nonsense"])
    values = data.draw(st.dictionaries(keys, JUNK, min_size=1, max_size=2))
    try:
        recipe = load_recipe(None, GIVEN | {"methods": [name]}, method_overrides=values)
    except RecipeError as error:
        assert error.hint  # noqa: PT017 (an error is allowed, not required)
    else:
        assert recipe.to_toml()
