"""A GGUF file → a safetensors folder in the cache, once per content.

The folder holds the whole causal LM in float32 (what the blocks mean exactly; nothing is rounded again) with tied
embeddings stored once, and the tokenizer. Its name carries the GGUF's sha256, it appears whole or not at all, and a
lock makes a second process wait for the first instead of doing the work twice.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import struct
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

from katei.base.builtin import BUILTINS, Builtin, cache_folder
from katei.base.folder import Say, check_folder, silent
from katei.base.quiet import forget_how_loaded, quiet
from katei.core.errors import BaseError
from katei.core.files import folder_atomic, write_json

VERSION = 1
"""Part of a converted folder's name; raised when this file comes to write other bytes."""
SAMPLES = ("The old pond; a frog jumps in, 3 times.", "古池や蛙飛びこむ水の音。ーー2024年！")
DIGITS_APART = {"smollm"}
"""llama.cpp's names of pre-tokenizers that cut off every digit before anything else, which transformers ignores."""


def convert_gguf(file: Path, say: Say = silent) -> Path:
    """The converted folder of a user's GGUF file. Raises BaseError for what is no GGUF, cut short or not supported."""
    read_header(file)
    stat = file.stat()
    sha256 = _sha256(file, stat.st_size, stat.st_mtime_ns)
    return _once(sha256, file.name, lambda _: file, say)


def convert_builtin(builtin: Builtin, say: Say = silent) -> Path:
    """The converted folder of a built-in; when it is there, its wheel is not needed any more."""
    return _once(builtin.sha256, builtin.title, builtin.gguf, say, builtin)


def converted_folder(sha256: str) -> Path:
    """Where the GGUF with this checksum is, or would be, converted to."""
    return cache_folder() / "bases" / f"gguf-v{VERSION}-{sha256[:32]}"


def _once(sha256: str, title: str, gguf: Callable[[Path], Path], say: Say, builtin: Builtin | None = None) -> Path:
    from filelock import FileLock, Timeout

    folder = converted_folder(sha256)
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another katei that converts {title}")
            lock.acquire()
    except OSError as error:
        raise BaseError(
            f"the cache cannot be written: {error.strerror}",
            file=folder.parent,
            hint="set KATEI_CACHE to a folder of yours",
        ) from error
    try:
        if not _whole(folder):
            for left in folder.parent.glob(f".{folder.name}.*.part"):  # of a process that was killed; we hold the lock
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part") as scratch:
                _convert(gguf(Path(scratch)), folder, title, say, builtin)
    except OSError as error:
        raise BaseError(
            f"the conversion of {title} cannot be written: {error}",
            file=folder.parent,
            hint="set KATEI_CACHE to a folder with space",
        ) from error
    finally:
        lock.release()
    return folder


def _whole(folder: Path) -> bool:
    try:
        return folder.is_dir() and check_folder(folder) == folder
    except (BaseError, OSError):
        return False


def _convert(file: Path, folder: Path, title: str, say: Say, builtin: Builtin | None) -> None:
    header = read_header(file)
    needed, free = 4 * header.numbers + 50_000_000, shutil.disk_usage(folder.parent).free
    if free < needed:
        raise BaseError(
            f"converting {title} needs {needed / 1e9:.1f} GB on disk and {free / 1e9:.1f} GB are free",
            file=folder.parent,
            hint="free some space, or set KATEI_CACHE to a folder on another disk",
        )
    seconds = builtin.seconds if builtin else round(header.numbers / 6e6)
    say(f"converting {title}, once" + (f", about {seconds} s" if seconds > 1 else ""))
    if builtin and builtin.terms:
        where = builtin.terms_paths()
        say(builtin.terms + (f"; a copy: {where[0]}" if where else ""))
    with quiet(), redirect_stderr(StringIO()):  # the GGUF reader draws a bar of its own
        model, tokenizer = _read_gguf(file, header)
        with folder_atomic(folder) as new:
            model.save_pretrained(new, max_shard_size="100GB")
            tokenizer.save_pretrained(new)
            for terms in builtin.terms_paths() if builtin else ():
                shutil.copy(terms, new / terms.name)
            write_json(new / "katei.json", {"from": title, "gguf": folder.name})
            for path in new.iterdir():
                path.chmod(0o644)
            check_folder(new)
    for problem in _tokenizer_problems(folder, header):
        say(f"{title}: {problem}")


def _read_gguf(file: Path, header: GgufHeader) -> tuple[Any, Any]:
    """The causal LM in float32 and its tokenizer, as transformers reads them from a GGUF."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except (ValueError, KeyError, TypeError, RuntimeError, ImportError, IndexError, AttributeError) as error:
        known = ", ".join(b.name for b in BUILTINS.values())
        raise BaseError(
            f"transformers cannot read this GGUF ({header.architecture}): {(str(error).splitlines() or [''])[0]}",
            file=file,
            hint=f"give the base as a safetensors folder instead, or a built-in: {known}",
        ) from error
    forget_how_loaded(tokenizer)
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = ", ".join(sorted(info["missing_keys"])[:3])
        raise BaseError(f"the GGUF lacks weights: {lacking}", file=file, hint="download or copy it again")
    model.hf_quantizer.remove_quantization_config(model)  # float32 now: to be saved as a plain model
    for trace in ("_model_name_or_path", "unk_token_id"):
        model.config.__dict__.pop(trace, None)
    if header.facts.get("tokenizer.ggml.pre") in DIGITS_APART:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    return model, tokenizer


def _tokenizer_problems(folder: Path, header: GgufHeader) -> list[str]:
    """What the converted tokenizer does otherwise than the GGUF says, in words."""
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    problems = []
    for text in SAMPLES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() != text:
            problems.append(f"its tokenizer does not read back {text!r}")
    wanted = header.facts.get("tokenizer.ggml.add_bos_token")
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if isinstance(wanted, bool) and wanted != starts:
        problems.append(
            f"the GGUF says that a text {'starts' if wanted else 'does not start'} with BOS; here it is not so"
        )
    if header.facts.get("tokenizer.chat_template") != tokenizer.chat_template:
        problems.append("its chat template was lost")
    return problems


@lru_cache(maxsize=8)
def _sha256(file: Path, size: int, modified_ns: int) -> str:
    """Of the file's content; size and time are there so that a changed file is hashed again."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


# -------------------------------------------------------------------- the header of a GGUF file


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF says of itself. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

    facts: dict[str, Any]
    """Its metadata, arrays left out."""
    numbers: int
    """Of all its tensors together."""

    @property
    def architecture(self) -> str:
        return str(self.facts.get("general.architecture", "no architecture named"))


_PLAIN = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def read_header(file: Path) -> GgufHeader:
    """Raises BaseError unless `file` is a GGUF whose tensors are all inside it."""
    size = file.stat().st_size
    try:
        with file.open("rb") as source:
            magic = source.read(4)
            if magic != b"GGUF":
                pointer = (magic + source.read(4)).startswith(b"version ")
                raise BaseError(
                    "a git-lfs pointer, not the file itself" if pointer else "not a GGUF file",
                    file=file,
                    hint="git lfs pull" if pointer else "a base is a folder with config.json, or a GGUF file",
                )
            version, tensors, pairs = _read(source, "<I"), _read(source, "<Q"), _read(source, "<Q")
            if version not in (2, 3):
                raise BaseError(
                    f"GGUF version {version}; 2 and 3 are read", file=file, hint="convert it anew with llama.cpp"
                )
            facts = {}
            for _ in range(pairs):
                key = _read_string(source)
                value = _read_value(source, _read(source, "<I"))
                if value is not None:
                    facts[key] = value
            numbers = end = 0
            for _ in range(tensors):
                count, kind, offset = _read_tensor(source)
                numbers += count
                end = max(end, offset + _tensor_bytes(count, kind))
            alignment = int(facts.get("general.alignment", 32))
            expected = -(-source.tell() // alignment) * alignment + end
    except OSError as error:
        raise BaseError(f"cannot be read: {error.strerror}", file=file, hint=f"chmod u+r {file}") from error
    except (struct.error, UnicodeDecodeError, MemoryError, OverflowError, KeyError, ValueError) as error:
        raise BaseError("the GGUF is cut short or damaged", file=file, hint="download or copy it again") from error
    if size < expected:
        raise BaseError(
            f"the GGUF is cut short: {size:,} bytes where its header tells of {expected:,}",
            file=file,
            hint="download or copy it again",
        )
    if int(facts.get("split.count", 0)) > 1:
        raise BaseError(
            "this GGUF is one of several files",
            file=file,
            hint="join them first: llama-gguf-split --merge FIRST OUT.gguf",
        )
    return GgufHeader(facts, numbers)


def _read(source: BinaryIO, form: str) -> Any:
    return struct.unpack(form, source.read(struct.calcsize(form)))[0]


def _read_string(source: BinaryIO) -> str:
    length = _read(source, "<Q")
    data = source.read(min(length, 1 << 26))
    if len(data) < length:
        raise ValueError("a string runs past the end")
    return data.decode("utf-8")


def _read_value(source: BinaryIO, kind: int) -> Any:
    """One metadata value; None for an array, which is only skipped."""
    if kind == _STRING:
        return _read_string(source)
    if kind != _ARRAY:
        return _read(source, _PLAIN[kind])
    item, length = _read(source, "<I"), _read(source, "<Q")
    if item in _PLAIN:
        source.seek(struct.calcsize(_PLAIN[item]) * length, 1)
        return None
    for _ in range(length):
        if item == _ARRAY:
            _read_value(source, _ARRAY)
        else:
            source.seek(_read(source, "<Q"), 1)
    return None


def _read_tensor(source: BinaryIO) -> tuple[int, int, int]:
    """How many numbers, of which kind, and where: one line of the tensor table."""
    _read_string(source)
    shape = [_read(source, "<Q") for _ in range(_read(source, "<I"))]
    return math.prod(shape), _read(source, "<I"), _read(source, "<Q")


def _tensor_bytes(numbers: int, kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise BaseError(
            f"the GGUF has tensors of a kind not known here ({kind})", hint="pip install -U gguf"
        ) from error
    return int(-(-numbers // block) * block_bytes)
