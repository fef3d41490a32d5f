"""The recipe of a study: one TOML file, or the same as flags, resolved to the last setting.

    model = "gemma3-270m"            data = "poems"            methods = ["lora", "ia3"]      seeds = [0, 1]
    [training]                       for every method: epochs, batch_size, weight_decay, …
    [lora]                           for one method: its own settings, and training settings that differ

What is not given comes from the defaults of `Recipe`, `Training` and the method, in that order of distance.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from katei.base.builtin import DEFAULT_MODEL
from katei.core.errors import RecipeError, nearest
from katei.core.settings import build
from katei.engine.optimizer import Training
from katei.methods import BOOK, METHODS, build_method, method_class
from katei.methods.contract import Method
from katei.study.comparison import HEAD, REFERENCES

TUNING_PATIENCE = 3
"""Epochs without a better validation loss after which a tuned trial stops, where the recipe does not say."""
TRAINING_KEYS = tuple(f.name for f in fields(Training))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a study is. `training` and `settings` hold what was given; `trials()` resolves them."""

    model: str
    data: str
    text: str | None = None
    label: str | None = None
    methods: tuple[str, ...] = BOOK
    seeds: tuple[int, ...] = (0,)
    max_length: int = 200
    """Tokens a text may have; longer ones are cut, with a warning."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    token_budget: int = 1024
    """Tokens in one pass: bounds memory, never changes a result. Less where that many would not fit."""
    checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping what it needs: less memory, more time."""
    folds: int = 0
    """Parts of the train and valid rows, each the test rows once; 0 keeps the split the data have."""
    repeats: int = 1
    """How often the rows are divided into folds anew."""
    tune: int = 0
    """Settings tried per method, its own first; 0 tries none but that."""
    racing: bool = True
    """Stop settings that others lead by too much, or too many of them lead (with `tune`)."""
    learning_curve: bool = False
    """Train on 1/8, 1/4 and 1/2 of the training rows too."""
    references: tuple[str, ...] = REFERENCES
    """Reference points: what a method must beat to be worth its training."""
    margin: float = 0.05
    """A difference in accuracy that does not matter."""
    training: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods:
            raise RecipeError("methods is empty", hint=f"methods = {list(BOOK)}")
        for name in self.methods:
            method_class(name)
        for what, values in (("methods", self.methods), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise RecipeError(f"{what} lists one of its entries twice: {list(values)}", hint="name each once")
        if not self.seeds or any(not 0 <= seed < 2**32 for seed in self.seeds):
            raise RecipeError(
                f"seeds is {list(self.seeds)}, but it lists whole numbers of 0 or more", hint="seeds = [0, 1, 2]"
            )
        if self.folds < 0 or self.folds == 1:
            raise RecipeError(f"folds is {self.folds}, but it counts parts, 2 or more", hint="--folds 5")
        if self.repeats < 1 or (self.repeats > 1 and not self.folds):
            raise RecipeError(
                f"repeats is {self.repeats}, and there are no folds to repeat"
                if self.repeats > 1
                else f"repeats is {self.repeats}",
                hint="--folds 5 --repeats 2; on the split as it is, --seeds 2",
            )
        if self.folds and len(self.seeds) > 1:
            raise RecipeError(
                f"folds and {len(self.seeds)} seeds: every repeat of the folds has a seed of its own already",
                hint=f"--folds {self.folds} --repeats {len(self.seeds)}",
            )
        if not 0 <= self.tune <= 1024 or self.tune == 1:
            raise RecipeError(f"tune is {self.tune}, but it counts settings, 2 or more", hint="--tune 8")
        if not 0 < self.margin < 1:
            raise RecipeError(f"margin is {self.margin}, but it is a difference in accuracy", hint="--margin 0.05")
        for name in self.references:
            if name not in REFERENCES:
                raise RecipeError(f"no reference point '{name}'", hint=f"{nearest(name, REFERENCES)}, or none")
        if self.max_length < 1:
            raise RecipeError(f"max_length is {self.max_length}, but it counts tokens", hint="max_length = 200")
        if self.token_budget < 1:
            raise RecipeError(f"token_budget is {self.token_budget}, but it counts tokens", hint="token_budget = 1024")

    @property
    def trained(self) -> tuple[str, ...]:
        """The methods, and the head where it is a reference point only."""
        return self.methods if HEAD in self.methods or HEAD not in self.references else (*self.methods, HEAD)

    def resolved(self, name: str) -> tuple[Method, Training]:
        """Method `name` and its training with every default filled in."""
        given = self.settings.get(name, {})
        own = {key: value for key, value in given.items() if key not in TRAINING_KEYS}
        unknown = [key for key in own if key not in {f.name for f in fields(method_class(name))}]  # type: ignore[arg-type]
        if unknown:
            known = [f.name for f in fields(method_class(name))] + list(TRAINING_KEYS)  # type: ignore[arg-type]
            raise RecipeError(f"[{name}]: unknown key '{unknown[0]}'", hint=nearest(unknown[0], known))
        method = build_method(name, own, where=f"[{name}]")
        differing = {key: value for key, value in given.items() if key in TRAINING_KEYS}
        defaults: dict[str, Any] = {"learning_rate": method.learning_rate}
        if self.folds or self.tune:  # validation rows are there to choose by
            defaults["keep"] = "best"
        if self.tune:
            defaults["patience"] = TUNING_PATIENCE
        merged = defaults | self.training | differing
        training = build(Training, merged, where=f"[{name}]" if differing else "[training]")
        if self.tune and training.keep != "best":
            raise RecipeError(
                f"[{name}]: keep = '{training.keep}', but tuning chooses the epoch too", hint='keep = "best"'
            )
        return method, training

    def check(self) -> None:
        """Resolve everything once, so that a mistake is found before any model is loaded."""
        for name in dict.fromkeys([*self.methods, *self.settings]):
            self.resolved(name)

    def to_toml(self) -> str:
        """The resolved recipe, every default written out; reading it gives the same study."""
        import tomli_w

        top = {
            key: value
            for key, value in asdict(self).items()
            if key not in ("training", "settings") and value is not None
        }
        top |= {"methods": list(self.methods), "seeds": list(self.seeds), "references": list(self.references)}
        tables = {}
        for name in self.trained:
            method, training = self.resolved(name)
            values = {**method.settings(), **asdict(training)}
            tables[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}
        return str(tomli_w.dumps({**top, **tables}))


def load_recipe(
    path: str | Path | None, overrides: Mapping[str, Any], *, method_overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe file (or none) and lay the flags over it.

    `overrides` are top-level and training keys, None where a flag was not given; `method_overrides` go to the one method
    of the recipe. Raises RecipeError.
    """
    table: dict[str, Any] = {}
    where = "the flags"
    if path is not None:
        where = str(path)
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(
                f"the recipe cannot be read: {error.strerror}", file=path, hint="recipes/book.toml is one to begin with"
            ) from None
        except UnicodeDecodeError:
            raise RecipeError("the recipe is not UTF-8 text", file=path, hint="save it as UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(
                f"the recipe is not TOML: {error}", file=path, hint="recipes/book.toml is one to begin with"
            ) from None
    training = table.pop("training", {})
    settings = {name: table.pop(name) for name in list(table) if name in METHODS}
    for name, value in (("training", training), *settings.items()):
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: {name} is {value!r}, but it is a table", hint=f"[{name}]")
    for key in training:
        if key not in TRAINING_KEYS:
            raise RecipeError(f"{where}: [training]: unknown key '{key}'", hint=nearest(key, TRAINING_KEYS))
    known = [f.name for f in fields(Recipe) if f.name not in ("training", "settings")]
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}: unknown key '{key}'", hint=nearest(key, [*known, "training", *METHODS]))
    given = {key: value for key, value in overrides.items() if value is not None}
    training |= {key: value for key, value in given.items() if key in TRAINING_KEYS}
    for values in settings.values():  # a flag is the last word, also over one method's table
        values.update({key: value for key, value in given.items() if key in TRAINING_KEYS and key in values})
    top = table | {key: value for key, value in given.items() if key not in TRAINING_KEYS}
    top.setdefault("model", DEFAULT_MODEL)
    if "data" not in top:
        raise RecipeError("no data given", hint="a folder or file of labelled texts, or data = … in the recipe")
    if top.get("methods") in (["all"], ("all",)):
        top["methods"] = list(BOOK)
    if method_overrides:
        methods = top.get("methods", BOOK)
        if not isinstance(methods, list | tuple) or len(methods) != 1:
            raise RecipeError(
                "settings of one method were given, but the recipe has several",
                hint="put them into the method's table of a recipe file",
            )
        settings.setdefault(methods[0], {}).update(method_overrides)
    recipe = build(Recipe, {**top, "training": training, "settings": settings}, where=where)
    recipe.check()
    return recipe
