"""What a process holds of a mapped weights file: measured where the file is here, against the file itself."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tests.helpers.models import CONFIGS
from tests.helpers.tiny import tiny_tokenizer
from transformers import AutoModel

from katei.base.load import load_config
from katei.core.machine import mapped_bytes
from katei.plan.process import LOOKED_AT_BYTES, weights_file

MIB = 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells which pages are mapped")


@linux
def test_looking_at_a_mapped_file_maps_what_lies_around(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 * MIB))
    one = mapped_bytes(file, 0, 64 * MIB, [32 * MIB])
    assert one is not None
    assert 4096 <= one <= 4 * MIB
    assert mapped_bytes(file, 0, 16 * MIB, [32 * MIB]) == 0
    assert mapped_bytes(file, 0, 64 * MIB, range(0, 64 * MIB, 4096)) == 64 * MIB


def test_a_file_that_ends_before_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(100))
    (tmp_path / "nothing").write_bytes(b"")
    assert mapped_bytes(tmp_path / "weights", 0, 4096, [1000]) is None
    assert mapped_bytes(tmp_path / "nothing", 0, 4096, [0]) is None
    assert mapped_bytes(tmp_path / "not there", 0, 4096, [0]) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    AutoModel.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    return tmp_path


def test_the_embedding_is_found_in_its_file(folder: Path) -> None:
    found = weights_file(load_config(str(folder)), torch.float32)
    assert found.place is not None
    file, start = found.place
    with safe_open(file, framework="pt") as weights:
        embedding = weights.get_tensor("embed_tokens.weight")
    there = np.frombuffer(file.read_bytes()[start : start + found.embedding], np.float32)
    assert torch.equal(torch.from_numpy(there.copy()).view(embedding.shape), embedding)
    assert found.rows == len(embedding)
    assert found.unread(range(found.rows)) == 0
    assert 0 <= found.unread([3]) < found.embedding


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1", bytes([3, 0, 0, 0, 0, 0, 0, 0]) + b"[1]"]
)
def test_a_damaged_file_is_left_for_loading_to_name(folder: Path, content: bytes) -> None:
    config = load_config(str(folder))
    (folder / "model.safetensors").write_bytes(content)
    found = weights_file(config, torch.float32)
    assert found.place is None
    assert found.unread([3]) == max(0, found.embedding - LOOKED_AT_BYTES)
