"""The watch over a training run: planted faults are named, healthy runs are left alone."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from faults import FAULTS, FIRES, PAGE, Convolution, Fault, Mlp, Part, Recurrent, Transformer, filled, report_of, steps
from torch import nn

from stablekern.errors import NonFiniteError
from stablekern.health import watch
from stablekern.health.watch import _Step, norms

NAN, INF = float("nan"), float("inf")
BY_NAME = {fault.name: fault for fault in FAULTS}


def named(fault: Fault) -> str:
    return fault.name


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("fault", FAULTS, ids=named)
def test_each_fault_is_named(fault, late):
    """Step, phase, module, operation, cause, and the number that proves it."""
    report = report_of(fault, late=late)
    assert (report.step, report.phase, report.path) == (fault.step, fault.phase, fault.path)
    assert report.cause.kind == fault.kind and fault.op in report.op
    assert report.tensor.nan + report.tensor.inf > 0
    if fault.measured is not None:
        name, value = fault.measured
        found = report.cause.measured[name]
        assert math.isfinite(found) and (value is None or found == pytest.approx(value))
    if fault.phase not in ("before the step", "weights"):
        assert all(x.nan + x.inf == 0 for x in report.inputs) or fault.kind in ("input", "0 * inf", "fully masked row")
    assert report.remarks == ()
    assert f"step {fault.step}" in str(report) and report.cause.remedy in str(report)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["cause"]["kind"] == fault.kind


def test_at_least_twenty_faults_in_five_models_of_every_kind():
    kinds = {fault.kind for fault in FAULTS}
    asked = {"repeated eigenvalues", "zero norm", "exp overflow", "sqrt at 0", "log at 0", "half overflow"}
    assert asked | {"0 * inf in a masked branch", "NaN norm in clip"} <= kinds
    assert len(FAULTS) >= 20 and len({fault.model for fault in FAULTS}) >= 5


def test_the_table_of_the_page_is_what_is_said():
    def without_digits(text: str) -> str:
        return re.sub(r"[-+]?\d[\d.e+-]*", "#", text)

    text = PAGE.read_text()
    assert without_digits(filled(text)) == without_digits(text)


# ---- healthy runs ----------------------------------------------------------------------------------------------------


def identity(x):
    return x


HEALTHY = [Fault("healthy", model, "", "", "", None, identity) for model in (Mlp, Transformer, Recurrent, Convolution)]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("fault", HEALTHY, ids=lambda fault: fault.model.__name__)
def test_a_healthy_run_is_the_same_with_and_without(fault, late):
    def weights(watched: bool) -> list[torch.Tensor]:
        runs = list(steps(fault))
        model = runs[0][0]
        if watched:
            with watch(model, late=late) as watcher:
                for _, step in runs:
                    step()
            assert watcher.report is None and watcher.step == len(runs) + 1
        else:
            for _, step in runs:
                step()
        assert not model._forward_hooks and not model._forward_pre_hooks
        return list(model.parameters())

    backward, grad = torch.autograd.backward, torch.autograd.grad
    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))
    assert torch.autograd.backward is backward and torch.autograd.grad is grad


def test_late_counts_are_not_read_before_they_have_arrived(monkeypatch):
    """No `item`, `tolist`, `bool` of a tensor by the watch while it only counts."""
    runs = list(steps(BY_NAME["repeated eigenvalues"]))
    reads = []

    def refused(name):
        original = getattr(torch.Tensor, name)

        def read(self, *args):
            reads.append(name)
            return original(self, *args)

        return read

    with pytest.raises(NonFiniteError, match="repeated eigenvalues"), watch(runs[0][0], late=True):
        with monkeypatch.context() as patch:
            patch.setattr(_Step, "arrived", lambda self: False)
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "nonzero"):
                patch.setattr(torch.Tensor, name, refused(name))
            runs[0][1]()
            runs[1][1]()
            runs[2][1]()
        assert reads == []


def test_norms_of_all_kinds_of_tensors():
    tensors = [torch.ones(3), torch.full((2,), 6e4, dtype=torch.float16), torch.empty(0), torch.ones(2).double()]
    first, _, empty, double = norms(tensors).isfinite().tolist()  # the half one may be a suspicion
    assert first and empty and double and norms(tensors, exact=True).isfinite().all()
    assert not norms([torch.tensor([1.0, NAN])]).isfinite().all()
    assert not norms([torch.tensor([1.0, -INF])]).isfinite().all()


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_a_norm_that_overflows_is_no_fault(late):
    """Finite entries of 1e30, whose squares overflow."""
    model = nn.Linear(3, 3)
    with watch(model, late=late) as watcher:
        (model(torch.ones(2, 3)) * 1e30).sum().backward()
    assert watcher.report is None and model.weight.grad.max() > 1e29


# ---- what a hit does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["repeated eigenvalues", "softmax by hand", "gradients per token, then clipped"])
def test_raising_comes_before_the_weights_are_touched(name):
    runs = list(steps(BY_NAME[name]))
    model = runs[0][0]
    with pytest.raises(NonFiniteError) as caught, watch(model) as watcher:
        for _, step in runs:
            before = [p.detach().clone() for p in model.parameters()]
            step()
    assert caught.value.report is watcher.report and str(watcher.report) in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_warning_comes_once_and_the_run_goes_on():
    runs = list(steps(BY_NAME["repeated eigenvalues"]))
    with pytest.warns(RuntimeWarning, match="first non-finite tensor: backward of step 3") as caught:
        with watch(runs[0][0], on_hit="warn"):
            for _, step in runs[:FIRES]:
                step()
    assert len(caught) == 1


def test_the_search_leaves_no_trace():
    """Buffers, gradients, modes and random numbers are what they would be without it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.out = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)

        def forward(self, x):
            return self.out(self.drop(self.norm(x))) / (0 * x[:, :1])

    def run(watched: bool) -> tuple:
        torch.manual_seed(0)
        model, x = Net(), torch.randn(5, 4)
        with watch(model, on_hit="record") if watched else torch.enable_grad() as watcher:
            model(x).sum().backward()
        if watched:
            assert watcher.report.op == "div" and watcher.report.cause.kind == "division by zero"
        return [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.rand(3)], model.training

    (with_watch, mode), (without, same_mode) = run(True), run(False)
    assert mode == same_mode
    for a, b in zip(with_watch, without, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_model_that_raises_over_a_nan_is_searched():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.edges = nn.Linear(4, 9)

        def forward(self, x):
            a = self.edges(x).unflatten(-1, (3, 3)).sub(100).sqrt()
            return torch.linalg.eigh(a @ a.mT).eigenvalues

    model = Net()
    with pytest.raises(NonFiniteError, match="sqrt of a negative number") as caught, watch(model) as watcher:
        model(torch.ones(2, 4))
    assert isinstance(caught.value.__context__, torch.linalg.LinAlgError)
    assert watcher.report.op == "sqrt" and "LinAlgError in the model" in watcher.report.seen


# ---- models of all sorts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", ["torch.compile", "in place", "a part"])
def test_compiled_models_are_repeated_uncompiled(compiled):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.part = nn.Linear(8, 9), Part(BY_NAME["where() around a log"].part)
            self.part.on = True

        def forward(self, x):
            return self.part(self.body(x))

    torch._dynamo.reset()
    model = Net()
    if compiled == "in place":
        model.compile(backend="eager")
    elif compiled == "a part":
        model.body.compile(backend="eager")
    watched = torch.compile(model, backend="eager") if compiled == "torch.compile" else model
    with watch(watched, on_hit="record") as watcher:
        watched(torch.randn(6, 8)).square().mean().backward()
    report = watcher.report
    assert report.path == "part" and report.cause.kind == "0 * inf in a masked branch"
    assert "repeated uncompiled" in report.remarks[0]


def test_shared_modules_go_by_the_name_under_their_caller():
    class Block(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, x):
            return self.part(x)

    shared = Part(lambda x: x.log())
    model = nn.Sequential(nn.Linear(2, 2), Block(shared), nn.ReLU(), Block(shared))
    model.register_forward_pre_hook(lambda *_: None)
    shared.function = lambda x: x if x.min() < 0 else x.log()
    shared.on = True
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    with watch(model, on_hit="record") as watcher:
        model(torch.ones(1, 2))
    report = watcher.report
    assert report.path == "3.part" and report.note == "shared with 1.part, call 2"


def test_without_a_model_the_outermost_modules_are_found():
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    with watch(on_hit="record") as watcher:
        criterion(model(torch.randn(5, 4)), torch.full((5,), -100)).backward()
    assert watcher.report.module == "CrossEntropyLoss" and watcher.report.cause.kind == "empty reduction"
    assert nn.Module.__call__.__qualname__ == "Module._wrapped_call_impl"


def test_keyword_arguments_nested_outputs_and_autograd_grad():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(3, 3)

        def forward(self, *, inputs):
            y = self.out(inputs["x"])
            return {"logits": [y.abs().sub(y.abs()).sqrt()], "count": 3}

    model = Net()
    with watch(model, on_hit="record") as watcher:
        y = model(inputs={"x": torch.ones(2, 3)})["logits"][0]
        torch.autograd.grad(y.sum(), model.parameters())
    assert watcher.report.op.startswith("SqrtBackward0") and watcher.report.cause.measured["zeros"] == 6


def test_infinities_that_are_written_on_purpose_are_passed_over():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(3, 3)
            self.register_buffer("mask", torch.tensor([0.0, -INF, 0.0]))

        def forward(self, x, broken=False):
            y = (self.out(x) + self.mask).masked_fill(x > 2, -INF)
            return torch.softmax(y + torch.full((3,), -INF), -1) if broken else y

    model = Net()
    with watch(model) as watcher:
        for _ in range(3):
            torch.softmax(model(torch.tensor([[1.0, 1.0, 3.0]])), -1).square().sum().backward()
        assert watcher.report is None
        with pytest.raises(NonFiniteError, match="fully masked row"):
            model(torch.ones(1, 3), broken=True)


def test_a_scaler_may_skip_its_steps():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, scaled=True, on_hit="record") as watcher:
        (model(torch.ones(2, 3)).sum() * INF).backward()  # a scale that is too large: the scaler would skip this step
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        assert watcher.report is None
        model(torch.ones(2, 3)).mul(0).sum().sqrt().backward()
        optimizer.step()
    assert watcher.report.step == 2 and watcher.report.cause.kind == "sqrt at 0" and watcher.report.phase == "loss"


def test_a_scaler_is_noticed():
    """Its first scale is too large on purpose: the step is skipped, and no fault."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with watch(model) as watcher:
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((2, 3), 100.0)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert watcher.report is None and watcher.scaled and scaler.get_scale() < 2.0**127
    assert torch.amp.GradScaler.scale.__qualname__ == "GradScaler.scale" and "watch" not in repr(
        torch.amp.GradScaler.scale
    )


def test_watches_may_be_nested_and_see_inference_and_vmap():
    model = nn.Sequential(nn.Linear(3, 3), Part(lambda x: torch.log(0 * x)))
    with watch(model, on_hit="record") as outer, watch(model[0]) as inner:
        with torch.inference_mode():
            model(torch.ones(2, 3))
        torch.func.vmap(model)(torch.ones(2, 4, 3))
        assert outer.report is None
        model[1].on = True
        model(torch.ones(2, 3))
    assert inner.report is None and outer.report.path == "1" and outer.report.op == "log"


def test_steps_are_those_of_the_optimizer_or_else_the_backwards():
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    optimizer, foreign = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    with watch(model, first_step=10) as watcher:
        for _ in range(3):
            for _ in range(2):  # accumulated
                model(torch.ones(2, 3)).sum().backward()
            other(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            foreign.step()
        assert watcher.step == 13
    with watch(model) as watcher:
        for _ in range(3):
            model(torch.ones(2, 3)).sum().backward()
        assert watcher.step == 3


def test_what_could_not_be_repeated_is_said():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.calls = nn.Linear(3, 3), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2 and self.fails:
                raise KeyError("no more data")
            return self.out(x) / (0 if self.calls == 1 else 1)

    for fails, remark in ((True, "KeyError"), (False, "the repeated call was finite")):
        model = Once()
        model.fails = fails
        with watch(model, on_hit="record") as watcher:
            model(torch.ones(2, 3))
        assert watcher.report.cause.kind == "unknown" and remark in watcher.report.remarks[0]

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x + self.bias

    model, x = Shift(), torch.ones(2, 3)
    with watch(model, on_hit="record") as watcher:
        y = model(x)
        y.register_hook(lambda g: g * INF)
        x.add_(1)
        y.sum().backward()
    assert any("written to after the call" in remark for remark in watcher.report.remarks)


def test_distribution_over_the_steps_before():
    """The argument that overflows in the end, step by step."""
    part = Part(torch.exp)
    part.on = True
    model = nn.Sequential(nn.Linear(2, 2), part)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, on_hit="record", history=8) as watcher:
        for number in range(1, 40):
            with torch.no_grad():
                model[0].weight.fill_(2.0 * number)
            model(torch.ones(3, 2)).clamp(max=1).mean().backward()
            if watcher.report is not None:
                break
            optimizer.step()
            optimizer.zero_grad()
    assert watcher.report.cause.kind == "exp overflow" and watcher.report.step == 23
    name, rows = watcher.distribution()
    assert name == "operand 0" and 4 <= len(rows) <= 8 and rows[0][0] == 1 and rows[-1][0] == 23
    for number, values in rows:
        torch.testing.assert_close(values.mean().item(), 4.0 * number, rtol=0.05, atol=1.5)


def test_misuse():
    with pytest.raises(TypeError, match="`model` must be a module: got int"):
        watch(3)
    with pytest.raises(ValueError, match="`on_hit` must be raise, warn or record: got 'stop'"):
        watch(nn.Linear(1, 1), on_hit="stop")
    with pytest.raises(ValueError, match="`history` must be >= 0: got -1"):
        watch(nn.Linear(1, 1), history=-1)
