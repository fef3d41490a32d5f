"""A base folder on disk: config.json, model*.safetensors, a tokenizer. Checked and identified without loading it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from katei.base.builtin import WHAT_MODEL_MAY_BE
from katei.core.errors import BaseError

Say = Callable[[str], None]

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
NOT_PLAIN = {"I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"}
CHUNK = 1 << 24


def silent(message: str) -> None:
    """The `say` of a caller that wants no messages."""


def check_folder(folder: Path, *, weights: bool = True) -> Path:
    """`folder`, if all that loading needs is there and whole; raises BaseError otherwise. Reads headers, not weights.

    `weights=False` asks for config and tokenizer only.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise BaseError("no permission to read this folder", file=folder, hint=f"chmod -R u+rX {folder}")
    config = read_config(folder)
    if (folder / "adapter_config.json").exists():
        raise BaseError(
            "the folder holds an adapter beside a base",
            file=folder,
            hint="move adapter_config.json to a folder of its own",
        )
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "some method")
        raise BaseError(
            f"the weights are quantised ({method}); katei needs the plain ones",
            file=folder,
            hint="give the unquantised base (fp32, bf16 or fp16), or a GGUF file",
        )
    for file in weight_files(folder) if weights else ():
        _check_safetensors(file)
    if not any(all((folder / part).is_file() for part in parts) for parts in TOKENIZERS):
        raise BaseError(
            "the folder has no tokenizer",
            file=folder,
            hint="copy tokenizer.json and tokenizer_config.json (or tokenizer.model) from the base it comes from",
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise BaseError(
                "this is an adapter, not a base", file=folder, hint="give the base it was trained on as MODEL"
            )
        raise BaseError("the folder has no config.json, so it is no base model", file=folder, hint=WHAT_MODEL_MAY_BE)
    return _read_json_object(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a base, in name order: one, or those its index names. Raises BaseError."""
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE]
    index = folder / INDEX
    if index.is_file():
        named = _read_json_object(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise BaseError("the index has no weight_map", file=index, hint="download the base again")
        shards = sorted({str(name) for name in named.values()})
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise BaseError(
                f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:3])}",
                file=folder,
                hint="download the base again; the index names every file it needs",
            )
        return [folder / name for name in shards]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise BaseError(
            f"the weights are in {pickled[0]}, a pickle: opening one can run code, so katei reads safetensors only",
            file=folder,
            hint="if you trust where it comes from, convert it once: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\"",
        )
    raise BaseError(
        f"the folder has no {ONE_FILE}",
        file=folder,
        hint=f"weights are read from {ONE_FILE} or from {INDEX} and its files",
    )


def safetensors_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors' table of a safetensors file and the bytes the whole file should have. Raises BaseError."""
    size = file.stat().st_size
    again = "download or copy the file again"
    try:
        with file.open("rb") as source:
            start = source.read(8)
            if start.startswith(b"version "):
                raise BaseError("this is a git-lfs pointer, not the weights", file=file, hint="git lfs pull")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or 8 + length > size:
                raise BaseError(f"not a whole safetensors file ({size:,} bytes)", file=file, hint=again)
            table = json.loads(source.read(length))
        tensors = {name: entry for name, entry in table.items() if name != "__metadata__"}
        return tensors, 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except OSError as error:
        raise BaseError(f"cannot be read: {error.strerror}", file=file, hint=f"chmod u+r {file}") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise BaseError("the safetensors header is damaged", file=file, hint=again) from error


def _check_safetensors(file: Path) -> None:
    tensors, expected = safetensors_header(file)
    size = file.stat().st_size
    if size != expected:
        word = "cut short" if size < expected else "damaged"
        raise BaseError(
            f"the file is {word}: {size:,} bytes where its header tells of {expected:,}",
            file=file,
            hint="download or copy the file again",
        )
    odd = sorted({str(entry.get("dtype")) for entry in tensors.values()} & NOT_PLAIN)
    if odd:
        raise BaseError(
            f"the weights are quantised ({', '.join(odd)}); katei needs the plain ones",
            file=file,
            hint="give the unquantised base (fp32, bf16 or fp16), or a GGUF file",
        )


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaseError(f"cannot be read: {error.strerror}", file=path, hint=f"chmod u+r {path}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise BaseError(f"not JSON: {error}", file=path, hint="download or copy the file again") from error
    if not isinstance(value, dict):
        raise BaseError("not a JSON object", file=path, hint="download or copy the file again")
    return value


def fingerprint(folder: Path) -> str:
    """sha256 that names these weights: over config.json (its keys sorted, without the version of the library that wrote
    it) and over every byte of the safetensors files.

    Every byte, so any other weights have another fingerprint; in chunks of 16 MiB hashed by a few threads and then
    hashed together, so it takes 0.2 to 0.4 s for 500 MB that the loader is about to read anyway.
    """
    config = {k: v for k, v in read_config(folder).items() if k != "transformers_version" and not k.startswith("_")}
    whole = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for file in weight_files(folder):
            size = file.stat().st_size
            whole.update(f"\n{file.name} {size}\n".encode())
            for digest in pool.map(_chunk_digest, [(file, start) for start in range(0, size, CHUNK)]):
                whole.update(digest)
    return whole.hexdigest()


def _chunk_digest(chunk: tuple[Path, int]) -> bytes:
    file, start = chunk
    with file.open("rb") as source:
        source.seek(start)
        return hashlib.sha256(source.read(CHUNK)).digest()
