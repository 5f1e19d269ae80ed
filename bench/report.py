"""The README's speed table, from the newest committed result line of each case: `python -m bench.report [--write]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.store import RESULTS

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- speed: begin (python -m bench.report --write) -->", "<!-- speed: end -->"


def newest(device: Path) -> dict[tuple[str, ...], dict]:
    """The last line of each (op, case, direction, baseline, allocator) in a device's folder."""
    found = {}
    for path in sorted(device.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            result = json.loads(line)
            key = [result.get(name, "") for name in ("op", "case", "direction", "baseline")]
            found[tuple([*key, result.get("allocator", "keep")])] = result
    return found


def table(device: Path) -> str:
    """Markdown: one row per timed case, then what the machine was."""
    results = newest(device)
    timed = [r for r in results.values() if "ratio" in r and r.get("allocator", "keep") == "keep"]
    fresh = {key[:4]: f"{r['ratio']:.1f}x" for key, r in results.items() if r.get("allocator") == "system"}
    rows = [
        f"| `{r['op']}` {r['case']}, {r['direction']} | {r['baseline']} | {r['baseline_ms']:.1f} ms | {r['ms']:.2f} ms "
        f"| {r['ratio']:.1f}x | {fresh.get((r['op'], r['case'], r['direction'], r['baseline']), '')} "
        f"| {100 * r['share_of_limit']:.0f} % |"
        for r in timed
    ]
    one = timed[-1]
    rest = [
        f"One training step of the detector, {r['case']}: {r['ms']:.0f} ms."
        for r in results.values()
        if r["op"] == "detector"
    ]
    for r in results.values():
        if r["op"] == "startup":
            rest.append(
                f"`import stablekern` adds {max(r['import_added_s'], 0.0):.2f} s to `import torch`; "
                f"the first native build takes {r['first_build_s']:.0f} s."
            )
    return "\n".join(
        [
            "| Op and workload | Against | Its time | Ours | Ratio of medians | ... fresh pages | Share of the limit |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Measured interleaved in one run on {one['device']}, torch {one['torch']}. The limit is the larger of "
            f"flops and bytes over what a matrix product ({one['limit_gflops']:.0f} GFLOP/s) and a copy "
            f"({one['limit_gbytes_per_s']:.0f} GB/s) reached in that run. glibc keeps freed memory meanwhile, "
            "for both sides; the second ratio is with fresh pages for every large block, glibc's default.",
            *rest,
        ]
    )


def filled(text: str, body: str) -> str:
    """`text` with everything between the two marks replaced."""
    before, _, tail = text.partition(BEGIN)
    after = tail.partition(END)[2]
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu-amd-epyc-2-threads", help="folder of bench/results")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    body = table(RESULTS / options.device)
    if options.write:
        temporary = README.with_suffix(".partial")
        temporary.write_text(filled(README.read_text(), body))
        temporary.replace(README)
    sys.stdout.write(body + "\n")


if __name__ == "__main__":
    main()
