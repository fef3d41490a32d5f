"""What the operating system says of the machine."""

from __future__ import annotations

from pathlib import Path


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
