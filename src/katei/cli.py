"""The commands: parse, call one function of `katei.api`, print its result. Results go to stdout, progress to stderr.

Nothing heavy is imported before a command runs, so `katei --help` is quick.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from katei.core.errors import RecipeError, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Parameter-efficient fine-tuning of LLMs on the hardware you have at home: many methods in lockstep over one frozen base.",
)

METHOD_HELP = "lora, adalora, prompt-tuning, p-tuning, prefix-tuning, ia3, llama-adapter, head or full"
MODEL_HELP = "A folder, a hub id, a GGUF file, or a built-in: gemma3-270m, smollm2."
BASE_HELP = f"{MODEL_HELP} [gemma3-270m]"
DATA_HELP = "A folder with train/valid/test as .tsv, .csv, .jsonl or .parquet; one such file; a hub data-set id; or poems, poems-en."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Model = Annotated[str | None, typer.Option("--model", help=MODEL_HELP)]
BaseModel = Annotated[str | None, typer.Option("--model", help=BASE_HELP)]
Precision = Annotated[str, typer.Option(help="Of the frozen base: fp32, bf16 or fp16. Adapters and heads are fp32.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
TrialName = Annotated[str | None, typer.Option("--trial", help="Which trial of a run with several.")]
RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", help="A recipe, a TOML file, or a packaged one: book, demo. Flags win over it."),
]
TextColumn = Annotated[str | None, typer.Option("--text", help="Column with the texts; not needed with two columns.")]
LabelColumn = Annotated[
    str | None, typer.Option("--label", help="Column with the labels; not needed with two columns.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in --out.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method: --set rank=1. Repeatable."),
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training rows [10].")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate [the method's own].")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per batch [1].")]
Accumulation = Annotated[int | None, typer.Option(help="Batches per optimizer step [1].")]
Decay = Annotated[float | None, typer.Option(help="AdamW's weight decay [0].")]
Warmup = Annotated[float | None, typer.Option(help="Share of the steps in which the rate rises [0].")]
Patience = Annotated[
    int | None, typer.Option(help="Stop after this many epochs without a better validation loss [0: never].")
]
Keep = Annotated[str | None, typer.Option(help="Which epoch's adapter stays: last or best (validation loss) [last].")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens a text may have [200].")]
TokenBudget = Annotated[int | None, typer.Option(help="Tokens in one pass: bounds memory, never the result [1024].")]
TrainPrecision = Annotated[
    str | None, typer.Option("--precision", help="Of the frozen base: fp32, bf16 or fp16 [fp32].")
]
TrainDevice = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps [auto].")]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--checkpointing", help="Compute each layer again in backward instead of keeping it: less memory, more time."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Begin also what does not fit by the plan.")]
Lang = Annotated[str, typer.Option(help="Of the verdict: en or ja.")]
SaveSeconds = Annotated[float, typer.Option(help="Save the state at most this often; a killed run goes on from there.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from katei import __version__

        print(f"katei {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    model: BaseModel = None,
    epochs: Epochs = None,
    device: TrainDevice = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare the six methods on the bundled poems: the main job on embedded things."""
    from katei import api

    study = api.demo(out=out, model=model, watcher=_watcher(), overwrite=overwrite, epochs=epochs, device=device)
    _print_study(study, as_json)


@app.command()
def train(
    data: Annotated[str | None, typer.Argument(help=DATA_HELP)] = None,
    method: Annotated[str | None, typer.Option(help=METHOD_HELP + ".")] = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/train"),
    model: BaseModel = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    seed: Annotated[int | None, typer.Option(help="Everything random flows from it [0].")] = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    weight_decay: Decay = None,
    warmup: Warmup = None,
    patience: Patience = None,
    keep: Keep = None,
    max_length: MaxLength = None,
    token_budget: TokenBudget = None,
    precision: TrainPrecision = None,
    device: TrainDevice = None,
    checkpointing: Checkpointing = None,
    save_seconds: SaveSeconds = 60.0,
    force: Force = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train one method; prints the epoch table and the test scores."""
    from katei import api

    study = api.train(
        data,
        out=out,
        method=method,
        seed=seed,
        model=model,
        recipe=recipe,
        settings=_settings(settings),
        text=text,
        label=label,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        weight_decay=weight_decay,
        warmup=warmup,
        patience=patience,
        keep=keep,
        max_length=max_length,
        token_budget=token_budget,
        precision=precision,
        device=device,
        checkpointing=checkpointing,
        save_seconds=save_seconds,
        force=force,
        overwrite=overwrite,
        watcher=_watcher(),
    )
    _print_study(study, as_json)


@app.command()
def compare(
    context: typer.Context,
    data: Annotated[str | None, typer.Argument(help=DATA_HELP)] = None,
    method: Annotated[
        str | None, typer.Option(help=f"Comma-separated: {METHOD_HELP}; all means the book's six [all].")
    ] = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/compare"),
    model: BaseModel = None,
    recipe: RecipeFile = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds, from 0 [1].")] = None,
    folds: Annotated[
        int | None, typer.Option(help="Cross-validate: parts of the train and valid rows, each tested once [0: no].")
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="With --folds: how often the rows are divided anew [1].")] = None,
    tune: Annotated[
        int | None, typer.Option(help="Settings tried per method, chosen on validation rows [0: its own alone].")
    ] = None,
    no_racing: Annotated[
        bool, typer.Option("--no-racing", help="With --tune: train every setting to its end.")
    ] = False,
    learning_curve: Annotated[
        bool, typer.Option("--learning-curve", help="Train on 1/8, 1/4 and 1/2 of the rows too: would more help?")
    ] = False,
    text: TextColumn = None,
    label: LabelColumn = None,
    epochs: Epochs = None,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="One learning rate for all [each method's own].")
    ] = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    weight_decay: Decay = None,
    warmup: Warmup = None,
    patience: Patience = None,
    keep: Keep = None,
    max_length: MaxLength = None,
    token_budget: TokenBudget = None,
    precision: TrainPrecision = None,
    device: TrainDevice = None,
    checkpointing: Checkpointing = None,
    save_seconds: SaveSeconds = 60.0,
    force: Force = False,
    overwrite: Overwrite = False,
    results: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Train nothing: compare results obtained elsewhere. A table with method, row, label and prediction (or one "
            "probability_LABEL per class; also seed, fold), or with method, correct and rows.",
        ),
    ] = None,
    lang: Lang = "en",
    margin: Annotated[float | None, typer.Option(help="A difference in accuracy that does not matter [0.05].")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, what the methods should beat: majority class, tf-idf, head, zero-shot, or none [all four]; "
            "with --from methods of the table [none]."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train several methods in lockstep on the same rows (and folds, and seeds); prints which is better, and by how much."""
    from katei import api
    from katei.study.verdicts import check_language

    check_language(lang)
    references = None if reference is None else [n.strip() for n in reference.split(",")] if reference != "none" else []
    if results is not None:
        from katei.printing import print_comparison

        _check_alone(context, ("lang", "margin", "reference"))
        margin = 0.05 if margin is None else margin
        comparison = api.compare_from(results, margin=margin, references=references or [], lang=lang)
        _finish(comparison, as_json, lambda: print_comparison(comparison, lang))
        return
    study = api.compare(
        data,
        out=out,
        methods=None if method is None else [name.strip() for name in method.split(",")],
        seeds=seeds,
        folds=folds,
        repeats=repeats,
        tune=tune,
        racing=False if no_racing else None,
        learning_curve=True if learning_curve else None,
        references=references,
        margin=margin,
        model=model,
        recipe=recipe,
        text=text,
        label=label,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        weight_decay=weight_decay,
        warmup=warmup,
        patience=patience,
        keep=keep,
        max_length=max_length,
        token_budget=token_budget,
        precision=precision,
        device=device,
        checkpointing=checkpointing,
        save_seconds=save_seconds,
        force=force,
        overwrite=overwrite,
        watcher=_watcher(),
    )
    _print_study(study, as_json, lang)


@app.command()
def plan(
    data: Annotated[str | None, typer.Argument(help=f"{DATA_HELP} Or none, with --tokens.")] = None,
    method: Annotated[
        str | None, typer.Option(help=f"Comma-separated: {METHOD_HELP}; all means the book's six [all].")
    ] = None,
    model: BaseModel = None,
    device: Annotated[
        str, typer.Option(help="A card (rtx2070, rtx4060ti-16gb …), a size (8GB), cpu or auto.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="Comma-separated: fp32, bf16, fp16, nf4.")] = "fp32",
    tokens: Annotated[int | None, typer.Option(help="Tokens of the longest text, instead of DATA [200].")] = None,
    classes: Annotated[int, typer.Option(help="With --tokens: how many classes.")] = 2,
    checkpointing: Checkpointing = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    seeds: Annotated[int | None, typer.Option(help="Trials of each method in lockstep [1].")] = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    token_budget: TokenBudget = None,
    html: Annotated[Path | None, typer.Option(help="Write the picture as a page too, an .html file.")] = None,
    lang: Annotated[str, typer.Option(help="Of the page and the notes: en or ja.")] = "en",
    as_json: Json = False,
) -> None:
    """Does it fit? Memory by method and part, the largest batch and length, and the time, before anything is trained."""
    from katei import api
    from katei.printing import print_plans

    result = api.plan(
        data,
        model=model,
        methods=None if method is None else [name.strip() for name in method.split(",")],
        device=device,
        precisions=[name.strip() for name in precision.split(",")],
        tokens=tokens,
        classes=classes,
        checkpointing=checkpointing,
        recipe=recipe,
        settings=_settings(settings),
        seeds=seeds,
        text=text,
        label=label,
        batch_size=batch_size,
        max_length=max_length,
        token_budget=token_budget,
        html=html,
        lang=lang,
        say=_say,
    )
    _finish(result, as_json, lambda: print_plans(result))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, one of its trials, or an adapter peft saved.")],
    data: Annotated[str, typer.Argument(help="Labelled rows: a file, or a folder whose test rows are used.")],
    trial: TrialName = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    model: Model = None,
    precision: Precision = "fp32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a trained adapter on labelled rows, with 95 % intervals."""
    from katei import api
    from katei.printing import print_scores

    scores = api.evaluate(
        run, data, trial=trial, text=text, label=label, model=model, precision=precision, device=device, say=_say
    )
    _finish(scores, as_json, lambda: print_scores(scores))


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder, one of its trials, or an adapter peft saved.")],
    file: Annotated[
        Path,
        typer.Argument(
            help="Rows to classify, of any number: .tsv, .csv, .jsonl or .parquet; or - for stdin, a text a line, answered "
            "on stdout as it comes (with --text, TSV with a header)."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where the predictions go [FILE.predictions.EXT]; its ending is the format.")
    ] = None,
    trial: TrialName = None,
    text: TextColumn = None,
    model: Model = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Probabilities at the temperature of the validation rows.")
    ] = False,
    abstain: Annotated[
        float | None, typer.Option(help="Leave prediction empty where no class has this probability.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Add the likeliest labels in their order: top_1, top_1_probability, …")
    ] = None,
    format: Annotated[str | None, typer.Option(help="With -: tsv or jsonl [tsv].")] = None,
    precision: Precision = "fp32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Classify rows: the input's columns, then prediction and one probability per class. Killed, the same command goes on."""
    from katei import api
    from katei.progress import RowsWatcher

    common: dict[str, Any] = {"trial": trial, "text": text, "model": model, "precision": precision, "device": device}
    common |= {"calibrated": calibrated, "abstain": abstain, "top_k": top_k, "say": _say}
    piped = str(file) == "-"
    if piped and out is not None:
        raise RecipeError(
            "with - the answers go to stdout, not to --out", hint=f"katei predict {run} - < TEXTS > {out}"
        )
    if format is not None and not piped:
        raise RecipeError("--format is for - (stdin to stdout)", hint="the ending of --out is the format of a file")
    with RowsWatcher(_console()) as watcher:
        if piped:
            result = api.predict_pipe(
                run, sys.stdin.buffer, sys.stdout.buffer, format=format or "tsv", tick=watcher.tick, **common
            )
        else:
            result = api.predict(run, file, out=out, tick=watcher.tick, **common)
    line = f"{result['rows']} rows → {result['out']} in {result['seconds']:.1f} s"
    if "abstained" in result:
        line += f", {result['abstained']} without a prediction"
    _finish(result, as_json, lambda: _say(line) if piped else print(line))


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="One or more prompts; with --model alone, nothing else. A run folder may come first."),
    ] = None,
    model: Model = None,
    trial: Annotated[
        str | None,
        typer.Option("--trial", help="Which trials of a run, side by side: lora,ia3; base is the base alone; all."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are a user's messages: use the chat template.")] = False,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this word. Repeatable.")] = None,
    memorised: Annotated[
        str | None,
        typer.Option("--memorised", metavar="TEXT", help="Write nothing: show how well a known text is continued."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to add, at most.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 is greedy; 0.8 varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set of tokens that has this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    precision: Precision = "fp32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue prompts with a base, or with a run's adapters: katei generate [RUN] PROMPT …"""
    from katei import api
    from katei.printing import Continuing, print_continuations, print_memorised

    run, prompts = None, list(prompts or [])
    if prompts and Path(prompts[0]).is_dir() and (model is None or len(prompts) > 1 or memorised is not None):
        run, prompts = Path(prompts[0]), prompts[1:]
    if memorised is not None:
        if prompts:
            raise RecipeError(
                "--memorised judges its own TEXT, so a prompt has no meaning", hint="leave the prompt out"
            )
        judged = api.memorised(
            memorised, run=run, model=model, trial=trial, precision=precision, device=device, say=_say
        )
        _finish(judged, as_json, lambda: print_memorised(judged))
        return
    if run is not None and not prompts:
        raise RecipeError("no prompt given", hint=f'katei generate {run} "春の夜の"')
    if run is None and model is None:
        raise RecipeError(
            f"neither a run nor a base given: '{prompts[0]}' is no folder, so it is taken for a prompt"
            if prompts
            else "no prompt given",
            hint='katei generate RUN "春の夜の", or katei generate --model gemma3-270m "春の夜の"',
        )
    trials = None if trial is None else [name.strip() for name in trial.split(",")]
    continuing = Continuing(
        [f"{prompt}\n" for prompt in prompts] if chat else prompts,
        alone=len(prompts) == 1 and (trials is None or (len(trials) == 1 and trials != ["all"])),
    )
    pairs = api.continuations(
        prompts,
        run=run,
        model=model,
        trials=trials,
        precision=precision,
        device=device,
        new_tokens=new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or [],
        chat=chat,
        on_text=continuing.on_text,
        say=_say,
    )
    _finish({"continuations": pairs}, as_json, lambda: None if continuing.end() else print_continuations(pairs))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A finished run folder, or a table that compare --from takes.")],
    out: Annotated[Path | None, typer.Option(help="The page, an .html file [RUN/report.html].")] = None,
    lang: Annotated[str, typer.Option(help="en or ja.")] = "en",
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run's report: one HTML file that needs nothing else, the verdict first; and results.csv, one number a line."""
    from katei import api

    result = api.report(run, out=out, lang=lang)
    _finish(result, as_json, lambda: print(f"{result['verdict']}\n\n{result['out']}"))
    if open_it:
        import webbrowser

        webbrowser.open(Path(result["out"]).resolve().as_uri())


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="A run folder, one of its trials, or an adapter peft saved.")],
    out: Annotated[Path, typer.Option(help="The new model's folder.")],
    trial: TrialName = None,
    kind: Annotated[
        str | None,
        typer.Option("--as", help="sequence-classification or causal-lm (without the head) [what it was trained for]."),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the weights: fp32, fp16 or bf16. Computed in fp32.")] = "fp32",
    data: Annotated[str | None, typer.Option(help="Rows to compare the merged model on [the run's own].")] = None,
    model: Model = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Fold LoRA, AdaLoRA or (IA)³ into the base's weights, and check that the merged model answers the same."""
    from katei import api

    result = api.merge(
        run, out=out, trial=trial, kind=kind, precision=precision, data=data, model=model, device=device, say=_say
    )
    _finish(result, as_json, lambda: print(f"merged into {result['out']}: {_agreement(result)}"))


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The new folder.")],
    run: Annotated[Path | None, typer.Argument(help="A run folder or one of its trials.")] = None,
    format: Annotated[
        str, typer.Option(help="peft; gguf (merged, for llama.cpp); gguf-lora (LoRA or AdaLoRA alone, for llama.cpp).")
    ] = "peft",
    trial: TrialName = None,
    precision: Annotated[str, typer.Option(help="Of a whole GGUF's weights: fp16 or fp32.")] = "fp16",
    data: Annotated[str | None, typer.Option(help="Rows to compare a GGUF on [the run's own].")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The adapter's base; without RUN, the base to write as a GGUF.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter for another tool."""
    from katei import api

    result = api.export(run, out=out, format=format, trial=trial, precision=precision, data=data, model=model, say=_say)
    more = f": {_agreement(result)}" if result["agreement"] else ""
    _finish(result, as_json, lambda: print(f"{result['format']} in {result['out']}{more}"))


@app.command()
def serve(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN…", help="Run folders (all their trials) and adapter folders, of one base."),
    ],
    host: Annotated[
        str, typer.Option(help="The address to bind to; any but this machine's own needs --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="KATEI_TOKEN", help="What requests must show: Authorization: Bearer TOKEN.")
    ] = None,
    model: Model = None,
    max_rows: Annotated[int, typer.Option(help="Of one request: texts × adapters.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Of one text.")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(help="Of one continuation.")] = 256,
    max_body: Annotated[int, typer.Option(help="Bytes of one request.")] = 1 << 20,
    queue_rows: Annotated[int, typer.Option(help="Rows that may wait; beyond it the answer is 429.")] = 2048,
    queue_tokens: Annotated[int, typer.Option(help="Tokens that may wait.")] = 65536,
    token_budget: Annotated[int, typer.Option(help="Tokens in one pass: bounds memory, never the result.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is given up (504).")] = 60.0,
    precision: Precision = "fp32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer over HTTP: every adapter of the runs, mixed in one batch; and a page to try them on."""
    from katei import api

    result = api.serve(
        runs,
        host=host,
        port=port,
        token=token,
        model=model,
        precision=precision,
        device=device,
        say=_say,
        limits={
            "rows": max_rows,
            "tokens": max_tokens,
            "new_tokens": max_new_tokens,
            "body_bytes": max_body,
            "queue_rows": queue_rows,
            "queue_tokens": queue_tokens,
            "token_budget": token_budget,
            "seconds": timeout,
        },
    )
    _finish(result, as_json, lambda: print(f"{result['requests']} requests, {result['rows']} rows; stopped"))


@app.command()
def models(as_json: Json = False) -> None:
    """The built-in bases, and whether each is installed."""
    from katei import api
    from katei.printing import print_models

    listing = api.models()
    _finish({"models": listing}, as_json, lambda: print_models(listing))


@app.command()
def doctor(as_json: Json = False) -> None:
    """The machine, the versions, and what to fix."""
    from katei import api
    from katei.printing import print_doctor

    report = api.doctor()
    _finish(report, as_json, lambda: print_doctor(report))


# -------------------------------------------------------------------- shared


def _settings(pairs: list[str] | None) -> dict[str, Any] | None:
    """`rank=1` as a recipe would hold it: the value is TOML, and a bare word is a string."""
    import tomllib

    if not pairs:
        return None
    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"--set {pair}: a setting is KEY=VALUE", hint="--set rank=1")
        try:
            table = tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            table = {"value": value}
        values[key.strip()] = table["value"] if len(table) == 1 else value
    return values


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _watcher() -> Any:
    from katei.progress import TerminalWatcher

    return TerminalWatcher(_console())


def _say(text: str) -> None:
    from rich.text import Text

    _console().print(Text(text, style="dim"))


def _print_study(study: Any, as_json: bool, lang: str = "en") -> None:
    from katei.printing import print_study

    _finish(study.as_json(), as_json, lambda: print_study(study, lang))


def _check_alone(context: typer.Context, own: tuple[str, ...]) -> None:
    """Raise RecipeError for flags of training beside --from."""
    flags = {p.name: p.opts[0] if p.opts[0].startswith("-") else "DATA" for p in context.command.params}
    sources = {name: context.get_parameter_source(str(name)) for name in flags}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    wrong = [flags[n] for n in given if n not in (*own, "results", "as_json")]
    if wrong:
        raise RecipeError(
            f"--from trains nothing, so {', '.join(wrong)} has no meaning", hint="katei compare --from FILE"
        )


def _agreement(result: dict[str, Any]) -> str:
    a, token = result["agreement"], result.get("kind") == "causal-lm"
    same = f"{a['labels']:.1%} of {a['rows']} rows get the same {'likeliest next token' if token else 'label'}"
    return f"{same}; largest change of a probability {a['max_probability_change']:.1e}"


def _finish(result: dict[str, Any], as_json: bool, show: Any) -> None:
    show()
    if as_json:
        print(json.dumps(result, ensure_ascii=False))


def main() -> None:
    """The `katei` program: exit code 0, 2 for a user's mistake, 130 when stopped, and a traceback only with --debug."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is escaped, never an error
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    as_json = "--json" in arguments
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="katei", standalone_mode=False)
    except UserError as error:
        if debug:
            raise
        _report(str(error), error.as_dict(), as_json)
        sys.exit(2)
    except KeyboardInterrupt:
        _stopped(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        # typer brings its own copy of click's exceptions, and which depends on its version: they share these two methods
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            message = error.format_message()
            facts = {"kind": "usage", "message": message, "file": None, "row": None, "hint": "katei --help"}
            _report(f"{message}\n  → katei --help", facts, as_json)
            sys.exit(2)
        if type(error).__name__ == "Abort":  # what typer makes of Ctrl-C
            _stopped(arguments)
        if debug:
            raise
        refused = _refused(error)
        if refused is not None:
            _report(str(refused), {**refused.as_dict(), "kind": "system"}, as_json)
            sys.exit(2)
        message = f"a mistake of katei's own: {type(error).__name__}: {error}"
        hint = "the same command with --debug shows where; please report it"
        facts = {"kind": "bug", "message": message, "file": None, "row": None, "hint": hint}
        _report(f"{message}\n  → {hint}", facts, as_json)
        sys.exit(1)
    if code == 130:  # so do others of its versions
        _stopped(arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _stopped(arguments: list[str]) -> NoReturn:
    trains = any(command in arguments[:1] for command in ("demo", "train", "compare"))
    more = " The same command goes on from the last state saved." if trains else ""
    print(f"katei: stopped.{more}", file=sys.stderr)
    sys.exit(130)


def _refused(error: Exception) -> UserError | None:
    """What the machine would not do, as the user can mend it; None for anything else."""
    if isinstance(error, OSError) and error.strerror:
        hint = "check the path, its permissions and the space on the disk"
        return UserError(error.strerror, file=error.filename, hint=hint)
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        hint = "a smaller --token-budget or --max-length, fewer methods or seeds at once, --precision bf16, or a smaller base"
        return UserError("out of memory", hint=hint)
    return None


def _report(text: str, facts: dict[str, object], as_json: bool) -> None:
    print(f"katei: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": facts}, ensure_ascii=False))


if __name__ == "__main__":
    main()
