"""Faults planted in small models, for the watch: what each does, and what must be said of it.

`python tests/faults.py` writes the table of docs/watch.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stablekern
from stablekern.health.watch import Report, watch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "watch.md"
FIRES = 3  # the step at which a fault is switched on
NAN, INF = float("nan"), float("inf")


class Part(nn.Module):
    """What a fault replaces: the identity until it is switched on."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.on = function, False

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.on else x


# ---- five models: inputs (6, 8), outputs (6, 3) ----------------------------------------------------------------------


class Mlp(nn.Module):
    path = "body.1"

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 9), part, nn.Tanh())
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Graph(nn.Module):
    """A part works on a matrix of edge weights (6, 3, 3), made twice by the same module."""

    path = "encoding.part"

    class Encoding(nn.Module):
        def __init__(self, part: Part) -> None:
            super().__init__()
            self.part = part

        def forward(self, edges: Tensor) -> Tensor:
            return self.part(edges + edges.mT).flatten(1)

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.edges, self.encoding, self.head = nn.Linear(8, 9), Graph.Encoding(part), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoding(self.edges(x).unflatten(-1, (3, 3))))


class Transformer(nn.Module):
    """Two blocks, recomputed in the backward; the part sees the scores (6, 4, 4)."""

    path = "blocks.1.part"

    class Block(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.mix, self.part = nn.Linear(2, 6), part

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(x).chunk(3, -1)
            return x + torch.softmax(self.part(q @ k.mT), -1) @ v

    def __init__(self, part: Part, reentrant: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Transformer.Block(nn.Identity()), Transformer.Block(part)])
        self.first, self.head, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unflatten(-1, (4, 2))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.flatten(1))


class Reentrant(Transformer):
    def __init__(self, part: Part) -> None:
        super().__init__(part, reentrant=True)


class Recurrent(nn.Module):
    """One cell, called four times and known by two names."""

    path = "cell.part"

    class Cell(nn.Module):
        def __init__(self, part: Part) -> None:
            super().__init__()
            self.mix, self.part = nn.Linear(5, 3), part

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.part(torch.tanh(self.mix(torch.cat([x, h], -1))) + h)

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.cell = Recurrent.Cell(part)
        self.alias = self.cell

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(6, 3)
        for piece in x.chunk(4, -1):
            h = self.cell(piece, h)
        return h


class Convolution(nn.Module):
    path = "layers.1"

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), part, nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.unsqueeze(1))


# ---- the faults ------------------------------------------------------------------------------------------------------


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


@dataclass(frozen=True)
class Fault:
    """`kind` and `op` are what the report must say; `measured` a number in it and its value (None: any finite one)."""

    name: str
    model: Callable[[Part], nn.Module]
    kind: str
    op: str
    phase: str
    measured: tuple[str, float | None] | None
    part: Callable[[Tensor], Tensor] | None = None
    loss: Callable[[Tensor], Tensor] = mean_square
    batch: Callable[[Tensor], Tensor] | None = None
    between: Callable[[nn.Module], None] | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda m: torch.optim.SGD(m.parameters(), lr=1e-3)
    step: int = FIRES
    path: str | None = None  # of the part, if there is one

    def __post_init__(self) -> None:
        if self.path is None:
            object.__setattr__(self, "path", "" if self.part is None else self.model.path)


def rows(x: Tensor, value: float) -> Tensor:
    """`x` with its first row replaced, still with a gradient."""
    first = torch.zeros_like(x)
    first[0] = 1
    return x * (1 - first) + value * first


def unit(x: Tensor) -> Tensor:
    x = rows(x, 0.0)
    return x / x.norm(dim=-1, keepdim=True)


def masked_log(x: Tensor) -> Tensor:
    x = rows(x.abs(), 0.0)
    return torch.where(x > 0, x.log(), torch.zeros_like(x))


def hand_softmax(x: Tensor) -> Tensor:
    e = torch.exp(100 + x)
    return e / e.sum(-1, keepdim=True)


def masked_exp(x: Tensor) -> Tensor:
    x = rows(x, 120.0)
    return torch.where(x > 50, x, x.exp())


def eigenvectors(a: Tensor) -> Tensor:
    return torch.linalg.eigh(0 * a + torch.eye(3)).eigenvectors


def singular_vectors(a: Tensor) -> Tensor:
    return torch.linalg.svd(0 * a + torch.eye(3)).U


def degrees(a: Tensor) -> Tensor:
    """An isolated node in the first graph."""
    a = rows(a.abs(), 0.0)
    scale = a.sum(-1).rsqrt()
    return scale.unsqueeze(-1) * a * scale.unsqueeze(-2)


def masked_degrees(a: Tensor) -> Tensor:
    a = rows(a.abs(), 0.0)
    degree = a.sum(-1)
    scale = torch.where(degree > 0, degree.rsqrt(), torch.zeros_like(degree))
    return scale.unsqueeze(-1) * a * scale.unsqueeze(-2)


def cosine(a: Tensor) -> Tensor:
    """eps is added outside of the root: too late for its derivative."""
    a = rows(a, 0.0)
    return a / (a.pow(2).sum(-1, keepdim=True).sqrt() + 1e-8)


def angle(a: Tensor) -> Tensor:
    return torch.acos((a / a.norm(dim=-1, keepdim=True)) @ (a / a.norm(dim=-1, keepdim=True)).mT * 0 + torch.eye(3))


def closed_row(scores: Tensor) -> Tensor:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2] = True
    return torch.softmax(scores.masked_fill(mask, -INF), -1)


def half_scores(scores: Tensor) -> Tensor:
    big = (scores * 0 + 300).half()
    return (big @ big).float()


def half_gradient(scores: Tensor) -> Tensor:
    y = scores.half().float()
    return y + 1e9 * (y - y.detach())  # the forward is y


class Inverse(torch.autograd.Function):
    """A hand-written backward that divides by its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (x - x)


def growth(h: Tensor) -> Tensor:
    return (h + 1) * 1e15


def scan(h: Tensor) -> Tensor:
    """Zero tokens: the forward is 0 whatever the gates; the backward multiplies them up."""
    gate = (h * 0 + 1e30).unsqueeze(0).expand(1, 6, 3).mT.contiguous()
    token = (h * 0).unsqueeze(0).mT.contiguous()
    return stablekern.linear_scan(gate, token)[0].mT + h


def token_count(model: nn.Module) -> None:
    """Gradients per token, of a layer that saw none, then clipped."""
    next(model.parameters()).grad.zero_().div_(0.0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def scaled_wrongly(model: nn.Module) -> None:
    next(model.parameters()).grad.mul_(INF)


def adam_without_eps(model: nn.Module) -> torch.optim.Optimizer:
    """The first layer gets no gradient, and Adam divides 0 by 0."""
    next(model.parameters()).register_hook(torch.zeros_like)
    return torch.optim.Adam(model.parameters(), eps=0.0)


def spread(x: Tensor) -> Tensor:
    return x / (rows(x, 1.0).var(-1, keepdim=True).sqrt() + 1)


FAULTS = (
    Fault("softmax by hand", Mlp, "exp overflow", "exp", "forward", ("largest_argument", None), hand_softmax),
    Fault(
        "log of a ReLU", Convolution, "log at 0", "log", "forward", ("zeros", 16), lambda x: rows(x.abs(), 0.0).log()
    ),
    Fault("0/0 by a norm", Mlp, "zero norm", "div", "forward", ("zeros", 1), unit),
    Fault(
        "layer norm without eps",
        Mlp,
        "zero variance",
        "native_layer_norm",
        "forward",
        ("zeros", 1),
        lambda x: F.layer_norm(rows(x, 2.0), (9,), eps=0.0),
    ),
    Fault(
        "where() around a log", Mlp, "0 * inf in a masked branch", "LogBackward0", "backward", ("places", 9), masked_log
    ),
    Fault(
        "where() around an exp",
        Mlp,
        "0 * inf in a masked branch",
        "ExpBackward0",
        "backward",
        ("largest_argument", 120),
        masked_exp,
    ),
    Fault(
        "standard deviation of a constant row", Mlp, "zero variance", "SqrtBackward0", "backward", ("zeros", 1), spread
    ),
    Fault(
        "repeated eigenvalues",
        Graph,
        "repeated eigenvalues",
        "LinalgEighBackward0",
        "backward",
        ("smallest_gap", 0),
        eigenvectors,
    ),
    Fault(
        "repeated singular values",
        Graph,
        "repeated eigenvalues",
        "LinalgSvdBackward0",
        "backward",
        ("smallest_gap", 0),
        singular_vectors,
    ),
    Fault("an isolated node", Graph, "sqrt at 0", "rsqrt", "forward", ("zeros", 3), degrees),
    Fault(
        "an isolated node behind where()",
        Graph,
        "0 * inf in a masked branch",
        "RsqrtBackward0",
        "backward",
        ("places", 3),
        masked_degrees,
    ),
    Fault("eps outside of the root", Graph, "zero norm", "SqrtBackward0", "backward", ("zeros", 3), cosine),
    Fault(
        "angle between equal vectors", Graph, "edge of arccos", "AcosBackward0", "backward", ("at_the_edge", 18), angle
    ),
    Fault(
        "inverse of a singular matrix",
        Graph,
        "singular matrix",
        "linalg_inv_ex",
        "forward",
        ("singular_value_ratio", 0),
        lambda a: torch.linalg.inv_ex(0 * a + 1).inverse,
    ),
    Fault(
        "attention row without a key", Transformer, "fully masked row", "softmax", "forward", ("rows", 6), closed_row
    ),
    Fault("scores in half precision", Transformer, "half overflow", "bmm", "forward", ("largest", 360000), half_scores),
    Fault(
        "gradient in half precision",
        Transformer,
        "half overflow",
        "ToCopyBackward0",
        "backward",
        ("limit", 65504),
        half_gradient,
    ),
    Fault(
        "same, recomputed reentrantly",
        Reentrant,
        "half overflow",
        "ToCopyBackward0",
        "backward",
        ("limit", 65504),
        half_gradient,
    ),
    Fault("a state that grows", Recurrent, "overflow", "mul", "forward", ("largest", None), growth),
    Fault("a fused scan, backward", Recurrent, "overflow", "LinearScan", "backward", ("largest", None), scan),
    Fault(
        "a backward of one's own",
        Recurrent,
        "division by zero",
        "InverseBackward",
        "backward",
        ("zeros", 18),
        Inverse.apply,
    ),
    Fault(
        "negative number to a fraction",
        Convolution,
        "outside the domain",
        "pow",
        "forward",
        ("negative", None),
        lambda x: x.sub(10) ** 0.3,
    ),
    Fault(
        "mean of nothing",
        Convolution,
        "empty reduction",
        "mean",
        "forward",
        ("entries", 0),
        lambda x: x + x[x > 1e9].mean(),
    ),
    Fault(
        "difference of infinities",
        Convolution,
        "overflow",
        "mul",
        "forward",
        ("largest", None),
        lambda x: (y := x.abs() * 1e38 * 1e38) - y,
    ),
    Fault(
        "mask by a product", Convolution, "0 * inf", "mul", "forward", ("products", None), lambda x: x + (x * 0) * -INF
    ),
    Fault(
        "root mean square of a perfect fit",
        Convolution,
        "sqrt at 0",
        "SqrtBackward0",
        "loss",
        ("zeros", 1),
        loss=lambda y: (0 * y).abs().sum().sqrt(),
    ),
    Fault(
        "every target ignored",
        Mlp,
        "empty reduction",
        "NllLossBackward0",
        "loss",
        ("targets", 0),
        loss=lambda y: F.cross_entropy(y, torch.full((6,), -100)),
    ),
    Fault("a batch with a NaN", Mlp, "input", "addmm", "forward", None, batch=lambda x: rows(x, NAN), path="body.0"),
    Fault(
        "gradients per token, then clipped",
        Recurrent,
        "NaN norm in clip",
        "SGD.step",
        "before the step",
        ("all_nan", 2),
        between=token_count,
    ),
    Fault(
        "gradients multiplied by inf",
        Graph,
        "gradient changed after backward",
        "SGD.step",
        "before the step",
        ("not_finite", 1),
        between=scaled_wrongly,
    ),
    Fault(
        "Adam without eps", Mlp, "weights", "addmm", "weights", None, optimizer=adam_without_eps, step=2, path="body.0"
    ),
)


def steps(fault: Fault, *, last: int = FIRES + 2) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
    """The model, and a function for each training step; the fault is in that numbered FIRES."""
    torch.manual_seed(0)
    part = Part(fault.part or (lambda x: x))
    model = fault.model(part)
    optimizer = fault.optimizer(model)
    for number in range(1, last + 1):

        def step(number: int = number) -> None:
            part.on = on = number >= FIRES
            x = torch.randn(6, 8)
            x = fault.batch(x) if on and fault.batch else x
            optimizer.zero_grad()
            y = model(x)
            (fault.loss(y) if on else mean_square(y)).backward()
            if on and fault.between:
                fault.between(model)
            optimizer.step()

        yield model, step


def report_of(fault: Fault, **options: object) -> Report | None:
    """What a watch says of it."""
    runs = list(steps(fault))
    with watch(runs[0][0], on_hit="record", **options) as watcher:
        for _, step in runs:
            step()
            if watcher.report is not None:
                break
    return watcher.report


def table() -> str:
    """Markdown: each fault with what was said."""
    lines = ["| fault | model | said: phase, module, operation | cause, measured |", "|---|---|---|---|"]
    for fault in FAULTS:
        report = report_of(fault)
        name = type(steps(fault).__next__()[0]).__name__
        where = f"`{report.path}`" if report.path else "outside the model" if not report.module else "the model itself"
        cause = f"{report.cause.kind}: {report.cause.text}".replace("|", "\\|")
        lines.append(f"| {fault.name} | {name} | {report.phase}, {where}, `{report.op}` | {cause} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """The page with the table as it is now."""
    return re.sub(r"(<!-- faults: begin -->\n).*?(<!-- faults: end -->)", r"\1{}\n\2", text, flags=re.S).format(table())


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
    sys.exit(0)
