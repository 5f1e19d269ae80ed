"""Compile the native CPU kernels, once per machine, compiler, torch and source: on first use, or from setup.py.

They are several libraries, `PARTS`, so that the first call of an op waits for its own part only. Each lives in a
directory of the user's cache whose name is a hash over everything that goes into it. One process builds, under an
`flock` that dies with its holder; the others wait. What is built appears by a rename, so a killed build leaves nothing
that looks finished. Only the standard library is imported here, since setup.py loads this file by its path, before the
package exists.
"""

from __future__ import annotations

import fcntl
import functools
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
from collections.abc import Iterable
from pathlib import Path

try:
    from stablekern.errors import BuildError, message
except ImportError:  # loaded by path from setup.py

    class BuildError(RuntimeError):  # type: ignore[no-redef]
        pass

    def message(where: str, rule: str, *got: object) -> str:
        return f"stablekern.{where}: {rule}: {' and '.join(str(item) for item in got)}"


# The libraries and their sources, in the order in which these are started: what takes longest first, so that it is not
# left to run alone at the end. "core" comes with any other. Sources of different parts do not refer to each other.
PARTS = {
    "core": ("bindings.cpp", "cpu/finite_stats.cpp", "cpu/grad_guard.cpp"),
    "linear_scan": ("cpu/linear_scan.cpp",),
    "eigen": (
        "cpu/eigh.cpp",
        "cpu/eigenprojector.cpp",
        "cpu/spectral_function.cpp",
        "cpu/laplacian_pe.cpp",
        "cpu/normalized_laplacian.cpp",
    ),
    "scans": (
        "cpu/selective_scan.cpp",
        "cpu/ssd_scan.cpp",
        "cpu/selective_scan_general.cpp",
        "cpu/causal_conv1d.cpp",
        "cpu/gated_rms_norm.cpp",
        "cpu/ssd_state_update.cpp",
        "cpu/selective_state_update.cpp",
    ),
    "solvers": ("cpu/cg.cpp", "cpu/cayley_step.cpp", "cpu/cg_csr.cpp", "cpu/small_cayley.cpp"),
    "training": ("cpu/complex_adamw.cpp", "cpu/focal_loss.cpp"),
    "edges": ("cpu/cosine_edges.cpp", "cpu/assemble_adjacency.cpp"),
    "covariance": ("cpu/covariance_blend.cpp", "cpu/sample_covariance.cpp", "cpu/chol_solve_safe.cpp"),
}
# How ops begin that are not named after their source.
_OTHER_NAMES = {
    "eigvalsh": "eigh",
    "philox": "complex_adamw",
    "cholesky": "chol_solve_safe",
    "gradient": "grad_guard",
    "multiply_gradients": "grad_guard",
}

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
_PRELUDE = "stablekern/prelude.h"  # what most sources include
_LIBRARY = "_native" + sysconfig.get_config_var("EXT_SUFFIX")  # "core", or all parts in one where it is prebuilt


@functools.cache
def part_of(op: str) -> str:
    """The part that holds an op, by its name or that of one of its kernels ("eigh", "cg_csr_bwd")."""
    for begin, source in _OTHER_NAMES.items():
        if op.startswith(begin):
            return part_of(source)
    for part, sources in PARTS.items():
        if any(op.startswith(Path(name).stem) for name in sources):
            return part
    raise KeyError(op)


def library_name(part: str) -> str:
    return _LIBRARY if part == "core" else f"{part}.so"


def sources() -> tuple[str, ...]:
    """Those of all parts."""
    return tuple(name for part in PARTS.values() for name in part)


def source_root() -> Path:
    """`csrc`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for root in (package / "csrc", package.parent / "csrc"):
        if (root / PARTS["core"][0]).is_file():
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


def _identities(march: str, parts: tuple[str, ...]) -> dict[str, str]:
    """For each part the hash of compiler, instruction set, torch, Python, flags and its sources."""
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
    for path in sorted(root.glob("include/stablekern/*.h")):
        digest.update(path.read_bytes())
    found = {}
    for part in parts:
        own = digest.copy()
        for name in PARTS[part]:
            own.update(name.encode() + b"\0" + (root / name).read_bytes())
        found[part] = own.hexdigest()[:20]
    return found


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


def _places(cache: str | None, march: str, parts: tuple[str, ...]) -> dict[str, Path]:
    """Where the library of each part is, or will be."""
    directory = cache_directory(cache)
    return {
        part: directory / f"native-{part}-{identity}" / library_name(part)
        for part, identity in _identities(march, parts).items()
    }


def find(cache: str | None, march: str, part: str = "core") -> Path | None:
    """The library if it is there already; builds nothing."""
    if path := prebuilt():
        return path
    path = _places(cache, march, (part,))[part]
    return path if private(path) else None


def build(cache: str | None = None, march: str = "native", parts: tuple[str, ...] = ("core",)) -> dict[str, Path]:
    """The libraries of `parts`, those compiled now that are not in the cache. Raises `BuildError` with the cause."""
    if path := prebuilt():
        return dict.fromkeys(parts, path)
    places = _places(cache, march, parts)
    if all(private(path) for path in places.values()):
        return places
    directory = cache_directory(cache)
    with open(directory / "native.lock", "w") as lock:
        _wait_for(lock)
        missing = {part: path for part, path in places.items() if not private(path)}
        for stale in directory.glob("native-*.partial"):  # of builders that were killed: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        if missing:
            partial = Path(tempfile.mkdtemp(prefix="native-", suffix=".partial", dir=directory))
            try:
                compile_into(partial, march, {library_name(part): PARTS[part] for part in missing})
                for path in missing.values():
                    _install(partial / path.name, path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return places


def _install(library: Path, path: Path) -> None:
    """Move a library that was just built to its place, in a folder of its own that appears whole."""
    library.chmod(0o700)  # whatever the umask
    folder = Path(tempfile.mkdtemp(prefix=f"{path.parent.name}.", suffix=".partial", dir=path.parent.parent))
    os.replace(library, folder / path.name)
    if path.parent.is_symlink():
        path.parent.unlink()
    if path.parent.exists():  # without a library, or with one that others could write: not left by a build
        shutil.rmtree(path.parent)
    os.replace(folder, path.parent)


def _wait_for(lock) -> None:
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                _say("stablekern: another process is compiling CPU kernels; waiting for it\n")
                told = True
            time.sleep(0.1)


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def compile_into(directory: Path, march: str = "native", libraries: dict[str, tuple[str, ...]] | None = None) -> Path:
    """Write a build.ninja into `directory`, run it, and return the path of the first library there.

    `libraries` says what goes into which; one with all sources by default.
    """
    libraries = libraries or {_LIBRARY: sources()}
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

    def objects(names: Iterable[str]) -> list[str]:
        return [f"{Path(name).stem}.o" for name in names]

    wanted = {name for names in libraries.values() for name in names}
    # In the order of `PARTS` as a whole, since ninja starts what it can in the order of the file.
    compiled = [name for name in sources() if name in wanted]
    # The compiler looks for `_PRELUDE` with .gch in its working directory, then for the header itself: where it cannot
    # precompile, or does not use what it has precompiled, it reads the header. For one source it may as well.
    header = root / "include" / _PRELUDE
    there = header.is_file()
    prelude = [_PRELUDE + ".gch"] if there and sum(name.startswith("cpu/") for name in compiled) > 1 else []
    include = f"-include {_PRELUDE}" if there else ""

    def edge(out: str, name: str) -> list[str]:
        line = f"build {out}: compile {quote(str(root / name))}"
        if not name.startswith("cpu/"):  # pybind11 takes its time by itself, in which the header is compiled
            return [line]
        return [f"{line} | {' '.join(prelude)}" if prelude else line, f"  include = {include}"]

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
        *(line for o, name in zip(objects(compiled), compiled, strict=True) for line in edge(o, name)),
        *(f"build {library}: link {' '.join(objects(names))}" for library, names in libraries.items()),
        f"default {' '.join(libraries)}",
        "",
    ]
    (directory / "build.ninja").write_text("\n".join(lines))
    jobs = os.environ.get("MAX_JOBS", "")
    command = [_ninja(), "-C", str(directory), *(["-j", jobs] if jobs.isdigit() else [])]
    start = time.monotonic()
    progress = "stablekern: compiling CPU kernels for this machine, once"
    _say(f"{progress} [0/{len(prelude) + len(compiled) + len(libraries)}]")
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
                _say(f"\r{progress} {line.partition(']')[0]}]")
    shutil.rmtree(directory / Path(_PRELUDE).parent, ignore_errors=True)  # a hundred megabytes
    if process.returncode != 0:
        _say("\n")
        raise BuildError(message("build", "the compiler failed", "".join(output[-30:]).strip()))
    _say(
        f"\rstablekern: compiled CPU kernels in {time.monotonic() - start:.0f} s, kept for the next run"
        + " " * 24
        + "\n"
    )
    return directory / next(iter(libraries))


def _is_x86() -> bool:
    return os.uname().machine in ("x86_64", "amd64")
