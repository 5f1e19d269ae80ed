"""The cases of `bench/cases` for pytest-benchmark: `pytest bench/ --benchmark-only [-k eigh] [--benchmark-compare]`.

Each case and direction is a group with two entries, `ours` and `baseline`, over the same inputs. `python -m bench.run`
takes the numbers of this project, both sides in turn; this is for the tools that people have around pytest-benchmark.
"""

from __future__ import annotations

import pytest
import torch

from bench.cases import Case, all_cases
from bench.run import call

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def runs() -> list:
    return [
        pytest.param(case, direction, side, id=f"{case.op}-{case.name}-{direction}-{side}".replace(" ", "_"))
        for case in all_cases()
        for direction in case.directions
        for side in ("ours", "baseline")
    ]


@pytest.mark.parametrize(("case", "direction", "side"), runs())
def test_op(benchmark, case: Case, direction: str, side: str):
    benchmark.group = f"{case.op} {case.name} {direction}"
    benchmark.extra_info.update(side=side, baseline=case.baseline_name, bytes=case.bytes, flops=case.flops)
    function = case.ours if side == "ours" else case.baseline
    try:
        step = call(function, case.inputs(DEVICE), case, backward=direction == "fwd+bwd")
        step()
    except ImportError as missing:
        pytest.skip(f"{missing}: pip install 'stablekern[bench]'")
    if DEVICE == "cuda":
        forward = step

        def step() -> None:
            forward()
            torch.cuda.synchronize()

    benchmark(step)
