"""The exhibits: each cause must show with plain PyTorch, stay with the published fix, and be gone with ours."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stablekern import zoo
from stablekern.cli import main
from stablekern.zoo import FIX, OURS, STOCK, Exhibit
from stablekern.zoo.exhibit import largest, spread

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Rows of plain PyTorch or of a fix that count 0, because that is what they show.
CLEAN = {
    ("degenerate_floor", "torch.linalg.eigvalsh"): "a loss of eigenvalues has no gap in its gradient",
    ("state_clamp", "state clamped every 256 steps"): "its gradient is finite, and 1e12",
    ("focal_half", "(1 - p)^2 log p"): "it is NaN where the other vanishes",
    ("cayley_solver", "CG, 50 iterations"): "at the smallest dt the matrix is close to Hermitian",
}


_CPU_SECONDS = 40.0  # of one thread; two cores are allowed that much time


@pytest.fixture(scope="module")
def found() -> dict[str, Exhibit]:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)  # the processor time of one thread says the same on a busy machine
    start = time.process_time()
    exhibits = {exhibit.name: exhibit for exhibit in zoo.run()}
    spent = time.process_time() - start
    torch.set_num_threads(threads)
    assert torch.equal(state, torch.get_rng_state()), "torch's random numbers are left alone"
    assert spent < _CPU_SECONDS
    return exhibits


@pytest.mark.parametrize("name", zoo.EXHIBITS)
def test_each_exhibit(name, found):
    exhibit = found[name]
    for row in exhibit.rows:
        assert 0 <= row.bad <= row.of and row.of > 0
        if row.who == OURS:
            assert row.bad == 0, row
        elif (name, row.name) not in CLEAN:
            assert row.bad > 0, row
    for who in (STOCK, FIX, OURS):
        assert any(row.who == who for row in exhibit.rows) and any(s.who == who for s in exhibit.figure.series)
    assert exhibit.total(STOCK)[0] > 0 and exhibit.total(FIX)[0] > 0
    for series in exhibit.figure.series:
        assert len(series.x) == len(series.y) > 1
        if series.who == OURS:
            assert all(abs(y) < 1e5 for y in series.y), "finite, and of a usual size"


def test_the_published_shift_changes_no_gap(found):
    """The curve of A + 1e-3 I is that of A, up to rounding."""
    series = {s.who: s for s in found["repeated_eigenvalues"].figure.series}
    both = [(a, b) for x, a, b in zip(series[STOCK].x, series[STOCK].y, series[FIX].y, strict=True) if x > 1e-4]
    assert len(both) > 10 and all(a == pytest.approx(b, rel=0.05) for a, b in both)


def test_the_noise_is_what_the_formula_says(found):
    """sqrt(2 T lr steps) times 1e4, times 1 with ours: the exhibit runs the rule that it claims to."""
    series = {s.who: s.y[-1] for s in found["langevin_noise"].figure.series}
    plain = (2 * 1e-5 * 1.2e-3 * 10) ** 0.5
    assert series[STOCK] == pytest.approx(1e4 * plain, rel=0.05)
    assert series[FIX] == pytest.approx(series[STOCK], rel=1e-3)
    assert series[OURS] == pytest.approx(plain, rel=0.05)


def test_helpers():
    assert spread(1.0, 100.0, 3) == [1.0, 10.0, 100.0]
    assert largest([1.0, float("nan"), float("inf")]) == 1.0 and largest([]) is None


# ---- the command -----------------------------------------------------------------------------------------------------


def test_json_is_a_list_alone_on_stdout():
    done = subprocess.run(
        [sys.executable, "-m", "stablekern", "zoo", "langevin_noise", "focal_half", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    objects = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [o["name"] for o in objects] == ["langevin_noise", "focal_half"]
    fields = {"name", "seen", "cause", "published", "remedy", "counted", "measured", "rows", "figure", "seconds"}
    assert all(set(o) == fields for o in objects)
    assert objects[0]["rows"][0]["who"] == STOCK and objects[1]["figure"]["series"][0]["y"][0] is None
    assert done.stderr.startswith("langevin_noise: ")


def test_text_and_page(tmp_path, capsys):
    from html.parser import HTMLParser

    class Page(HTMLParser):
        images: list[dict] = []

        def handle_starttag(self, tag, attributes):
            values = dict(attributes)
            if tag == "img":
                self.images.append(values)
            assert not values.get("href", "").startswith("http"), "the page must stand alone"

    path = tmp_path / "zoo.html"
    assert main(["zoo", "focal_half", "cosine_gradient", "--html", str(path)]) == 0
    shown = capsys.readouterr()
    assert "wrong and certain" in shown.out and "published fix" in shown.out and str(path) in shown.err
    page = Page()
    page.feed(path.read_text())
    assert len(page.images) == 2
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.images)
    assert "<h1>Why training goes NaN</h1>" in path.read_text() and "Focal half" in path.read_text()


def test_what_it_refuses(tmp_path, capsys, monkeypatch):
    assert main(["zoo", "unicorn"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "there is no exhibit `unicorn`; there are repeated_eigenvalues," in shown.err
    assert main(["zoo", "langevin_noise", "--html", str(tmp_path / "no" / "where.html")]) == 2
    assert "No such file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["zoo", "langevin_noise", "--html", str(tmp_path / "page.html")]) == 2
    assert "stablekern zoo needs the extras: pip install 'stablekern[cli]'" in capsys.readouterr().err


# ---- the page in docs ------------------------------------------------------------------------------------------------


def test_docs_hold_the_numbers_of_the_committed_run(found):
    bench_zoo = pytest.importorskip("bench.zoo", reason="the benches live in the checkout")
    record = json.loads((DOCS / "zoo.json").read_text())
    text = (DOCS / "zoo.md").read_text()
    assert bench_zoo.tables(record) in text, "run `python -m bench.zoo --only-text`"
    assert [e["name"] for e in record["exhibits"]] == list(zoo.EXHIBITS), "run `python -m bench.zoo`"
    for exhibit in record["exhibits"]:
        assert (DOCS / "figures" / f"zoo_{exhibit['name']}.svg").stat().st_size < 150_000
        here = found[exhibit["name"]]
        assert [(r["who"], r["name"], r["case"], r["of"]) for r in exhibit["rows"]] == [
            (r.who, r.name, r.case, r.of) for r in here.rows
        ]
        assert all(row["bad"] == 0 for row in exhibit["rows"] if row["who"] == OURS)
