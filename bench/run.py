"""Time ops against their baselines: `python -m bench.run [--op eigh,ssd_scan] [--seconds 8] [--save]`.

Each line: median time, ratio of medians against the named baseline, and the share of the machine's limit (the larger of
flops and bytes over what a matrix product and a copy reached in the same run). glibc gives large blocks back meanwhile,
as it does for users, and chains with large temporaries pay for fresh pages again and again; with `--allocator keep` it
keeps freed memory, for both sides. `--save` appends one JSON line per case to bench/results. `--check` exits 1 when a
gate is missed.
"""

from __future__ import annotations

import argparse
import sys

import torch

import stablekern
from bench.cases import Case, all_cases
from bench.store import append, device_name, stamp
from bench.timing import Ceilings, Times, ceilings, interleave, keep_freed_memory
from stablekern import _registry


def tensors(outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else [o for o in outputs if isinstance(o, torch.Tensor)]


def call(function, inputs, case: Case, *, backward: bool):
    """One call of `function`, ours or the baseline of `case`, and with `backward` the gradients of its outputs."""
    if not backward:

        def forward():
            with torch.no_grad():
                function(*inputs)

        return forward
    arguments = [x.detach().requires_grad_(i not in case.constant) for i, x in enumerate(inputs)]
    leaves = [x for x in arguments if x.requires_grad]
    weights = case.cotangents([o.detach() for o in tensors(function(*arguments))])
    return lambda: torch.autograd.grad(tensors(function(*arguments)), leaves, weights)


def measure(case: Case, direction: str, device: str, seconds: float, top: Ceilings) -> dict:
    inputs = case.inputs(device)
    backward = direction == "fwd+bwd"
    times: dict[str, Times] = interleave(
        {
            "ours": call(case.ours, inputs, case, backward=backward),
            "baseline": call(case.baseline, inputs, case, backward=backward),
        },
        seconds=seconds,
        device=device,
    )
    ours, base = times["ours"], times["baseline"]
    factor = case.backward if backward else 1.0
    limit = max(case.flops * factor / top.flops, case.bytes * factor / top.bandwidth)
    return {
        "op": case.op, "case": case.name, "direction": direction,
        "dtype": str(inputs[0].dtype).removeprefix("torch."), "baseline": case.baseline_name,
        "ms": round(1e3 * ours.median, 4), "ms_best": round(1e3 * ours.best, 4),
        "ms_p20": round(1e3 * ours.quantile(0.2), 4), "ms_p80": round(1e3 * ours.quantile(0.8), 4),
        "baseline_ms": round(1e3 * base.median, 3), "baseline_ms_best": round(1e3 * base.best, 3),
        "ratio": round(base.median / ours.median, 2), "ratio_best": round(base.best / ours.best, 2),
        "gate": case.gates.get(direction), "share_of_limit": round(limit / ours.median, 3),
        "gflops": round(case.flops * factor / ours.median / 1e9, 1),
        "gbytes_per_s": round(case.bytes * factor / ours.median / 1e9, 2),
        "limit_gflops": round(top.flops / 1e9, 1), "limit_gbytes_per_s": round(top.bandwidth / 1e9, 1),
        "samples": len(ours.samples), "busy_samples": ours.busy + base.busy,
        "backend": backend(case, inputs, device), **stamp(device),
        "facts": case.facts(*inputs) if case.facts else {},
    }  # fmt: skip


def backend(case: Case, inputs, device: str) -> str:
    """What ran the case's first dispatcher op, found by watching the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "stablekern" and not seen:
                seen.append(_registry.backend_for(function.overloadpacket.__name__, *args, device=device))
            if function.namespace == "stablekern_native" and not seen:  # called without an op in between
                seen.append("native")
            return function(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        case.ours(*inputs)
    return seen[0] if seen else "torch"


def line(result: dict) -> str:
    gate = "" if result["gate"] is None else f"  gate {result['gate']:g}x"
    busy = f"  ({result['busy_samples']} samples while busy)" if result["busy_samples"] else ""
    facts = "".join(f"  {name.replace('_', ' ')} {value:g}" for name, value in result["facts"].items())
    return (
        f"{result['op']:<13} {result['case']:<28} {result['direction']:<8} {result['backend']:<7}"
        f" {result['ms']:9.2f} ms"
        f"  {result['ratio']:7.{1 if result['ratio'] >= 1 else 2}f}x of {result['baseline']} ({result['baseline_ms']:.0f} ms)"
        f"  {100 * result['share_of_limit']:.0f} % of the limit{gate}{facts}{busy}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="comma-separated ops; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--direction", choices=["fwd", "fwd+bwd", "step"], help="all of a case by default")
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each line")
    parser.add_argument("--threads", type=int, help="CPU threads; those of torch by default")
    parser.add_argument("--backend", help="force a backend")
    parser.add_argument(
        "--allocator", choices=["system", "keep"], default="system", help="what becomes of freed memory"
    )
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    parser.add_argument("--check", action="store_true", help="exit 1 if a gate is missed")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    stablekern.use_backend(options.backend)
    known = {case.op for case in all_cases()}
    wanted = set(options.op.split(",")) if options.op else known
    if wanted - known:
        parser.error(f"--op: unknown {', '.join(sorted(wanted - known))}; known are {', '.join(sorted(known))}")
    if options.allocator == "keep":
        keep_freed_memory()
    top = ceilings(options.device)
    print(f"{device_name(options.device)}: {top.flops / 1e9:.0f} GFLOP/s, copy {top.bandwidth / 1e9:.0f} GB/s")
    missed = 0
    for case in (case for case in all_cases() if case.op in wanted):
        for direction in (d for d in case.directions if options.direction in (None, d)):
            result = measure(case, direction, options.device, options.seconds, top)
            result["allocator"] = options.allocator
            print(line(result), flush=True)
            missed += result["gate"] is not None and options.device == "cpu" and result["ratio"] < result["gate"]
            if options.save:
                append(result)
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
