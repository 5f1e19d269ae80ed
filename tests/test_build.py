"""The native build: cached under the right key, private, crash-proof, and absent with one clear warning."""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

import stablekern
from stablekern import _build, _load, _registry
from stablekern.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        cwd="/",
    )


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A source tree that compiles in a second: the build logic does not care what it compiles."""
    root = tmp_path / "csrc"
    (root / "include" / "stablekern").mkdir(parents=True)
    (root / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(_build, "PARTS", {"core": ("one.cpp",)})
    monkeypatch.setattr(_build, "source_root", lambda: root)
    return root


def test_sources_are_all_there_and_all_listed():
    root = _build.source_root()
    listed = {str(root / name) for name in _build.sources()}
    assert listed == {str(p) for p in [*root.glob("*.cpp"), *root.glob("cpu/*.cpp")]}


def kernels() -> dict[str, str]:
    """The part of each kernel, as the sources register them."""
    root = _build.source_root()
    return {
        name: part
        for part, sources in _build.PARTS.items()
        for source in sources
        for name in re.findall(r'm\.impl\("(\w+)"', (root / source).read_text())
    }


def test_each_kernel_and_op_knows_its_part():
    """By name alone: asking compiles nothing. A launcher may call kernels of its own part, and those of the core."""
    registered = kernels()
    assert len(registered) > 40
    assert {name: _build.part_of(name) for name in registered} == registered
    launchers = {
        op: here["cpu"]["native"].function for op, here in _registry._launchers.items() if "native" in here["cpu"]
    }
    assert len(launchers) > 40
    for op, function in launchers.items():
        used = {registered[name] for name in inspect.unwrap(function).__code__.co_names if name in registered}
        assert used <= {"core", _build.part_of(op)}, op


def test_a_first_call_builds_its_part_and_the_core_alone(tmp_path):
    """Kernels of other parts are not there yet; each library is in a private folder of its own."""
    code = """
        import torch, stablekern
        from stablekern import _load
        stablekern.focal_loss(torch.zeros(1), torch.ones(1))
        print(sorted(_load._loaded))
        print(_load.native_reason("eigh", build=False))
    """
    cache = tmp_path / "cache"
    run = python(code, STABLEKERN_CACHE_DIR=str(cache), STABLEKERN_BACKEND="native", STABLEKERN_NATIVE="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "['core', 'training']",
        "not built yet; the first call that wants them builds them",
    ]
    assert {path.name.split("-")[1] for path in cache.glob("native-*-*")} == {"core", "training"}
    assert all(
        path.stat().st_mode & 0o777 == 0o700 for path in cache.rglob("*") if path.suffix == ".so" or path.is_dir()
    )


def test_no_fast_math():
    assert not [flag for flag in _build.FLAGS if "fast-math" in flag or flag in ("-Ofast", "-ffinite-math-only")]


def test_built_once_and_again_for_other_sources_flags_or_targets(tiny, tmp_path, monkeypatch, capsys):
    cache = str(tmp_path / "cache")
    first = _build.build(cache, "x86-64")["core"]
    assert first.is_file() and "compiled CPU kernels" in capsys.readouterr().err
    stamp = first.stat().st_mtime_ns
    assert _build.build(cache, "x86-64")["core"] == first and first.stat().st_mtime_ns == stamp
    assert not capsys.readouterr().err, "a cached build is silent"
    (tiny / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    second = _build.build(cache, "x86-64")["core"]
    (tiny / "include" / "stablekern" / "a.h").write_text("// a header\n")
    third = _build.build(cache, "x86-64")["core"]
    monkeypatch.setattr(_build, "FLAGS", (*_build.FLAGS, "-DX"))
    fourth = _build.build(cache, "x86-64")["core"]
    fifth = _build.build(cache, "x86-64-v2")["core"]
    monkeypatch.setattr("torch.__version__", "2.99.0")
    assert _build.find(cache, "x86-64-v2") is None
    assert len({first, second, third, fourth, fifth}) == 5


def test_a_killed_build_does_not_hang_the_next(tiny, tmp_path):
    """SIGKILL in the middle of the compilation; the next process builds, and the leftovers are gone."""
    cache = tmp_path / "cache"
    slow = tmp_path / "slow-cxx"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) sleep 60;; esac\nexec {_build.compiler()} "$@"\n')
    slow.chmod(0o755)
    code = f"""
        from stablekern import _build
        from pathlib import Path
        _build.PARTS, _build.source_root = {{"core": ("one.cpp",)}}, lambda: Path({str(tiny)!r})
        _build.build({str(cache)!r}, "x86-64")["core"]
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "CXX": str(slow)}, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not list(cache.glob("*.partial/build.ninja")) and time.monotonic() < end:
        time.sleep(0.05)
    assert list(cache.glob("*.partial/build.ninja")), "the build did not start"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(cache.glob("*.partial")), "the kill came too late to test anything"
    lock = next(cache.glob("*.lock"))
    # The same key: the compiler's version text and macros are those of the wrapped compiler.
    start = time.monotonic()
    assert _build.build(str(cache), "x86-64")["core"].is_file()
    assert time.monotonic() - start < 30
    assert lock.exists() and not list(cache.glob("*.partial"))


@pytest.mark.parametrize("broken", [False, True])
def test_the_prelude_is_precompiled_or_read(tiny, tmp_path, monkeypatch, broken):
    """Once, before the sources of cpu/ if they are several; a compiler that cannot do so reads it with each of them."""
    (tiny / "include" / "stablekern" / "prelude.h").write_text("inline int two() { return 2; }\n")
    (tiny / "cpu").mkdir()
    visible = 'extern "C" __attribute__((visibility("default")))'
    (tiny / "cpu" / "two.cpp").write_text(f"{visible} int four() {{ return 2 * two(); }}\n")
    (tiny / "cpu" / "three.cpp").write_text(f"{visible} int six() {{ return 3 * two(); }}\n")
    monkeypatch.setattr(_build, "PARTS", {"core": ("one.cpp", "cpu/two.cpp", "cpu/three.cpp")})
    log, wrapper = tmp_path / "log", tmp_path / "cxx"
    refusal = 'case "$*" in *c++-header*) exit 1;; esac\n' if broken else ""
    wrapper.write_text(f'#!/bin/sh\n{refusal}exec {_build.compiler()} "$@" -Winvalid-pch -H 2>>{log}\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("MAX_JOBS", "1")
    library = _build.build(str(tmp_path / "cache"), "x86-64")["core"]
    made = ctypes.CDLL(str(library))
    assert (made.four(), made.six()) == (4, 6)
    assert not list(library.parent.rglob("*.gch"))
    # -H of GCC lists what is read: "! name" is a precompiled header that is taken.
    taken = [line for line in log.read_text().splitlines() if line.startswith("! ") and line.endswith("prelude.h.gch")]
    version = subprocess.run([_build.compiler(), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" in version:
        assert len(taken) == (0 if broken else 2)


def test_two_processes_build_once(tiny, tmp_path):
    cache = tmp_path / "cache"
    code = f"""
        from stablekern import _build
        from pathlib import Path
        _build.PARTS, _build.source_root = {{"core": ("one.cpp",)}}, lambda: Path({str(tiny)!r})
        print(_build.build({str(cache)!r}, "x86-64")["core"])
    """
    both = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert sum("compiled CPU kernels" in err for _, err in results) == 1


def test_the_cache_is_private(tiny, tmp_path):
    cache = tmp_path / "cache"
    path = _build.build(str(cache), "x86-64")["core"]
    assert cache.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    with pytest.raises(BuildError, match=r"writable by you alone \(0700\): got 0o777"):
        _build.build(str(cache), "x86-64")["core"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to make a directory of somebody else's")
def test_a_cache_of_somebody_else_is_refused(tmp_path):
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(BuildError, match="must belong to you: got owner 12345"):
        _build.cache_directory(str(tmp_path))


def test_a_compiler_error_is_shown(tiny, tmp_path):
    (tiny / "one.cpp").write_text("int broken( {\n")
    with pytest.raises(BuildError, match=r"(?s)the compiler failed: got .*one\.cpp:1:14: error"):
        _build.build(str(tmp_path / "cache"), "x86-64")["core"]
    assert not list((tmp_path / "cache").glob("native-*/"))


NO_COMPILER = """
    import warnings, torch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import stablekern
        from stablekern import _load
        a = torch.eye(3).expand(2, 3, 3)
        first = stablekern.eigh(a); stablekern.eigh(a)
    texts = [str(w.message) for w in caught if "CPU kernels" in str(w.message)]
    assert len(texts) == 1, texts
    print(texts[0])
    try:
        stablekern.use_backend("native"); stablekern.eigh(a)
    except stablekern.errors.BackendUnavailableError as error:
        print(error)
"""


def test_without_a_compiler_torch_runs_with_one_warning(tmp_path):
    run = python(NO_COMPILER, CXX="no-such-compiler", STABLEKERN_CACHE_DIR=str(tmp_path / "c"), STABLEKERN_BACKEND="")
    assert run.returncode == 0, run.stderr
    warned, forced = run.stdout.strip().splitlines()
    assert "plain torch runs instead" in warned and "no C++ compiler found" in warned
    assert forced.startswith("stablekern.eigh_fwd: backend `native` is forced") and "no C++ compiler" in forced


def test_import_compiles_and_loads_nothing(tmp_path):
    code = """
        import sys, time, torch
        start = time.perf_counter()
        import stablekern
        print(time.perf_counter() - start)
        heavy = ("triton", "mne", "edfio", "typer", "matplotlib", "stablekern._native", "ninja")
        print([name for name in heavy if name in sys.modules])
    """
    cache = tmp_path / "cache"
    run = python(code, STABLEKERN_CACHE_DIR=str(cache))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[1] == "[]"
    assert not cache.exists()


def test_the_real_library_loads():
    module = _load.native_module()
    assert module.simd in ("avx512", "avx2", "portable") and module.vector_bytes in (16, 32, 64)


IGNORED = (".git", ".venv", "*.egg-info", "build", "dist", "runs", "__pycache__", "results", "site", "figures")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of the checkout, which a build may write into."""
    copy = tmp_path_factory.mktemp("sources") / "stablekern"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*IGNORED))
    return copy


def pip_wheel(source: Path, out: Path, **environment: str) -> Path:
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    run = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = out.glob("stablekern-*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    """The pure-Python wheel."""
    return pip_wheel(sources, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def clean(tmp_path):
    """A new environment: what it takes to install a wheel without its dependencies there, and to run it.

    The dependencies are those of this environment, by PYTHONPATH, in which an editable install does not count.
    """
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=120)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    others = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))

    def install(wheel: Path) -> Path:
        words = [sys.executable, "-m", "pip", "--python", home, "install", "--quiet", "--no-deps", wheel]
        run = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
        return site

    def execute(*words: str, **environment: str) -> subprocess.CompletedProcess:
        settings = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{others}", **environment}
        words = (str(home / "bin" / words[0]), *words[1:])
        return subprocess.run(words, capture_output=True, text=True, timeout=300, env=settings, cwd=tmp_path)

    return install, execute


def test_version_stands_in_one_place(wheel):
    assert wheel.name == f"stablekern-{stablekern.__version__}-py3-none-any.whl", "a plain build holds no compiled code"
    assert f"## {stablekern.__version__} " in (ROOT / "CHANGELOG.md").read_text()
    for path in ("pyproject.toml", "setup.py", "docs/index.md", "README.md"):
        assert stablekern.__version__ not in (ROOT / path).read_text(), path


def test_the_source_archive_builds_the_same_wheel(sources, wheel, tmp_path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=sources)
    assert run.returncode == 0, run.stderr
    archive = tmp_path / run.stdout.splitlines()[-1]
    assert archive.name == f"stablekern-{stablekern.__version__}.tar.gz"
    (tmp_path / "out").mkdir()
    again = pip_wheel(archive, tmp_path / "out")
    assert contents(again) == contents(wheel)


def test_the_pure_wheel_works_in_a_clean_environment(wheel, clean, tmp_path):
    """Kernels are inside; nothing is taken from the checkout, and nothing is compiled by installing."""
    install, execute = clean
    site = install(wheel)
    kernels = ("triton_kernels/focal_loss.py", "csrc/bindings.cpp", "csrc/include/stablekern/simd.h")
    for name in (*kernels, "testing/specs/eigh.py", "py.typed"):
        assert (site / "stablekern" / name).is_file(), name
    code = """
        import torch, stablekern
        from stablekern import _build, testing
        print(stablekern.__file__, _build.source_root())
        testing.all_specs()
        for backend in ("torch", "triton"):
            with stablekern.use_backend(backend):
                print(float(stablekern.focal_loss(torch.zeros(1), torch.ones(1))))
    """
    run = execute("python", "-c", textwrap.dedent(code), TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    where, *values = run.stdout.strip().splitlines()
    assert where.count(str(site)) == 2, where
    assert values[0][:8] == values[1][:8] == "0.086643"
    cache = tmp_path / "cache"
    run = execute("stablekern", "doctor", "--json", "--no-build", STABLEKERN_CACHE_DIR=str(cache))
    assert json.loads(run.stdout)["versions"]["stablekern"] == stablekern.__version__
    assert not list(cache.glob("native-*"))


def test_the_platform_wheel_carries_its_library(sources, clean, tmp_path):
    """Built with one kernel in place of all, which takes seconds; used without a compiler."""
    copy, log, wrapper = tmp_path / "copy", tmp_path / "log", tmp_path / "cxx"
    shutil.copytree(sources, copy, ignore=shutil.ignore_patterns(*IGNORED))
    build = copy / "stablekern" / "_build.py"
    before, _, rest = build.read_text().partition("PARTS = {")
    some = '{"core": ("bindings.cpp", "cpu/grad_guard.cpp"), "training": ("cpu/focal_loss.cpp",)}'
    build.write_text(f"{before}PARTS = {some}\n{rest.partition('}')[2]}")
    wrapper.write_text(f'#!/bin/sh\necho "$@" >>{log}\nexec {_build.compiler()} "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "out").mkdir()
    settings = {"STABLEKERN_PREBUILD": "1", "CXX": str(wrapper), "STABLEKERN_MARCH": "x86-64-v2"}
    wheel = pip_wheel(copy, tmp_path / "out", **settings)
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in wheel.name and "any" not in wheel.name
    commands = log.read_text().splitlines()
    assert len(commands) == 5 and all("-march=x86-64-v2" in line for line in commands if " -c " in line)
    assert "c++-header" in commands[0] + commands[1], "the prelude is compiled beside what does not read it"
    install, execute = clean
    site = install(wheel)
    code = """
        import torch, stablekern
        from stablekern import _load
        print(_load.native_module().__file__, stablekern.available_backends("focal_loss")["native"])
        with stablekern.use_backend("native"):
            print(float(stablekern.focal_loss(torch.zeros(1), torch.ones(1))))
    """
    cache = tmp_path / "cache"
    settings = {"CXX": "no-such-compiler", "STABLEKERN_CACHE_DIR": str(cache), "STABLEKERN_NATIVE": "1"}
    run = execute("python", "-c", textwrap.dedent(code), **settings)
    assert run.returncode == 0, run.stderr
    where, value = run.stdout.strip().splitlines()
    assert where == f"{site / 'stablekern' / _build._LIBRARY} None" and value[:8] == "0.086643"
    assert not cache.exists() and "compil" not in run.stderr


def test_the_package_is_typed():
    pytest.importorskip("mypy", reason="pip install '.[types]'")
    run = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert run.returncode == 0, run.stdout
    assert (ROOT / "stablekern" / "py.typed").is_file()
