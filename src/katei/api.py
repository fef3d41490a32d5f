"""katei from Python: one function per command, the same results.

    from katei import api
    study = api.compare("poems", model="gemma3-270m", methods=["lora", "ia3"], out="runs/two", epochs=3)
    print(study.results["verdict"])
    api.predict("runs/two", "new.tsv", out="answers.tsv", trial="lora")

Every function raises `katei.core.errors.UserError` for a user's mistake, before anything is loaded or written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from katei.core.errors import AdapterError, RecipeError

if TYPE_CHECKING:
    from katei.study.folder import Study
    from katei.study.training import Watcher

PathLike = str | Path


def _silent(text: str) -> None:
    pass


def compare(
    data: PathLike | None = None,
    *,
    out: PathLike,
    model: str | None = None,
    methods: Sequence[str] | None = None,
    recipe: PathLike | None = None,
    seeds: Sequence[int] | int | None = None,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    save_seconds: float | None = None,
    force: bool = False,
    settings: Mapping[str, Any] | None = None,
    **flags: Any,
) -> Study:
    """Train several methods (and seeds) in lockstep over one base and write the run folder `out`.

    `flags` are recipe keys (`epochs=3`, `learning_rate=1e-3`, `precision="bf16"`, `text="poem"`, …) and win over `recipe`, a
    TOML file or the name of a packaged one. `settings` are the method's own (`{"rank": 4}`), for a recipe of one method.
    An integer `seeds` means that many, from 0. A run that was killed goes on where it stopped. What does not fit this machine by
    its plan is refused, but for `force`.
    """
    from katei.study.recipe import load_recipe
    from katei.study.report import write_report
    from katei.study.run import SAVE_SECONDS, run_study

    if isinstance(seeds, int):
        seeds = range(seeds)
    overrides = {
        **flags,
        "data": None if data is None else str(data),
        "model": model,
        "methods": None if methods is None else list(methods),
        "seeds": None if seeds is None else list(seeds),
    }
    if save_seconds is not None and not 0 <= save_seconds < float("inf"):
        raise RecipeError(f"save_seconds is {save_seconds}, but it must be 0 or more", hint="--save-seconds 60")
    resolved = load_recipe(_recipe_path(recipe), overrides, method_overrides=settings)
    study = run_study(
        resolved,
        Path(out),
        overwrite=overwrite,
        watcher=watcher,
        save_seconds=SAVE_SECONDS if save_seconds is None else save_seconds,
        force=force,
    )
    write_report(study.run)
    return study


def compare_from(
    file: PathLike, *, margin: float = 0.05, references: Sequence[str] = (), lang: str = "en"
) -> dict[str, Any]:
    """Compare methods by results obtained elsewhere: a table of predictions or of counts; see `katei.study.external`."""
    from katei.study.external import compare_file
    from katei.study.verdicts import check_language, note, verdict

    check_language(lang)
    comparison = compare_file(file, margin=margin, references=references)
    said = {"note": note(comparison, lang), "verdict": verdict(comparison, lang)}
    return {"file": str(file), **comparison.as_json(), **said}


def train(
    data: PathLike | None = None, *, out: PathLike, method: str | None = None, seed: int | None = None, **rest: Any
) -> Study:
    """Train one trial: `compare` with one method and one seed."""
    methods = None if method is None else [method]
    if methods is None and rest.get("recipe") is None:
        raise RecipeError("no method given", hint="--method lora")
    seeds = None if seed is None else [seed]
    return compare(data, out=out, methods=methods, seeds=seeds, **{"references": [], **rest})


def demo(
    *,
    out: PathLike = "runs/demo",
    model: str | None = None,
    watcher: Watcher | None = None,
    overwrite: bool = False,
    **flags: Any,
) -> Study:
    """The main job on embedded things: six methods on the bundled poems."""
    return compare(out=out, model=model, recipe="demo", watcher=watcher, overwrite=overwrite, **flags)


def plan(
    data: PathLike | None = None,
    *,
    model: str | None = None,
    methods: Sequence[str] | None = None,
    device: str = "auto",
    precisions: Sequence[str] = ("fp32",),
    tokens: int | None = None,
    classes: int = 2,
    recipe: PathLike | None = None,
    seeds: Sequence[int] | int | None = None,
    settings: Mapping[str, Any] | None = None,
    html: PathLike | None = None,
    lang: str = "en",
    say: Callable[[str], None] = _silent,
    **flags: Any,
) -> dict[str, Any]:
    """What fits on `device`, method by method, without loading or training anything; see `katei.plan`.

    Rows are those of `data`, or `tokens` tokens each. `device` is a card's name, a size ("8GB"), "cpu" or "auto". Flags and recipe are
    those of `compare`. `html` writes the same as a page too; `lang` is the page's language and that of `rows` and `notes`.
    """
    from katei.study.planning import plan_methods
    from katei.study.recipe import load_recipe
    from katei.study.report.plan import check_page, write_plan
    from katei.study.verdicts import check_language

    check_language(lang)
    if html is not None:
        check_page(Path(html))

    if data is not None and tokens is not None:
        raise RecipeError("both data and tokens are given", hint="--tokens N instead of the data, or the data alone")
    if data is None and tokens is None and recipe is None:
        tokens = 200
    overrides = {
        **flags,
        "data": str(data) if data is not None else (None if recipe is not None else "poems"),
        "model": model,
        "methods": None if methods is None else list(methods),
        "seeds": list(range(seeds)) if isinstance(seeds, int) else None if seeds is None else list(seeds),
    }
    resolved = load_recipe(_recipe_path(recipe), overrides, method_overrides=settings)
    result = plan_methods(
        resolved,
        device,
        precisions=precisions,
        tokens=tokens,
        classes=classes,
        lang=lang,
        say=say,
    )
    if html is not None:
        write_plan(result, Path(html), lang)
    return result


def evaluate(
    run: PathLike,
    data: PathLike,
    *,
    trial: str | None = None,
    text: str | None = None,
    label: str | None = None,
    model: str | None = None,
    precision: str = "fp32",
    device: str = "auto",
    say: Callable[[str], None] = _silent,
) -> dict[str, Any]:
    """Scores of a trained adapter on labelled rows, with 95 % intervals."""
    from katei.data import load_split
    from katei.methods.saved import AdapterNote
    from katei.ship.adapters import adapter_folder, note_of, open_adapter
    from katei.ship.predict import predict_texts
    from katei.study.results import test_scores

    folder = adapter_folder(Path(run), trial)
    note: AdapterNote = note_of(folder)
    split = load_split(data, text=text or note.text_column or None, label=label, label_names=note.labels)
    base, stack, note = open_adapter(folder, model=model, precision=precision, device=device, say=say)
    return asdict(test_scores(predict_texts(base, stack, note, split.texts), split.labels))


def predict(
    run: PathLike,
    file: PathLike,
    *,
    out: PathLike | None = None,
    trial: str | None = None,
    text: str | None = None,
    model: str | None = None,
    precision: str = "fp32",
    device: str = "auto",
    calibrated: bool = False,
    abstain: float | None = None,
    top_k: int | None = None,
    save_seconds: float | None = None,
    tick: Callable[[int, int], None] = lambda done, rows: None,
    say: Callable[[str], None] = _silent,
) -> dict[str, Any]:
    """Classify every row of a TSV, CSV, JSONL or parquet file of any size, in constant memory.

    Returns `rows`, `out` and `seconds` (and `abstained`, with `abstain`). Killed, the same call goes on and ends with the same bytes.
    `calibrated` applies the temperature of the adapter's validation rows; below a probability of `abstain` there is no prediction;
    `top_k` adds the likeliest labels in their order. `tick` is called with the rows done and the rows in all.
    """
    import time

    from katei.ship.adapters import adapter_digest, adapter_folder, note_of, open_adapter
    from katei.ship.answers import answers_of
    from katei.ship.partial import SAVE_SECONDS
    from katei.ship.predict import check_input, default_out, predict_file

    started = time.perf_counter()
    folder = adapter_folder(Path(run), trial)
    note = note_of(folder)
    answers = answers_of(folder, note, calibrated=calibrated, abstain=abstain, top_k=top_k)
    target = Path(out) if out is not None else default_out(Path(file))
    job = check_input(Path(file), target, note, text, answers)
    base, stack, note = open_adapter(folder, model=model, precision=precision, device=device, say=say)
    save = SAVE_SECONDS if save_seconds is None else save_seconds
    digest = adapter_digest(folder)
    counts = predict_file(base, stack, note, job, answers, adapter=digest, save_seconds=save, tick=tick, say=say)
    abstained = {} if abstain is None else {"abstained": counts["abstained"]}
    seconds = round(time.perf_counter() - started, 3)
    return {"rows": counts["rows"], "out": str(target), "seconds": seconds, **abstained}


def predict_pipe(
    run: PathLike,
    source: IO[bytes],
    sink: IO[bytes],
    *,
    format: str = "tsv",
    trial: str | None = None,
    text: str | None = None,
    model: str | None = None,
    precision: str = "fp32",
    device: str = "auto",
    calibrated: bool = False,
    abstain: float | None = None,
    top_k: int | None = None,
    tick: Callable[[int, int], None] = lambda done, rows: None,
    say: Callable[[str], None] = _silent,
) -> dict[str, Any]:
    """Classify a pipe's rows as they come: a text a line, or with `text` (a column) TSV with a header. Writes `tsv` or `jsonl`."""
    import time

    from katei.ship.adapters import adapter_folder, note_of, open_adapter
    from katei.ship.answers import answers_of
    from katei.ship.pipe import check_format
    from katei.ship.pipe import predict_pipe as answer

    started = time.perf_counter()
    check_format(format)
    folder = adapter_folder(Path(run), trial)
    answers = answers_of(folder, note_of(folder), calibrated=calibrated, abstain=abstain, top_k=top_k)
    base, stack, note = open_adapter(folder, model=model, precision=precision, device=device, say=say)
    rows = answer(base, stack, note, source, sink, answers, text=text, format=format, tick=tick)
    return {"rows": rows, "out": "-", "seconds": round(time.perf_counter() - started, 3)}


def generate(
    prompts: Sequence[str],
    *,
    run: PathLike | None = None,
    model: str | None = None,
    trial: str | None = None,
    say: Callable[[str], None] = _silent,
    **how: Any,
) -> list[str]:
    """Continuations of each prompt by a base (`model`), or by the base with a run's adapter; see `continuations`."""
    pairs = continuations(prompts, run=run, model=model, trials=None if trial is None else [trial], say=say, **how)
    return [pair["continuation"] for pair in pairs]


def continuations(
    prompts: Sequence[str],
    *,
    run: PathLike | None = None,
    model: str | None = None,
    trials: Sequence[str] | None = None,
    precision: str = "fp32",
    device: str = "auto",
    new_tokens: int = 40,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool = False,
    on_text: Callable[[str | None, int, str], None] | None = None,
    say: Callable[[str], None] = _silent,
) -> list[dict[str, Any]]:
    """`trial`, `prompt` and `continuation` of each trial and prompt, side by side in one pass per token.

    `trials` are names of the run's trials, "base" for the base alone, or "all". A continuation ends before a word of `stop`; with
    `chat` prompts are a user's messages. `on_text` gets (trial, number of the prompt, more text) as text comes.
    """
    from katei.ship.generate import Sampling
    from katei.ship.generate import generate as continue_

    sampling = Sampling(new_tokens=new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if not prompts or any(not prompt for prompt in prompts):
        raise RecipeError("a prompt is empty", hint='katei generate --model gemma3-270m "春の夜の"')
    names, voices, base, causal_lm = _voices(run, model, trials, precision, device, say)
    generation = getattr(causal_lm, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    heard = None if on_text is None else lambda voice, prompt, text: on_text(names[voice], prompt, text)
    texts = continue_(
        base,
        causal_lm.get_output_embeddings(),
        prompts,
        sampling,
        voices,
        stop=stop,
        chat=chat,
        stop_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
        on_text=heard,
    )
    return [
        {"trial": name, "prompt": prompt, "continuation": text}
        for name, own in zip(names, texts, strict=True)
        for prompt, text in zip(prompts, own, strict=True)
    ]


def memorised(
    text: str,
    *,
    run: PathLike | None = None,
    model: str | None = None,
    trial: str | None = None,
    precision: str = "fp32",
    device: str = "auto",
    say: Callable[[str], None] = _silent,
) -> dict[str, Any]:
    """How well a base (or a run's adapter) continues a known text: per token log-probability and rank, the longest exact run."""
    from katei.ship.memorised import memorised as judge

    _, voices, base, causal_lm = _voices(run, model, None if trial is None else [trial], precision, device, say)
    return asdict(judge(base, causal_lm.get_output_embeddings(), text, voices[0]))


def _voices(
    run: PathLike | None,
    model: str | None,
    trials: Sequence[str] | None,
    precision: str,
    device: str,
    say: Callable[[str], None],
) -> tuple[list[str | None], list[Any], Any, Any]:
    """Names, adapters (None for the base alone), the base they share, and its whole causal LM."""
    from katei.base.load import load_causal_lm
    from katei.base.packed import Base
    from katei.methods.saved import read_adapter
    from katei.ship.adapters import adapter_folder, trial_names

    names: list[str | None] = [None] if trials is None else list(trials)
    if names == ["all"] and run is not None:
        names = ["base", *(name for name in trial_names(Path(run)) if name != "full")]
    if run is None and names != [None]:
        raise RecipeError(
            "--trial names a run's adapters, and there is no run", hint='katei generate RUN "春の夜の" --trial lora'
        )
    saved = [
        None if run is None or name == "base" else read_adapter(adapter_folder(Path(run), name), headless=True)
        for name in names
    ]
    bases = {s.note.base for s in saved if s is not None}
    if run is not None and not bases:
        bases = {
            read_adapter(adapter_folder(Path(run), n), headless=True).note.base
            for n in trial_names(Path(run))
            if n != "full"
        }
    if model is None and len(bases) != 1:
        raise RecipeError(
            "neither a run nor a base given"
            if not bases
            else f"the adapters have different bases: {', '.join(sorted(bases))}",
            hint='katei generate --model gemma3-270m "春の夜の"',
        )
    name = model or bases.pop()
    loaded = load_causal_lm(name, precision=precision, device=device, say=say)
    whole: Any = loaded.model
    base = Base(whole.base_model, loaded.tokenizer, name=name, fingerprint=loaded.fingerprint)
    return names, [None if s is None else s.stack(base) for s in saved], base, whole


def report(run: PathLike, *, out: PathLike | None = None, lang: str = "en") -> dict[str, Any]:
    """Write a run's report: one HTML file, self-contained, the verdict first; and its results.csv, one number a line.

    `run` may also be a table that `compare_from` takes. Returns `run`, `out`, `tidy` (None for such a table), `lang`, `bytes` and
    `verdict`, in English or Japanese.
    """
    from katei.study.report import write_report

    written = write_report(Path(run), None if out is None else Path(out), lang)
    return {
        "run": str(run),
        "out": str(written.out),
        "tidy": None if written.tidy is None else str(written.tidy),
        "lang": lang,
        "bytes": written.out.stat().st_size,
        "verdict": ("" if lang == "ja" else " ").join(written.facts.verdict),
    }


def merge(
    run: PathLike,
    *,
    out: PathLike,
    trial: str | None = None,
    kind: str | None = None,
    precision: str = "fp32",
    data: PathLike | None = None,
    model: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = _silent,
) -> dict[str, Any]:
    """Fold an adapter into its base: a plain `transformers` folder, compared with the adapter on rows.

    `kind` is sequence-classification or causal-lm (the adapter's head is left out); without it, what the adapter was trained for.
    The rows are those of `data`, or the run's own test (valid, train) rows. Raises CannotMerge for prompts and the like.
    """
    from katei.methods.saved import read_adapter
    from katei.ship.adapters import adapter_folder, open_base_of, open_causal_lm_of, read_any, rows_to_compare
    from katei.ship.models import check_mergeable, merge_adapter, merged_kind

    folder = adapter_folder(Path(run), trial)
    saved = read_any(folder) if kind == "causal-lm" else read_adapter(folder, headless=True)
    check_mergeable(saved, Path(out), precision)
    kind = merged_kind(saved, kind)
    texts = rows_to_compare(Path(run), data, saved.note)
    causal_lm = None
    if kind == "causal-lm":
        base, causal_lm = open_causal_lm_of(saved, model=model, device=device, say=say)
        if not saved.generates:
            say("the adapter's head is left out: a causal LM has no place for it")
    else:
        base = open_base_of(saved, model=model, precision="fp32", device=device, say=say)
    rows = [base.tokenize(text, saved.note.max_length) for text in texts]
    agreement = merge_adapter(saved, base, Path(out), rows, say, causal_lm=causal_lm, precision=precision)
    return {"out": str(out), "format": "transformers", "kind": kind, "agreement": asdict(agreement)}


def export(
    run: PathLike | None = None,
    *,
    out: PathLike,
    format: str = "peft",
    trial: str | None = None,
    precision: str = "fp16",
    data: PathLike | None = None,
    model: str | None = None,
    say: Callable[[str], None] = _silent,
) -> dict[str, Any]:
    """Write an adapter in another tool's format: `peft` (the one it is kept in), `gguf` (merged, for llama.cpp), `gguf-lora`.

    Without a run, `gguf` writes the base `model` alone. `precision` is that of a whole GGUF's weights.
    """
    from katei.ship import export as formats
    from katei.ship.adapters import adapter_folder, open_base_of, open_causal_lm_of, read_any, rows_to_compare

    if format not in formats.FORMATS:
        raise AdapterError(f"no export to '{format}'", hint=f"--format one of: {', '.join(formats.FORMATS)}")
    agreement = None
    if run is None:
        if model is None or format != "gguf":
            raise AdapterError(
                "no run given", hint=f"katei export RUN --format {format}; a base alone: --model BASE --format gguf"
            )
        formats.export_base_gguf(model, Path(out), say, precision=precision)
    elif format == "peft":
        formats.export_peft(adapter_folder(Path(run), trial), Path(out))
    else:
        saved = read_any(adapter_folder(Path(run), trial))
        formats.check_gguf(saved, format, precision, Path(out))
        if format == "gguf-lora":
            base = open_base_of(saved, model=model, precision="fp32", device="cpu", say=say)
            formats.export_gguf_lora(saved, base, Path(out))
        else:
            texts = rows_to_compare(Path(run), data, saved.note)
            base, causal_lm = open_causal_lm_of(saved, model=model, device="cpu", say=say)
            rows = [base.tokenize(text, saved.note.max_length) for text in texts]
            agreement = asdict(formats.export_gguf(saved, base, causal_lm, Path(out), rows, say, precision=precision))
    return {"out": str(out), "format": format, "agreement": agreement}


def serve(
    runs: Sequence[PathLike],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    model: str | None = None,
    precision: str = "fp32",
    device: str = "auto",
    limits: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = _silent,
) -> dict[str, Any]:
    """Serve every adapter of `runs` over HTTP until stopped (Ctrl-C, SIGTERM). `limits`: see `katei.ship.serve.engine.Limits`.

    Returns `url`, `requests`, `rows` and `seconds`.
    """
    from katei.ship.serve import require_extra

    require_extra()
    from katei.ship.serve.engine import Limits
    from katei.ship.serve.server import check_binding, listening_socket
    from katei.ship.serve.server import serve as serve_shelf
    from katei.ship.serve.shelf import load_shelf

    check_binding(host, port, token)
    bounds = Limits(**(limits or {}))
    sock = listening_socket(host, port)
    try:
        shelf = load_shelf([Path(run) for run in runs], model=model, precision=precision, device=device, say=say)
        names = ", ".join(shelf.adapters)
        say(f"{len(shelf.adapters)} adapter{'s' if len(shelf.adapters) > 1 else ''} on {shelf.base.name}: {names}")
        return serve_shelf(
            shelf,
            sock,
            host=host,
            limits=bounds,
            token=token,
            say=say,
            started=lambda server, url: say(f"{url}  (the page; {url}/docs the endpoints; Ctrl-C stops)"),
        )
    finally:
        sock.close()


def doctor() -> dict[str, Any]:
    """The machine, the versions, and what to fix."""
    from katei.doctor import doctor as examine

    return examine()


def models() -> list[dict[str, Any]]:
    """The built-in bases, and whether each is installed."""
    from katei.doctor import models as listing

    return listing()


def _recipe_path(recipe: PathLike | None) -> Path | None:
    """A recipe file, or the packaged one of that name."""
    if recipe is None:
        return None
    packaged = Path(__file__).parent / "recipes" / f"{recipe}.toml"
    return packaged if packaged.exists() and not Path(recipe).exists() else Path(recipe)
