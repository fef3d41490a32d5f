"""What may be said of the scores, and no more."""

from __future__ import annotations

from typing import Any

from katei.core.metrics import wilson_interval
from katei.study.run import verdict


def trial(name: str, correct: int, rows: int = 54, finished: str = "done") -> dict[str, Any]:
    test = {"accuracy": correct / rows, "accuracy_interval": wilson_interval(correct, rows), "rows": rows}
    return {"name": name, "finished": finished, "test": None if finished == "diverged" else test}


def test_one_trial_is_compared_with_the_commonest_class() -> None:
    assert "This trial beats always answering the commonest class (0.704)" in verdict([trial("a", 50)], 0.704)
    assert "is not shown to beat" in verdict([trial("a", 40)], 0.704)


def test_overlapping_intervals_are_not_ranked() -> None:
    said = verdict([trial("a", 53), trial("b", 51), trial("c", 38)], 0.704)
    assert said.startswith("2 of 3 trials beat")
    assert "Not shown to beat it: c." in said
    assert "1 of the other 2 have intervals that overlap the best one's: this table does not rank them." in said
    assert "The two intervals overlap" in verdict([trial("a", 53), trial("b", 51)], 0.704)
    assert "rank" not in verdict([trial("a", 54), trial("b", 30)], 0.704)


def test_diverged_trials_and_missing_rows_are_said() -> None:
    said = verdict([trial("a", 53), trial("b", 0, finished="diverged")], 0.704)
    assert said.startswith("b diverged: try a smaller learning rate. This trial beats")
    assert "No test rows" in verdict([{"name": "a", "finished": "done", "test": None}], None)
