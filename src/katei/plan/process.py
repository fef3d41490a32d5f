"""What a process on the CPU holds at its peak: the resident memory that `ru_maxrss` and a task manager show.

    resident = what was there before the base (Python, torch, transformers, the tokenizer, the data: measured, not guessed)
             + weights
             + the other live tensors at the peak × (1 + SLACK)
             + SCRATCH_BYTES               oneDNN's and the BLAS' own buffers, thread stacks, the autograd engine
"""

from __future__ import annotations

SLACK = 0.0
SCRATCH_BYTES = 0


def process_bytes(resident: int, weights: int, live_peak: int) -> int:
    return resident + weights + int((live_peak - weights) * (1 + SLACK)) + SCRATCH_BYTES


def resident_bytes() -> int:
    """Of this process, now."""
    import psutil

    return int(psutil.Process().memory_info().rss)
