"""Compile the native CPU kernels, once per machine, compiler, torch and source: on first use, or from setup.py.

The result lives in a directory of the user's cache whose name is a hash over everything that goes into it. One
process builds, under an `flock` that dies with its holder; the others wait. What is built appears by a rename, so a
killed build leaves nothing that looks finished. Only the standard library is imported here, since setup.py loads this
file by its path, before the package exists.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

try:
    from stablekern.errors import BuildError, message
except ImportError:  # loaded by path from setup.py

    class BuildError(RuntimeError):  # type: ignore[no-redef]
        pass

    def message(where: str, rule: str, *got: object) -> str:
        return f"stablekern.{where}: {rule}: {' and '.join(str(item) for item in got)}"


# In the order in which they are started: what takes longest first, so that it is not left to run alone at the end.
SOURCES = (
    "bindings.cpp",
    "cpu/linear_scan.cpp",
    "cpu/cg.cpp",
    "cpu/eigh.cpp",
    "cpu/eigenprojector.cpp",
    "cpu/selective_scan.cpp",
    "cpu/ssd_scan.cpp",
    "cpu/selective_scan_general.cpp",
    "cpu/causal_conv1d.cpp",
    "cpu/spectral_function.cpp",
    "cpu/laplacian_pe.cpp",
    "cpu/complex_adamw.cpp",
    "cpu/cosine_edges.cpp",
    "cpu/covariance_blend.cpp",
    "cpu/assemble_adjacency.cpp",
    "cpu/cayley_step.cpp",
    "cpu/gated_rms_norm.cpp",
    "cpu/focal_loss.cpp",
    "cpu/sample_covariance.cpp",
    "cpu/small_cayley.cpp",
    "cpu/chol_solve_safe.cpp",
    "cpu/ssd_state_update.cpp",
    "cpu/selective_state_update.cpp",
    "cpu/normalized_laplacian.cpp",
    "cpu/finite_stats.cpp",
    "cpu/grad_guard.cpp",
)

# No fast-math: NaN and infinities must keep their meaning. These two give up what nobody reads (errno, trap flags).
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "--param=ggc-min-heapsize=524288",  # KiB before GCC looks for garbage, which it would do dozens of times
    "-Wall",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
_PROGRESS = "stablekern: compiling the CPU kernels for this machine (once; about a minute)"
_PRELUDE = "stablekern/prelude.h"  # what most sources include
_LIBRARY = "_native" + sysconfig.get_config_var("EXT_SUFFIX")


def source_root() -> Path:
    """`csrc`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for root in (package / "csrc", package.parent / "csrc"):
        if (root / SOURCES[0]).is_file():
            return root
    raise BuildError(message("build", "the C++ sources are missing from the installation", package))


def compiler() -> str:
    """The C++ compiler's path: $CXX, else c++, g++ or clang++ on PATH."""
    asked = os.environ.get("CXX", "").strip()
    for name in (asked,) if asked else ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError(
        message("build", "no C++ compiler found (install g++ or clang++, or set CXX)", asked or "none on PATH")
    )


def _ninja() -> str:
    spec = importlib.util.find_spec("ninja")
    if spec is not None and spec.origin is not None:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    if path := shutil.which("ninja"):
        return path
    raise BuildError(message("build", "ninja is not installed (pip install ninja)", "none on PATH"))


def _includes() -> list[str]:
    torch_root = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    pybind_root = Path(importlib.util.find_spec("pybind11").origin).parent  # type: ignore[union-attr, arg-type]
    return [
        str(source_root() / "include"),
        str(pybind_root / "include"),  # before torch's, which has a pybind11 of its own that refuses the stable ABI
        str(torch_root / "include"),
        sysconfig.get_paths()["include"],
    ]


def _link_flags() -> list[str]:
    torch_root = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    # Already loaded by `import torch` under the same soname, so no rpath is needed.
    return ["-shared", f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]


def _identity(march: str) -> str:
    """Hash of compiler, instruction set, torch, Python, flags and sources."""
    import torch

    cxx = compiler()
    run = {"capture_output": True, "text": True, "check": True, "timeout": 60}
    try:
        version = subprocess.run([cxx, "--version"], **run).stdout  # type: ignore[call-overload]
        # `-march=native` means something else on another machine with the same home directory: hash what it means.
        macros = subprocess.run([cxx, f"-march={march}", "-dM", "-E", "-x", "c++", os.devnull], **run).stdout  # type: ignore[call-overload]
    except (subprocess.SubprocessError, OSError) as error:
        raise BuildError(message("build", "the C++ compiler does not run", error)) from None
    digest = hashlib.sha256()
    for part in (version, macros, torch.__version__, sys.version, *FLAGS, march):
        digest.update(part.encode() + b"\0")
    root = source_root()
    headers = sorted(root.glob("include/stablekern/*.h"))
    for path in [*(root / name for name in SOURCES), *headers]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def cache_directory(cache: str | None) -> Path:
    """The private cache directory, created if need be; refused if others could write code into it."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stablekern"
    directory = Path(cache).expanduser() if cache else default
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = directory.stat()
    except OSError as error:
        raise BuildError(
            message("build", "the cache directory cannot be used (set STABLEKERN_CACHE_DIR)", error)
        ) from None
    if facts.st_uid != os.getuid():
        raise BuildError(
            message("build", f"the cache directory {directory} must belong to you", f"owner {facts.st_uid}")
        )
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = oct(stat.S_IMODE(facts.st_mode))
        raise BuildError(
            message("build", f"the cache directory {directory} must be writable by you alone (0700)", mode)
        )
    directory = directory.resolve()
    if folder := open_folder(directory):
        rule = f"anybody may replace the cache directory {directory} in {folder} (chmod o-w, or the sticky bit)"
        raise BuildError(message("build", rule, oct(stat.S_IMODE(folder.stat().st_mode))))
    return directory


def open_folder(path: Path) -> Path | None:
    """The first folder from `path` upwards in which anybody may rename what is not his, if there is one."""
    for folder in (path, *path.parents):
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return folder
    return None


def private(path: Path) -> bool:
    """Whether `path` is a file of yours, in a folder of yours, that nobody else can write: what may be executed."""
    if not path.is_file():
        return False
    facts = [part.lstat() for part in (path.parent, path)]
    return all(
        one.st_uid == os.getuid() and not stat.S_ISLNK(one.st_mode) and not one.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        for one in facts
    )


def prebuilt() -> Path | None:
    """The library that a wheel built ahead of time carries, if it does."""
    path = Path(__file__).resolve().parent / _LIBRARY
    return path if path.is_file() else None


def find(cache: str | None, march: str) -> Path | None:
    """The library if it is there already; builds nothing."""
    if path := prebuilt():
        return path
    path = cache_directory(cache) / f"native-{_identity(march)}" / _LIBRARY
    return path if private(path) else None


def build(cache: str | None = None, march: str = "native") -> Path:
    """The path of the library, compiled now if it is not in the cache. Raises `BuildError` with the cause."""
    if path := prebuilt():
        return path
    directory = cache_directory(cache)
    final = directory / f"native-{_identity(march)}"
    if private(final / _LIBRARY):
        return final / _LIBRARY
    with open(directory / f"{final.name}.lock", "w") as lock:
        _wait_for(lock)
        if not private(final / _LIBRARY):
            for stale in directory.glob(f"{final.name}.*.partial"):  # of builders that were killed: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{final.name}.", suffix=".partial", dir=directory))
            try:
                compile_into(partial, march).chmod(0o700)  # whatever the umask
                if final.is_symlink():
                    final.unlink()
                if final.exists():  # without a library, or with one that others could write: not left by a build
                    shutil.rmtree(final)
                os.replace(partial, final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return final / _LIBRARY


def _wait_for(lock) -> None:
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                _say("stablekern: another process is compiling the CPU kernels; waiting for it\n")
                told = True
            time.sleep(0.1)


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def compile_into(directory: Path, march: str = "native") -> Path:
    """Write a build.ninja into `directory`, run it, and return the library's path there."""
    root = source_root()
    flags = [*FLAGS, f"-march={march}", *(f"-I{path}" for path in _includes())]
    if march == "native":
        flags.append("-mprefer-vector-width=512" if _is_x86() else "")

    def quote(path: str) -> str:
        """A path of a build statement, in ninja's own escapes; it quotes $in and $out for the shell itself."""
        return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def word(text: str) -> str:
        """One word of a command, which ninja hands to a shell."""
        return shlex.quote(text).replace("$", "$$")

    objects = [f"{Path(name).stem}.o" for name in SOURCES]
    # The compiler looks for `_PRELUDE` with .gch in its working directory, then for the header itself: where it cannot
    # precompile, or does not use what it has precompiled, it reads the header.
    header = root / "include" / _PRELUDE
    prelude = [_PRELUDE + ".gch"] if header.is_file() else []
    include = f"-include {_PRELUDE}" if prelude else ""

    def edge(out: str, name: str) -> list[str]:
        line = f"build {out}: compile {quote(str(root / name))}"
        if not name.startswith("cpu/"):  # pybind11 takes its time by itself, in which the header is compiled
            return [line]
        return [f"{line} | {' '.join(prelude)}", f"  include = {include}"]

    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {word(compiler())}",
        f"flags = {' '.join(word(flag) for flag in flags if flag)}",
        "rule precompile",
        "  command = $cxx $flags -x c++-header -c $in -o $out || rm -f $out",
        "  description = precompile $in",
        "rule compile",
        "  command = $cxx $flags $include -c $in -o $out",
        "  description = compile $in",
        "rule link",
        f"  command = $cxx $in {' '.join(word(flag) for flag in _link_flags())} -o $out",
        "  description = link",
        *(f"build {out}: precompile {quote(str(header))}" for out in prelude),
        *(line for o, name in zip(objects, SOURCES, strict=True) for line in edge(o, name)),
        f"build {_LIBRARY}: link {' '.join(objects)}",
        f"default {_LIBRARY}",
        "",
    ]
    (directory / "build.ninja").write_text("\n".join(lines))
    jobs = os.environ.get("MAX_JOBS", "")
    command = [_ninja(), "-C", str(directory), *(["-j", jobs] if jobs.isdigit() else [])]
    start = time.monotonic()
    _say(f"{_PROGRESS} [0/{len(prelude) + len(SOURCES) + 1}]")
    output = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
    ) as process:
        for line in process.stdout:  # type: ignore[union-attr]
            output.append(line)
            if line.startswith("["):
                _say(f"\r{_PROGRESS} {line.partition(']')[0]}]")
    shutil.rmtree(directory / Path(_PRELUDE).parent, ignore_errors=True)  # a hundred megabytes
    if process.returncode != 0:
        _say("\n")
        raise BuildError(message("build", "the compiler failed", "".join(output[-30:]).strip()))
    _say(
        f"\rstablekern: compiled the CPU kernels in {time.monotonic() - start:.0f} s, kept for the next run"
        + " " * 24
        + "\n"
    )
    return directory / _LIBRARY


def _is_x86() -> bool:
    return os.uname().machine in ("x86_64", "amd64")
