"""The walk of examples/nan_hunt as its README writes it, and `stablekern doctor --watch`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import stablekern
from stablekern.cli import main

HUNT = Path(__file__).resolve().parent.parent / "examples" / "nan_hunt"
README = (HUNT / "README.md").read_text()
SCRIPTS = Path(sys.executable).parent

TRAINING = """
import torch
from torch import nn

def healthy():
    print("to stdout")
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    while True:
        model(torch.ones(3, 2)).square().mean().backward()
        optimizer.step()

class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0))
    def forward(self, x):
        return torch.exp(self.rate * x)

def overflows():
    model = Growing()
    for step in range(1, 100):
        with torch.no_grad():
            model.rate.fill_(float(step))
        try:
            model(torch.linspace(0, 3, 7)).clamp(max=1).sum().backward()
        except Exception:
            pass  # as loops do that must go on

def raises():
    raise KeyError("no data")

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working directory, imported anew."""
    (tmp_path / "watched_training.py").write_text(TRAINING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "watched_training", raising=False)
    return "watched_training"


def test_the_walk_as_it_is_written(tmp_path):
    """Three commands: it breaks, it is found as printed, it is mended, and then it trains."""
    shutil.copytree(HUNT, tmp_path, dirs_exist_ok=True)
    packages = Path(stablekern.__file__).resolve().parent.parent  # what is tested here, wherever it is installed
    environment = os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "PYTHONPATH": str(packages)}

    def shell(command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
        )

    commands = re.findall(r"```sh\n(.*?)\n```", README, flags=re.S)
    printed = re.findall(r"```text\n(.*?)\n```", README, flags=re.S)
    assert len(commands) == 3 and len(printed) == 2
    broken = shell(commands[0])
    assert broken.returncode == 1 and printed[0].partition(":")[0] in broken.stderr

    found = shell(commands[1])
    assert found.returncode == 1, found.stderr
    said = found.stdout.replace(f"{tmp_path}/", "")
    for line in printed[1].splitlines():  # statistics depend on the last digits of the machine
        if line.split()[0] not in ("made", "from"):
            assert line in said, line
    assert (tmp_path / "found.html").read_text().count("data:image/png;base64,") == 2

    assert shell(commands[2]).returncode == 0
    mended = shell(commands[0])
    assert mended.returncode == 0, mended.stderr
    losses = [float(value) for value in re.findall(r"loss (\S+)", mended.stdout)]
    assert len(losses) == 5 and losses[-1] < 0.1 and "100 steps, and the loss ends below 0.1" in README


def test_a_healthy_function_is_stopped_after_its_steps(module, capsys):
    assert main(["doctor", "--watch", f"{module}:healthy", "--steps", "7", "--json"]) == 0
    shown = capsys.readouterr()
    outcome = json.loads(shown.out)
    assert outcome["finite"] and outcome["steps"] == 7 and outcome["report"] is None and outcome["error"] is None
    assert "to stdout" in shown.err
    assert main(["doctor", "--watch", f"{module}:healthy", "--steps", "2"]) == 0
    assert "no non-finite tensor in 2 steps" in capsys.readouterr().out


def test_the_report_in_json_in_text_and_as_a_page(module, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert main(["doctor", "--watch", f"{module}:overflows", "--json", "--html", str(page)]) == 1
    outcome = json.loads(capsys.readouterr().out)
    assert not outcome["finite"] and outcome["report"]["cause"]["kind"] == "exp overflow"
    assert outcome["report"]["step"] == outcome["steps"] == 30  # exp(3 * 30) is above float32
    course = outcome["course"]
    assert course["steps"][0] == 1 and course["steps"][-1] == 30
    for step, quantiles in zip(course["steps"], course["quantiles"], strict=True):
        assert quantiles[0] == 0 and quantiles[2] == pytest.approx(1.5 * step) and quantiles[4] == 3 * step
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2 and "exp overflow" in text and "http" not in text
    assert main(["doctor", "--watch", f"{module}:overflows"]) == 1
    shown = capsys.readouterr().out
    assert "operand 0, over the steps before" in shown and "first non-finite tensor: forward of step 30" in shown


def test_what_cannot_be_run(module, capsys):
    for target, why in (
        (f"{module}:absent", "has no function `absent`"),
        (f"{module}:number", "has no function `number`"),
        ("nowhere_to_be_found:main", "there is no module"),
        (module, "must be module:function"),
    ):
        assert main(["doctor", "--watch", target]) == 2
        assert why in capsys.readouterr().err
    assert main(["doctor", "--watch", f"{module}:raises"]) == 2
    assert "raised KeyError: 'no data'" in capsys.readouterr().out


def test_without_the_parser_and_without_matplotlib(module, capsys, monkeypatch):
    from stablekern.cli import _without_typer

    assert _without_typer(["doctor", "--watch", f"{module}:healthy", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert _without_typer(["doctor", "--watch"]) == 2
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert main(["doctor", "--watch", f"{module}:healthy", "--html", "page.html"]) == 2
    assert "pip install 'stablekern[cli]'" in capsys.readouterr().err
