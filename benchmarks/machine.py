"""What a result was measured on."""

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil
import torch


def command() -> str:
    """What was called, as it can be called again."""
    return f"python {shlex.join(sys.argv)}"


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return {
        "processor": next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.processor()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
        "load_at_start": os.getloadavg()[0],
    }
