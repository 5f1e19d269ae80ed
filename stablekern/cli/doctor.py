"""`stablekern doctor`: what this machine can run, and why not more. Needs nothing but the base installation."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch

import stablekern
from stablekern import _build, _load, _registry, settings
from stablekern._nvrtc import version as nvrtc_version
from stablekern.errors import BuildError, SettingError

__all__ = ["collect", "run", "summary", "text"]

# Instruction sets that the kernels or torch make use of, as Linux names them on x86 and on Arm.
_SIMD = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "asimd", "sve")
_EXTRAS = {
    "eeg": ("mne", "edfio"),
    "cli": ("typer", "rich", "matplotlib"),
    "bench": ("mambapy", "transformers", "torch-geometric", "linear-operator"),
    "test": ("pytest", "pytest-benchmark", "hypothesis", "scipy"),
}


# ---- the facts -----------------------------------------------------------------------------------------------------


def collect(*, build: bool = True) -> dict[str, Any]:
    """Everything that `doctor` knows, as JSON types. Builds the native kernels if they are not there, if `build`.

    Keys, whose names and types stay:

    - `schema`: 1. `usable`: whether every op has a backend on every device here and every setting is legal. `problems`:
        one sentence for each reason why not.
    - `versions`: `stablekern`, `torch`, `python`, `numpy`, `triton` (None if not installed).
    - `system`: `os`, `machine`, `cpu`, `cores` (of the machine), `cores_allowed` (of this process), `torch_threads`,
        `memory_gib`, `simd` (list), `torch_simd` (the level torch's own kernels run at).
    - `compiler`: `path`, `version`, `reason` (None, or why there is none).
    - `native`: the CPU kernels: `ready`, `simd`, `vector_bytes`, `compiler`, `reason`.
    - `cache`: `path`, `reason`.
    - `gpus`: list of `name`, `capability` ("8.9"), `memory_gib`. `gpu_reason`: None, or why there is none.
    - `triton`: `version`, `cuda` and `cpu` (each None if it can run there, else why not).
    - `nvrtc`: `version` (None if it cannot be used), `reason`.
    - `settings`: list of `name`, `value`, `effect`, `error`, for every variable of the package that is set.
    - `mamba_fallback`: whether SEIZURE_MAMBA_FORCE_FALLBACK is on.
    - `extras`: list of `name`, `packages` (name to version or None), `install` (the command; None if complete).
    - `ops`: list of `op`, `device`, `backends` (dispatcher op to backend, None if none can run it), `reasons`
        (backend to why it does not run, for those better than the one that does, or forced).
    """
    problems: list[str] = []
    state = _settings(problems)
    legal = not problems
    native = _native(build) if legal else _no_native("a setting is not legal")
    facts = {
        "schema": 1,
        "usable": True,
        "problems": problems,
        "versions": {
            "stablekern": stablekern.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "triton": _version("triton"),
        },
        "system": _system(),
        "compiler": _compiler(),
        "native": native,
        "cache": _cache(),
        "gpus": _gpus(),
        "gpu_reason": _gpu_reason(),
        "triton": _triton(),
        "nvrtc": _nvrtc(),
        "settings": state,
        "mamba_fallback": any(s["name"] == "SEIZURE_MAMBA_FORCE_FALLBACK" and s["value"] is True for s in state),
        "extras": _extras(),
        "ops": _ops(build, problems) if legal else [],
    }
    facts["usable"] = not problems
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    try:
        with open("/proc/cpuinfo") as file:
            block = file.read().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _system() -> dict[str, Any]:
    cpu = _cpuinfo()
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        memory = None
    return {
        "os": _os_name(),
        "machine": platform.machine(),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cores_allowed": allowed,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory, 1),
        "simd": [name for name in _SIMD if name in flags],
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
    }


def _os_name() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = platform.system()
    return f"{name}, kernel {platform.release()}"


def _compiler() -> dict[str, Any]:
    try:
        path = _build.compiler()
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        return {"path": None, "version": None, "reason": _plain(error)}
    return {"path": path, "version": run.stdout.partition("\n")[0], "reason": None}


def _plain(error: BaseException) -> str:
    """An error's text without the name of the function that raised it."""
    where, _, rest = str(error).partition(": ")
    return rest if where.startswith("stablekern.") else str(error)


def _no_native(reason: str) -> dict[str, Any]:
    return {"ready": False, "simd": None, "vector_bytes": None, "compiler": None, "reason": reason}


def _native(build: bool) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same reason is returned, and shown
        reason = _load.native_reason(build=build)
    if reason is not None:
        return _no_native(reason)
    module = _load.native_module()
    facts = {"simd": module.simd, "vector_bytes": module.vector_bytes, "compiler": module.compiler}
    return {"ready": True, **facts, "reason": None}


def _cache() -> dict[str, Any]:
    try:
        return {"path": str(_build.cache_directory(settings.get("STABLEKERN_CACHE_DIR"))), "reason": None}
    except BuildError as error:
        return {"path": None, "reason": _plain(error)}


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        memory = round(facts.total_memory / 2**30, 1)
        found.append({"name": facts.name, "capability": f"{facts.major}.{facts.minor}", "memory_gib": memory})
    return found


def _gpu_reason() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return "torch finds no CUDA device: see nvidia-smi, and CUDA_VISIBLE_DEVICES"


def _triton() -> dict[str, Any]:
    cuda = _load.triton_reason("cuda") or (None if torch.cuda.is_available() else "no CUDA device")
    return {"version": _version("triton"), "cuda": cuda, "cpu": _load.triton_reason("cpu")}


def _nvrtc() -> dict[str, Any]:
    """NVIDIA's run-time compiler, as cuda-bindings finds it."""
    version, reason = nvrtc_version()
    return {"version": version, "reason": reason}


def _settings(problems: list[str]) -> list[dict[str, Any]]:
    """The variables that are set; a value that is not legal is a problem, not an exception."""
    found = []
    for name, setting in settings.SETTINGS.items():
        if not os.environ.get(name, "").strip():
            continue
        entry: dict[str, Any] = {"name": name, "value": None, "effect": setting.effect, "error": None}
        try:
            entry["value"] = settings.get(name)
        except SettingError as error:
            entry["error"] = _plain(error)
            problems.append(_plain(error))
        found.append(entry)
    try:
        settings.safe_clamp_bounds()
    except SettingError as error:
        if _plain(error) not in problems:
            problems.append(_plain(error))
    return found


def _extras() -> list[dict[str, Any]]:
    rows = []
    for name, packages in _EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        install = None if all(versions.values()) else f"pip install 'stablekern[{name}]'"
        rows.append({"name": name, "packages": versions, "install": install})
    return rows


def _ops(build: bool, problems: list[str]) -> list[dict[str, Any]]:
    parts: dict[str, list[str]] = {}
    for name in _registry.ops():
        parts.setdefault(name.removesuffix("_fwd").removesuffix("_bwd"), []).append(name)
    rows = []
    for op, names in parts.items():
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            backends: dict[str, str | None] = {}
            reasons: dict[str, str] = {}
            # Forward before backward; the reasons of the two differ only where one of them lacks a kernel.
            for name in sorted(names, key=lambda name: not name.endswith("_fwd")):
                backends[name], why = _registry.explain(name, device, build=build)
                reasons |= {backend: reason for backend, reason in why.items() if backend not in reasons}
            rows.append({"op": op, "device": device, "backends": backends, "reasons": reasons})
            if None in backends.values():
                because = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
                problems.append(f"{op} cannot run on {device} ({because})")
    return rows


# ---- what is printed -----------------------------------------------------------------------------------------------


class _Section(NamedTuple):
    title: str
    rows: list[tuple[str, str]]


def _sections(facts: dict[str, Any]) -> list[_Section]:
    versions, system, native = facts["versions"], facts["system"], facts["native"]
    compiler, triton, nvrtc = facts["compiler"], facts["triton"], facts["nvrtc"]
    cores = f"{system['cores_allowed']} of {system['cores']} cores" if system["cores"] else "cores unknown"
    memory = f", {system['memory_gib']:g} GiB of memory" if system["memory_gib"] else ""
    machine = [
        ("stablekern", versions["stablekern"]),
        ("torch", versions["torch"]),
        ("Python", f"{versions['python']}, NumPy {versions['numpy']}"),
        ("system", f"{system['os']}, {system['machine']}"),
        ("CPU", f"{system['cpu']}, {cores}, torch uses {system['torch_threads']}{memory}"),
        ("SIMD", f"{' '.join(system['simd']) or 'unknown'} (torch: {system['torch_simd']})"),
    ]
    built = (
        f"ready, {native['simd']}, {native['vector_bytes']}-byte vectors"
        if native["ready"]
        else f"no: {native['reason']}"
    )
    cpu = [
        (
            "compiler",
            f"{compiler['version']} ({compiler['path']})" if compiler["path"] else f"no: {compiler['reason']}",
        ),
        ("CPU kernels", built),
        ("cache", facts["cache"]["path"] or f"no: {facts['cache']['reason']}"),
    ]
    gpu = [
        ("GPU", f"{g['name']}, compute capability {g['capability']}, {g['memory_gib']:g} GiB") for g in facts["gpus"]
    ]
    gpu = gpu or [("GPU", f"none: {facts['gpu_reason']}")]
    on = "runs on the GPU" if triton["cuda"] is None else f"not on a GPU: {triton['cuda']}"
    on += "" if triton["cpu"] is not None else "; interpreted on the CPU (TRITON_INTERPRET=1)"
    gpu.append(("Triton", f"{triton['version']}, {on}" if triton["version"] else f"no: {triton['cuda']}"))
    gpu.append(("NVRTC", nvrtc["version"] or f"no: {nvrtc['reason']}"))
    extras = []
    for extra in facts["extras"]:
        have = ", ".join(f"{name} {version}" for name, version in extra["packages"].items() if version)
        lack = ", ".join(name for name, version in extra["packages"].items() if not version)
        extras.append(
            (extra["name"], have if not lack else f"{have + '; ' if have else ''}without {lack}: {extra['install']}")
        )
    chosen = [(s["name"], s["error"] if s["error"] else f"{s['value']}: {s['effect']}") for s in facts["settings"]] or [
        ("none", "no variable of the package is set")
    ]
    ops = [(_op_name(row, facts), _op_text(row)) for row in facts["ops"]]
    titles = ("Machine", "CPU kernels", "GPU", "Extras", "Settings (environment variables)", "Backend of each op")
    sections = [_Section(t, rows) for t, rows in zip(titles, (machine, cpu, gpu, extras, chosen, ops), strict=True)]
    if facts["mamba_fallback"]:
        sections.append(
            _Section("Fallback", [("Mamba-2", "SEIZURE_MAMBA_FORCE_FALLBACK is on: the layers run without their scan")])
        )
    if facts["problems"]:
        sections.append(_Section("Problems", [("!", problem) for problem in facts["problems"]]))
    return [section for section in sections if section.rows]


def summary(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The few lines of `collect`'s facts that say what a run is going to run on."""
    versions, system, native = facts["versions"], facts["system"], facts["native"]
    on_cpu = [set(row["backends"].values()) for row in facts["ops"] if row["device"] == "cpu"]
    plain = sum(backends != {"native"} for backends in on_cpu)
    kernels = f"ready ({native['simd']})" if native["ready"] else f"no, plain torch instead: {native['reason']}"
    kernels += f"; {plain} of {len(on_cpu)} ops use plain torch" if native["ready"] and plain else ""
    rows = [
        (
            "stablekern",
            f"{versions['stablekern']}, torch {versions['torch']}, Python {versions['python']}, {system['os']}",
        ),
        ("CPU", f"{system['cpu']}, {system['cores_allowed']} cores, torch uses {system['torch_threads']}"),
        ("CPU kernels", kernels),
        ("GPU", ", ".join(g["name"] for g in facts["gpus"]) or f"none: {facts['gpu_reason']}"),
    ]
    rows += [("setting", f"{s['name']}={s['value']}: {s['effect']}") for s in facts["settings"]]
    return rows + [("problem", problem) for problem in facts["problems"]]


def _op_name(row: dict[str, Any], facts: dict[str, Any]) -> str:
    return f"{row['op']} ({row['device']})" if facts["gpus"] else row["op"]


def _op_text(row: dict[str, Any]) -> str:
    chosen = list(dict.fromkeys(backend or "none" for backend in row["backends"].values()))
    names = {name.removeprefix(f"{row['op']}_") or name: backend or "none" for name, backend in row["backends"].items()}
    text = chosen[0] if len(chosen) == 1 else ", ".join(f"{name} {backend}" for name, backend in names.items())
    why = "; ".join(f"{backend}: {reason}" for backend, reason in row["reasons"].items())
    return f"{text}  (not {why})" if why else text


def text(facts: dict[str, Any], *, width: int = 100) -> str:
    """The facts of `collect` as plain text, wrapped to `width` columns."""
    lines = []
    for section in _sections(facts):
        lines.append(section.title)
        column = max(len(name) for name, _ in section.rows)
        for name, value in section.rows:
            lead = f"  {name:<{column}}  "
            lines += textwrap.wrap(
                value, max(width, len(lead) + 20), initial_indent=lead, subsequent_indent=" " * len(lead)
            )
        lines.append("")
    lines.append(
        "This machine can run every op." if facts["usable"] else "Something has to be put right: see Problems."
    )
    return "\n".join(lines)


def _rich_printer() -> Callable[[dict[str, Any]], None] | None:
    """A printer with colours, if rich is installed and stdout is a terminal."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None

    def show(facts: dict[str, Any]) -> None:
        console = Console(highlight=False)
        for section in _sections(facts):
            console.print(Text(section.title, "bold red" if section.title == "Problems" else "bold"))
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
            table.add_column(style="cyan", no_wrap=True)
            table.add_column()
            for name, value in section.rows:
                table.add_row(Text(f"  {name}"), Text(value))
            console.print(table)
            console.print()
        console.print(
            Text("This machine can run every op.", "bold green")
            if facts["usable"]
            else Text("Something has to be put right: see Problems.", "bold red")
        )

    return show


def run(*, as_json: bool = False, build: bool = True) -> int:
    """Print the facts to stdout; returns the exit code, 0 if everything can run, else 1."""
    facts = collect(build=build)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        (_rich_printer() or (lambda facts: print(text(facts))))(facts)
    return 0 if facts["usable"] else 1
