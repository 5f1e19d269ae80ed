"""Spec of `cayley_step`: every method, on rings with chords."""

from __future__ import annotations

import torch

from stablekern.ops.cayley_step import cayley_step, reference

from . import FLOATS, OpSpec, Sample


def graph(g: torch.Generator, nodes: int, chords: int = 0) -> torch.Tensor:
    """The edges (2, E) of a ring and of random chords, in random order and direction; each once."""
    pairs = {(min(i, (i + 1) % nodes), max(i, (i + 1) % nodes)) for i in range(nodes)}
    wanted = len(pairs) + chords
    while len(pairs) < wanted:
        i, j = torch.randint(nodes, (2,), generator=g).tolist()
        if i != j:
            pairs.add((min(i, j), max(i, j)))
    edges = torch.tensor(sorted(pairs))[torch.randperm(len(pairs), generator=g)].T
    swap = torch.rand(edges.shape[1], generator=g) < 0.5
    return torch.where(swap, edges.flip(0), edges)


def tokens(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=g, dtype=torch.complex128)


def samples(g: torch.Generator) -> list[Sample]:
    def sample(name: str, *shape: int, chords: int = 3, dt: float = 0.3, low: float = 0.2, **kwargs):
        edges = graph(g, shape[-1], chords)
        weights = low + torch.rand(edges.shape[1], generator=g, dtype=torch.float64)
        step = torch.tensor(dt, dtype=torch.float64)
        options = {"method": kwargs.pop("method")} if "method" in kwargs else {}
        return Sample(name, (tokens(g, *shape), edges, weights, step), options, **kwargs)

    def empty(count: int = 0):
        return torch.zeros(2, count, dtype=torch.int64), torch.ones(count, dtype=torch.float64)

    def among(count: int, reach: int, nodes: int, **kwargs):
        """Edges between all nodes at most `reach` apart, which rows that are near have in common."""
        ends = torch.combinations(torch.arange(nodes)).T
        ends = ends[:, ends[1] - ends[0] <= reach]
        weights = 0.2 + torch.rand(ends.shape[1], generator=g, dtype=torch.float64)
        return Sample(f"band-{reach}-{nodes}", (tokens(g, count, nodes), ends, weights, 0.1), **kwargs)

    psi, edges, weights, dt = sample("", 6, 5, 9).args
    isolated = edges[:, (edges != 4).all(0)]
    graded = torch.logspace(-18, 15, 8, dtype=torch.float64)[:, None] * tokens(g, 8, 6)
    six = graph(g, 6, 4)
    spread = torch.logspace(-4, 0, six.shape[1], dtype=torch.float64)
    # The gradient of dt is one sum with cancellation, and a solve of condition 100 loses two digits: float32 alone has
    # an oracle that is more exact by more than that.
    coarse = {"dtypes": FLOATS[:1]}
    return [
        sample("typical", 2, 3, 7, gradcheck=True),
        sample("chebyshev", 5, 8, method="chebyshev", gradcheck=True),
        sample("dense", 5, 8, method="dense", gradcheck=True),
        sample("unitary", 5, 8, method="dense", dt=40.0, gradcheck=True, **coarse),
        sample("cocg", 5, 8, method="cocg", gradcheck=True),
        sample("two-terms", 4, 6, method="chebyshev", dt=1e-5),
        sample("three-terms", 4, 6, method="chebyshev", dt=2e-3, **coarse),
        sample("long", 3, 12, method="chebyshev", dt=30.0, **coarse),
        sample("backward-in-time", 3, 6, method="chebyshev", dt=-0.7, gradcheck=True),
        sample("signed-weights", 4, 7, method="chebyshev", low=-0.5, gradcheck=True),
        sample("signed-weights-cocg", 4, 7, method="cocg", low=-0.5),
        sample("odd", 37, 19, chords=20, method="chebyshev"),
        sample("odd-dense", 37, 19, chords=20, method="dense"),
        sample("tiles", 70, 70, chords=90, dt=0.5, method="dense", **coarse),
        sample("one-tile", 3, 9, **coarse),
        among(5, 10, 11),
        among(3, 6, 30),
        sample("model", 40, 256, chords=500, dt=0.02),
        sample("model-large-step", 40, 256, chords=500, dt=1.0, **coarse),
        Sample("length-1", (tokens(g, 1), *empty(), dt), gradcheck=True),
        Sample("two-nodes", (tokens(g, 3, 2), torch.tensor([[1], [0]]), torch.ones(1, dtype=torch.float64), dt)),
        Sample("no-edges", (tokens(g, 3, 4), *empty(), dt), {"method": "chebyshev"}),
        Sample("no-edges-dense", (tokens(g, 3, 4), *empty(), dt), {"method": "dense"}),
        Sample("isolated-node", (psi, isolated, weights[: isolated.shape[1]], 0.3)),
        Sample("empty", (tokens(g, 0, 4), graph(g, 4), weights[:4], dt)),
        Sample("empty-cocg", (tokens(g, 0, 4), graph(g, 4), weights[:4], dt), {"method": "cocg"}),
        Sample("number", (psi, edges, weights, 0.1)),
        Sample("zero-step", (psi, edges, weights, 0.0)),
        Sample("zero-tokens", (psi * 0, edges, weights, dt)),
        Sample("zero-tokens-cocg", (psi * 0, edges, weights, dt), {"method": "cocg"}),
        Sample("zero-weights", (psi, edges, weights * 0, dt)),
        Sample("spread-weights", (tokens(g, 4, 6), six, spread * 10, dt), {"method": "chebyshev"}, **coarse),
        Sample("graded-tokens", (graded, six, spread, dt), {"method": "chebyshev"}, gradients=False),
        Sample("graded-tokens-dense", (graded, six, spread, dt), {"method": "dense"}, gradients=False),
        Sample("graded-tokens-cocg", (graded, six, spread, dt), {"method": "cocg"}, gradients=False),
        Sample("permuted", (psi.transpose(0, 1).contiguous().transpose(0, 1), edges.T.contiguous().T, weights, dt)),
        Sample("strided", (tokens(g, 6, 18)[:, ::2], edges, weights.repeat_interleave(2)[::2], dt)),
        Sample("conjugate", (psi.conj(), edges, weights, dt), {"method": "chebyshev"}),
    ]


def _call(**changes):
    g = torch.Generator().manual_seed(0)
    edges = graph(g, 6, 2)
    named = {"psi": tokens(g, 3, 6), "edges": edges, "weights": torch.ones(edges.shape[1], dtype=torch.float64)}
    named |= {"dt": 0.1}

    def call():
        return cayley_step(**named | {key: f(named) if callable(f) else f for key, f in changes.items()})

    return call


def _with_edge(j: int, k: int):
    return lambda a: torch.cat((a["edges"][:, 1:], torch.tensor([[j], [k]])), 1)


SPECS = (
    OpSpec(
        "cayley_step",
        op=cayley_step,
        reference=reference,
        samples=samples,
        interpreted=("unitary", "tiles", "one-tile", "dense"),  # the last one in complex128 too
        floor_ulps=16.0,  # a factor formed beforehand has errors of its own, where a solve is exact to a few ulp
        errors=(
            (_call(psi=torch.tensor(1j)), ValueError, r"`psi` must have the shape \(\.\.\., D\)"),
            (_call(psi=lambda a: a["psi"].real), TypeError, "`psi` must be one of complex64, complex128: got float64"),
            (_call(edges=lambda a: a["edges"][:1]), ValueError, r"`edges` must have the shape \(2, E\): got \(1, 8\)"),
            (_call(edges=lambda a: a["edges"].int()), TypeError, "`edges` must be one of int64: got int32"),
            (_call(weights=lambda a: a["weights"][1:]), ValueError, "`weights` and `edges` disagree on `E`: got 7 and"),
            (_call(weights=lambda a: a["weights"].float()), TypeError, "`weights` must be one of float64: got float32"),
            (_call(edges=_with_edge(1, 6)), ValueError, r"`edges` must lie in \[0, 6\): got 6"),
            (_call(edges=_with_edge(-1, 2)), ValueError, r"`edges` must lie in \[0, 6\): got -1"),
            (_call(edges=_with_edge(3, 3)), ValueError, "`edges` must join two nodes: got a loop at 3"),
            (
                _call(edges=lambda a: torch.cat((a["edges"][:, 1:], a["edges"][:, 1:2].flip(0)), 1)),
                ValueError,
                r"`edges` must hold each undirected edge once: got \(\d, \d\) again",
            ),
            (_call(dt=float("nan")), ValueError, "`dt` must be a number: got nan"),
            (_call(dt=float("inf")), ValueError, "`dt` must be finite: got inf"),
            (_call(dt=torch.ones(2)), ValueError, r"`dt` must have the shape \(\): got \(2,\)"),
            (_call(dt=torch.tensor(1)), TypeError, "`dt` must be one of .*: got int64"),
            (_call(method="cg"), ValueError, "`method` must be one of 'auto', 'chebyshev', 'dense', 'cocg': got 'cg'"),
        ),
    ),
)
