from __future__ import annotations

import pytest

from tests.helpers.trained import Trained, train_study


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished study of every method."""
    return train_study(tmp_path_factory.mktemp("study"))
