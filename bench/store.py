"""Where result lines are kept: one JSON object a line, bench/results/<device>/<op>.jsonl."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device_name(device: str) -> str:
    """A folder name: the GPU's name, or the CPU's with its core count."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        found = (
            re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
            if platform.system() == "Linux"
            else None
        )
        name = f"{found[1] if found else platform.processor()}-{torch.get_num_threads()}-threads"
    return re.sub(r"[^a-z0-9]+", "-", f"{device}-{name}".lower()).strip("-")


def commit() -> tuple[str, bool]:
    """The checkout's revision, and whether its code differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD"), bool(
        git("status", "--porcelain", "--", "stablekern", "csrc", "triton_kernels", "bench/*.py")
    )


def stamp(device: str) -> dict[str, Any]:
    """What a line needs to be compared with another one later."""
    revision, dirty = commit()
    return {
        "commit": revision,
        "dirty": dirty,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "date": time.strftime("%Y-%m-%d"),
    }


def append(result: dict[str, Any]) -> None:
    """Add the line to the file of its device and op."""
    target = RESULTS / result["device"] / f"{result['op']}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "a") as file:
        file.write(json.dumps(result) + "\n")
