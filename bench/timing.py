"""Interleaved timing on a machine that is never quite quiet, and the two ceilings it is compared with."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_QUIET_WAIT_S = 2.0
_TURN_S = 0.03
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Times:
    """Seconds of one variant; `busy` counts the samples taken while another process was runnable."""

    samples: tuple[float, ...]
    busy: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _others_runnable() -> bool:
    """Whether another process wants a core now: field 4 of /proc/loadavg counts the runnable threads of all processes.

    Ours are taken off: a worker of torch's pool spins for a while after its last task, and sleeping until it stops
    would put every sample behind its waking up.
    """
    try:
        with open("/proc/loadavg") as file:
            runnable = int(file.read().split()[3].partition("/")[0])
        own = sum(state.read_text().rpartition(")")[2].split()[0] == "R" for state in _own_threads())
    except OSError:  # no /proc, or a thread that ended meanwhile
        return False
    return runnable > own


def _own_threads() -> list[Path]:
    return [task / "stat" for task in Path("/proc/self/task").iterdir()]


def _wait_until_quiet() -> bool:
    """True once no other process is runnable; False if that does not happen within the limit."""
    end = time.monotonic() + _QUIET_WAIT_S
    while _others_runnable():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _once(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    start_s = time.perf_counter()
    function()
    return time.perf_counter() - start_s


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for both sides of a comparison.

    By default it returns blocks above 32 MiB to the system and maps them anew, page fault by page fault, at the next
    allocation: 11 ms for 40 MB on a virtual machine, in which the kernels that are compared would drown.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, 2**31 - 1)


def interleave(
    variants: dict[str, Callable[[], object]], *, seconds: float, device: str, least: int = 3
) -> dict[str, Times]:
    """Run the variants in turns, A A B B A A B B ..., until the time is spent and each has had `least` turns.

    A turn repeats its call until `_TURN_S` have passed, one call at least. The first call of a turn finds its inputs
    thrown out of the caches by the other variant; within a turn they are as warm as in a loop of the same call. Every
    call is a sample, so the median of a short call is that of a warm one.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    busy = dict.fromkeys(variants, 0)
    for function in variants.values():
        function()  # builds, page faults, first-use allocations
    end = time.monotonic() + seconds
    turns = 0
    while time.monotonic() < end or turns < least:
        turns += 1
        for name, function in variants.items():
            turn_end = time.monotonic() + _TURN_S
            while True:
                quiet = device == "cuda" or _wait_until_quiet()
                found[name].append(_once(function, device))
                busy[name] += not quiet
                if time.monotonic() > turn_end:
                    break
    return {name: Times(tuple(samples), busy[name]) for name, samples in found.items()}


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches now: float32 matrix product (FLOP/s) and copy (bytes/s, read + write)."""

    flops: float
    bandwidth: float


def ceilings(device: str) -> Ceilings:
    n, words = (1024, 16 * 2**20) if device == "cpu" else (8192, 2**29)
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    source, target = torch.ones(words, device=device), torch.empty(words, device=device)
    times = interleave({"gemm": lambda: a @ b, "copy": lambda: target.copy_(source)}, seconds=1.0, device=device)
    return Ceilings(2 * n**3 / times["gemm"].best, 8 * words / times["copy"].best)
