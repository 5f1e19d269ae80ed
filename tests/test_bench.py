"""`stablekern bench`: lines that are kept, drawn, compared; an op is timed only if it is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stablekern.cli import main

ROOT = Path(__file__).resolve().parent.parent

LINE = {
    "op": "eigh", "case": "many", "direction": "fwd", "dtype": "float32", "baseline": "torch", "ms": 2.0,
    "ms_p20": 1.9, "ms_p80": 2.1, "baseline_ms": 20.0, "ratio": 10.0, "gate": 5.0, "share_of_limit": 0.25,
    "gbytes_per_s": 3.0, "limit_gbytes_per_s": 12.0, "backend": "native", "device": "here", "allocator": "system",
    "error_float64": {"relative": 1e-7, "tolerances": 0.4, "of": "typical, output 0"},
}  # fmt: skip


def kept(path: Path, *changes: dict) -> Path:
    path.write_text("".join(json.dumps({**LINE, **change}) + "\n" for change in changes))
    return path


def test_bench_shows_and_draws_kept_lines(tmp_path, capsys):
    older = {"ms": 9.0}  # the newest line of a case counts
    lines = kept(tmp_path / "a.jsonl", older, {}, {"direction": "fwd+bwd"}, {"op": "cg", "gate": 50.0})
    assert main(["bench", str(lines), "--plots", str(tmp_path / "plots")]) == 0
    shown = capsys.readouterr().out
    assert "0.40" in shown and "10.00 (gate 50)" in shown and "25 %" in shown and shown.count("eigh") == 2
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["limit.png", "limit.svg", "time.png", "time.svg"]
    assert (tmp_path / "plots" / "time.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (tmp_path / "plots" / "time.svg").read_text()
    assert "stablekern, fwd+bwd" in drawn and ">cg<" in drawn
    assert main(["bench", str(lines), "--op", "cg", "--json"]) == 0
    assert [line["op"] for line in json.loads(capsys.readouterr().out)] == ["cg"]


def test_bench_compares_two_files(tmp_path, capsys):
    first = kept(tmp_path / "a.jsonl", {}, {"op": "cg"}, {"op": "gone"}, {"op": "noisy"})
    second = kept(
        tmp_path / "b.jsonl",
        {"ms": 1.0, "ms_p20": 0.9, "ms_p80": 1.1, "ratio": 20.0},
        {"op": "cg", "ms": 4.0, "ms_p20": 3.8, "ms_p80": 4.2, "ratio": 5.0},
        {"op": "noisy", "ms": 2.15, "ms_p20": 2.0, "ms_p80": 2.3},
    )
    assert main(["bench", "--compare", str(first), str(second), "--json"]) == 0
    rows = {row["op"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {op: row["verdict"] for op, row in rows.items()} == {"eigh": "faster", "cg": "slower", "noisy": "same"}
    assert rows["eigh"]["speedup"] == 2.0 and rows["cg"]["speedup_against_baseline"] == 0.5
    assert main(["bench", "--compare", str(first), str(second)]) == 0
    assert "1 faster, 1 same, 1 slower; 1 in one of the two only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench", "--op", "nothing"], "there is no op `nothing`; there are "),
        (["bench", "missing.jsonl"], "missing.jsonl"),
        (["bench", "--compare", "missing.jsonl", "missing.jsonl"], "missing.jsonl"),
        (["bench", "--device", "tpu"], "tpu is none of cpu, cuda"),
    ],
)
def test_bench_refuses_what_there_is_not(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert text in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("no json\n")
    assert main(["bench", "bad.jsonl"]) == 2
    assert "bad.jsonl:1: not a JSON line" in capsys.readouterr().err


def test_bench_without_a_checkout_says_what_is_missing(monkeypatch, capsys):
    from stablekern.cli import bench

    monkeypatch.setattr(bench, "_benches", lambda: None)
    assert main(["bench"]) == 2
    assert "the workloads are in the source checkout" in capsys.readouterr().err


@pytest.fixture
def impatient(monkeypatch):
    """Do not wait for the machine to be quiet: these times count for nothing."""
    pytest.importorskip("bench.timing", reason="the benches live in the checkout")
    monkeypatch.setattr("bench.timing._QUIET_WAIT_S", 0.0)


def test_bench_times_an_op_and_keeps_its_lines(tmp_path, impatient, capsys):
    out = tmp_path / "lines.jsonl"
    command = ["bench", "--op", "small_cayley", "--direction", "fwd", "--seconds", "0.05", "--device", "cpu", "--json"]
    assert main([*command, "--out", str(out)]) == 0
    shown = json.loads(capsys.readouterr().out)
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert lines == shown and len(lines) >= 1
    for line in lines:
        assert line["op"] == "small_cayley" and line["ms"] > 0 and line["share_of_limit"] > 0
        assert line["error_float64"]["tolerances"] <= 1 and line["commit"] and line["torch"] and line["machine"]


def test_bench_does_not_time_what_is_wrong(monkeypatch, impatient, capsys):
    from stablekern import _registry

    launchers = _registry._launchers["small_cayley_fwd"]["cpu"]
    right = launchers["torch"]
    monkeypatch.setitem(launchers, "torch", right._replace(function=lambda A: right.function(A) * 1.001))
    command = ["bench", "--op", "small_cayley", "--direction", "fwd", "--seconds", "0.05", "--device", "cpu", "--json"]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == [] and "not timed: small_cayley torch float32: " in shown.err


def test_entry_points_of_pytest_benchmark(tmp_path):
    """`pytest bench/ --benchmark-only`, on one small case; `make test` does not collect them."""
    pytest.importorskip("pytest_benchmark", reason="`make test` installs it")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-k", "eigh-one",
               "--benchmark-max-time=0.01", f"--benchmark-json={out}", "-q", "-p", "no:cacheprovider"]  # fmt: skip
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker's
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["benchmarks"]
    assert {one["extra_info"]["side"] for one in found} == {"ours", "baseline"}
    assert {one["group"] for one in found} == {"eigh one 19x19 fwd", "eigh one 19x19 fwd+bwd"} and len(found) == 4
