"""The planner against the engine on real tensors, the book's facts, and its errors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.live import LiveBytes
from tests.helpers.models import CONFIGS, tiny_model

from katei import api
from katei.base.packed import Base
from katei.core.errors import BaseError, UserError
from katei.engine.lockstep import Lockstep, Tokens, Trial, score_rows
from katei.engine.optimizer import Training
from katei.methods import METHODS
from katei.methods.contract import TrialFacts, merged_weights
from katei.plan import fake
from katei.plan.devices import find_device
from katei.plan.plan import Planner, Run
from katei.plan.shapes import SHAPES, bundled
from katei.study.planning import in_processes

CPU = replace(find_device("cpu"), usable_bytes=1 << 40)


def run_of(name: str, trials: int, batch_size: int, *, checkpointing: bool = False) -> Run:
    rng = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 40, (6,), generator=rng).tolist()
    ids = tuple(tuple(torch.randint(3, 290, (n,), generator=rng).tolist()) for n in lengths)
    pool, rows = Tokens(ids, tuple(i % 3 for i in range(6))), tuple(range(6))
    method = METHODS[name](**({"layers": 2} if name == "llama-adapter" else {}))
    training = Training(learning_rate=1e-3, epochs=2, batch_size=batch_size)
    made = tuple(Trial(f"{name}-{k}", method, k, training, rows, rows) for k in range(1 if name == "full" else trials))
    return Run(made, 3, pool, (), 64, checkpointing)


@pytest.mark.parametrize(("architecture", "checkpointing"), [("llama", False), ("gemma3", True)])
@pytest.mark.parametrize("name", METHODS)
def test_live_bytes_are_the_real_runs_to_the_byte(
    name: str, architecture: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "LOOKED_AT", 100)  # which step is the heaviest is judged by benchmarks/plan_error.py
    run = run_of(name, trials=3, batch_size=2, checkpointing=checkpointing)
    with Planner(CONFIGS[architecture], "fp32", CPU) as planner:
        trace = planner.trace(run)
    model = tiny_model(architecture)
    base = Base(model)
    outside = {t.data_ptr(): t.nbytes for t in base.frozen_tensors()}
    with LiveBytes(base.frozen_tensors()) as meter:
        Lockstep(base, run.trials, 3, run.pool, token_budget=64, checkpointing=checkpointing).run()
    assert trace.live_peak_bytes == sum(outside.values()) + meter.peak


def test_the_books_facts() -> None:
    result = api.plan(
        model="llm-jp/llm-jp-3-1.8b",
        methods=["lora", "full"],
        device="rtx2070",
        tokens=60,
        settings=None,
        recipe="book",
    )
    lora, full = result["plans"]
    assert lora["trainable"] == 200_704
    assert lora["parts"]["frozen weights"] == pytest.approx(6.2 * 2**30, rel=0.01)
    assert lora["fits"]
    assert not full["fits"]
    assert full["max_tokens"] == 0


@pytest.mark.parametrize("name", SHAPES)
def test_a_bundled_shape_is_a_config_of_transformers(name: str) -> None:
    config = bundled(name)
    assert config is not None
    assert config.hidden_size == SHAPES[name]["hidden_size"]
    assert bundled(f"{name}-instruct") is not None or name.endswith("-pt")


@pytest.mark.parametrize(
    ("typed", "mib"),
    [("rtx2070", 8192), ("RTX 2070", 8192), ("GeForce RTX 4060 Ti", 8188), ("2070", 8192), ("8GB", 8192)],
)
def test_a_device_is_found_however_it_is_written(typed: str, mib: int) -> None:
    assert find_device(typed).capacity_bytes == mib << 20


def test_no_bf16_before_ampere() -> None:
    assert not find_device("rtx2070").bf16
    assert find_device("rtx3060").bf16


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(BaseError) as refused:
        find_device("rtx2071")
    assert "rtx2070" in (refused.value.hint or "")


def test_nf4_is_half_a_byte_and_a_scale_for_each_block() -> None:
    run = run_of("lora", trials=1, batch_size=1)
    with Planner(CONFIGS["llama"], "nf4", CPU) as planner:
        nf4 = planner.trace(run)
    with Planner(CONFIGS["llama"], "bf16", CPU) as planner:
        half = planner.trace(run)
    base = Base(tiny_model("llama"))
    embedding = base.model.get_input_embeddings().weight
    matrices = [w for w in base.model.parameters() if w.dim() == 2 and w is not embedding]
    saved = sum(2 * w.numel() - -(-w.numel() // 2) - 4 * -(-w.numel() // 64) for w in matrices)
    assert half.parts["frozen weights"] - nf4.parts["frozen weights"] == saved
    assert nf4.parts["a weight, dequantised"] == 2 * max(w.numel() for w in matrices)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_method_is_planned_for_every_family_on_a_card(family: str, name: str) -> None:
    with Planner(CONFIGS[family], "fp32", find_device("8GB")) as planner:
        trace = planner.trace(run_of(name, trials=1, batch_size=2))
        assert planner.need(trace) > trace.live_peak_bytes
    inside = trace.parts.get("activations", 0) + trace.parts.get("attention", 0)
    assert sum(trace.layers) <= inside
    if trace.where == "train" and name not in ("llama-adapter", "head"):  # whose lower layers keep nothing
        assert all(trace.layers[:-1]), "backward may have begun with the last one"


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_prediction_and_merge_hold_what_is_planned_to_the_byte(name: str) -> None:
    run = run_of(name, trials=1, batch_size=1)
    method = run.trials[0].method.saved_as()
    with fake.without_numbers():
        shape = fake.base_of_shape(CONFIGS["llama"], "fp32")
        prediction = fake.trace_prediction(shape, method, 3, run.pool, 64)
        merge = fake.trace_merge(shape, method, 3) if method.merges else None
    base = Base(tiny_model("llama"))
    weights = sum({t.data_ptr(): t.nbytes for t in base.frozen_tensors()}.values())
    with LiveBytes(base.frozen_tensors()) as meter:
        stack = method.build(base, 3, [0], [TrialFacts(1)])
        score_rows(base, [stack], [(0, 0, ids) for ids in run.pool.ids], token_budget=64)
    assert prediction.live_peak_bytes == weights + meter.peak
    if merge is not None:
        with LiveBytes(base.frozen_tensors()) as meter:
            stack = method.build(base, 3, [0], [TrialFacts(1)])
            merged = merged_weights(base, stack)
            again = [w.clone() for w in base.model.parameters()]
            assert merge.live_peak_bytes == weights + meter.peak
            assert len(merged) == len(again)
    with Planner(CONFIGS["llama"], "fp32", replace(CPU, usable_bytes=64 << 20)) as planner:
        plan = planner.plan(run)
        assert plan.predict_bytes is not None
        assert (plan.merge_bytes is None) == (not method.merges)


def test_full_fine_tuning_leaves_the_base_of_the_others_alone() -> None:
    lora, full = (run_of(name, trials=1, batch_size=1) for name in ("lora", "full"))
    with Planner(CONFIGS["llama"], "fp32", CPU) as planner:
        alone = planner.trace(lora)
    with Planner(CONFIGS["llama"], "fp32", CPU) as planner:
        planner.trace(full)
        assert planner.trace(lora) == alone


@pytest.mark.parametrize("name", METHODS)
def test_what_fits_most_fits_and_one_more_step_does_not(name: str) -> None:
    run = run_of(name, trials=1, batch_size=1)
    with Planner(CONFIGS["llama"], "fp32", CPU) as planner:
        need = planner.need(planner.trace(run))
        room = replace(CPU, usable_bytes=need + (3 << 20))
    with Planner(CONFIGS["llama"], "fp32", room) as planner:
        plan = planner.plan(run)
        assert plan.fits
        for n, shape in ((plan.max_tokens, (1, 0)), (plan.max_batch_size, (0, 1))):

            def live(k: int, shape: tuple[int, int] = shape) -> int:
                rows, tokens = (1, k) if shape == (1, 0) else (k, run.longest)
                return planner.trace(run.with_rows(rows, tokens, planner.vocabulary)).live_peak_bytes

            assert live(n) <= planner.live_limit(run)
            if n < planner.positions:
                assert live(int(n * 1.03) + 2) > planner.live_limit(run)


@pytest.mark.parametrize("end", [1, 40, 70])
def test_the_search_for_the_most_has_an_end(end: int) -> None:
    run = run_of("ia3", trials=1, batch_size=1)
    with Planner(CONFIGS["llama"], "fp32", CPU) as planner:
        assert planner.most(run, lambda n: (n, run.longest), end) == end


@pytest.mark.parametrize("n", [0, 1, 2, 5, 9])
def test_work_is_dealt_out_and_comes_back_in_order(n: int) -> None:
    assert in_processes(lambda some: [10 * x for x in some], range(n)) == [10 * x for x in range(n)]


def test_the_page_has_the_plans_numbers(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    result = api.plan(model="llm-jp-3-150m", methods=["lora", "full"], device="8GB", tokens=20, html=page, lang="ja")
    text = page.read_text(encoding="utf-8")
    for plan in result["plans"]:
        assert f'value="{plan["device_bytes"]}"' in text
    assert '<html lang="ja">' in text
    assert result["notes"][0].startswith("学習後")
    assert all(note in text for note in result["notes"])
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"precisions": ["fp8"]}, "no precision 'fp8'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 10**6}, "this base reads 4,096 at most"),
        ({"tokens": 8, "classes": 1}, "classes is 1"),
        ({"html": "plan.txt"}, "no name for it"),
        ({"model": "llm-jp/llm-jp-3-1.9b"}, "llm-jp-3-1.9b"),
        ({"methods": ["lara"]}, "no method is named 'lara'"),
        ({"lang": "fr"}, "fr"),
    ],
)
def test_a_mistake_is_named(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        api.plan(**{"model": "llm-jp-3-150m", "device": "8GB", **asked})
