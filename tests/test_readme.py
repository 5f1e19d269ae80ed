"""Numbers of the README stand in committed result lines; its code and commands are in `tests/test_docs.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_two_commands_come_first():
    targets = re.findall(r"^make (\w+)", README, flags=re.M)
    assert targets[:2] == ["demo", "test"]


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
    timed = report._timed(ROOT / "bench" / "results" / report.DEVICE)
    for headline in report.HEADLINE:
        op, case, directions, baseline = headline
        found = [r for r in report.headlines(timed) if r["op"] == op and r["case"].startswith(case)]
        assert {r["direction"] for r in found} >= set(directions), headline


def test_demo_figures_are_those_of_the_result_lines():
    report = pytest.importorskip("bench.detector_report", reason="the benches live in the checkout")
    demos = report.lines("demo")
    assert len(demos) == 3
    first, second, third = (f"{r['auroc']:.3f}" for r in demos)
    assert f"{first}, {second} and {third}" in README
    assert all(r["auroc"] >= 0.85 and r["steps"] >= 150 and r["seconds"] < 240 for r in demos)
    assert all(r["not_finite"]["steps"] == 0 for r in demos)
