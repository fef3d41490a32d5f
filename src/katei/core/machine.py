"""What the operating system says of the machine."""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np


def container_limit_bytes() -> int | None:
    """The memory limit of this process's container (cgroup), if it has one."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def return_freed_memory() -> None:
    """From here on, what tensors free goes back to the system at once (glibc). Its heap would keep holes between tensors of
    different sizes, a quarter of the process's memory where layers are recomputed; a step takes about 8 % longer without them.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


_M_MMAP_THRESHOLD = -3
"""malloc.h"""


def resident_bytes() -> int:
    """What this process holds, now, after `give_back`: after a conversion its heap would keep a gigabyte of what was freed, after
    reading a tokenizer 150 MiB.
    """
    import psutil

    give_back()
    return int(psutil.Process().memory_info().rss)


def give_back() -> None:
    """What this process has freed so far goes back to the system (glibc)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak_memory() -> None:
    """Count `peak_memory_bytes` from here on, where the system can do that (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """The most resident memory this process has had."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mapped_bytes(file: Path, start: int, size: int, places: Sequence[int]) -> int | None:
    """Of `size` bytes of `file` from `start` on, how many a process holds that maps the file and looks at the bytes at `places` (within
    the file): whole pages, and what the kernel maps around them, 64 KiB or, where it cached the file in larger pieces, up to 2 MiB
    (seen on Linux 6.18). None where the system does not tell, or the file ends before.
    """
    try:
        with file.open("rb") as opened, Path("/proc/self/pagemap").open("rb") as pagemap:
            mapped = np.frombuffer(mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ), np.uint8)
            mapped[np.asarray(places)].sum()
            first = (mapped.ctypes.data + start) // mmap.PAGESIZE
            last = (mapped.ctypes.data + start + size - 1) // mmap.PAGESIZE
            pagemap.seek(8 * first)
            entries = np.frombuffer(pagemap.read(8 * (last + 1 - first)), np.uint64)
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE if len(entries) else None
