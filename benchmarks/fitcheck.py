"""katei's plan beside that of fitcheck-llm 0.3.1, on what that one knows: LoRA on a causal LM of Llama's shape.

    pip install --no-deps fitcheck-llm==0.3.1; python -m benchmarks.fitcheck

Each planner is held to what it plans for, on this machine's CPU by one meter (`benchmarks.live`): fitcheck to a training step of peft
(causal LM, LoRA on q, k, v and o, AdamW), without the share that it adds for a GPU's context and allocator; katei to its own step (a
classifier). Both are the peak of live tensors, in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import Figures, arguments, quantile, say
from benchmarks.plan_error import base_folder

SHAPES = ("HuggingFaceTB/SmolLM2-360M", "llm-jp/llm-jp-3-440m", "Qwen/Qwen3-0.6B")
ROWS = ((1, 60), (4, 60), (1, 300), (4, 300))
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 16


def fitcheck_bytes(config: Any, parameters: int, rows: int, tokens: int) -> int:
    from fitcheck.config_parser import ModelConfig
    from fitcheck.estimator import TrainingConfig, estimate
    from fitcheck.gpu_db import GPU_DB

    model = ModelConfig(
        name="model",
        num_params=parameters,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    training = TrainingConfig(
        batch_size=rows, seq_len=tokens, precision="fp32", lora_rank=RANK, lora_targets=TARGETS, flash_attn=True
    )
    report = estimate(model, training, GPU_DB["3090"])
    return int((report.total_mib - report.overhead_mib) * 2**20)


def peft_bytes(folder: Path, rows: int, tokens: int) -> tuple[int, int]:
    """Live bytes of peft's own step, and the model's parameters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from benchmarks.live import LiveBytes

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum({p.data_ptr(): p.nbytes for p in [*model.parameters(), *model.buffers()]}.values())
    outside = [*model.parameters(), *model.buffers()]
    with LiveBytes(outside) as meter:
        tuned = get_peft_model(model, LoraConfig(r=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad])
        ids = torch.arange(rows * tokens).reshape(rows, tokens) % 97 + 3
        for _ in range(2):  # the second step has the moments
            tuned(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights + meter.peak, parameters


def katei_bytes(folder: Path, rows: int, tokens: int) -> tuple[int, int]:
    """Live bytes planned, and those of a real step."""
    from benchmarks.live import LiveBytes
    from katei.base.load import load_base, load_config
    from katei.base.packed import Base
    from katei.engine.lockstep import Lockstep, Trial
    from katei.engine.optimizer import Training
    from katei.methods.lora import LoRA
    from katei.plan.devices import find_device
    from katei.plan.plan import Planner, Run, synthetic

    config = load_config(str(folder))
    method = LoRA(rank=RANK, targets=TARGETS)
    training = Training(learning_rate=1e-4, epochs=2, batch_size=rows)
    trial = Trial("lora", method, 0, training, tuple(range(rows)))
    run = Run((trial,), 2, synthetic(tokens, rows, int(config.vocab_size), 2), token_budget=rows * tokens)
    with Planner(config, "fp32", find_device("cpu")) as planner:
        planned = planner.trace(run).live_peak_bytes
    base = Base(load_base(str(folder)).model)
    weights = sum({t.data_ptr(): t.nbytes for t in base.frozen_tensors()}.values())
    with LiveBytes(base.frozen_tensors()) as meter:
        Lockstep(base, run.trials, 2, run.pool, token_budget=run.token_budget).run()
    return planned, weights + meter.peak


def main() -> None:
    options = arguments(__doc__).parse_args()
    from transformers import AutoConfig

    figures = Figures("plan", quick=options.quick)
    errors: dict[str, list[float]] = {"fitcheck": [], "katei": []}
    for shape in SHAPES[:1] if options.quick else SHAPES:
        folder = base_folder(shape)
        config = AutoConfig.from_pretrained(folder)
        for rows, tokens in ROWS:
            measured, parameters = peft_bytes(folder, rows, tokens)
            theirs = fitcheck_bytes(config, parameters, rows, tokens) / measured - 1
            planned, own = katei_bytes(folder, rows, tokens)
            for name, error in (("fitcheck", theirs), ("katei", planned / own - 1)):
                errors[name].append(error)
                case = f"{shape}, LoRA, {rows} × {tokens} tokens, fp32"
                figures.add(f"live bytes, {name}'s plan ÷ measured - 1", "", [error], case=case)
    for name, values in errors.items():
        sizes = [abs(value) for value in values]
        mean = sum(sizes) / len(sizes)
        say(f"{name}: mean {mean:.1%}, median {quantile(sizes, 0.5):.1%}, worst {max(sizes):.1%} of {len(sizes)}")


if __name__ == "__main__":
    main()
