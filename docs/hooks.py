"""What MkDocs adds to the pages of this folder: docstrings, result lines, figures, settings, MathML.

A page `<package>/<module>.md` is a few lines written by hand; behind them come the reference (from the docstrings),
the derivation, accuracy and speed (from bench/results) and the backends of `stablekern.<package>.<module>`. Formulas
become MathML while the site is built, so that no page loads a script for them. A link to a file of the repository
outside of this folder gets a copy of that file.
"""

from __future__ import annotations

import html
import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT)]

from latex2mathml.converter import convert  # noqa: E402
from mkdocs.structure.files import File, InclusionLevel  # noqa: E402

from bench import accuracy, report  # noqa: E402

# Files of the repository's root that are pages of the site.
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
PACKAGES = ("ops", "optim", "health")
NAV: tuple[tuple[str, tuple[str, ...] | str], ...] = (
    ("Quickstart", "index.md"),
    ("Why training goes NaN", ("zoo.md", "watch.md", "health/*.md")),
    ("Ops", ("ops/index.md", "ops/*.md")),
    ("Training", ("optim/*.md", "corpora.md")),
    ("Layers", ("nn.md", "detector.md")),
    ("Moving from", ("migrate/*.md",)),
    ("Speed and accuracy", ("speed.md", "accuracy.md", "plots.md", "gpu_notes.md")),
    ("Inside", ("architecture.md", "adding_an_op.md", "environment.md")),
    ("Project", tuple(ROOT_PAGES.values())),
)
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_config(config: Any) -> Any:
    """The navigation: what of `NAV` there is."""
    config.nav = []
    for title, entries in NAV:
        if isinstance(entries, str):
            config.nav.append({title: entries})
            continue
        found = [page for entry in entries for page in ([entry] if entry in ROOT_PAGES.values() else _pages(entry))]
        if found := list(dict.fromkeys(found)):
            config.nav.append({title: found})
    return config


def _pages(pattern: str) -> list[str]:
    return sorted((path.relative_to(DOCS).as_posix() for path in DOCS.glob(pattern)), key=str.lower)


def _outside(target: str, source: Path) -> str | None:
    """The path in the repository of what a link of `source` points at, if that is a file outside of docs/."""
    path = Path(os.path.normpath(source.parent / target))
    if path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS):
        return path.relative_to(ROOT).as_posix()
    return None


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the root, and every file of the repository that a page links to."""
    sources = [Path(file.abs_src_path) for file in files.documentation_pages()]
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
        sources.append(ROOT / name)
    linked = {_outside(target, path) for path in sources for _, target, _ in _LINK.findall(path.read_text())}
    for name in sorted(linked - {None} - set(ROOT_PAGES)):
        copy = File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name))
        copy.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(copy)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    source = next((ROOT / name for name, uri in ROOT_PAGES.items() if uri == page.file.src_uri), None)
    source = source or Path(page.file.abs_src_path)
    here = page.file.src_uri

    def link(found: re.Match[str]) -> str:
        name = _outside(found[2], source)
        if name is not None:
            target = ROOT_PAGES.get(name, f"repository/{name}")
        elif source.parent == ROOT and found[2].startswith("docs/"):
            target = found[2].removeprefix("docs/")
        else:
            return found[0]
        return found[1] + os.path.relpath(target, os.path.dirname(here) or ".") + found[3]

    markdown = _LINK.sub(link, markdown)
    markdown = re.sub(r"<!-- reference: ([\w.]+) -->", lambda m: reference(m[1], level=2), markdown)
    markdown = markdown.replace("<!-- settings -->", settings_table())
    markdown = markdown.replace("<!-- ops -->", ops_table())
    markdown = markdown.replace("<!-- accuracy -->", accuracy.table())
    package, _, name = here.removesuffix(".md").partition("/")
    if package in PACKAGES and name != "index":
        markdown += "\n\n" + generated(f"stablekern.{package}.{name}", depth=here.count("/"))
    return re.sub(r"<!--.*?-->\n?", "", markdown, flags=re.S)


def public(module: Any) -> list[tuple[str, Any]]:
    """Functions and classes that a module exports and defines; tuples that they return are described where they are."""
    found = [(name, getattr(module, name)) for name in module.__all__]
    return [
        (name, value)
        for name, value in found
        if (inspect.isfunction(value) or inspect.isclass(value))
        and not (inspect.isclass(value) and issubclass(value, (tuple, BaseException)))
    ]


def reference(module_name: str, level: int) -> str:
    """Signature and docstring of each public name."""
    parts = []
    for name, value in public(importlib.import_module(module_name)):
        prefix = "class " if inspect.isclass(value) else ""
        parts += [f"{'#' * level} {name}", "```python\n" + prefix + signature(name, value) + "\n```", docstring(value)]
    return "\n\n".join(parts)


def signature(name: str, value: Any) -> str:
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(value)))  # annotations are texts
    if len(name + text) <= 100:
        return name + text
    inner, _, result = text.removeprefix("(").rpartition(")")
    arguments, depth, start = [], 0, 0
    for index, letter in enumerate(inner):
        depth += letter in "([" and 1 or letter in ")]" and -1 or 0
        if letter == "," and not depth:
            arguments.append(inner[start:index].strip())
            start = index + 1
    arguments.append(inner[start:].strip())
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){result}"


def docstring(value: Any) -> str:
    return inspect.getdoc(value) or ""


def generated(module_name: str, depth: int) -> str:
    module = importlib.import_module(module_name)
    names = [name for name, _ in public(module)]
    up = "../" * depth
    parts = ["## Reference", reference(module_name, level=3)]
    if text := inspect.getdoc(module):
        parts += ["## Derivation" if module_name.startswith("stablekern.ops") else "## How it works", text]
    if body := accuracy.section(names, up):
        parts += ["## Measured accuracy", body]
    if body := report.section(names):
        parts += ["## Measured speed", body]
    if body := backends(module_name.rpartition(".")[2]):
        parts += ["## Backends", body]
    return "\n\n".join(parts)


def backends(op: str) -> str:
    """Which kernels there are, on a CPU and on a GPU, best first."""
    from stablekern import _registry

    rows = []
    for name in _registry.ops():
        if name.removesuffix("_fwd") == op or name == op:
            for device in ("cpu", "cuda"):
                order = [b for b in _registry._ORDER[device] if b in _registry._launchers[name][device]]
                rows.append(f"| {'CPU' if device == 'cpu' else 'GPU'} | {', '.join(order)} |")
    return "\n".join(["| Device | Backends, best first |", "|---|---|", *rows]) if rows else ""


def settings_table() -> str:
    from stablekern.settings import SETTINGS

    rows = [f"| `{s.name}` | {s.effect} | {s.legal} | `{s.default}` |" for s in SETTINGS.values()]
    return "\n".join(["| Variable | What it does | Legal values | When unset |", "|---|---|---|---|", *rows])


def ops_table() -> str:
    """The first line of every public function's docstring, with a link to its page."""
    rows = []
    for path in _pages("ops/*.md"):
        if path != "ops/index.md":
            page = path.removeprefix("ops/")
            for name, value in public(importlib.import_module(f"stablekern.ops.{page.removesuffix('.md')}")):
                first = " ".join(docstring(value).partition("\n\n")[0].split()).replace("|", "\\|")
                rows.append(f"| [`{name}`]({page}#{name.lower()}) | {first} |")
    return "\n".join(["| | |", "|---|---|", *rows])


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """MathML in place of the formulas, which are delimited as arithmatex leaves them."""

    def formula(found: re.Match[str]) -> str:
        text = html.unescape(found[2]).strip()
        display = text.startswith(r"\[")
        return convert(text[2:-2].strip(), display="block" if display else "inline")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, content, flags=re.S)
