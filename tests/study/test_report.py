"""report.html and results.csv: every number is the one in the results, every section stands where its data are, and texts stay texts."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from katei import api
from katei.core.errors import RecipeError, RunError
from katei.study.comparison import Comparison, Outcome, Rows
from katei.study.folder import PARTIAL
from katei.study.report.draw import Axis, axis, band, calibration_bins, roc_curve
from katei.study.report.gather import read_predictions
from katei.study.report.words import words_of
from katei.study.scored import scored_rows
from katei.study.statistics import compare_outcomes
from katei.study.verdicts import verdict
from tests.helpers.rows import data_folder
from tests.helpers.simulated import HOSTILE, simulated_run
from tests.helpers.tiny import tiny_base_folder
from tests.helpers.trained import Trained

SECTIONS = "scores differences curves roc calibration cost tuning learning hard trials warnings repeat_it".split()


class Reader(HTMLParser):
    """The page as a machine reads it: its sections, its scores by method and metric, its tags, links and texts."""

    def __init__(self, html: str):
        super().__init__()
        self.sections: list[str] = []
        self.scores: dict[tuple[str, str], list[tuple[float, str]]] = {}
        self.links: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self._method = self._metric = ""
        self._value: float | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.links += [values[key] for key in ("src", "href") if key in values]
        if tag == "section":
            self.sections.append(values["id"])
        if tag == "tr":
            self._method = values.get("data-method", "")
        if tag in ("td", "th"):
            self._metric = values.get("data-metric", "")
        if tag == "data":
            self._value = float(values["value"])

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._value is not None and self._metric:
            self.scores.setdefault((self._method, self._metric), []).append((self._value, data))
        self._value = None


def page_of(run: Path, **how: Any) -> tuple[Reader, dict[str, Any]]:
    result = api.report(run, **how)
    return Reader(Path(result["out"]).read_text(encoding="utf-8")), result


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated_run(tmp_path_factory.mktemp("folds"))


# -------------------------------------------------------------------- numbers


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_every_score_is_the_one_in_the_results(folds: Path, lang: str) -> None:
    page, _ = page_of(folds, lang=lang)
    methods = json.loads((folds / "results.json").read_text())["comparison"]["methods"]
    assert len(methods) == 10
    expected = {
        (m["method"], key.removesuffix("_interval")): [m[key.removesuffix("_interval")], *(m[key] or [])]
        for m in methods
        for key in m
        if key.endswith("_interval")
    }
    assert {key: [value for value, _ in found] for key, found in page.scores.items()} == expected
    for found in page.scores.values():
        assert all(text == f"{value:.3f}" for value, text in found)


def test_every_difference_is_the_one_in_the_results(folds: Path) -> None:
    html = Path(api.report(folds)["out"]).read_text(encoding="utf-8")
    pairs = json.loads((folds / "results.json").read_text())["comparison"]["differences"]
    rows = re.findall(
        r'<tr><th scope="row">([^<]+ − [^<]+)</th><td class="text">([^<]+)</td>(.*?)</tr>', html, re.DOTALL
    )
    names = {words_of("en")[m]: m for m in ("accuracy", "roc_auc")}
    shown = {
        (names[metric], pair): [float(v) for v in re.findall(r'<data value="([^"]+)"', rest)]
        for pair, metric, rest in rows
    }
    assert shown == {(d["metric"], f"{d['first']} − {d['second']}"): [d["difference"], *d["interval"]] for d in pairs}
    forest = re.findall(
        r'<li class="(\w+)[^"]*"><span class="pair"><span>(.*?)</span> − <span>(.*?)</span></span>', html
    )
    says = {
        (d["first"], d["second"]): "different" if d["different"] else "equivalent" if d["equivalent"] else "open"
        for d in pairs
        if d["metric"] == "accuracy"
    }
    assert {(first, second): state for state, first, second in forest} == says
    assert len(set(says.values())) > 1


def test_a_comparison_comes_back_from_json(folds: Path) -> None:
    written = json.loads((folds / "results.json").read_text())
    back = Comparison.from_json(written["comparison"])
    assert json.loads(json.dumps(back.as_json())) == written["comparison"]
    assert verdict(back) == written["verdict"]


@pytest.mark.parametrize("design", ["folds", "given"])
def test_without_a_comparison_the_page_computes_the_same(design: str, tmp_path: Path) -> None:
    """Runs from before there were any hold predictions alone."""
    run = simulated_run(tmp_path, design=design)
    with_it, result = page_of(run)
    results = json.loads((run / "results.json").read_text())
    del results["comparison"]
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    without, computed = page_of(run)
    assert set(without.scores) == set(with_it.scores)
    for key, found in with_it.scores.items():
        assert [v for v, _ in without.scores[key]] == pytest.approx([v for v, _ in found], abs=1e-12), key
    assert computed["verdict"] == result["verdict"]


def test_scored_rows_are_those_that_count(folds: Path) -> None:
    """Settings that were not chosen, and trials with fewer training rows, say nothing of a method."""
    results = json.loads((folds / "results.json").read_text())
    columns = {name: list(values) for name, values in read_predictions(folds).items()}
    expected = scored_rows(columns, results["labels"], results["trials"])
    assert expected is not None
    assert [o.method for o in expected.outcomes][-4:] == ["majority class", "tf-idf", "head", "zero-shot"]
    mine = [i for i, trial in enumerate(columns["trial"]) if trial == "lora-r0f0"]
    first, second = (f"probability_{name}" for name in results["labels"])
    other = {first: second, second: first}
    added = {name: [columns[other.get(name, name)][i] for i in mine] for name in columns}
    added["trial"] = ["lora-r0f0-s1"] * len(mine)
    for (
        name,
        values,
    ) in columns.items():  # the same rows once more, the other way round, from a setting that was not chosen
        values += added[name]
    found = scored_rows(columns, results["labels"], results["trials"])
    assert found is not None
    for a, b in zip(expected.outcomes, found.outcomes, strict=True):
        assert a.probability_SEC is not None
        assert b.probability_SEC is not None
        np.testing.assert_array_equal(a.probability_SEC, b.probability_SEC)
    results["trials"][-2]["share"] = 0.5
    assert results["trials"][-2]["chosen"]
    fewer = scored_rows(columns, results["labels"], results["trials"])
    assert fewer is not None
    assert fewer.left_out == ("llama-adapter",)


def test_results_csv_holds_every_number(folds: Path) -> None:
    result = api.report(folds)
    results = json.loads((folds / "results.json").read_text())
    with Path(result["tidy"]).open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == "trial method seed repeat fold setting share split epoch metric value low high".split()
    epochs = {(x["trial"], int(x["epoch"]), x["split"], x["metric"]): float(x["value"]) for x in lines if x["epoch"]}
    assert len(epochs) == sum(4 * len(t["epochs"]) for t in results["trials"])
    trial = results["trials"][0]
    assert epochs[trial["name"], 3, "valid", "loss"] == trial["epochs"][2]["valid_loss"]
    test = {(x["trial"], x["metric"]): x for x in lines if x["trial"] and x["split"] == "test"}
    assert float(test[trial["name"], "accuracy"]["value"]) == trial["test"]["accuracy"]
    assert float(test[trial["name"], "accuracy"]["low"]) == trial["test"]["accuracy_interval"][0]
    # reference points have no trial in results.json: their parts are scored from the predictions
    columns = read_predictions(folds)
    mine = [i for i, name in enumerate(columns["trial"]) if name == "tf-idf-r1f2"]
    right = [columns["prediction"][i] == columns["label"][i] for i in mine]
    assert float(test["tf-idf-r1f2", "accuracy"]["value"]) == pytest.approx(np.mean(right))
    assert (test["tf-idf-r1f2", "accuracy"]["repeat"], test["tf-idf-r1f2", "accuracy"]["fold"]) == ("1", "2")
    pooled = {(x["method"], x["metric"], x["share"]): x for x in lines if not x["trial"]}
    for scores in results["comparison"]["methods"]:
        assert float(pooled[scores["method"], "brier", ""]["high"]) == scores["brier_interval"][1]
    point = results["learning_curve"]["points"][0]
    assert float(pooled[point["method"], "accuracy", str(point["share"])]["value"]) == point["accuracy"]


# -------------------------------------------------------------------- sections


def test_all_sections_in_their_order(folds: Path) -> None:
    page, _ = page_of(folds)
    assert page.sections == ["verdict", *SECTIONS]


def test_sections_without_data_are_left_out(llama: Trained, tmp_path: Path) -> None:
    """A run as `katei compare` writes it today, of every method."""
    out = tmp_path / "r.html"
    page, result = page_of(llama.run, out=out)
    assert [s for s in page.sections if s in ("tuning", "learning")] == []
    assert {"scores", "differences", "curves", "cost", "hard", "trials", "repeat_it"} <= set(page.sections)
    assert result["out"] == str(out)
    results = json.loads((llama.run / "results.json").read_text())
    for trial in results["trials"]:
        if trial["test"] and (trial["method"], "accuracy") in page.scores:
            assert page.scores[trial["method"], "accuracy"][0][0] == pytest.approx(trial["test"]["accuracy"])
    assert len(page.scores) > 20


def test_a_run_without_test_rows_says_so(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", test=0)
    api.train(data, out=tmp_path / "run", method="lora", model=str(tiny_base_folder(tmp_path)), epochs=1)
    for lang, said in (("en", "No test rows"), ("ja", "テスト行がない")):
        page, result = page_of(tmp_path / "run", lang=lang)
        assert result["verdict"].startswith(said)
        assert [s for s in page.sections if s != "warnings"] == ["verdict", "curves", "cost", "trials", "repeat_it"]


def test_a_study_that_was_stopped_reports_what_there_is(tmp_path: Path) -> None:
    run = simulated_run(tmp_path)
    results = json.loads((run / "results.json").read_text())
    for name in ("results.json", "environment.json", "predictions.parquet"):
        (run / name).unlink()
    for trial in results["trials"]:
        trial |= {"finished": trial["finished"] if trial["chosen"] else None, "chosen": False, "test": None}
    keep = {key: results[key] for key in ("labels", "trials", "design")}
    partial = {**keep, "partial": True, "comparison": None, "verdict": "Stopped."}
    (run / PARTIAL).write_text(json.dumps(partial), encoding="utf-8")
    for lang, said in (("en", "Stopped when 60 of 120 trials"), ("ja", "120 試行のうち 60")):
        page, result = page_of(run, lang=lang)
        assert result["verdict"].startswith(said)
        assert page.sections == ["verdict", "curves", "trials", "repeat_it"]


def test_one_trial_alone(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", labels=("a1", "b1", "c1"), test=15)
    api.train(data, out=tmp_path / "run", method="head", model=str(tiny_base_folder(tmp_path)), epochs=1)
    page, result = page_of(tmp_path / "run")
    assert "nothing to compare it with" in result["verdict"]
    assert "differences" not in page.sections
    assert "roc" in page.sections, "one class against the rest"


def test_a_method_that_diverged_is_left_out_and_named(tmp_path: Path) -> None:
    run = simulated_run(tmp_path, design="given")
    results = json.loads((run / "results.json").read_text())
    del results["comparison"]
    (lost,) = [t for t in results["trials"] if t["method"] == "ia3"]
    lost |= {"finished": "diverged", "test": None}
    lost["epochs"][-1] |= {"train_loss": None, "valid_loss": None}
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    columns = {name: list(values) for name, values in read_predictions(run).items()}
    for name in columns:
        if name.startswith("probability_"):
            columns[name] = [
                float("nan") if m == "ia3" else v for m, v in zip(columns["method"], columns[name], strict=True)
            ]
    pq.write_table(pa.table(columns), run / "predictions.parquet")
    page, result = page_of(run)
    assert result["verdict"].startswith("ia3 diverged")
    assert "ia3" not in {method for method, _ in page.scores}
    assert any("Not in the comparison" in text and "ia3" in text for text in page.texts)


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_results_from_elsewhere(lang: str, tmp_path: Path) -> None:
    table = tmp_path / "book.csv"
    table.write_text("method,correct,rows\nlora,52,54\nadalora,51,54\ntf-idf,44,54\n", encoding="utf-8")
    page, result = page_of(table, lang=lang)
    assert page.sections == ["verdict", "scores", "differences"]
    assert result["out"] == str(tmp_path / "book.report.html")
    assert result["tidy"] is None
    assert page.scores["lora", "accuracy"][0][0] == 52 / 54
    expected = api.compare_from(table, references=["tf-idf"], lang=lang)
    assert result["verdict"] == expected["verdict"]


# -------------------------------------------------------------------- texts


def test_texts_stay_texts(folds: Path) -> None:
    page, _ = page_of(folds)
    assert HOSTILE in page.texts
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert all(link.startswith(("#", "data:,")) for link in page.links)


def test_texts_are_shown_only_if_they_are_those_of_the_run(tmp_path: Path) -> None:
    run = simulated_run(tmp_path)
    data = tmp_path / "data" / "train.jsonl"
    known, _ = page_of(run)
    assert HOSTILE in known.texts
    with data.open("a", encoding="utf-8") as file:
        file.write('{"poem": "one more", "label": "warm"}\n')
    changed, _ = page_of(run)
    assert HOSTILE not in changed.texts
    assert any("train, line 1" in text for text in changed.texts)
    shutil.rmtree(data.parent)
    gone, _ = page_of(run)
    assert HOSTILE not in gone.texts
    assert any("texts cannot be shown" in text for text in gone.texts)


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    run = simulated_run(tmp_path, labels=('<b>"x"</b>', "{{ 7 * 7 }}"))
    page, _ = page_of(run)
    plain, _ = page_of(simulated_run(tmp_path / "plain"))
    assert sorted(page.tags) == sorted(plain.tags), "no name became a tag"
    for name in ('<b>"x"</b>', "{{ 7 * 7 }}"):
        assert any(name in text for text in page.texts)


def test_both_languages_have_the_same_words_and_places() -> None:
    english, japanese = words_of("en"), words_of("ja")
    assert english.keys() == japanese.keys()
    for key, text in english.items():
        places = re.findall(r"\{(\w+)\}", text)
        assert sorted(places) == sorted(re.findall(r"\{(\w+)\}", japanese[key])), key
    with pytest.raises(RecipeError):
        words_of("de")


def test_every_word_is_used() -> None:
    folder = Path(api.__file__).parent / "study" / "report"
    files = [*folder.glob("*.html"), *folder.glob("*.py"), folder.parent / "planning.py"]
    used = "".join(file.read_text(encoding="utf-8") for file in files)
    made = re.compile(r"(part_\w+|f_\w+|facts_\w+|.*_note|accuracy|roc_auc|macro_f1|log_loss|brier|calibration_error)$")
    assert [
        key for key in words_of("en") if f'"{key}"' not in used and f"'{key}'" not in used and not made.match(key)
    ] == []


def test_nothing_is_written_where_the_report_cannot_be(folds: Path, tmp_path: Path) -> None:
    for out, said in ((tmp_path, "is a folder"), (folds / "results.json", "is HTML")):
        before = (folds / "results.json").read_bytes()
        with pytest.raises(RunError, match=said):
            api.report(folds, out=out)
        assert (folds / "results.json").read_bytes() == before


# -------------------------------------------------------------------- what the plots are drawn from


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (-0.13, 0.3, (-0.2, -0.1, 0, 0.1, 0.2, 0.3)),
        (3, 3, (2.4, 2.6, 2.8, 3, 3.2, 3.4, 3.6)),
    ],
)
def test_an_axis_has_round_ticks(low: float, high: float, ticks: tuple[float, ...]) -> None:
    found = axis(low, high)
    assert found.ticks == pytest.approx(ticks)
    assert (found.at(found.low), found.at(found.high)) == (0, 100)
    assert found.low <= low <= high <= found.high
    assert [float(found.label(t)) for t in found.ticks] == pytest.approx(found.ticks), "a tick is what its label says"


def test_a_quarter_is_not_rounded_to_a_tenth() -> None:
    assert [Axis(0.5, 1, (0.5, 0.75, 1)).label(t) for t in (0.5, 0.75, 1)] == ["0.50", "0.75", "1.00"]


def test_roc_curves_have_the_area_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 3):
        labels_E = rng.integers(0, classes, 60)
        score_EC = rng.normal(0, 1, (60, classes)) + 1.5 * np.eye(classes)[labels_E]
        p_EC = np.exp(score_EC) / np.exp(score_EC).sum(1, keepdims=True)
        curve = np.array(roc_curve(p_EC, labels_E))
        area = np.trapezoid(curve[:, 1], curve[:, 0])
        expected = roc_auc_score(labels_E, p_EC[:, 1] if classes == 2 else p_EC, multi_class="ovr")
        assert area == pytest.approx(expected, abs=1e-9 if classes == 2 else 0.01)  # the mean is on a grid of 101
        assert curve[0].tolist() == [0, 0]
        assert curve[-1].tolist() == [1, 1]


def test_calibration_bins_add_up_to_the_error() -> None:
    """The bins drawn are those that the calibration error in the table sums over."""
    rng = np.random.default_rng(1)
    labels_E = rng.integers(0, 2, 50)
    p_E = rng.uniform(0, 1, 50)
    p_EC = np.stack([1 - p_E, p_E], 1)
    bins = calibration_bins(p_EC[None], labels_E)
    error = sum(b.rows / 50 * abs(b.confidence - b.right) for b in bins)
    assert sum(b.rows for b in bins) == 50
    found = compare_outcomes([Outcome("m", p_EC.argmax(1)[None], p_EC[None])], Rows(labels_E, ("a", "b")))
    assert error == pytest.approx(found.methods[0].estimates["calibration_error"].value)


def test_a_band_is_the_median_and_the_middle_half_of_what_is_still_running() -> None:
    curves = [{1: 1.0, 2: 0.5}, {1: 2.0, 2: 0.7, 3: 0.4}, {1: 3.0}, {1: 4.0}, {1: 5.0}]
    found = band(curves)
    assert found.median == ((1.0, 3.0), (2.0, 0.6), (3.0, 0.4))
    assert [y for _, y in found.low] == pytest.approx([2.0, 0.55, 0.4])
    assert [y for _, y in found.high] == pytest.approx([4.0, 0.65, 0.4])
