"""`python -m stablekern.testing`: the suite of the ops on a user's machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import stablekern.testing
from stablekern.testing import report, suite

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--op", "small_cayley,finite_stats"]


def test_the_specs_are_those_of_the_tests():
    names = [spec.name for spec in stablekern.testing.all_specs()]
    assert {"eigh", "ssd_scan", "focal_loss"} <= set(names) and len(names) == len(set(names))
    for path in (ROOT / "tests" / "specs").glob(
        "*.py"
    ):  # they have two names: that of the tests, and the installed one
        assert not re.search(r"^(from|import) specs\b", path.read_text(), flags=re.M), path


def test_a_table_and_an_exit_code(capsys):
    assert report.main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["op", "device", "backend", "dtype"]
    rows = {tuple(line.split()[:4]): line for line in lines[1:] if line.startswith(("small_cayley", "finite_stats"))}
    assert {"native", "torch"} <= {key[2] for key in rows}
    row = rows["small_cayley", "cpu", "native", "float64"]
    samples, units = int(row.split()[4]), float(row.split()[5])
    assert samples > 5 and 0 <= units <= 1 and "yes (" in row
    assert re.search(r"^All errors are within their tolerance: \d+ samples and \d+ gradchecks in \d+ s\.$", lines[-1])


def test_json_and_markdown(capsys):
    assert report.main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in found["rows"]} == {"small_cayley", "finite_stats"}
    assert all(row["good"] and row["samples"] for row in found["rows"]) and "usable" in found["machine"]
    assert report.main([*SMALL, "--markdown"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("**All errors are within") and "| machine | |" in text and "<details>" in text
    assert report.main(["--op", "nothing"]) == 2
    assert "there is no op `nothing`" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["value", "gradient", "nan", "raises"])
def test_what_is_wrong_is_seen(fault, monkeypatch, capsys):
    """A wrong launcher: three times the tolerance, a wrong derivative, a NaN, an exception."""
    from stablekern import _registry

    launchers = _registry._launchers["small_cayley_fwd"]["cpu"]
    right = launchers["torch"]

    def wrong(*arguments):
        out = right.function(*arguments)
        if fault == "raises":
            raise ZeroDivisionError("of this test")
        return out * (1 + 1e-4) if fault == "value" else out.clone().fill_(torch.nan)

    if fault == "gradient":
        real = suite.gradcheck
        monkeypatch.setattr(suite, "gradcheck", lambda *a, **k: real(*a, **k) and bool(1 / 0))
    else:
        monkeypatch.setitem(launchers, "torch", right._replace(function=wrong))
    assert report.main(["--op", "small_cayley", "--markdown"]) == 1
    text = capsys.readouterr().out
    assert re.match(r"\*\*\d of \d rows are not good", text)
    assert {"value": "TOO LARGE", "gradient": "| NO |", "nan": "non-finite entries differ", "raises": "of this test"}[
        fault
    ] in text


def test_out_of_time_is_said():
    rows = list(report.found(["small_cayley"], seconds=0.0))
    assert rows and all(row.skipped.startswith("out of time") and row.samples == 0 for row in rows)
    assert "cannot run: out of time" in report.text(rows, 0.0)
