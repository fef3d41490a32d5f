"""katei: parameter-efficient fine-tuning of LLMs on the hardware you have at home."""

__version__ = "0.1.0"
