"""katei as a scikit-learn classifier of texts.

    from katei.sklearn import PeftClassifier
    model = PeftClassifier(method="lora", base="gemma3-270m", epochs=3)
    cross_val_score(model, texts, labels, cv=5)

`fit` takes the same steps as `katei train`: the same settings, the same engine, the same adapter folder (a test compares the bytes).
A base is loaded once per process and shared by all fits. A pickle holds the path of the saved folder and its fingerprint, never a
tensor: to unpickle is to read safetensors.

Dimensions: E rows · C classes.
"""

from __future__ import annotations

import tempfile
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from katei.base.builtin import DEFAULT_MODEL
from katei.base.device import pick_device
from katei.base.packed import Base
from katei.core.calibration import fit_temperature
from katei.core.errors import AdapterError, DataError, RecipeError, RunError
from katei.core.files import folder_atomic
from katei.data import Split
from katei.data.tables import is_blank
from katei.engine.lockstep import Lockstep, Trial
from katei.engine.optimizer import Training
from katei.methods.contract import Method, Stack
from katei.methods.full import Full
from katei.methods.saved import AdapterNote, read_adapter, read_note, save_adapter
from katei.ship.adapters import adapter_digest, open_adapter
from katei.ship.models import save_full
from katei.ship.predict import predict_texts
from katei.study.recipe import Recipe, load_recipe
from katei.study.run import encode, open_base

BASES_KEPT = 2
"""Bases that stay loaded in one process, the last ones used."""


class InputError(DataError, ValueError):
    """X or y is not what can be learned from; a ValueError, as scikit-learn's own checks raise."""


class PeftClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A frozen base with an adapter and a classifier on its last token; X is a list, array or Series of str.

    What is None is what `katei train` takes when it is not told: the method's own learning rate, ten epochs, batches of one.

    Parameters
    ----------
    method : lora, adalora, prompt-tuning, p-tuning, prefix-tuning, ia3, llama-adapter, head or full
    base : a folder, a hub id, a GGUF file, or a built-in
    settings : the method's own, such as {"rank": 4}
    epochs, learning_rate, batch_size, weight_decay, warmup : how it is trained
    max_length : tokens a text may have; longer ones are cut, with a warning
    validation_fraction : share of the rows, drawn within each class, that is held out and not trained on, for `patience`, `keep` and the
        temperature that `katei predict --calibrated` applies. 0 trains on all of them.
    patience : stop after this many epochs without a better validation loss; 0 never does
    keep : "last" or "best", the epoch that stays; the best is by validation loss
    random_state : an integer is the seed of `katei train --seed`; None, or a RandomState, draws one
    precision, device : of the base
    token_budget : tokens in one pass; bounds memory, not the result
    out : the folder the adapter is saved in (a later fit replaces it); None is a temporary one that lives as long as the estimator

    Attributes
    ----------
    classes_ : the labels, sorted
    folder_ : the adapter as `katei predict`, `merge`, `export` and peft take it
    history_ : one dict per epoch, as in results.json
    """

    def __init__(
        self,
        method: str = "lora",
        base: str = DEFAULT_MODEL,
        *,
        settings: Mapping[str, Any] | None = None,
        epochs: int | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        weight_decay: float | None = None,
        warmup: float | None = None,
        max_length: int | None = None,
        validation_fraction: float = 0.0,
        patience: int | None = None,
        keep: str | None = None,
        random_state: int | np.random.RandomState | None = 0,
        precision: str = "fp32",
        device: str = "auto",
        token_budget: int | None = None,
        out: str | Path | None = None,
    ):
        self.method = method
        self.base = base
        self.settings = settings
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.max_length = max_length
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.keep = keep
        self.random_state = random_state
        self.precision = precision
        self.device = device
        self.token_budget = token_budget
        self.out = out

    # ---------------------------------------------------------------- what scikit-learn calls

    def fit(self, X: Any, y: Any) -> Self:
        """Train on texts X and labels y. Raises InputError for what cannot be learned from, before any base is loaded."""
        texts = self._texts(X, fitting=True)
        if y is None:
            raise InputError("requires y to be passed, but the target y is None", hint="fit(texts, labels)")
        labels = column_or_1d(y, warn=True)
        _check_labels(labels)
        check_classification_targets(labels)
        check_consistent_length(texts, labels)
        classes, index_E = _classes(labels)
        recipe, seed = self._recipe(), self._seed()
        method, training = recipe.resolved(self.method)
        train, valid = self._held_out(index_E, training, seed)
        folder, temporary = self._folder()
        with _ONE_AT_A_TIME:
            base = (
                open_base(self.base, self.precision, self.device, _silent) if isinstance(method, Full) else self._base()
            )
            splits = {
                name: Split("X", tuple(texts[i] for i in rows), tuple(int(index_E[i]) for i in rows), tuple(rows))
                for name, rows in (("train", train), ("valid", valid))
            }
            tokens = {
                name: encode(base.tokenizer, split, recipe.max_length, base.vocabulary)
                for name, split in splits.items()
                if split.texts
            }
            self._warn_of_cuts(base, texts, recipe.max_length)
            trial = Trial(self.method, method, seed, training, tuple(range(len(train))))
            lockstep = Lockstep.on_split(
                base, [trial], len(classes), tokens["train"], tokens.get("valid"), token_budget=recipe.token_budget
            )
            lockstep.run()
            state = lockstep.states[0]
            if state.finished == "diverged":
                hint = "a smaller learning_rate"
                raise RunError(f"training diverged in epoch {len(state.epochs) + 1}: a loss is not finite", hint=hint)
            temperature = None
            if "valid" in tokens:
                valid_EC = lockstep.probabilities([(state, state.trial.valid)])[0]
                temperature = fit_temperature(valid_EC, tokens["valid"].labels)
            note = AdapterNote(
                name=self.method,
                method=method.name,
                settings=method.settings(),
                labels=tuple(str(label) for label in classes),
                base=self.base,
                fingerprint=base.fingerprint,
                max_length=recipe.max_length,
                text_column="text",
                training={**asdict(training), "seed": seed, "rows": len(train), "epochs_run": len(state.epochs)},
                temperature=temperature,
            )
            _save(folder, lockstep.stacks[0], base, method, note)
            self._model = self._open(folder, temporary)
        self.classes_ = classes
        self.folder_ = folder
        self.history_ = [asdict(epoch) for epoch in state.epochs]
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """The likeliest label of each text."""
        probability_EC = self.predict_proba(X)
        labels_E: NDArray[Any] = self.classes_[probability_EC.argmax(1)]
        return labels_E

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """The probability of each class of `classes_`, (E, C). A text's does not depend on the others'."""
        check_is_fitted(self)
        texts = self._texts(X, fitting=False)
        model = self._model
        with _ONE_AT_A_TIME:
            return predict_texts(model.base, model.stack, model.note, texts)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array, tags.input_tags.string = True, False, True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_model")

    # ---------------------------------------------------------------- pickles hold a path

    def __getstate__(self) -> dict[str, Any]:
        if not self.__sklearn_is_fitted__():
            unfitted: dict[str, Any] = super().__getstate__()
            return unfitted
        return {
            "params": {
                name: value for name, value in vars(self).items() if not name.startswith("_") and not name.endswith("_")
            },
            "folder": str(self.folder_.resolve()),
            "fingerprint": self._model.fingerprint,
            "classes": self.classes_.tolist(),
            "dtype": self.classes_.dtype.str,
            "history": self.history_,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "fingerprint" not in state:
            super().__setstate__(state)
            return
        folder = Path(state["folder"])
        for name, value in state["params"].items():
            setattr(self, name, value)
        if not folder.is_dir():
            raise AdapterError(
                "this estimator was pickled by reference to its folder, which is not there any more",
                file=folder,
                hint="put the folder back; fit with out= a folder that stays, since a temporary one goes with its estimator",
            )
        if adapter_digest(folder) != state["fingerprint"]:
            raise AdapterError(
                "holds another adapter than the one that was pickled",
                file=folder,
                hint="a later fit replaced it: give each estimator an out= of its own",
            )
        self.classes_ = np.array(state["classes"], dtype=np.dtype(state["dtype"]))
        self.folder_, self.history_ = folder, state["history"]
        with _ONE_AT_A_TIME:
            self._model = self._open(folder, _TEMPORARY.get(str(folder)))

    # ---------------------------------------------------------------- pieces

    def _texts(self, X: Any, *, fitting: bool) -> list[str]:
        return _texts(X)

    def _recipe(self) -> Recipe:
        """What `katei train` makes of the same settings."""
        given = {
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "weight_decay": self.weight_decay,
            "warmup": self.warmup,
            "max_length": self.max_length,
            "patience": self.patience,
            "keep": self.keep,
            "token_budget": self.token_budget,
        }
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
        fixed = {"data": "X", "model": str(self.base), "methods": [self.method]}
        fixed |= {"precision": self.precision, "device": self.device}
        return load_recipe(None, {**plain, **fixed}, method_overrides=self.settings)

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer) and not isinstance(self.random_state, bool):
            if not 0 <= self.random_state < 2**32:
                raise RecipeError(
                    f"random_state is {self.random_state}, but a seed is 0 or more", hint="random_state=0"
                )
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _held_out(self, index_E: NDArray[np.intp], training: Training, seed: int) -> tuple[list[int], list[int]]:
        """Rows to train on and rows to watch."""
        rows, share = list(range(len(index_E))), self.validation_fraction
        if not 0 <= share < 1:
            raise RecipeError(
                f"validation_fraction is {share}, but it is a share of the rows", hint="0.1, or 0 for none"
            )
        if not share:
            if training.patience or training.keep == "best":
                what = f"patience = {training.patience}" if training.patience else 'keep = "best"'
                raise RecipeError(f"{what} needs validation rows", hint="validation_fraction=0.1")
            return rows, []
        try:
            train, valid = train_test_split(rows, test_size=share, stratify=index_E, random_state=seed)
        except ValueError as error:
            hint = "a larger validation_fraction, more rows of each class, or 0"
            raise InputError(f"no validation rows can be held out: {error}", hint=hint) from None
        return sorted(train), sorted(valid)

    def _folder(self) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
        """Where the adapter goes, checked before anything is trained."""
        if self.out is None:
            temporary = tempfile.TemporaryDirectory(prefix="katei-", ignore_cleanup_errors=True)
            folder = Path(temporary.name).resolve() / "adapter"
            _TEMPORARY[str(folder)] = temporary
            return folder, temporary
        folder = Path(self.out).expanduser()
        if folder.exists() and not (
            folder.is_dir() and ((folder / "katei.json").exists() or not any(folder.iterdir()))
        ):
            raise RunError("holds other things than an adapter", file=folder, hint="out= a new folder")
        return folder, None

    def _warn_of_cuts(self, base: Base, texts: Sequence[str], max_length: int) -> None:
        cut = sum(len(ids) > max_length for ids in base.tokenizer(list(texts))["input_ids"])
        if cut:
            message = f"{cut} of {len(texts)} texts are cut to {max_length} tokens; max_length keeps more"
            warnings.warn(message, UserWarning, stacklevel=3)

    def _base(self) -> Base:
        return shared_base(str(self.base), self.precision, self.device)

    def _open(self, folder: Path, temporary: tempfile.TemporaryDirectory[str] | None) -> _Model:
        """The adapter as it lies on the disk: what a pickle will find."""
        note = read_note(folder)
        if note is not None and note.method == Full.name:
            base, stack, note = open_adapter(folder, precision=self.precision, device=self.device, say=_silent)
        else:
            saved, base = read_adapter(folder), self._base()
            stack, note = saved.stack(base), saved.note
        return _Model(base, stack, note, adapter_digest(folder), temporary)


@dataclass(frozen=True)
class _Model:
    """What a fitted estimator answers with."""

    base: Base
    stack: Stack
    note: AdapterNote
    fingerprint: str
    temporary: tempfile.TemporaryDirectory[str] | None
    """Removed when the last estimator that uses it is gone."""


# -------------------------------------------------------------------- shared by all estimators of a process

_ONE_AT_A_TIME = threading.RLock()
"""A base runs one pass at a time."""
_BASES: OrderedDict[tuple[object, ...], Base] = OrderedDict()
_TEMPORARY: weakref.WeakValueDictionary[str, tempfile.TemporaryDirectory[str]] = weakref.WeakValueDictionary()


def shared_base(name: str, precision: str, device: str) -> Base:
    """The base, loaded once per process for each precision and device; a folder whose files have changed is loaded again."""
    with _ONE_AT_A_TIME:
        files: list[tuple[str, int, int]] = []
        if Path(name).is_dir():
            facts = [(file.name, file.stat()) for file in sorted(Path(name).iterdir())]
            files = [(file, fact.st_size, fact.st_mtime_ns) for file, fact in facts]
        key = (name, precision, str(pick_device(device)), *files)
        if key not in _BASES:
            _BASES[key] = open_base(name, precision, device, _silent)
            while len(_BASES) > BASES_KEPT:
                _BASES.popitem(last=False)
        _BASES.move_to_end(key)
        return _BASES[key]


def _silent(text: str) -> None:
    pass


def _save(folder: Path, stack: Stack, base: Base, method: Method, note: AdapterNote) -> None:
    with folder_atomic(folder) as temporary:
        if isinstance(method, Full):
            save_full(temporary, base, stack, note)
            return
        save_adapter(temporary, stack, 0, method, note, str(base.model.config._name_or_path or note.base))


def _texts(X: Any) -> list[str]:
    """X as a list of texts, each a string with something in it. Raises InputError that names the sample, counted from 0."""
    one_column = "X is a list, a one-dimensional array or a Series of str (or a table of one column)"
    if isinstance(X, str | bytes):
        raise InputError("X is one string, where a list of texts is expected", hint="[text]")
    shape = getattr(X, "shape", None)
    if shape is not None and not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)):
        raise InputError(f"X has shape {tuple(shape)}, but each sample is one text", hint=one_column)
    if shape is not None and not hasattr(X, "__array__"):
        raise InputError(f"X is a {type(X).__name__}", hint=one_column)
    try:
        values = np.asarray(X, dtype=object).ravel().tolist() if shape is not None else list(X)
    except TypeError:
        raise InputError(f"X is a {type(X).__name__}, which has no samples", hint=one_column) from None
    if not values:
        raise InputError("X has 0 sample(s), while a minimum of 1 is required", hint=one_column)
    for i, value in enumerate(values):
        what = None
        if value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value):
            what = "is missing (None or NaN)"
        elif not isinstance(value, str):
            what = f"is a {type(value).__name__}, not a str"
        elif is_blank(value):
            what = "is empty"
        elif "\0" in value:
            what = "holds a NUL character"
        elif not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            what = "holds half of a surrogate pair, which is no character"
        if what is not None:
            raise InputError(f"sample {i} of X {what}", hint="fill it in, or leave it out with its label")
    return [str(value) for value in values]


def _check_labels(labels: NDArray[Any]) -> None:
    if any(value is None or value != value for value in labels.tolist()):
        raise InputError("y contains NaN or None: a label is missing", hint="labels are integers or strings")


def _classes(labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The sorted classes, and the class of each sample."""
    try:
        classes, index_E = np.unique(labels, return_inverse=True)
    except TypeError:
        raise InputError("y holds labels of several types", hint="all integers or all strings") from None
    if len(classes) < 2:
        raise InputError(
            f"y holds one class, {classes.tolist()}; a classifier needs two or more", hint="check the labels"
        )
    names = [str(label) for label in classes]
    if any(is_blank(name) or "\0" in name for name in names) or len(set(names)) < len(names):
        raise InputError(f"y holds labels without a name of their own: {names}", hint="labels are integers or strings")
    return classes, index_E
