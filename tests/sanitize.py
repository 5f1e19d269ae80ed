"""The native tests under sanitizers: `python tests/sanitize.py [address] [thread] [pytest's arguments]`.

address: AddressSanitizer and UndefinedBehaviorSanitizer. thread: ThreadSanitizer, with `parallel_for` on threads that
it can follow (tests/emulation/threads.cpp). The library is built with GCC through a wrapper that adds the flags, into a
cache of its own (build/sanitize); the runtime is preloaded, since Python is not instrumented. A finding ends the run.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "sanitize"
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    # Python and torch keep what they allocate to the end; a leak of ours shows up in `make soak`.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:ignore_interceptors_accesses=1",
}
# Every native kernel on every sample of its spec. Gradcheck calls the same kernels a thousand times.
TESTS = ("tests/test_ops.py", "-k", "cpu-native and matches")


def compiler() -> str:
    """GCC: the names of the runtimes are its own."""
    found = shutil.which(os.environ.get("CXX", "").strip() or "g++")
    if found is None:
        raise SystemExit("sanitize: no g++ found")
    return found


def wrapper(kind: str) -> Path:
    """A compiler that adds the flags; the build's key changes with the macros that they define."""
    path = WORK / kind / "cxx"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    threads = ROOT / "tests" / "emulation" / "threads.cpp"
    more = f'case " $* " in *" -shared "*) set -- "$@" -std=c++20 -fPIC {threads};; esac\n' if kind == "thread" else ""
    flags = f"-O1 -g1 -fno-omit-frame-pointer {FLAGS[kind]}"
    path.write_text(f'#!/bin/sh\n{more}exec {compiler()} "$@" {flags}\n')
    path.chmod(0o755)
    return path


def environment(kind: str) -> dict[str, str]:
    cxx = wrapper(kind)
    return {
        **os.environ,
        "CXX": str(cxx),
        "STABLEKERN_CACHE_DIR": str(cxx.parent / "cache"),
        "STABLEKERN_BACKEND": "",
        "PYTHONPATH": str(ROOT),
    }


def preloaded(kind: str) -> str:
    """Paths of the runtimes; and of the C++ library, which must be there when they look for what throws."""
    names = (*RUNTIMES[kind], "libstdc++.so.6")
    ask = [[compiler(), f"-print-file-name={name}"] for name in names]
    return " ".join(
        os.path.realpath(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())
        for words in ask
    )


def run(kind: str, words: list[str]) -> int:
    settings = environment(kind)
    build = "from stablekern import _build, settings; print(_build.build(settings.get('STABLEKERN_CACHE_DIR')))"
    subprocess.run([sys.executable, "-c", build], env=settings, cwd=ROOT, check=True)
    settings |= {"LD_PRELOAD": preloaded(kind), **OPTIONS}
    # ThreadSanitizer wants its shadow where address randomisation may put libraries.
    fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" and shutil.which("setarch") else []
    for old in (WORK / kind).glob("report.*"):
        old.unlink()
    for name in OPTIONS:
        settings[name] += f":log_path={WORK / kind / 'report'}"  # pytest holds what is written to stderr
    test = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *(words or TESTS)]
    status = subprocess.run([*fixed, *test], env=settings, cwd=ROOT).returncode
    for report in sorted((WORK / kind).glob("report.*")):
        sys.stderr.write(report.read_text(errors="replace"))
        status = status or 1
    return status


def main() -> int:
    words = sys.argv[1:]
    kinds = [word for word in words if word in FLAGS] or list(FLAGS)
    status = 0
    for kind in kinds:
        sys.stderr.write(f"sanitize: {kind}\n")
        status |= run(kind, [word for word in words if word not in FLAGS])
    return status


if __name__ == "__main__":
    sys.exit(main())
