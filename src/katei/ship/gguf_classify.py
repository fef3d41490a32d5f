"""Classify texts with llama.cpp: its embedding of the last token, times the score head beside this file.

    llama-server -m MODEL.gguf --embeddings --pooling last --port 8080 &
    python classify.py http://127.0.0.1:8080 "a text" "another"

Needs numpy and safetensors. The embedding must come unscaled ("embd_normalize": -1): the head was trained on it as it is.
"""

import json
import sys
import urllib.request
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent


def ask(url: str, question: dict[str, object]) -> object:
    body = json.dumps(question).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def classify(server: str, text: str) -> dict[str, float]:
    """The probability of each label."""
    note = json.loads((HERE / "katei.json").read_text(encoding="utf-8"))
    head_CD = load_file(HERE / "head.safetensors")["score.weight"]
    tokens = ask(f"{server}/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]  # type: ignore[index]
    asked = {"input": tokens[: note["max_length"]], "embd_normalize": -1}
    embedding = ask(f"{server}/embeddings", asked)[0]["embedding"]  # type: ignore[index]
    scores_C = head_CD.astype(np.float64) @ np.array(embedding, dtype=np.float64).reshape(-1)
    p_C = np.exp(scores_C - scores_C.max())
    return dict(zip(note["labels"], (p_C / p_C.sum()).tolist(), strict=True))


if __name__ == "__main__":
    for text in sys.argv[2:]:
        print(json.dumps(classify(sys.argv[1].rstrip("/"), text), ensure_ascii=False))
