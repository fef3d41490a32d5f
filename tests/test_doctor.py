"""`doctor` and `models`: plain data, right about this machine, and every problem says what to do."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path

import psutil
import pytest
import torch

from katei import doctor as module
from katei.base.builtin import BUILTINS
from katei.doctor import doctor, models


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATEI_CACHE", str(tmp_path / "cache"))


def fixes(report: dict[str, object]) -> str:
    return json.dumps(report["problems"])


def test_it_is_plain_data_about_this_machine() -> None:
    report = doctor()
    assert json.loads(json.dumps(report)) == report
    assert list(report) == ["machine", "accelerators", "versions", "cache", "models", "problems"]
    assert (
        1 <= report["machine"]["available_bytes"] <= report["machine"]["memory_bytes"] <= psutil.virtual_memory().total
    )
    assert report["machine"]["threads"] >= 1
    flags = Path("/proc/cpuinfo")
    if flags.exists() and platform.machine() == "x86_64":
        assert report["machine"]["bf16"] == any(
            word in flags.read_text().split() for word in ("amx_bf16", "avx512_bf16")
        )
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(report["accelerators"]) == torch.cuda.device_count() + torch.backends.mps.is_available()
    assert report["cache"]["used_bytes"] == 0
    assert not Path(report["cache"]["folder"]).exists()  # looking creates nothing
    assert all(set(problem) == {"problem", "fix"} and all(problem.values()) for problem in report["problems"])


def test_models_say_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [model["name"] for model in models()] == list(BUILTINS)
    for model in models():
        assert model["installed"] == BUILTINS[model["name"]].installed()
        assert not model["converted"]
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert [model["type"] for model in models()] == [builtin.install for builtin in BUILTINS.values()]
    assert "no built-in base is installed" in fixes(doctor())


def test_the_cache_is_measured(tmp_path: Path) -> None:
    (tmp_path / "cache" / "bases").mkdir(parents=True)
    (tmp_path / "cache" / "bases" / "file").write_bytes(b"x" * 1234)
    assert doctor()["cache"]["used_bytes"] == 1234


def test_low_disk_low_memory_and_a_blocked_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    monkeypatch.setattr(module, "container_limit_bytes", lambda: 10**9)
    (tmp_path / "cache").write_text("a file")
    report = doctor()
    assert report["machine"]["memory_bytes"] == 10**9
    for words in ("0.0 GB are free", "0.9 GiB of memory are available", "cannot be written"):
        assert words in fixes(report)


def test_a_torch_that_does_not_fit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_accelerators", list)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "built for CUDA 12.8 and finds no GPU" in fixes(doctor())
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "a CPU build that cannot use it" in fixes(doctor())


def test_a_package_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "katei needs" not in fixes(doctor())
    monkeypatch.setattr(module, "_version", lambda package: None if package == "gguf" else "0.0.1")
    assert "gguf is not installed; katei needs >=" in fixes(doctor())
    assert "pip install 'torch>=" in fixes(doctor())
