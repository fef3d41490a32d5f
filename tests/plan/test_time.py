"""Time: what the clock adds up is counted by hand; a calibration's rates are those of this machine's own products."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.models import CONFIGS

from katei.base import ops
from katei.engine.lockstep import Lockstep, Tokens, Trial
from katei.engine.optimizer import Training
from katei.methods.lora import LoRA
from katei.plan.fake import base_of_shape, without_numbers
from katei.plan.time import Clock, Machine, calibrate, epoch_seconds

FREE = Machine({1: 1e30}, 1e30, 1e30, 0.0)
CPU = torch.device("cpu")


def test_a_product_takes_its_operations() -> None:
    x, w = torch.empty(8, 16, device="meta"), torch.empty(4, 16, device="meta")
    with without_numbers(), Clock(replace(FREE, rate={8: 1000.0})) as clock:
        ops.product(x, w)
    assert clock.seconds == pytest.approx(2 * 8 * 16 * 4 / 1000)
    assert clock.calls == 1


def test_one_dnn_makes_a_kernel_for_each_shape_once() -> None:
    if not ops.ONE_DNN:
        pytest.skip("this torch has no oneDNN")
    w = torch.randn(4, 16)
    with Clock(replace(FREE, kernel_seconds=1.0)) as clock:
        for rows in (8, 8, 9):
            ops.product(torch.randn(rows, 16), w)
        ops.product(torch.randn(8, 4), w.t())
        torch.mm(torch.randn(8, 16), w.t())  # another library's
    assert clock.seconds == pytest.approx(3.0)


def test_the_rest_takes_its_bytes_and_a_lookup_no_more_than_it_gives() -> None:
    x, table = torch.empty(8, 16, device="meta"), torch.empty(1000, 16, device="meta")
    ids = torch.zeros(8, dtype=torch.long, device="meta")
    with Clock(replace(FREE, bandwidth=1.0)) as clock:
        x + x
    assert clock.seconds == 3 * x.nbytes
    with Clock(replace(FREE, bandwidth=1.0)) as clock:
        F.embedding(ids, table)
    assert clock.seconds == 2 * x.nbytes


def test_the_overhead_comes_with_every_call_and_hides_behind_a_queue() -> None:
    x = torch.empty(8, 16, device="meta")
    for queued, seconds in ((False, 2 * (5.0 + 3 * x.nbytes)), (True, 2 * 3 * x.nbytes)):
        with Clock(replace(FREE, bandwidth=1.0, call_seconds=5.0, queued=queued)) as clock:
            (x + x) * x
        assert clock.seconds == seconds


def test_between_measured_rows_the_seconds_are_linear() -> None:
    machine = replace(FREE, rate={10: 100.0, 30: 200.0})
    at = {rows: machine.product_seconds(rows, rows * 1.0) for rows in (10, 20, 30, 60)}
    assert at[10] == pytest.approx(0.1)
    assert at[30] == pytest.approx(0.15)
    assert at[20] == pytest.approx((at[10] + at[30]) / 2)
    assert at[60] == pytest.approx(2 * at[30])


def seconds(machine: Machine, rows: int, trials: int) -> float:
    pool = Tokens(tuple(tuple(range(3, 3 + n % 7 + 5)) for n in range(rows + 4)), (0, 1) * ((rows + 4) // 2))
    training = Training(learning_rate=1e-3, epochs=2, batch_size=2)
    valid = tuple(range(rows, rows + 4))
    made = [Trial(f"lora-{k}", LoRA(), k, training, tuple(range(rows)), valid) for k in range(trials)]
    with without_numbers():
        return epoch_seconds(Lockstep(base_of_shape(CONFIGS["llama"], "fp32"), made, 2, pool), machine)


def test_an_epoch_grows_with_its_rows_and_trials() -> None:
    machine = Machine({1: 1e9}, 1e9, 1e9, 1e-5)
    once, twice, two = seconds(machine, 8, 1), seconds(machine, 16, 1), seconds(machine, 8, 2)
    assert 1.6 < twice / once < 2.1
    assert 1.2 < two / once < 2.0


def test_a_calibration_measures_this_machines_products() -> None:
    machine = calibrate(CONFIGS["llama"], torch.float32, CPU, seconds=0.3)
    assert all(value > 0 for value in (*machine.rate.values(), machine.bandwidth, machine.batched_rate))
    assert 1e-7 < machine.call_seconds < 1e-2
    assert 0 <= machine.kernel_seconds < 0.1
    rows, width = 1024, CONFIGS["llama"].hidden_size
    x, w = torch.randn(rows, width), torch.randn(4 * width, width)
    ops.product(x, w)
    started = time.perf_counter()
    for _ in range(20):
        ops.product(x, w)
    rate = 20 * 2 * rows * width * 4 * width / (time.perf_counter() - started)
    assert rate / 10 < machine.rate[1024] < rate * 10
