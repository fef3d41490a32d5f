"""Serving: every answer is the offline one, requests share passes, limits hold, bad requests do no harm, stopping loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from katei import api, cli
from katei.core.errors import AdapterError, RecipeError, RunError, UserError
from katei.engine.lockstep import score_rows
from katei.ship import serve as serve_package
from katei.ship.adapters import open_adapter
from katei.ship.predict import predict_texts
from katei.ship.serve.engine import Busy, Engine, Limits, Row, Scoring, run_pass
from katei.ship.serve.guard import is_loopback
from katei.ship.serve.metrics import Metrics
from katei.ship.serve.server import check_binding, listening_socket
from katei.ship.serve.shelf import Shelf, load_shelf
from tests.helpers.rows import data_folder
from tests.helpers.serving import Gate, Running, serving
from tests.helpers.tiny import tiny_base_folder
from tests.helpers.trained import TEXTS, Trained

SERVED = ("adalora", "head", "ia3", "llama-adapter", "lora", "p-tuning", "prefix-tuning", "prompt-tuning")
TOLERANCE = 5e-6
"""Of a probability: the rounding of float32 logits, which depends on a row's neighbours. Measured: 1e-6."""
Probabilities = dict[str, np.ndarray]


def silent(text: str) -> None:
    pass


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def shelf(llama: Trained) -> Shelf:
    return load_shelf([llama.run], say=silent)


@pytest.fixture(scope="module")
def server(shelf: Shelf) -> Iterator[Running]:
    with serving(shelf) as running:
        yield running


@pytest.fixture(scope="module")
def offline(llama: Trained) -> Probabilities:
    """`predict_texts` of each adapter, on a base of its own: (texts, C)."""
    answers = {}
    for name in SERVED:
        base, stack, note = open_adapter(llama.trial(name), say=silent)
        answers[f"run/{name}"] = predict_texts(base, stack, note, TEXTS)
    return answers


def assert_offline(told: dict[str, Any], expected_C: np.ndarray) -> None:
    labels = ["cold", "暖かい"]
    assert list(told["probabilities"]) == labels
    assert np.abs(np.array(list(told["probabilities"].values())) - expected_C).max() < TOLERANCE
    assert told["prediction"] == labels[int(expected_C.argmax())]


# -------------------------------------------------------------------- the answers


def test_every_answer_is_the_offline_one(server: Running, offline: Probabilities) -> None:
    reply = server.post("/classify", {"texts": TEXTS})
    assert reply.status == 200
    results = reply.json["results"]
    assert [list(result) for result in results] == [list(offline)] * len(TEXTS)
    for t, result in enumerate(results):
        for name, told in result.items():
            assert_offline(told, offline[name][t])
            assert not told["cut"]
    assert np.ptp([p[0, 0] for p in offline.values()]) > 0.1, "adapters that answer alike would hide a mix-up"


@pytest.mark.parametrize(
    ("adapters", "names"),
    [("run/lora", ["run/lora"]), (["run/ia3", "run/lora"], ["run/ia3", "run/lora"]), ("all", None), (None, None)],
)
def test_which_adapters_are_asked(
    adapters: Any, names: list[str] | None, server: Running, offline: Probabilities
) -> None:
    (result,) = server.post("/classify", {"texts": TEXTS[:1], "adapters": adapters}).json["results"]
    assert list(result) == (names or list(offline))
    for name, told in result.items():
        assert_offline(told, offline[name][0])


def test_requests_that_wait_together_share_one_pass_and_are_not_mixed_up(
    shelf: Shelf, offline: Probabilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with serving(shelf) as running:
        gate.close()
        first = running.later("/classify", {"texts": TEXTS[:1], "adapters": "run/head"})
        until(lambda: len(gate.passes) == 1)
        asked = [(t, name) for t in range(len(TEXTS)) for name in offline]
        later = [running.later("/classify", {"texts": [TEXTS[t]], "adapters": name}) for t, name in asked]
        until(lambda: running.engine.queued_rows == len(asked))
        gate.open()
        assert first.reply().status == 200
        for (t, name), request in zip(asked, later, strict=True):
            assert_offline(request.reply().json["results"][0][name], offline[name][t])
        one, *rest = gate.passes
        budget = running.engine.limits.token_budget
        tokens = [sum(map(running.engine.tokens, rows)) for rows in rest]
        assert len(one) == 1
        assert max(tokens) <= budget
        assert len(rest) == -(-sum(tokens) // budget) <= 2, "as few passes as the budget allows"
        assert {(r.stack, r.adapter) for r in rest[0]} == {(s.stack, s.adapter) for s in shelf.adapters.values()}
        metrics = running.get("/metrics").body.decode()
        assert f"katei_pass_requests_sum {len(asked) + 1}" in metrics
        assert f"katei_pass_requests_count {1 + len(rest)}" in metrics


def test_a_pass_is_what_the_training_engine_computes(shelf: Shelf) -> None:
    rows = [Row(s.stack, s.adapter, shelf.base.tokenize(text)) for text in TEXTS[:3] for s in shelf.adapters.values()]
    ours = np.stack(run_pass(shelf, rows))
    theirs = score_rows(shelf.base, shelf.stacks, [(r.stack, r.adapter, r.ids) for r in rows], token_budget=10**6)
    assert (ours == theirs).all()


@pytest.fixture(scope="module")
def more(llama: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Other adapters of the same base: three classes, texts cut to 6 tokens; two seeds, which share a stack."""
    folder = tmp_path_factory.mktemp("more")
    data = data_folder(folder / "data", labels=("春", "夏", "秋"))
    settings = {"epochs": 1, "learning_rate": 0.05, "max_length": 6, "batch_size": 4}
    api.compare(
        data, out=folder / "three", model=str(llama.base), methods=["lora", "ia3"], seeds=2, references=[], **settings
    )
    return Trained(folder / "three", llama.base, data)


def test_adapters_with_other_classes_and_lengths_in_the_same_pass(
    llama: Trained, more: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = load_shelf([more.run, llama.trial("lora")], say=silent)
    names = sorted(path.name for path in (more.run / "trials").iterdir())
    assert list(shelf.adapters) == [*(f"three/{name}" for name in names), "run/lora"]
    assert len(shelf.stacks) == 4, "two seeds of a method share a stack; the last one is the base as it is"
    gate = Gate(monkeypatch)
    with serving(shelf) as running:
        results = running.post("/classify", {"texts": TEXTS}).json["results"]
        assert len(gate.passes) == 1
    folders = {f"three/{name}": more.trial(name) for name in names} | {"run/lora": llama.trial("lora")}
    for name, folder in folders.items():
        base, stack, note = open_adapter(folder, say=silent)
        expected = predict_texts(base, stack, note, TEXTS)
        for t, text in enumerate(TEXTS):
            told = results[t][name]
            assert list(told["probabilities"]) == list(note.labels)
            assert np.abs(np.array(list(told["probabilities"].values())) - expected[t]).max() < TOLERANCE
            assert told["prediction"] == note.labels[int(expected[t].argmax())]
            assert told["tokens"] == min(len(base.tokenize(text)), note.max_length)
            assert told["cut"] == (len(base.tokenize(text)) > note.max_length)


def test_a_full_model_is_served_by_itself(llama: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    load_shelf([llama.run], say=said.append)
    assert any("left out run/full" in text for text in said)
    shelf = load_shelf([llama.trial("full")], say=silent)
    base, stack, note = open_adapter(llama.trial("full"), say=silent)
    with serving(shelf) as running:
        results = running.post("/classify", {"texts": TEXTS}).json["results"]
        assert running.post("/generate", {"prompts": ["a"]}).status == 409
    for result, expected_C in zip(results, predict_texts(base, stack, note, TEXTS), strict=True):
        assert_offline(result["run/full"], expected_C)
    with pytest.raises(AdapterError, match="its own base"):
        load_shelf([llama.trial("full"), llama.trial("lora")], say=silent)


def test_one_server_holds_one_base(llama: Trained, tmp_path: Path) -> None:
    other = tiny_base_folder(tmp_path, "llama", seed=5)
    api.train(llama.data, out=tmp_path / "other", method="head", model=str(other), epochs=1)
    with pytest.raises(AdapterError, match=r"'other/head' stands on another base .* than 'run/lora'") as refused:
        load_shelf([llama.trial("lora"), tmp_path / "other"], say=silent)
    assert "--port" in (refused.value.hint or "")
    with pytest.raises(AdapterError, match="other weights"):
        load_shelf([llama.trial("lora")], model=str(other), say=silent)


def test_names_are_one_of_a_kind(llama: Trained, tmp_path: Path) -> None:
    assert list(load_shelf([llama.trial("lora"), llama.trial("lora")], say=silent).adapters) == ["run/lora"]
    api.export(llama.run, out=tmp_path / "a" / "same", trial="lora")
    api.export(llama.run, out=tmp_path / "b" / "same", trial="ia3")
    with pytest.raises(RunError, match="two adapters would be named 'same'"):
        load_shelf([tmp_path / "a" / "same", tmp_path / "b" / "same"], say=silent)
    with pytest.raises(RunError, match="no such run"):
        load_shelf([tmp_path / "nowhere"], say=silent)


def test_an_adapter_that_peft_saved_stands_beside_ours(llama: Trained, offline: Probabilities, tmp_path: Path) -> None:
    """It names its base, not the base's weights: these are compared all the same."""
    api.export(llama.run, out=tmp_path / "from-peft", trial="lora")
    (tmp_path / "from-peft" / "katei.json").unlink()
    shelf = load_shelf([tmp_path / "from-peft", llama.trial("ia3")], say=silent)
    with serving(shelf) as running:
        results = running.post("/classify", {"texts": TEXTS}).json["results"]
    for result, lora_C, ia3_C in zip(results, offline["run/lora"], offline["run/ia3"], strict=True):
        assert_offline(result["run/ia3"], ia3_C)
        assert np.abs(np.array([result["from-peft"]["probabilities"][c] for c in "01"]) - lora_C).max() < TOLERANCE
    config = tmp_path / "from-peft" / "adapter_config.json"
    other = tiny_base_folder(tmp_path, "llama", seed=6)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(other)}))
    with pytest.raises(AdapterError, match="stands on another base"):
        load_shelf([tmp_path / "from-peft", llama.trial("ia3")], say=silent)


# -------------------------------------------------------------------- generation, explanation


@pytest.mark.parametrize("adapter", [None, "run/lora", "run/prefix-tuning", "run/head"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}])
def test_continuations_are_the_offline_ones_whatever_shares_their_passes(
    adapter: str | None, sampling: dict[str, Any], server: Running, llama: Trained, offline: Probabilities
) -> None:
    prompts = ["the iron gate", "春の風がやさしい朝に", "a"]
    body = {"prompts": prompts, "adapter": adapter, "new_tokens": 8, **sampling}
    generation = server.later("/generate", body)
    while not generation.done:
        result = server.post("/classify", {"texts": TEXTS[:2], "adapters": "run/ia3"}).json["results"][0]
        assert_offline(result["run/ia3"], offline["run/ia3"][0])
    where = {"model": str(llama.base)} if adapter is None else {"run": llama.run, "trial": adapter.split("/")[1]}
    assert generation.reply().json == {
        "adapter": adapter,
        "continuations": api.generate(prompts, new_tokens=8, **where, **sampling),
    }


@pytest.mark.parametrize("name", ["lora", "prompt-tuning"])
def test_an_explanation_is_the_text_again_without_each_part(name: str, server: Running, llama: Trained) -> None:
    text = "春の風、 砕けた鏡🦊the iron"
    told = server.post("/explain", {"text": text, "adapter": f"run/{name}"}).json
    base, stack, note = open_adapter(llama.trial(name), say=silent)
    ids = base.tokenize(text, note.max_length)
    assert "".join(part["text"] for part in told["parts"]) == text
    assert told["rest"] == ""
    # every token that is not the tokenizer's own belongs to one part, in order: the parts are runs of ids
    pieces = [base.tokenize(part["text"])[1:] for part in told["parts"]]
    assert [token for piece in pieces for token in piece] == ids[1:]
    whole_C = score_rows(base, [stack], [(0, 0, ids)], token_budget=1024)[0]
    label = int(whole_C.argmax())
    assert told["prediction"] == note.labels[label]
    done = 1
    for part, piece in zip(told["parts"], pieces, strict=True):
        without = ids[:done] + ids[done + len(piece) :]
        done += len(piece)
        expected = whole_C[label] - score_rows(base, [stack], [(0, 0, without)], token_budget=1024)[0][label]
        assert abs(part["effect"] - expected) < TOLERANCE
    assert max(abs(part["effect"]) for part in told["parts"]) > 0.01


def test_an_explanation_shares_passes_and_takes_long_texts_in_groups(
    server: Running, shelf: Shelf, more: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    told = server.post("/explain", {"text": "春の風", "adapter": "run/lora"}).json
    assert [len(rows) for rows in gate.passes] == [1 + len(told["parts"])]
    long = "the iron gate " * 12
    told = server.post("/explain", {"text": long, "adapter": "run/lora"}).json
    assert 32 < len(told["parts"]) <= 64
    assert "".join(part["text"] for part in told["parts"]) == long
    name = next(path.name for path in (more.run / "trials").iterdir())
    with serving(load_shelf([more.trial(name)], say=silent)) as running:
        told = running.post("/explain", {"text": long}).json  # the one adapter there is, which reads 6 tokens
        assert "".join(part["text"] for part in told["parts"]) + told["rest"] == long
        assert told["rest"]


# -------------------------------------------------------------------- limits


def test_overload_is_429_and_what_was_taken_is_answered(
    shelf: Shelf, offline: Probabilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with serving(shelf, queue_rows=6) as running:
        gate.close()
        taken = [running.later("/classify", {"texts": [TEXTS[0]], "adapters": "run/lora"})]
        until(lambda: len(gate.passes) == 1)
        for n in range(1, 7):
            taken.append(running.later("/classify", {"texts": [TEXTS[n]], "adapters": "run/lora"}))
            until(lambda n=n: running.engine.queued_rows == n)
        for _ in range(3):
            reply = running.post("/classify", {"texts": ["one more"], "adapters": "run/lora"})
            assert (reply.status, reply.error["kind"]) == (429, "busy")
            assert int(reply.headers["retry-after"]) >= 1
        assert running.get("/health").status == 200
        gate.open()
        for t, request in enumerate(taken):
            assert_offline(request.reply().json["results"][0]["run/lora"], offline["run/lora"][t])
        assert running.post("/classify", {"texts": ["one more"], "adapters": "run/lora"}).status == 200


def test_a_request_that_is_not_answered_in_time_is_504_and_leaves_the_queue(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with serving(shelf, seconds=0.3) as running:
        gate.close()
        replies = [running.later("/classify", {"texts": ["朝"], "adapters": "run/head"}) for _ in range(3)]
        assert [(r.reply().status, r.reply().error["kind"]) for r in replies] == [(504, "timeout")] * 3
        assert (running.engine.queued_rows, running.engine.queued_tokens) == (0, 0)
        gate.open()
        until(lambda: running.post("/classify", {"texts": ["朝"], "adapters": "run/head"}).status == 200)


def test_a_client_that_leaves_takes_its_rows_along(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with serving(shelf) as running:
        gate.close()
        first = running.later("/classify", {"texts": ["朝"], "adapters": "run/head"})
        until(lambda: len(gate.passes) == 1)
        body = json.dumps({"texts": TEXTS}).encode()
        head = f"POST /classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(head.encode() + body)
            until(lambda: running.engine.queued_rows == len(TEXTS) * len(SERVED))
        until(lambda: running.engine.queued_rows == 0)
        gate.open()
        assert first.reply().status == 200
        assert [len(rows) for rows in gate.passes] == [1], "nothing was computed for nobody"
        assert 'katei_dropped_total{reason="disconnect"} 1' in running.get("/metrics").body.decode()


def test_a_body_that_does_not_come_is_408(shelf: Shelf) -> None:
    with serving(shelf, body_seconds=0.2) as running, socket.create_connection(("127.0.0.1", running.port)) as slow:
        slow.sendall(
            b"POST /classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


# -------------------------------------------------------------------- bad requests

GOOD = {"texts": ["朝"], "adapters": "run/head"}
JSON = {"Content-Type": "application/json"}
NEST = 100_000


def bad(
    name: str, status: int, reason: str, path: str = "/classify", body: Any = None, method: str = "POST", **headers: str
) -> Any:
    raw = body if isinstance(body, bytes | str) else json.dumps(body)
    return pytest.param(status, reason, method, path, raw, JSON | headers, id=name)


BAD = [
    bad("not JSON", 400, "not JSON", body="{texts: 朝}"),
    bad("half of JSON", 400, "not JSON", body='{"texts": ["朝"'),
    bad("no body", 422, "body", body=b""),
    bad("two JSON values", 400, "not JSON", body="{} {}"),
    bad("not UTF-8", 400, "body", body=b'{"texts": ["\xff\xfe"]}'),
    bad("UTF-16, which Python reads", 404, "'x'", body='{"texts": ["朝"], "adapters": "x"}'.encode("utf-16")),
    bad("binary", 400, "", body=bytes(range(256))),
    bad("nested lists", 400, "body", body="[" * NEST + "]" * NEST),
    bad("nested objects", 400, "body", body='{"a":' * NEST + "1" + "}" * NEST),
    bad("nested in its place", 400, "body", body='{"texts": ' + "[" * NEST + "]" * NEST + "}"),
    bad("a list", 422, "dictionary", body=["朝"]),
    bad("null", 422, "", body=None),
    bad("a number with 10,000 digits", 400, "body", body='{"texts": [' + "9" * 10_000 + "]}"),
    bad("a huge body", 413, "larger than", body=b" " * (3 << 20)),
    bad("a wrong content type", 415, "only JSON", body=GOOD, **{"Content-Type": "text/plain"}),
    bad("a form", 415, "only JSON", body="texts=a", **{"Content-Type": "application/x-www-form-urlencoded"}),
    bad("no content type", 415, "only JSON", body=GOOD, **{"Content-Type": ""}),
    bad("no texts", 422, "texts", body={"adapters": "all"}),
    bad("an empty list", 422, "texts", body={"texts": []}),
    bad("texts is a string", 422, "texts", body={"texts": "朝"}),
    bad("a text is a number", 422, "texts.1", body={"texts": ["朝", 5]}),
    bad("a text is null", 422, "texts.0", body={"texts": [None]}),
    bad("a text is a list", 422, "texts.0", body={"texts": [["朝"]]}),
    bad("an unknown key", 422, "txts", body={"texts": ["朝"], "txts": 1}),
    bad("an empty text", 422, "text 2 is empty", body={"texts": ["朝", ""]}),
    bad("a blank text", 422, "text 1 is empty", body={"texts": ["\u3000 \t\u200b"]}),
    bad("NUL", 422, "NUL", body={"texts": ["朝\0夜"]}),
    bad("a lone surrogate", 422, "", body='{"texts": ["\\ud83e"]}'),
    bad("a raw surrogate", 422, "", body='{"texts": ["\ud83e"]}'),
    bad("a surrogate in a key", 422, "", body='{"texts": ["朝"], "\\ud83e": 1}'),
    bad("a surrogate as adapter", 404, "", body='{"texts": ["朝"], "adapters": "\\ud83e"}'),
    bad("too many texts", 413, "at most 512", body={"texts": ["朝"] * 513, "adapters": "run/head"}),
    bad("too many rows", 413, "texts × adapters", body={"texts": ["朝"] * 100}),
    bad("a text of too many tokens", 413, "at most 2,048", body={"texts": ["gate" * 3000]}),
    bad("a text of too many characters", 413, "characters", body={"texts": ["the" * 60_000]}),
    bad("an unknown adapter", 404, "run/lorra", body={"texts": ["朝"], "adapters": "run/lorra"}),
    bad("one unknown of two", 404, "nope", body={"texts": ["朝"], "adapters": ["run/lora", "nope"]}),
    bad("an empty adapter name", 404, "", body={"texts": ["朝"], "adapters": ""}),
    bad("no adapters", 422, "adapters", body={"texts": ["朝"], "adapters": []}),
    bad("adapters is a number", 422, "adapters", body={"texts": ["朝"], "adapters": 3}),
    bad("a path as adapter", 404, "..", body={"texts": ["朝"], "adapters": "../../../../etc/passwd"}),
    bad("a path inside the run", 404, "trials", body={"texts": ["朝"], "adapters": "run/../run/trials/lora"}),
    bad("an absolute path", 404, "/etc", body={"texts": ["朝"], "adapters": "/etc/passwd"}),
    bad("NUL in a name", 404, "", body={"texts": ["朝"], "adapters": "run/lora\0"}),
    bad("a long name", 404, "…", body={"texts": ["朝"], "adapters": "x" * 100_000}),
    bad("a path trick in the address", 404, "", path="/../../etc/passwd", method="GET"),
    bad("an escaped path trick", 404, "", path="/%2e%2e/%2e%2e/etc/passwd", method="GET"),
    bad("no such path", 404, "", path="/clasify", body=GOOD),
    bad("GET where POST is meant", 405, "", path="/classify", method="GET"),
    bad("DELETE", 405, "", path="/adapters", method="DELETE"),
    bad("a preflight", 405, "", path="/classify", method="OPTIONS"),
    bad("explain without adapter", 422, "adapter", path="/explain", body={"text": "朝"}),
    bad("explain an unknown one", 404, "nope", path="/explain", body={"text": "朝", "adapter": "nope"}),
    bad("explain a blank", 422, "empty", path="/explain", body={"text": " ", "adapter": "run/lora"}),
    bad("an empty prompt", 422, "prompt 1", path="/generate", body={"prompts": [""]}),
    bad("no prompts", 422, "prompts", path="/generate", body={"prompts": []}),
    bad("no new tokens", 422, "new_tokens", path="/generate", body={"prompts": ["a"], "new_tokens": 0}),
    bad("negative new tokens", 422, "new_tokens", path="/generate", body={"prompts": ["a"], "new_tokens": -5}),
    bad("a billion new tokens", 413, "at most", path="/generate", body={"prompts": ["a"], "new_tokens": 10**9}),
    bad("new tokens of 40 digits", 413, "at most", path="/generate", body={"prompts": ["a"], "new_tokens": 10**40}),
    bad("half a token", 422, "new_tokens", path="/generate", body={"prompts": ["a"], "new_tokens": 1.5}),
    bad("a word for a number", 422, "new_tokens", path="/generate", body={"prompts": ["a"], "new_tokens": "5"}),
    bad("true for a number", 422, "new_tokens", path="/generate", body={"prompts": ["a"], "new_tokens": True}),
    bad("NaN", 422, "temperature", path="/generate", body='{"prompts": ["a"], "temperature": NaN}'),
    bad("infinity", 422, "temperature", path="/generate", body='{"prompts": ["a"], "temperature": 1e999}'),
    bad("negative temperature", 422, "temperature", path="/generate", body={"prompts": ["a"], "temperature": -1}),
    bad("top_p of 2", 422, "top_p", path="/generate", body={"prompts": ["a"], "top_p": 2}),
    bad("a negative seed", 422, "seed", path="/generate", body={"prompts": ["a"], "seed": -1}),
    bad("a seed of 40 digits", 422, "seed", path="/generate", body={"prompts": ["a"], "seed": 10**40}),
    bad("another host's name", 403, "host", body=GOOD, Host="evil.example"),
    bad("a name like ours", 403, "host", body=GOOD, Host="127.0.0.1.evil.example"),
    bad("another page's origin", 403, "evil", body=GOOD, Origin="http://evil.example"),
    bad("a nowhere page", 403, "null", body=GOOD, Origin="null"),
    bad("reading from elsewhere", 403, "evil", path="/adapters", method="GET", Origin="https://evil.example"),
]


@pytest.mark.parametrize(("status", "reason", "method", "path", "body", "headers"), BAD)
def test_a_bad_request_gets_a_reason_and_does_no_harm(
    status: int, reason: str, method: str, path: str, body: str, headers: dict[str, str], server: Running,
    offline: Probabilities,
) -> None:  # fmt: skip
    reply = server.ask(method, path, body if method == "POST" else None, headers)
    assert reply.status == status, reply.body[:300]
    assert len(reply.body) < 2000
    assert reason in reply.error["message"]
    assert "Traceback" not in reply.body.decode()
    told = server.post("/classify", {"texts": [TEXTS[0]], "adapters": "run/lora"}).json["results"][0]
    assert_offline(told["run/lora"], offline["run/lora"][0])


def test_bytes_that_are_not_http(server: Running) -> None:
    for garbage in (
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nX: " + b"a" * 200_000,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            try:
                connection.sendall(garbage + b"\r\n\r\n")
                assert connection.recv(64).startswith(b"HTTP/1.1 4")
            except ConnectionError:
                pass  # shut in our face: as good an answer
    assert server.get("/health").status == 200


# -------------------------------------------------------------------- who may ask


def test_a_token_is_asked_of_all_but_the_pages_own_files(shelf: Shelf) -> None:
    with serving(shelf, token="open sesame".replace(" ", "-")) as running:
        for path in ("/", "/docs", "/openapi.json", "/health"):
            assert running.get(path).status == 200
        for headers in (
            {},
            {"Authorization": "Bearer open"},
            {"Authorization": "Basic open-sesame"},
            {"Authorization": "é"},
        ):
            for reply in (running.post("/classify", GOOD, **headers), running.get("/metrics", **headers)):
                assert (reply.status, reply.error["kind"]) == (401, "token")
                assert reply.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer open-sesame"}
        assert running.post("/classify", GOOD, **right).status == 200
        assert running.get("/adapters", **right).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:9", 200), ("localhost", 200), ("[::1]:80", 200), ("127.0.0.2", 200), ("a.localhost", 403), ("", 403)],
)
def test_names_of_this_machine(host: str, status: int, server: Running) -> None:
    assert server.get("/adapters", Host=host).status == status


def test_the_servers_own_page_may_ask(server: Running) -> None:
    assert server.post("/classify", GOOD, Origin=f"http://127.0.0.1:{server.port}").status == 200
    reply = server.post("/classify", GOOD)
    assert "access-control-allow-origin" not in reply.headers
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_beyond_loopback_any_name_is_answered_with_the_token(shelf: Shelf) -> None:
    with serving(shelf, token="abcd", host="0.0.0.0") as running:
        right = {"Authorization": "Bearer abcd", "Host": "home.example:8000"}
        assert running.post("/classify", GOOD, **right).status == 200
        assert running.post("/classify", GOOD, **right, Origin="http://evil.example").status == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "myhost.example"])
def test_another_address_wants_a_token(
    host: str, llama: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["katei", "serve", str(llama.run), "--host", host, "--json"])
    monkeypatch.delenv("KATEI_TOKEN", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    assert end.value.code == 2
    assert f"--host {host} --token" in said.err
    assert json.loads(said.out.splitlines()[-1])["error"]["kind"] == "recipe"
    check_binding(host, 8000, "a-token")


def test_what_is_checked_before_anything_is_loaded() -> None:
    for port in (-1, 65536):
        with pytest.raises(RecipeError, match="port"):
            check_binding("127.0.0.1", port, None)
    for token in ("", "two words", "日本", "a\nb"):
        with pytest.raises(RecipeError, match="token"):
            check_binding("127.0.0.1", 8000, token)
    for name in ("queue_rows", "token_budget", "seconds"):
        with pytest.raises(RecipeError, match="more than 0"):
            Limits(**{name: 0})
    with listening_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match="cannot be listened on"):
            listening_socket("127.0.0.1", port)
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "x")] == [
        True
    ] * 3 + [False] * 4


def test_without_the_extra_the_line_to_type(llama: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_package, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="serving needs fastapi and uvicorn") as refused:
        api.serve([llama.run])
    assert refused.value.hint == "pip install 'katei[serve]'"


# -------------------------------------------------------------------- stopping


def test_stopping_finishes_what_was_accepted_and_refuses_the_rest(
    shelf: Shelf, offline: Probabilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with serving(shelf) as running:
        gate.close()
        accepted = [running.later("/classify", {"texts": [text], "adapters": "run/lora"}) for text in TEXTS]
        until(lambda: sum(map(len, gate.passes)) + running.engine.queued_rows == len(TEXTS))
        running.server.handle_exit(signal.SIGTERM, None)
        until(lambda: not running.engine.accepting)
        reply = running.post("/classify", GOOD)
        assert (reply.status, reply.error["kind"]) == (503, "stopping")
        assert running.get("/health").status == 503
        gate.open()
        for t, request in enumerate(accepted):
            assert_offline(request.reply().json["results"][0]["run/lora"], offline["run/lora"][t])
        running.thread.join(20)
        assert not running.thread.is_alive()
        assert running.result["rows"] == len(TEXTS)
        with pytest.raises(ConnectionRefusedError):
            running.get("/health")


def test_the_command_ends_well_on_sigterm(llama: Trained, offline: Probabilities) -> None:
    command = [sys.executable, "-c", "from katei.cli import main; main()", "serve"]
    arguments = [str(llama.trial("lora")), str(llama.trial("ia3")), "--port", "0", "--json"]
    environment = os.environ | {"COLUMNS": "200"}
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"http://127\.0\.0\.1:(\d+)", line) for line in process.stderr)))
        running = Running(int(found[1]), None, None)  # type: ignore[arg-type]
        result = running.post("/classify", {"texts": TEXTS}).json["results"]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert list(result[0]) == ["run/lora", "run/ia3"]
    for t in range(len(TEXTS)):
        assert_offline(result[t]["run/ia3"], offline["run/ia3"][t])
    assert json.loads(out.splitlines()[-1])["rows"] == 2 * len(TEXTS)
    assert "Traceback" not in err


# -------------------------------------------------------------------- the engine alone


@pytest.fixture
def engine(shelf: Shelf) -> Iterator[Engine]:
    one = Engine(shelf, Limits(token_budget=64, queue_tokens=4000), Metrics())
    yield one
    one.close()


def job(shelf: Shelf, rows: int, tokens: int = 8, token: int = 5) -> Scoring:
    served = shelf.adapters["run/head"]
    return Scoring([Row(served.stack, served.adapter, [token] * tokens) for _ in range(rows)])


def test_a_small_job_passes_a_large_one_and_equal_ones_keep_their_order(
    shelf: Shelf, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    large, small, equal = job(shelf, 100), job(shelf, 1, token=6), job(shelf, 100, token=7)
    for one in (large, small, equal):
        engine.submit(one)
    engine.start()
    for one in (large, small, equal):
        assert len(one.future.result(30)) == len(one.answers)
    order = [row.ids[0] for rows in gate.passes for row in rows]
    assert order == [6] + [5] * 100 + [7] * 100
    assert all(sum(map(engine.tokens, rows)) <= 64 for rows in gate.passes)
    assert (engine.queued_rows, engine.queued_tokens) == (0, 0)


def test_the_queue_is_bounded_in_rows_and_tokens(shelf: Shelf, engine: Engine) -> None:
    engine.submit(job(shelf, 10, tokens=300))
    with pytest.raises(Busy) as busy:
        engine.submit(job(shelf, 4, tokens=300))
    assert busy.value.retry_seconds >= 1
    engine.submit(job(shelf, 3, tokens=300))
    assert (engine.queued_rows, engine.queued_tokens) == (13, 3900)


def test_a_row_that_fails_fails_its_own_job_alone(
    shelf: Shelf, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from katei.ship.serve import engine as module

    honest = module.run_pass

    def failing(shelf: Shelf, rows: list[Row]) -> list[Any]:
        if any(row.ids[0] == 13 for row in rows):
            raise MemoryError("out of memory")
        return honest(shelf, rows)

    monkeypatch.setattr(module, "run_pass", failing)
    good, poisoned, other = job(shelf, 2), job(shelf, 2, token=13), job(shelf, 1, token=9)
    for one in (good, poisoned, other):
        engine.submit(one)
    engine.start()
    assert len(good.future.result(30)) == 2
    assert len(other.future.result(30)) == 1
    with pytest.raises(MemoryError):
        poisoned.future.result(30)
    again = job(shelf, 1)
    engine.submit(again)
    assert len(again.future.result(30)) == 1, "the thread lives on"


def test_numbers_that_overflow_are_no_answer(shelf: Shelf, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from katei.ship.serve import engine as module

    monkeypatch.setattr(module, "run_pass", lambda shelf, rows: [np.array([np.nan, np.nan])] * len(rows))
    one = job(shelf, 2)
    engine.submit(one)
    engine.start()
    with pytest.raises(module.NotFinite):
        one.future.result(30)
    assert (engine.queued_rows, engine.queued_tokens) == (0, 0)


# -------------------------------------------------------------------- what else is read


def test_metrics_are_prometheus_text(server: Running) -> None:
    server.post("/classify", GOOD)
    reply = server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    typed, values = {}, {}
    for line in reply.body.decode().splitlines():
        if line.startswith("# TYPE"):
            typed[line.split()[2]] = line.split()[3]
        elif not line.startswith("#"):
            match = re.fullmatch(r'([a-z_]+)(\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})? ([-+.e\d]+)', line)
            assert match, line
            values[match[1] + (match[2] or "")] = float(match[3])
            assert re.sub(r"_(bucket|sum|count)$", "", match[1]) in typed or match[1] in typed
    assert values['katei_requests_total{endpoint="/classify",status="200"}'] >= 1
    assert values['katei_rows_total{adapter="run/head"}'] >= 1
    assert values["katei_pass_seconds_count"] >= 1
    assert values['katei_pass_seconds_bucket{le="+Inf"}'] == values["katei_pass_seconds_count"]
    assert values["katei_resident_bytes"] > 1e7
    assert values["katei_queue_rows"] == 0


def test_what_there_is_to_ask(server: Running, shelf: Shelf) -> None:
    told = server.get("/adapters").json
    assert [adapter["name"] for adapter in told["adapters"]] == [f"run/{name}" for name in SERVED]
    assert all(adapter["labels"] == ["cold", "暖かい"] for adapter in told["adapters"])
    assert told["base"] == Path(shelf.base.name).name
    assert told["generates"]


def test_the_endpoints_page_needs_no_network(server: Running) -> None:
    described = server.get("/openapi.json").json
    page = server.get("/docs")
    text = page.body.decode()
    for path in ("/classify", "/explain", "/generate", "/adapters", "/health", "/metrics"):
        assert path in described["paths"]
        assert f"<code>{path}</code>" in text
    for name in ("probabilities", "new_tokens", "effect"):
        assert name in text
    assert "script" not in text
    assert set(re.findall(r"https?://[^\s<&'\"]+", text)) == {
        f"http://127.0.0.1:8000{path}" for path in described["paths"]
    }
    assert "default-src 'none'" in page.headers["content-security-policy"]
