"""What the README says is what runs: its code, its commands, and numbers that stand in committed result lines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert blocks
    for block in blocks:
        run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        promised = re.findall(r"print\(.*\)\s+# (\w+)", block)
        assert run.stdout.split() == promised


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, flags=re.M)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_speed_table_is_that_of_the_result_lines():
    report = pytest.importorskip("bench.report", reason="the benches live in the checkout")
    device = ROOT / "bench" / "results" / report.DEVICE
    assert report.filled(README, report.table(device)) == README
    page = report.PAGE.read_text()
    assert report.filled(page, report.page(device)) == page


def test_detector_page_is_that_of_the_result_lines():
    report = pytest.importorskip("bench.detector_report", reason="the benches live in the checkout")
    page = report.PAGE.read_text()
    assert report.filled(page, report.body(), report.BEGIN, report.END) == page
    assert "figures/detector.svg" in page and report.FIGURE.is_file()


def test_every_headline_has_a_line():
    report = pytest.importorskip("bench.report", reason="the benches live in the checkout")
    timed, _ = report._timed(ROOT / "bench" / "results" / report.DEVICE)
    for headline in report.HEADLINE:
        op, case, directions, baseline = headline
        found = [r for r in report.headlines(timed) if r["op"] == op and r["case"].startswith(case)]
        assert {r["direction"] for r in found} >= set(directions), headline


def test_demo_figures_are_those_of_the_result_lines():
    report = pytest.importorskip("bench.report", reason="the benches live in the checkout")
    results = report.newest(ROOT / "bench" / "results" / "cpu-amd-epyc-2-threads")
    demos = [r for (op, *_), r in sorted(results.items()) if op == "demo"]
    assert len(demos) == 3
    first, second, third = (f"{r['auroc']:.3f}" for r in demos)
    assert f"{first}, {second} and {third}" in README
    assert all(r["auroc"] >= 0.85 and r["steps"] >= 150 and r["seconds"] < 240 for r in demos)
    assert all(r["not_finite"]["steps"] == 0 for r in demos)
