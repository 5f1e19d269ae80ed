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
    "address": "-fsanitize=address,undefined",
    "thread": "-fsanitize=thread",
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    # Python and torch keep what they allocate to the end; a leak of ours shows up in `make soak`.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:ignore_interceptors_accesses=1",
}
# What each of them must find, or it finds nothing: called through ctypes like this, before the tests.
PLANTED = {
    "address": 'extern "C" int fault() { int* x = new int[4]; return x[4]; }',
    "thread": """
        #include <cstdint>
        extern "C" std::int32_t torch_parallel_for(
            std::int64_t, std::int64_t, std::int64_t, void (*)(std::int64_t, std::int64_t, void*), void*);
        extern "C" int fault() {
          int sum = 0;
          torch_parallel_for(0, 64, 1, [](std::int64_t, std::int64_t, void* sum) { ++*static_cast<int*>(sum); }, &sum);
          return sum;
        }""",
}
FINDS = {"address": "insufficient space for an object", "thread": "WARNING: ThreadSanitizer: data race"}
# Every native kernel on every sample of its spec (gradcheck calls the same kernels a thousand times), and those without
# a spec: the optimizer's step, its noise, the guard's norms and products.
TESTS = (
    *("tests/test_ops.py", "tests/test_optim.py", "tests/test_grad_guard.py", "-k"),
    "cpu-native and matches or native and (equals or long_stream or half_precision or policy or underflows)",
)


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


def finds_planted_fault(kind: str, settings: dict[str, str], fixed: list[str]) -> None:
    source, library = WORK / kind / "planted.cpp", WORK / kind / "planted.so"
    source.write_text(PLANTED[kind])
    compiled = [settings["CXX"], "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(compiled, env={**settings, "LD_PRELOAD": ""}, check=True)
    call = f"import ctypes; ctypes.CDLL({str(library)!r}).fault()"
    done = subprocess.run([*fixed, sys.executable, "-c", call], env=settings, capture_output=True, text=True)
    if done.returncode == 0 or FINDS[kind] not in done.stderr:
        raise SystemExit(f"sanitize: {kind} does not find the fault that was planted for it\n{done.stderr}")


def run(kind: str, words: list[str]) -> int:
    settings = environment(kind)
    folder = settings["STABLEKERN_CACHE_DIR"]
    build = f"from stablekern import _build; _build.build({folder!r}, parts=tuple(_build.PARTS))"
    subprocess.run([sys.executable, "-c", build], env=settings, cwd=ROOT, check=True)
    settings = {**OPTIONS, **settings, "LD_PRELOAD": preloaded(kind)}
    # ThreadSanitizer wants its shadow where address randomisation may put libraries.
    fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" and shutil.which("setarch") else []
    finds_planted_fault(kind, settings, fixed)
    test = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--capture=sys", *(words or TESTS)]
    return subprocess.run([*fixed, *test], env=settings, cwd=ROOT).returncode


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
