"""A bad batch done again: the verdict must be data, weights or op, and name the operation."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import stablekern
from stablekern.cli import main
from stablekern.health import TrainingGuard, replay
from stablekern.health.bad_batch import save_bad_batch

pytestmark = pytest.mark.filterwarnings("ignore:stablekern.health.TrainingGuard:RuntimeWarning")
EDGES = torch.triu_indices(4, 4, 1)


class Graphs(nn.Module):
    """Edge weights to a Laplacian to its eigenvectors to a number: the model whose backward fails at equal weights."""

    def __init__(self, ours: bool = False) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(8, 1)
        self.drop = nn.Dropout(0.5)
        self.ours = ours

    def forward(self, edges: Tensor) -> Tensor:
        adjacency = edges.new_zeros(*edges.shape[:-1], 4, 4)
        adjacency[..., EDGES[0], EDGES[1]] = edges * self.gain
        adjacency = adjacency + adjacency.mT
        laplacian = torch.diag_embed(adjacency.sum(-1)) - adjacency
        decompose = stablekern.eigh if self.ours else torch.linalg.eigh
        try:
            vectors = decompose(laplacian)[1][..., 1:3]
        except torch.linalg.LinAlgError:  # as the original did; what follows it is NaN by itself
            vectors = 0.01 * torch.randn_like(laplacian)[..., 1:3]
        return self.head(self.drop(vectors.flatten(-2))).square().mean()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).square().mean()


def fresh(kind, *args) -> nn.Module:
    torch.manual_seed(5)
    return kind(*args)


def hit(tmp_path, model: nn.Module, batch, **options) -> str:
    """One guarded step on `batch`; the file that it writes."""
    guard = TrainingGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), directory=tmp_path, **options)
    guard.start(batch)
    loss = model(batch)
    loss.backward()
    guard.step(loss, batch)
    (path,) = guard.report().files
    return path


def broken(*values: float) -> Tensor:
    x = torch.randn(4, 3)
    x.view(-1)[: len(values)] = torch.tensor(values)
    return x


def test_one_nan_gradient_poisons_the_weights_and_the_replay_says_so(tmp_path):
    """The original hunt: a NaN gradient goes through the clip, and from the next batch on everything is NaN."""
    model = fresh(Graphs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = TrainingGuard(model, optimizer, directory=tmp_path)
    first = torch.rand(8, 6) + 0.5
    loss = model(first)
    loss.backward()
    guard.step(loss, first)
    optimizer.zero_grad()
    model(torch.ones(2, 6)).backward()  # equal weights: the eigenvalue 4 three times
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()  # not through the guard, as a loop without one does it
    optimizer.zero_grad()
    assert norm.isnan() and all(p.isnan().all() for p in model.parameters()), "every weight, one step later"
    harmless = torch.rand(8, 6) + 0.5
    loss = model(harmless)
    loss.backward()
    guard.step(loss, harmless)
    found = replay(guard.report().files[0], lambda: fresh(Graphs))
    assert found.verdict == "weights" and found.current is not None and found.fresh.finite
    assert (
        len(found.bad_weights) == 3 and found.bad_inputs == () and "fresh weights take the same batch" in found.reason
    )
    assert all(p.isfinite().all() for p in model.parameters()), "and the guard had brought the weights back"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_the_data(value, tmp_path):
    path = hit(tmp_path, fresh(Plain), broken(value))
    found = replay(path, lambda: fresh(Plain))
    assert found.verdict == "data", found.reason
    if value == 1e30:
        assert found.bad_inputs == () and found.fresh.fault.overflow and "batch is too large" in found.reason
    else:
        assert found.bad_inputs == ("batch (1 of 12 entries)",)


@pytest.mark.parametrize("moved", [False, True], ids=["from the start", "at these weights"])
def test_the_op(moved, tmp_path):
    """Equal edge weights: the batch is harmless, the weights are, the forward is; the backward of eigh is not."""
    model, batch = fresh(Graphs), torch.ones(2, 6)
    if moved:
        batch = torch.rand(1, 6).expand(2, 6) + 0.5
        with torch.no_grad():
            model.gain.copy_(1 / batch[0])
            batch = batch.round(decimals=2)
            model.gain.copy_(1 / batch[0].double())
        batch = batch.clone()
    found = replay(hit(tmp_path, model, batch), lambda: fresh(Graphs))
    assert found.verdict == "op", found.reason
    assert found.bad_inputs == found.bad_weights == ()
    assert found.current.fault.phase == "backward" and found.current.fault.node == "LinalgEighBackward0"
    assert not found.current.fault.overflow and found.current.fault.op.startswith("aten::div")
    assert found.fresh.finite == moved
    assert ("fresh ones do not get there" if moved else "on fresh weights too") in found.reason


def test_with_our_op_there_is_nothing_to_replay(tmp_path):
    model = fresh(Graphs, True)
    guard = TrainingGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), directory=tmp_path)
    loss = model(torch.ones(2, 6))
    loss.backward()
    guard.step(loss)
    assert guard.report().files == () and guard.report().taken == 1


@pytest.mark.parametrize(
    ("make", "phase"),
    [
        (lambda x: (x[:, 0] * 0).sqrt().sum(), "backward"),
        (lambda x: (x[:, 0] * 0).log().sum(), "forward"),
        (lambda x: x.norm(dim=1).mul(0).div(x[:, 0] * 0).sum(), "forward"),
        (lambda x: x.masked_fill(x == x, -torch.inf).softmax(-1).sum(), "forward"),
    ],
    ids=["sqrt at 0", "log 0", "0 / 0", "softmax of nothing"],
)
def test_ops_of_other_kinds(make, phase, tmp_path):
    model = nn.Linear(3, 3)
    batch = torch.randn(4, 3)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, x):
            return make(self.linear(x))

    found = replay(hit(tmp_path, Odd(), batch), Odd)
    assert found.verdict == "op" and found.current.fault.phase == phase, found.reason


def test_a_mask_of_infinities_is_no_fault(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            weights = self.linear(x).masked_fill(torch.tensor([False, True, True]), -torch.inf).softmax(-1)
            return weights.sum() + (0 * self.linear.bias[0]).sqrt()

    found = replay(hit(tmp_path, Masked(), torch.randn(2, 3)), Masked)
    assert found.verdict == "op" and found.current.fault.node == "SqrtBackward0"


def test_weights_that_have_grown(tmp_path):
    model = fresh(Plain)
    with torch.no_grad():
        model.second.weight.mul_(1e25)
    found = replay(hit(tmp_path, model, torch.randn(4, 3)), lambda: fresh(Plain))
    assert found.verdict == "weights" and "have grown too large" in found.reason and found.current.fault.overflow
    assert found.bad_weights == ()


def test_a_forward_that_raises_is_an_outcome(tmp_path):
    """cholesky raises where eigh gives NaN; with poisoned weights that is not the op's fault."""

    class Factor(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.linalg.cholesky(self.gain * x).sum()

    path, poisoned = tmp_path / "bad.pt", Factor()
    for gain, batch, verdict in ((float("nan"), torch.eye(3), "weights"), (1.0, torch.zeros(3, 3), "op")):
        nn.init.constant_(poisoned.gain, gain)
        rng = {"cpu": torch.get_rng_state()}
        save_bad_batch(path, step=1, batch=batch, rng=rng, model=poisoned, cause="loss")
        found = replay(path, Factor)
        assert found.verdict == verdict and "cholesky" in found.current.error, found.reason


def test_what_cannot_be_reproduced(tmp_path):
    model, batch = fresh(Plain), torch.randn(4, 3)
    guard = TrainingGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), directory=tmp_path)
    model(batch).backward()
    guard.step(torch.tensor(float("nan")), batch)
    found = replay(guard.report().files[0], lambda: fresh(Plain))
    assert found.verdict == "not reproduced"


def test_the_random_numbers_are_those_of_the_hit(tmp_path):
    class Lottery(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))
            self.seen = []

        def forward(self, x):
            self.seen.append(torch.rand(3))
            return (self.weight * x).sum() / 0 * 0

    model, second = Lottery(), Lottery()
    path = hit(tmp_path, model, torch.ones(64))
    state = torch.get_rng_state()
    replay(path, lambda: second)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model.seen[0], second.seen[0]) and torch.equal(model.seen[0], second.seen[1])


def test_without_weights_only_fresh_ones_are_tried(tmp_path):
    found = replay(hit(tmp_path, fresh(Graphs), torch.ones(2, 6), save_weights=False), lambda: fresh(Graphs))
    assert found.verdict == "op" and found.current is None


def test_models_that_do_not_fit(tmp_path):
    path = hit(tmp_path, fresh(Plain), broken(float("nan")))
    with pytest.raises(ValueError, match="the model must have the parameters of the file"):
        replay(path, lambda: (nn.Linear(3, 1), lambda model, x: model(x).sum()))
    with pytest.raises(TypeError, match="let the function return \\(model, loss\\)"):
        replay(path, lambda: nn.Linear(3, 1))
    with pytest.raises(TypeError, match="`build` must return a model"):
        replay(path, lambda: 3)


# ---- the command -----------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

def build():
    return Net(), lambda model, batch: (model.w * batch["x"]).sum()

three = 3
"""


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SCRIPT)
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(3))
    guard = TrainingGuard(model, torch.optim.SGD(model.parameters(), lr=1.0))
    batch = {"x": torch.tensor([1.0, float("nan"), 2.0])}
    loss = (model.w * batch["x"]).sum()
    loss.backward()
    guard.step(loss, batch)
    assert guard.report().files == ("bad_batch_1.pt",)
    return ["doctor", "--replay", "bad_batch_1.pt", "--model", "mine:build"]


def test_the_command_prints_json_alone(case, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "stablekern", *case, "--json"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["verdict"] == "data" and found["step"] == 1
    assert found["bad_inputs"] == ["batch['x'] (1 of 3 entries)"] and found["fresh"]["bad_gradients"] == ["w"]


def test_the_command_prints_a_text(case, capsys):
    assert main(case) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("step 1: data\n  the batch itself is not finite: batch['x'] (1 of 3 entries)\n")
    assert "fresh weights   loss nan, gradients not finite: w" in shown


def test_the_command_refuses_in_one_line(case, capsys):
    for arguments, why in (
        (case[:3], "--replay FILE and --model module:function go together"),
        ([*case[:-1], "absent:build"], "there is no module `absent`"),
        ([*case[:-1], "mine:absent"], "`mine` has no function `absent`"),
        ([*case[:-1], "mine:three"], "`mine` has no function `three`"),
        ([*case[:-1], "mine"], "`mine` must be module:function"),
        (["doctor", "--replay", "absent.pt", *case[3:]], "No such file"),
        (["doctor", "--replay", "mine.py", *case[3:]], "must be a file written by `TrainingGuard`"),
    ):
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1 and why in shown.err, shown.err


def test_the_command_needs_no_extras(case, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(case) == 0 and capsys.readouterr().out.startswith("step 1: data\n")
    assert main([*case, "--jsn"]) == 2 and capsys.readouterr().out == ""
