from __future__ import annotations

import pytest

from tests.helpers.trained import Trained, train_study


@pytest.fixture(scope="session", params=["llama", "qwen2", "gemma3"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished study of every method on each of three tiny bases."""
    return train_study(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_study(tmp_path_factory.mktemp("llama-alone"))
