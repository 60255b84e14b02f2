"""What the machine is, for reports and for what is only true on one."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """Model of the processor, as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
