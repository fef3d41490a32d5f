"""Recipes: defaults, files, flags over files, and errors that name the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from katei.core.errors import RecipeError
from katei.methods import BOOK, LoRA
from katei.study.recipe import Recipe, load_recipe

GIVEN = {"model": "m", "data": "d"}


def test_a_resolved_recipe_read_again_is_the_same_study(tmp_path: Path) -> None:
    recipe = load_recipe(None, {**GIVEN, "epochs": 3, "seeds": [1, 5], "text": "詩"})
    (tmp_path / "r.toml").write_text(recipe.to_toml(), encoding="utf-8")
    again = load_recipe(tmp_path / "r.toml", {})
    assert again.to_toml() == recipe.to_toml()
    assert [again.resolved(name) for name in BOOK] == [recipe.resolved(name) for name in BOOK]
    assert again.resolved("lora")[1].epochs == 3


def test_flags_win_over_the_methods_table_over_the_training_table(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[training]\nepochs = 4\nbatch_size = 2\n[lora]\nrank = 2\nepochs = 5\n", encoding="utf-8")
    method, training = load_recipe(file, GIVEN).resolved("lora")
    assert method == LoRA(rank=2)
    assert (training.epochs, training.batch_size, training.learning_rate) == (5, 2, LoRA.learning_rate)
    assert load_recipe(file, {**GIVEN, "epochs": 7}).resolved("lora")[1].epochs == 7
    assert load_recipe(file, GIVEN).resolved("ia3")[1].epochs == 4


def test_the_books_recipe_holds_its_settings() -> None:
    recipe = load_recipe("recipes/book.toml", {})
    assert recipe.methods == BOOK
    for name in BOOK:
        training = recipe.resolved(name)[1]
        assert (training.epochs, training.batch_size, training.learning_rate, training.weight_decay) == (
            10,
            1,
            1e-4,
            1.0,
        )
    assert recipe.resolved("lora")[0].settings()["rank"] == 1
    assert recipe.resolved("llama-adapter")[0].settings()["layers"] == 8
    assert recipe.max_length == 200


@pytest.mark.parametrize(
    ("text", "says", "hints"),
    [
        ("epocs = 3", "unknown key 'epocs'", "known"),
        ("[training]\nepocs = 3", "unknown key 'epocs'", "epochs"),
        ("[lora]\nrnak = 3", "unknown key 'rnak'", "rank"),
        ("[lorra]\nrank = 3", "unknown key 'lorra'", "lora"),
        ('[training]\nepochs = "3"', "epochs", "settings"),
        ("[training]\nepochs = 2.5", "epochs", "settings"),
        ("[lora]\nrank = true", "rank", "settings"),
        ("[lora]\nrank = 0", "rank is 0", "rank = 8"),
        ("[adalora]\ntarget_rank = 20", "nothing could be pruned", "lora"),
        ('methods = ["lora", "lora"]', "twice", None),
        ('methods = "lora"', "methods", None),
        ("methods = []", "methods is empty", "lora"),
        ("seeds = [-1]", "seeds", "seeds = [0, 1, 2]"),
        ("max_length = 0", "max_length", "200"),
        ('precision = "int4"', "precision", "settings"),
        ("lora = 3", "it is a table", "[lora]"),
        ("training = 3", "it is a table", "[training]"),
        ("this is not toml", "not TOML", None),
        ('[prompt-tuning]\ninit = "text"', "init_text", "init_text"),
        ('[ia3]\ntargets = ["down_proj"]', "scales outputs", "up_proj"),
    ],
)
def test_mistakes_are_named(text: str, says: str, hints: str | None, tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, GIVEN)
    assert says in str(caught.value)
    if hints is not None:
        assert hints in str(caught.value.hint)


def test_what_is_missing_is_asked_for() -> None:
    with pytest.raises(RecipeError, match="no model given"):
        load_recipe(None, {"data": "d"})
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe("nowhere.toml", GIVEN)


def test_settings_need_one_method() -> None:
    with pytest.raises(RecipeError, match="several"):
        load_recipe(None, GIVEN, method_overrides={"rank": 2})
    one = load_recipe(None, {**GIVEN, "methods": ["lora"]}, method_overrides={"rank": 2})
    assert isinstance(one, Recipe)
    assert one.resolved("lora")[0] == LoRA(rank=2)
