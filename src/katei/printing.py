"""Results as a person reads them: plain tables on stdout, one printer per kind of result."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from katei.progress import duration, number

if TYPE_CHECKING:
    from katei.study.folder import Study


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width of its own: do not fold tables at 80
        console = Console(highlight=False, width=150)
    return console


TRIALS_SHOWN = 12
"""Studies of more have no table of epochs for each."""


def print_study(study: Study, lang: str = "en") -> None:
    """The epoch tables, the scores with their intervals, the verdict, and where everything is."""
    console, results = _console(), study.results
    trials, comparison = results["trials"], results["comparison"]
    if len(trials) <= TRIALS_SHOWN:
        console.print(Columns([_epoch_table(trial) for trial in trials], padding=(0, 4)))
        if any(trial["best_epoch"] for trial in trials):
            console.print(Text("* lowest validation loss", style="dim"))
    if comparison is not None and results["design"]["kind"] != "given":
        _print_methods(comparison, "", console, lang)
    elif any(trial["test"] for trial in trials):
        references = [] if comparison is None else comparison["methods"]
        console.print(_score_table(trials, references, results["majority_accuracy"], console.width))
    if comparison is not None:
        _print_differences(comparison, ("accuracy",), console, lang)
    if results["tuning"]:
        console.print(Text(_tuning_line(results["tuning"], len(trials))))
    if results["learning_curve"]:
        from katei.study.verdicts import more_labels

        console.print(_curve_table(results["learning_curve"]["points"]))
        console.print(Text(more_labels(results["learning_curve"]["last_doubling"], lang)))
    _print_verdict(results, console, lang)
    seconds, memory = study.environment["seconds"], study.environment["memory"]
    console.print(
        Text(
            f"\n{duration(seconds['total'])} in all ({duration(seconds['load'])} loading, {duration(seconds['train'])} training, "
            f"{duration(seconds['evaluate'])} evaluating), {_peak(memory)}",
            style="dim",
        )
    )
    which = f" --trial {next(t['name'] for t in trials if t['chosen'])}" if len(trials) > 1 else ""
    console.print(
        Text(
            f"run folder  {study.run}\nreport      {study.run / 'report.html'}\nnext        katei predict {study.run} FILE.tsv{which}",
            style="dim",
        )
    )


def _peak(memory: dict[str, Any]) -> str:
    """The peak, and how far off the plan was."""
    said = f"peak memory {memory['peak_bytes'] / 2**30:.2f} GiB"
    if planned := memory.get("planned_bytes"):
        said += f" (planned {planned / 2**30:.2f}: {planned / memory['peak_bytes'] - 1:+.1%})"
    return said


def _print_verdict(results: dict[str, Any], console: Console, lang: str) -> None:
    from katei.study.comparison import Comparison
    from katei.study.verdicts import note, verdict

    said = results["verdict"]
    if results["comparison"] is not None:
        comparison = Comparison.from_json(results["comparison"])
        if (aside := note(comparison, lang)) is not None:
            console.print(Text(aside, style="dim"))
        if lang != "en":
            said = verdict(comparison, lang)
    console.print(Text(f"\n{said}"))


def _tuning_line(tuning: dict[str, Any], trials: int) -> str:
    return (
        f"tuning: {tuning['settings_per_method']} settings per method and training part; {tuning['stopped_by_racing']} of {trials} "
        f"trials were stopped by racing, {tuning['stopped_early'] - tuning['stopped_by_racing']} by patience: "
        f"{tuning['epochs_run']:,} of {tuning['epochs_full']:,} epochs trained ({tuning['share_saved']:.0%} saved)"
    )


def _curve_table(points: list[dict[str, Any]]) -> Table:
    sizes = sorted({point["share"]: point["train_rows"] for point in points}.items())
    title = "accuracy by training rows"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method")
    for _, rows in sizes:
        table.add_column(f"{rows:,}", justify="right")
    of = {(p["method"], p["share"]): p for p in points}
    for name in dict.fromkeys(p["method"] for p in points):
        cells = []
        for share, _ in sizes:
            point = of.get((name, share))
            between = f" ({_interval(point['accuracy_interval'])})" if point and point["accuracy_interval"] else ""
            cells.append(number(point["accuracy"] if point else None) + between)
        table.add_row(name, *cells)
    return table


def _epoch_table(trial: dict[str, Any]) -> Table:
    table = Table(title=trial["name"], title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("epoch", "train loss", "valid loss", "ROC AUC", "accuracy"):
        table.add_column(name, justify="right")
    for epoch in trial["epochs"]:
        values = (epoch["train_loss"], epoch["valid_loss"], epoch["valid_roc_auc"], epoch["valid_accuracy"])
        mark = " *" if epoch["epoch"] == trial["best_epoch"] else ""
        table.add_row(str(epoch["epoch"]) + mark, *(number(value) for value in values))
    if trial.get("ranks"):
        ranks = list(trial["ranks"].values())
        table.caption = f"ranks left: {sum(ranks)} over {len(ranks)} sites, {min(ranks)} to {max(ranks)} each"
        table.caption_justify = "left"
    return table


def _score_table(
    trials: list[dict[str, Any]], methods: list[dict[str, Any]], majority: float | None, width: int
) -> Table:
    rows = next(t["test"]["rows"] for t in trials if t["test"])
    title = f"test, {rows} rows, 95 % intervals"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 1 if width >= 92 else 0)  # the narrow one fits 80 columns
    table.add_column("trial")
    for name in ("accuracy", "interval", "ROC AUC", "interval", "loss", "trained", "of all"):
        table.add_column(name, justify="right")
    for trial in (t for t in trials if t["chosen"] and t["share"] == 1):
        test, counts = trial["test"], (f"{trial['trainable']:,}", f"{trial['trainable'] / trial['total']:.3%}")
        if test is None:
            table.add_row(trial["name"], trial["finished"] or "–", "", "", "", "", *counts)
            continue
        table.add_row(
            trial["name"],
            number(test["accuracy"]),
            _interval(test["accuracy_interval"]),
            number(test["roc_auc"]),
            _interval(test["roc_auc_interval"]),
            number(test["loss"]),
            *counts,
        )
    table.add_section()
    others = [m for m in methods if m["method"] not in {t["method"] for t in trials}]
    for m in others:  # reference points
        scores = (number(m["accuracy"]), _interval(m["accuracy_interval"]), number(m.get("roc_auc")))
        table.add_row(m["method"], *scores, _interval(m.get("roc_auc_interval")), number(m.get("log_loss")))
    if majority is not None and not any(m["method"] == "majority class" for m in others):
        table.add_row("commonest class", number(majority), "", "0.500")
    return table


def _interval(interval: list[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}"


COMPARISON_WORDS = {
    "en": {
        "method": "method", "rows": "rows", "accuracy": "accuracy", "interval": "95 % interval", "roc_auc": "ROC AUC",
        "macro_f1": "macro F1", "log_loss": "log loss", "brier": "Brier", "calibration_error": "calibration error",
        "pair": "difference in", "difference": "difference", "p": "p", "p_adjusted": "p (Holm)", "says": "",
        "different": "different", "equivalent": "equal within ±{margin:g}", "open": "cannot tell", "more": "{n} more pairs: --json",
        "alone": "Each interval of a difference is of its own; whether a pair is called different goes by p (Holm).",
        "rows_": "{rows:,} rows", "seeds_": "{rows:,} rows × {seeds} seeds", "folds_": "{rows:,} rows in {folds} folds × {seeds}",
        "counts_": "counts",
    },
    "ja": {
        "method": "手法", "rows": "行数", "accuracy": "正解率", "interval": "95 % 区間", "roc_auc": "ROC AUC",
        "macro_f1": "マクロ F1", "log_loss": "対数損失", "brier": "Brier", "calibration_error": "較正誤差",
        "pair": "差：", "difference": "差", "p": "p", "p_adjusted": "p（Holm）", "says": "",
        "different": "差あり", "equivalent": "±{margin:g} 以内で同等", "open": "分からない", "more": "ほか {n} 組は --json に",
        "alone": "差の区間は 1 組ごとのもの。差ありとするかどうかは p（Holm）で決めます。",
        "rows_": "{rows:,} 行", "seeds_": "{rows:,} 行 × シード {seeds} 個", "folds_": "{rows:,} 行、{folds} 分割 × {seeds} 回",
        "counts_": "正解数",
    },
}  # fmt: skip
WITH_INTERVAL = ("accuracy", "roc_auc")  # the others are in --json
PAIRS_SHOWN = 15


def print_comparison(result: dict[str, Any], lang: str) -> None:
    """Scores, differences, and the verdict of `compare --from`."""
    console = _console()
    _print_methods(result, f"{result['file']}, ", console, lang)
    _print_differences(result, ("accuracy", "roc_auc"), console, lang)
    if result["note"] is not None:
        console.print(Text(result["note"], style="dim"))
    console.print(Text(f"\n{result['verdict']}"))


def _print_methods(result: dict[str, Any], of: str, console: Console, lang: str) -> None:
    words, design = COMPARISON_WORDS[lang], result["design"]
    title = f"{of}{words[design['kind'] + '_'].format(**design)}"
    metrics = [
        m for m in words if all(m in scores for scores in result["methods"]) and f"{m}_interval" in result["methods"][0]
    ]
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(words["method"])
    table.add_column(words["rows"], justify="right")
    for metric in metrics:
        table.add_column(words[metric], justify="right")
        if metric in WITH_INTERVAL:
            table.add_column(words["interval"], justify="right")
    for scores in result["methods"]:
        values = []
        for m in metrics:
            values += [number(scores[m]), *([_interval(scores[f"{m}_interval"])] if m in WITH_INTERVAL else [])]
        table.add_row(scores["method"], f"{scores['rows']:,}", *values)
    if result["commonest_class"] is not None:
        table.add_section()
        table.add_row(f"= {result['commonest_class']['label']}", "", number(result["commonest_class"]["accuracy"]))
    console.print(table)


def _print_differences(result: dict[str, Any], metrics: tuple[str, ...], console: Console, lang: str) -> None:
    words = COMPARISON_WORDS[lang]
    shown = [m for m in dict.fromkeys(d["metric"] for d in result["differences"]) if m in metrics]
    for metric in shown:
        pairs = [d for d in result["differences"] if d["metric"] == metric]
        console.print(_difference_table(pairs, f"{words['pair']} {words[metric]}", result["margin"], words))
    if len(result["differences"]) > 1 and shown:
        console.print(Text(words["alone"], style="dim"))


def _difference_table(pairs: list[dict[str, Any]], title: str, margin: float, words: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("difference", "interval", "p", "p_adjusted"):
        table.add_column(words[name], justify="right")
    table.add_column(words["says"])
    for d in pairs[:PAIRS_SHOWN]:
        low, high = d["interval"]
        said = [words[key].format(margin=margin) for key in ("different", "equivalent") if d[key]] or [words["open"]]
        table.add_row(
            f"{d['first']} − {d['second']}",
            f"{d['difference']:+.3f}",
            f"{low:+.3f} – {high:+.3f}",
            *(f"{p:.3f}" if p >= 0.0005 else "< 0.001" for p in (d["p"], d["p_adjusted"])),
            ", ".join(said),
        )
    if len(pairs) > PAIRS_SHOWN:
        table.add_row(words["more"].format(n=len(pairs) - PAIRS_SHOWN))
    return table


BAR = 44
"""Characters of a device's whole memory."""
STRIPES = {"weights": ("█", "blue"), "adapters": ("▓", "green"), "activations": ("▒", "yellow"), "rest": ("░", "white")}
"""Part of the bar: its character and its colour."""


def print_plans(result: dict[str, Any]) -> None:
    """A stacked bar per plan against the device's limit, and how much more would fit."""
    console = _console()
    plans, usable = result["plans"], result["usable_bytes"]
    size = f"{usable / 2**30:.2f} GiB usable of {result['capacity_bytes'] / 2**30:.2f}"
    precisions = list(dict.fromkeys(plan["precision"] for plan in plans))
    what = f"{result['model']} in {', '.join(precisions)} on {result['device']}, {size}; {result['rows']}"
    console.print(Text(what))
    widest = max([usable, *(plan["device_bytes"] for plan in plans)])
    timed = any(plan["seconds_per_epoch"] is not None for plan in plans)
    names = [plan["method"] + (f", {plan['precision']}" if len(precisions) > 1 else "") for plan in plans]
    cells = max(8, min(BAR, console.width - max(map(len, names)) - 50 - (9 if timed else 0)))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("method", "", "GiB", "", "tokens", "rows", "trials", *(["epoch"] if timed else [])):
        table.add_column(name, justify="left" if name in ("method", "") else "right", no_wrap=True)
    for name, plan in zip(names, plans, strict=True):
        most = [f"{plan[key]:,}" if plan[key] else "–" for key in ("max_tokens", "max_batch_size", "max_trials")]
        table.add_row(
            name,
            _bar(plan, usable, widest, cells),
            f"{plan['device_bytes'] / 2**30:.2f}",
            Text("fits", style="green") if plan["fits"] else Text("too much", style="red"),
            *most,
            *([duration(plan["seconds_per_epoch"])] if timed and plan["seconds_per_epoch"] is not None else []),
        )
    console.print(table)
    legend = Text()
    for name, (mark, colour) in STRIPES.items():
        legend.append(f"{mark} ", style=colour)
        legend.append(f"{name}   ", style="dim")
    legend.append("│ the device's limit", style="dim")
    console.print(legend)
    said = ["tokens, rows, trials: the most that fit of the longest text, of rows in a pass, of trials in lockstep"]
    if timed:
        said.append("epoch: seconds on this machine, all trials of the method and their evaluation")
    for line in [*said, *result["notes"]]:
        console.print(Text(line, style="dim"))


def _bar(plan: dict[str, Any], usable: int, widest: int, cells: int) -> Text:
    from katei.plan.parts import four_parts

    bar, total = Text(), 0
    for name, size in four_parts(plan["parts"], plan["device_bytes"]).items():
        mark, colour = STRIPES[name]
        total += size
        bar.append(mark * max(0, round(cells * total / widest) - len(bar)), style=colour)
    bar.append(" " * (cells + 1 - len(bar)))
    limit = min(cells, round(cells * usable / widest))
    return bar[:limit] + Text("│", style="red") + bar[limit + 1 :]


def print_scores(scores: dict[str, Any]) -> None:
    console = _console()
    console.print(Text(f"{scores['rows']} rows"))
    console.print(Text(f"accuracy  {number(scores['accuracy'])}   95 % {_interval(scores['accuracy_interval'])}"))
    console.print(Text(f"ROC AUC   {number(scores['roc_auc'])}   95 % {_interval(scores['roc_auc_interval'])}"))
    console.print(Text(f"loss      {number(scores['loss'])}"))


class Continuing:
    """Continuations as they come: one flows onto stdout; several stand below each other while they grow, on a terminal."""

    def __init__(self, prompts: list[str], alone: bool):
        self.prompts, self.alone, self.begun = prompts, alone, False
        self.console = _console()
        self.texts: dict[tuple[str | None, int], str] = {}
        self.live: Live | None = None

    def on_text(self, trial: str | None, prompt: int, text: str) -> None:
        console = self.console
        if self.alone:
            if not self.begun:
                console.print(Text(self.prompts[prompt], style="bold"), soft_wrap=True, end="")
                self.begun = True
            console.print(Text(text), soft_wrap=True, end="")
            sys.stdout.flush()
        elif console.is_terminal:
            if self.live is None:
                self.live = Live(console=console, transient=True, vertical_overflow="crop")
                self.live.start()
            self.texts[trial, prompt] = self.texts.get((trial, prompt), "") + text
            lines = sorted(self.texts.items(), key=lambda item: item[0][1])
            self.live.update(Group(*(_continued(t, self.prompts[p], more) for (t, p), more in lines)))

    def end(self) -> bool:
        """True if everything has been printed already."""
        if self.live is not None:
            self.live.stop()
        if self.begun:
            print()
        return self.begun


def _continued(trial: str | None, prompt: str, continuation: str) -> Text:
    line = Text() if trial is None else Text(f"{trial}  ", style="dim")
    line.append(prompt, style="bold not dim")
    return line.append(continuation, style="not bold not dim")


def print_continuations(pairs: list[dict[str, Any]]) -> None:
    console = _console()
    several = len({pair["trial"] for pair in pairs}) > 1
    for prompt in dict.fromkeys(pair["prompt"] for pair in pairs):
        for pair in (p for p in pairs if p["prompt"] == prompt):
            console.print(_continued(pair["trial"] if several else None, prompt, pair["continuation"]), soft_wrap=True)


def print_memorised(judged: dict[str, Any]) -> None:
    console = _console()
    table = Table(box=SIMPLE_HEAD)
    table.add_column("token")
    for title in ("log p", "p", "rank"):
        table.add_column(title, justify="right")
    for t in judged["tokens"]:
        word = json.dumps(t["token"], ensure_ascii=False)[1:-1]
        style = "bold" if t["greedy"] else ""
        table.add_row(
            Text(word),
            f"{t['log_probability']:.2f}",
            f"{math.exp(t['log_probability']):.3f}",
            str(t["rank"]),
            style=style,
        )
    console.print(table)
    count = len(judged["tokens"])
    console.print(
        f"{judged['nats_per_token']:.2f} nats per token (perplexity {judged['perplexity']:.1f}); the likeliest token at "
        f"{judged['rank_1']:.0%} of {count} places",
        highlight=False,
    )
    if judged["longest_tokens"]:
        line = Text(
            f"longest exact greedy continuation, {judged['longest_tokens']} tokens:  …{judged['longest_after'][-40:]}"
        )
        line.append(judged["longest"], style="bold")
        console.print(line, soft_wrap=True)


def print_models(listing: list[dict[str, Any]]) -> None:
    console = _console()
    for model in listing:
        console.print(Text(model["name"], style="bold"))
        for key, value in model.items():
            if key != "name" and value not in (None, ""):
                console.print(Text(f"  {key:<12} {_plain(value)}"), soft_wrap=True)


def print_doctor(report: dict[str, Any]) -> None:
    console = _console()
    for section, values in report.items():
        console.print(Text(section, style="bold"))
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            console.print(
                Text(
                    f"  {str(key).removesuffix('_bytes'):<16} {_plain(_readable(key, value))}"
                    if isinstance(values, dict)
                    else f"  {_plain(value)}"
                ),
                soft_wrap=True,
            )
        if not values:
            console.print(Text("  none"))


def _readable(key: object, value: Any) -> Any:
    """Bytes, which programs get as integers, in GiB."""
    return f"{value / 2**30:.2f} GiB" if str(key).endswith("_bytes") and isinstance(value, int) else value


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key.removesuffix('_bytes')} {_plain(_readable(key, inner))}" for key, inner in value.items()
        )
    if isinstance(value, list | tuple):
        return ", ".join(_plain(inner) for inner in value)
    return str(value)
