"""The numbers and figures of docs/zoo.md: `python -m bench.zoo`.

Runs every exhibit, writes docs/zoo.json (what `stablekern zoo --json` prints, with the machine) and the figures, and
puts the tables into docs/zoo.md between its markers. `--only-text` does the last from the JSON that is there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

from bench.store import stamp
from stablekern import zoo
from stablekern.cli import _json
from stablekern.cli.zoo import draw

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"


def tables(record: dict[str, Any]) -> str:
    """The part of docs/zoo.md between the markers."""
    parts = []
    for found in record["exhibits"]:
        parts += [
            f"## {found['name'].replace('_', ' ').capitalize()}",
            f"*Seen:* {found['seen']}.",
            f"*Cause:* {found['cause']}.",
            f"*Published fix:* {found['published']}.",
            f"*What removes it:* {found['remedy']}.",
            f"![{found['figure']['caption']}](figures/zoo_{found['name']}.svg)",
            found["figure"]["caption"],
        ]
        measured = found["measured"] or ""
        head = f"| Counted in | Done by | Which is | Bad | {measured.capitalize()} |\n|---|---|---|---|---|"
        cases = list(dict.fromkeys(row["case"] for row in found["rows"]))
        rows = sorted(found["rows"], key=lambda row: cases.index(row["case"]))
        lines = []
        for row in rows:
            value = "" if row["largest"] is None else f"{row['largest']:.3g}"
            cells = (row["case"].replace("|", "\\|"), row["name"], row["who"], f"{row['bad']} of {row['of']}", value)
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join([head, *lines]))
        parts.append(f"Bad: {found['counted']}.")
    machine = record["machine"]
    seconds = sum(found["seconds"] for found in record["exhibits"])
    parts.append(f"Measured in {seconds:.0f} s on {machine['device']}, torch {machine['torch']} (`docs/zoo.json`).")
    return "\n\n".join(parts)


def write_text(record: dict[str, Any]) -> None:
    page = DOCS / "zoo.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables(record)}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-text", action="store_true", help="from docs/zoo.json, nothing is run")
    if not parser.parse_args().only_text:
        exhibits = list(zoo.run())
        for found in exhibits:
            print(f"{found.name}: {found.seconds:.1f} s")
            with matplotlib.rc_context({"svg.hashsalt": found.name, "svg.fonttype": "none"}):
                draw(found).savefig(DOCS / "figures" / f"zoo_{found.name}.svg", format="svg", metadata={"Date": None})
        record = {"machine": stamp("cpu"), "exhibits": [asdict(found) for found in exhibits]}
        (DOCS / "zoo.json").write_text(_json.dumps(record) + "\n")
    write_text(json.loads((DOCS / "zoo.json").read_text()))


if __name__ == "__main__":
    main()
