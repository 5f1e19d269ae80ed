"""The documentation: it builds without a warning and without the network, its code runs, its commands exist."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import stablekern

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")})
BLOCK = re.compile(r"(?:<!-- (run first|not run:)(.*?)-->\n)?^```(\w*)[^\n]*\n(.*?)^```", re.S | re.M)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, *languages: str) -> list[tuple[str, str, str]]:
    """(mark, what the mark holds, code) of each block in one of the languages."""
    return [(mark, held, code) for mark, held, lang, code in BLOCK.findall(path.read_text()) if lang in languages]


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=named)
def test_python_blocks_run(path, tmp_path, monkeypatch, any_backend):
    """All blocks of a page, one after the other; `print(...)  # text` must print that text, and what "warns" must.

    `<!-- run first ... -->` before a block holds lines that readers have already; `<!-- not run: reason -->` leaves
    the block out.
    """
    monkeypatch.chdir(tmp_path)
    page: dict[str, object] = {"__name__": "__main__"}
    for mark, held, code in blocks(path, "python"):
        if mark == "not run:":
            assert len(held.strip()) > 10, "a reason"
            compile(code, named(path), "exec")
            continue
        if mark:
            exec(compile(held, f"{named(path)}, run first", "exec"), page)
        printed = io.StringIO()
        warns = pytest.warns(RuntimeWarning) if re.search(r"# .*\bwarns\b", code) else contextlib.nullcontext()
        with contextlib.redirect_stdout(printed), warns:
            exec(compile(code, named(path), "exec"), page)
        promised = [text.split(";")[0].strip() for text in re.findall(r"print\(.*\)  # (.+)", code)]
        if promised:
            assert printed.getvalue().splitlines() == promised


def test_every_op_has_a_page_with_an_example():
    for path in (ROOT / "stablekern" / "ops").glob("[!_]*.py"):
        page = ROOT / "docs" / "ops" / f"{path.stem}.md"
        assert page.is_file(), page
        assert f"stablekern.{path.stem}(" in page.read_text()


def commands() -> list:
    found = []
    for path in PAGES:
        for _, _, code in blocks(path, "", "sh", "bash", "console"):
            for line in code.splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]
                if words and words[0] in ("make", "stablekern", "python", "pip", "torchrun", "pytest"):
                    found.append(pytest.param(words, id=f"{named(path)}: {' '.join(words)[:50]}"))
    return found


def check_cli(words: list[str]) -> None:
    """Command and options as the parser knows them."""
    import typer

    from stablekern.cli.app import app

    group = typer.main.get_command(app)
    command = group.commands.get(words[0])
    assert command is not None, f"{words[0]} is none of {', '.join(group.commands)}"
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options = {word.split("=")[0] for word in words[1:] if word.startswith("--")} - {"--help"}
    assert options <= known, f"{words[0]}: {options - known}"


def check_module(name: str) -> None:
    assert importlib.util.find_spec(name) is not None or (ROOT / name.replace(".", "/")).is_dir(), name


@pytest.mark.parametrize("words", commands())
def test_commands_exist(words):
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{target}:", makefile, flags=re.M), target
    elif words[0] == "stablekern":
        check_cli(words[1:])
    elif words[:2] == ["pip", "install"]:
        extras = {name for text in re.findall(r"\[(.+)\]", " ".join(words)) for name in text.split(",")}
        project = (ROOT / "pyproject.toml").read_text()
        for extra in extras:
            assert re.search(rf"^{extra} = \[", project, flags=re.M), extra
    elif "-m" in words:
        at = words.index("-m") + 1
        check_module(words[at])
        if words[at] == "stablekern":
            check_cli(words[at + 1 :])
    elif words[0] == "python":
        assert any(path.name == Path(words[1]).name for path in ROOT.glob("*/**/*.py")), words[1]
    else:
        pytest.fail(f"nothing checks {words}")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", out]
    run = subprocess.run(build, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


def test_site_builds_with_every_page(site):
    """`--strict`: a warning fails, and so does a link or an anchor that leads nowhere."""
    for path in (ROOT / "docs").rglob("*.md"):
        page = site / path.relative_to(ROOT / "docs").with_suffix(".html")
        assert page.is_file(), page
    for name in ("changelog", "contributing", "security"):
        assert (site / f"{name}.html").is_file()
    eigh = (site / "ops" / "eigh.html").read_text()
    assert "<math" in eigh and "<td>native, torch</td>" in eigh
    assert all(f'id="{part}"' in eigh for part in ("reference", "derivation", "measured-accuracy", "measured-speed"))
    assert "'auto'" in eigh, "defaults keep their quotes"
    environment = (site / "environment.html").read_text()
    assert all(name in environment for name in stablekern.settings.SETTINGS)


def test_site_loads_nothing_from_elsewhere(site):
    """Scripts, styles, images and fonts; a link that a reader may click is none of these."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//', text), page
        for tag in re.findall(r"<link[^>]*>", text):
            assert not re.search(r'href="(?:https?:)?//', tag), (page, tag)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//", sheet.read_text()), sheet


def test_site_has_no_formula_left_and_no_comment(site):
    for page in site.rglob("ops/*.html"):
        text = re.sub(r"<(code|pre)[ >].*?</\1>", "", page.read_text(), flags=re.S)
        assert "arithmatex" not in text and "$$" not in text, page
        assert "<!-- run first" not in text, page
