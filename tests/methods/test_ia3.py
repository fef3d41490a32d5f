"""(IA)³: which modules, in which architecture, are peft's own choice."""

from __future__ import annotations

import pytest
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)

from katei.core.errors import RecipeError
from katei.methods.contract import TrialFacts
from tests.helpers.models import CONFIGS, settings, tiny_base


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_default_targets_are_pefts(architecture: str) -> None:
    base = tiny_base(architecture)
    config = settings("ia3").build(base, 2, [0], [TrialFacts(1)]).peft_config(0)
    assert set(config["target_modules"]) == set(TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[base.model_type])
    assert config["feedforward_modules"] == TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[base.model_type]


def test_a_scaled_input_is_named_by_its_output() -> None:
    with pytest.raises(RecipeError) as refused:
        settings("ia3", targets=("k_proj", "down_proj"))
    assert "up_proj" in (refused.value.hint or "")
