"""A comparison in one or two plain sentences, English or Japanese: who is better, what cannot be told, what it would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from katei.core.errors import RecipeError, nearest
from katei.study.comparison import COMMONEST, MAJORITY, Comparison, Difference

LANGUAGES = ("en", "ja")
Words: TypeAlias = "type[_English] | type[_Japanese]"


def check_language(lang: str) -> str:
    if lang not in LANGUAGES:
        raise RecipeError(f"no language '{lang}'", hint=f"--lang en or ja; {nearest(lang, LANGUAGES)}")
    return lang


def _words(lang: str) -> Words:
    return _English if check_language(lang) == "en" else _Japanese


def verdict(comparison: Comparison, lang: str = "en") -> str:
    """What may be said of these scores, and no more."""
    words = _words(lang)
    said = [*_ranking(comparison, words), *_equalities(comparison, words)]
    said += [*_cost(comparison, words), *_references(comparison, words)]
    return words.joined(said)


def note(comparison: Comparison, lang: str = "en") -> str | None:
    """What the reader must know of how it was compared."""
    words = _words(lang)
    return {"counts": words.unpaired, "folds": words.folds, "seeds": words.seeds}.get(comparison.kind)


def more_labels(doubled: Mapping[str, Any], lang: str = "en") -> str:
    """Would more labels help? From what the last doubling of the training rows gained (`learning_curve`)."""
    return _words(lang).more_labels(doubled)


def _ranking(c: Comparison, words: Words) -> list[str]:
    scores = [s for s in c.methods if s.method not in c.references]
    if not scores:
        return []
    best, *others = [s.method for s in scores]
    pairs = _pairs(c)
    if not others:
        return [
            words.alone(best, scores[0].accuracy, scores[0].estimates["accuracy"].interval, c.rows, bool(c.references))
        ]
    real = [d for d in pairs if d.different]
    if not real:
        return [words.none(len(scores), min(pairs, key=lambda d: (d.p, -abs(d.value))), c.rows)]
    beaten = [d for d in real if d.first == best]
    level = [m for m in others if m not in [d.second for d in beaten]]
    said = [words.better(best, beaten, level)] if beaten else []
    rest = [d for d in real if d.first != best]
    if rest:
        said.append(words.also(rest))
    group = [best, *level]
    if len(group) > 2 and not any({d.first, d.second} <= set(group) for d in real):
        said.append(words.group(group))
    elif not beaten:
        said.append(words.level(best, level))
    return said


def _pairs(c: Comparison) -> list[Difference]:
    """Of methods, none of them a reference point."""
    return [d for d in c.of("accuracy") if not {d.first, d.second} & set(c.references)]


def _equalities(c: Comparison, words: Words) -> list[str]:
    same = [d for d in _pairs(c) if d.equivalent(c.margin)]
    return [words.equal(same, c.margin)] if same else []


def _cost(c: Comparison, words: Words) -> list[str]:
    """Of the best two that are not told apart."""
    pair = next((d for d in _pairs(c) if not d.different and not d.equivalent(c.margin)), None)
    if pair is None:
        return []
    if abs(pair.value) < 1e-9:
        return [words.same_score(pair, c.margin, c.rows_for_equivalence)]
    return [words.cost(pair, c.rows, c.seeds if c.kind == "seeds" else None, c.detectable)]


def _references(c: Comparison, words: Words) -> list[str]:
    tuned = [s.method for s in c.methods if s.method not in c.references]
    if not tuned:
        return []
    names = {name: {d.first for d in c.of("accuracy") if d.different and d.second == name} for name in c.references}
    if c.commonest is not None and MAJORITY not in c.references:  # else it is there, fitted to the training rows
        beaten = {d.first for d in c.against_commonest if d.different and d.value > 0 and d.second == COMMONEST}
        names[words.commonest(*c.commonest)] = beaten
    by_missing: dict[tuple[str, ...], list[str]] = {}
    for name, beaten in names.items():
        by_missing.setdefault(tuple(m for m in tuned if m not in beaten), []).append(name)
    said = [words.reference(names, missing, len(tuned)) for missing, names in by_missing.items()]
    worse = {n: [d.second for d in c.of("accuracy") if d.different and d.first == n] for n in c.references}
    return said + [words.reference_better(name, methods) for name, methods in worse.items() if methods]


class _English:
    unpaired = (
        "Counts do not say which rows each method got right, so these are compared as if each had test rows of its own. "
        "If all were scored on the same rows, a table of predictions (method, row, label, prediction) tells more."
    )
    folds = "Folds share their training rows; the intervals are widened for that (corrected resampled t)."
    seeds = "The intervals count the noise of seeds and of rows; with few seeds they are wide."

    @staticmethod
    def joined(said: Sequence[str]) -> str:
        return " ".join(said)

    @staticmethod
    def names(names: Sequence[str]) -> str:
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

    @staticmethod
    def of(d: Difference) -> str:
        return f"{d.value:+.3f}, 95 % interval {d.interval[0]:+.3f} to {d.interval[1]:+.3f}"

    @staticmethod
    def p(d: Difference) -> str:
        return f"adjusted p {'< 0.001' if d.p_adjusted < 0.001 else f'= {d.p_adjusted:.3f}'}"

    @classmethod
    def alone(cls, name: str, accuracy: float, interval: tuple[float, float] | None, rows: int, referred: bool) -> str:
        more = "" if referred else "; there is nothing to compare it with"
        return f"{name}: accuracy {accuracy:.3f}{cls._between(interval)} on {_rows(rows)}{more}."

    @staticmethod
    def _between(interval: tuple[float, float] | None) -> str:
        return "" if interval is None else f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})"

    @classmethod
    def none(cls, methods: int, d: Difference, rows: int) -> str:
        if methods == 2:
            return f"{d.first} and {d.second} cannot be told apart on {_rows(rows)} ({cls.of(d)}, {cls.p(d)})."
        if abs(d.value) < 1e-9:
            return f"No two of the {methods} methods can be told apart on {_rows(rows)}."
        return (
            f"No two of the {methods} methods can be told apart on {_rows(rows)}: even {d.first} against {d.second} "
            f"({cls.of(d)}) is within chance among so many pairs ({cls.p(d)})."
        )

    @classmethod
    def better(cls, best: str, beaten: Sequence[Difference], level: Sequence[str]) -> str:
        shown = [f"{d.second} ({cls.of(d)}, {cls.p(d)})" for d in beaten[:3]]
        if len(beaten) > 3:
            shown.append(f"{len(beaten) - 3} more")
        if level:
            return f"{best} is better than {cls.names(shown)}; it cannot be told apart from {cls.names(level)}."
        everyone = "every other method: " if len(beaten) > 1 else ""
        return f"{best} is better than {everyone}{cls.names(shown)}."

    @classmethod
    def also(cls, rest: Sequence[Difference]) -> str:
        shown = [f"{d.first} than {d.second}" for d in rest[:4]]
        return f"Better as well: {cls.names([*shown, f'{len(rest) - 4} more pairs'] if len(rest) > 4 else shown)}."

    @classmethod
    def group(cls, names: Sequence[str]) -> str:
        return f"No two of {cls.names(names)} can be told apart."

    @classmethod
    def level(cls, best: str, names: Sequence[str]) -> str:
        return f"{best}, with the highest score, cannot be told apart from {cls.names(names)}."

    @classmethod
    def equal(cls, same: Sequence[Difference], margin: float) -> str:
        shown = [f"{d.first} = {d.second}" for d in same[:4]] + (
            [f"{len(same) - 4} more pairs"] if len(same) > 4 else []
        )
        return f"Equal to within ±{margin:g}: {cls.names(shown)}."

    @staticmethod
    def same_score(d: Difference, margin: float, rows: int | None) -> str:
        more = f"to show them equal to within ±{margin:g} takes about {_about(rows or 0)} rows"
        return f"{d.first} and {d.second} have the same score; {more}."

    @classmethod
    def cost(cls, d: Difference, rows: int, seeds: int | None, detectable: float | None) -> str:
        said = f"Were the {d.value:+.3f} of {d.first} over {d.second} true, it would take about {cls._more(d, seeds)} to show it"
        if detectable is not None:
            return f"{said}; {_rows(rows)} can be expected to show differences of {detectable:.2f} and more."
        return f"{said}."

    @staticmethod
    def _more(d: Difference, seeds: int | None) -> str:
        if d.needed is None or d.needed.rows is None:
            return "far more rows and seeds than can be had"
        with_seeds = f" and {d.needed.seeds:,} seeds" if seeds is not None and d.needed.seeds is not None else ""
        return f"{_about(d.needed.rows)} rows{with_seeds}"

    @staticmethod
    def commonest(label: str, accuracy: float) -> str:
        return f"always answering '{label}' ({accuracy:.3f})"

    @classmethod
    def reference(cls, names: Sequence[str], missing: Sequence[str], tuned: int) -> str:
        if not missing:
            return f"{'It beats' if tuned == 1 else 'All of them beat'} {cls.names(names)}."
        either = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        if len(missing) == tuned:
            return f"{'It is not shown to beat' if tuned == 1 else 'None of them is shown to beat'} {either}."
        return f"Not shown to beat {either}: {cls.names(missing)}."

    @classmethod
    def reference_better(cls, name: str, methods: Sequence[str]) -> str:
        return f"{name} is better than {cls.names(methods)}."

    @staticmethod
    def more_labels(d: Mapping[str, Any]) -> str:
        if d["answer"] == "untrained":
            return "No method was trained to its end on all rows."
        if d["answer"] == "too few":
            return f"{d['method']} has too few training rows to take half of them away."
        seen = (
            f"from {d['half_rows']:,} to {d['all_rows']:,} training rows {d['method']} changed by {d['gain']:+.3f} "
            f"(95 % interval {d['interval'][0]:+.3f} to {d['interval'][1]:+.3f})"
        )
        return {
            "yes": f"More labels would help: {seen}; another doubling can be expected to gain something, and less than that.",
            "hardly": f"More labels of this kind would hardly help: {seen}, which is within ±{d['margin']:g}.",
            "unknown": f"Whether more labels would help cannot be told: {seen}.",
        }[d["answer"]]


class _Japanese:
    unpaired = (
        "正解数だけでは、どの行に正解したかが分からないため、手法ごとに別々のテスト行を使ったものとして比べました。"
        "同じ行で測ったのなら、行ごとの予測の表（method, row, label, prediction）を渡すとより多くのことが分かります。"
    )
    folds = "分割（fold）どうしは学習行を共有するため、区間をそのぶん広げています（補正リサンプル t）。"
    seeds = "区間はシードによるばらつきと行によるばらつきの両方を含みます。シードが少ないと区間は広くなります。"

    @staticmethod
    def joined(said: Sequence[str]) -> str:
        return "".join(said)

    @staticmethod
    def names(names: Sequence[str]) -> str:
        return "、".join(names)

    @staticmethod
    def of(d: Difference) -> str:
        return f"差 {d.value:+.3f}、95 % 区間 {d.interval[0]:+.3f} ～ {d.interval[1]:+.3f}"

    @staticmethod
    def p(d: Difference) -> str:
        return f"調整済み p {'< 0.001' if d.p_adjusted < 0.001 else f'= {d.p_adjusted:.3f}'}"

    @classmethod
    def alone(cls, name: str, accuracy: float, interval: tuple[float, float] | None, rows: int, referred: bool) -> str:
        between = "" if interval is None else f"（95 % 区間 {interval[0]:.3f} ～ {interval[1]:.3f}）"
        said = f"{name} の正解率は {rows:,} 行で {accuracy:.3f}{between}です。"
        return said if referred else f"{said}比べる相手がありません。"

    @classmethod
    def none(cls, methods: int, d: Difference, rows: int) -> str:
        if methods == 2:
            return f"{rows:,} 行では {d.first} と {d.second} の優劣は分かりません（{cls.of(d)}、{cls.p(d)}）。"
        if abs(d.value) < 1e-9:
            return f"{rows:,} 行では、{methods} 手法のどの 2 つも優劣は分かりません。"
        return (
            f"{rows:,} 行では、{methods} 手法のどの 2 つも優劣は分かりません。"
            f"最も離れた {d.first} と {d.second}（{cls.of(d)}）でも、これだけの組を比べれば偶然で起こる範囲です（{cls.p(d)}）。"
        )

    @classmethod
    def better(cls, best: str, beaten: Sequence[Difference], level: Sequence[str]) -> str:
        shown = [f"{d.second}（{cls.of(d)}、{cls.p(d)}）" for d in beaten[:3]]
        if len(beaten) > 3:
            shown.append(f"ほか {len(beaten) - 3} 手法")
        return f"{best} は {cls.names(shown)}より良いと言えます。" + (
            f"{cls.names(level)} との優劣は分かりません。" if level else ""
        )

    @classmethod
    def also(cls, rest: Sequence[Difference]) -> str:
        shown = [f"{d.first} は {d.second} より" for d in rest[:4]]
        more = f"（ほか {len(rest) - 4} 組）" if len(rest) > 4 else ""
        return f"また、{cls.names(shown)}良いと言えます{more}。"

    @classmethod
    def group(cls, names: Sequence[str]) -> str:
        return f"{cls.names(names)} のうち、どの 2 つも優劣は分かりません。"

    @classmethod
    def level(cls, best: str, names: Sequence[str]) -> str:
        return f"最高得点の {best} と {cls.names(names)} の優劣は分かりません。"

    @classmethod
    def equal(cls, same: Sequence[Difference], margin: float) -> str:
        shown = [f"{d.first} と {d.second}" for d in same[:4]] + ([f"ほか {len(same) - 4} 組"] if len(same) > 4 else [])
        return f"差が ±{margin:g} 以内で同等と言えるのは、{cls.names(shown)} です。"

    @staticmethod
    def same_score(d: Difference, margin: float, rows: int | None) -> str:
        return (
            f"{d.first} と {d.second} は同点です。±{margin:g} 以内で同等と示すには約 {_about(rows or 0)} 行が必要です。"
        )

    @classmethod
    def cost(cls, d: Difference, rows: int, seeds: int | None, detectable: float | None) -> str:
        said = f"{d.first} と {d.second} の差 {d.value:+.3f} が本当だとしても、それを示すには{cls._more(d, seeds)}が必要です。"
        if detectable is not None:
            said += f"{rows:,} 行で見つけられるのは、およそ {detectable:.2f} 以上の差です。"
        return said

    @staticmethod
    def _more(d: Difference, seeds: int | None) -> str:
        if d.needed is None or d.needed.rows is None:
            return "現実的でないほど多くの行とシード"
        with_seeds = f"とシード {d.needed.seeds:,} 個" if seeds is not None and d.needed.seeds is not None else ""
        return f"約 {_about(d.needed.rows)} 行{with_seeds}"

    @staticmethod
    def commonest(label: str, accuracy: float) -> str:
        return f"常に「{label}」と答える方法（{accuracy:.3f}）"

    @classmethod
    def reference(cls, names: Sequence[str], missing: Sequence[str], tuned: int) -> str:
        them = cls.names(names)
        them += "" if them.endswith("）") else " "
        if not missing:
            return f"{'' if tuned == 1 else 'どの手法も、'}{them}を上回ります。"
        if len(missing) == tuned:
            return f"{'' if tuned == 1 else 'どの手法も、'}{them}を上回るとは言えません。"
        return f"{them}を上回ると言えないのは {cls.names(missing)} です。"

    @classmethod
    def reference_better(cls, name: str, methods: Sequence[str]) -> str:
        return f"{name} は {cls.names(methods)} より良いと言えます。"

    @staticmethod
    def more_labels(d: Mapping[str, Any]) -> str:
        if d["answer"] == "untrained":
            return "全行で最後まで学習できた手法がありません。"
        if d["answer"] == "too few":
            return f"{d['method']} は学習行が少なすぎて、半分に減らせません。"
        seen = (
            f"学習行を {d['half_rows']:,} 行から {d['all_rows']:,} 行にしたとき、{d['method']} の正解率は {d['gain']:+.3f} "
            f"変わりました（95 % 区間 {d['interval'][0]:+.3f} ～ {d['interval'][1]:+.3f}）"
        )
        return {
            "yes": f"ラベルを増やせば良くなります。{seen}。さらに 2 倍にしても、伸びはこれより小さいはずです。",
            "hardly": f"この種のラベルを増やしても、ほとんど変わりません。{seen}。±{d['margin']:g} の範囲内です。",
            "unknown": f"ラベルを増やして良くなるかは分かりません。{seen}。",
        }[d["answer"]]


def _rows(rows: int) -> str:
    return f"{rows:,} row{'s' * (rows != 1)}"


def _about(rows: int) -> str:
    """Two digits: more would say more than is known."""
    digits = len(str(rows))
    return f"{round(rows, 2 - digits):,}" if digits > 2 else str(rows)
