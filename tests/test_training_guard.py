"""A guarded run: what it skips, halves, brings back, notices and writes; in a plain loop and in two real trainers."""

from __future__ import annotations

import math
import os
import warnings

import pytest
import torch
from torch import Tensor, nn

from stablekern import focal_loss
from stablekern.errors import NonFiniteError, TrainingStoppedError
from stablekern.health import TrainingGuard, constant_predictor_loss, load_bad_batch
from stablekern.health.training_guard import GuardReport
from stablekern.optim import ComplexAdamW

NAN, INF = float("nan"), float("inf")
LambdaLR, StepLR = torch.optim.lr_scheduler.LambdaLR, torch.optim.lr_scheduler.StepLR
pytestmark = pytest.mark.filterwarnings("ignore:stablekern.health.TrainingGuard:RuntimeWarning")


class Net(nn.Module):
    """A linear model with a buffer and dropout; a batch with `poison` makes the gradient of `scale` NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, poison: float = 0.0) -> Tensor:
        out = self.linear(self.drop(self.norm(x))).squeeze(-1) * self.scale
        return out + (0 * self.scale).sqrt() if poison else out  # adds 0, whose gradient is 0 / 0


def batch(poison: float = 0.0) -> dict:
    return {"x": torch.randn(8, 3), "poison": poison}


def run(guard: TrainingGuard, batches, loss=lambda out: out.square().mean(), **options) -> list[list[Tensor]]:
    """Train on the batches; the weights after each step."""
    course = []
    for one in batches:
        guard.start(one)
        value = loss(guard.model(**one))
        value.backward()
        guard.step(value, one, **options)
        for optimizer in guard.optimizers:
            optimizer.zero_grad()
        course.append([p.detach().clone() for p in guard.model.parameters()])
    return course


def guarded(tmp_path, optimizer=torch.optim.AdamW, scheduler=None, **options) -> TrainingGuard:
    model = Net()
    chosen = optimizer(model.parameters(), lr=0.1)
    return TrainingGuard(model, chosen, scheduler and scheduler(chosen), **{"directory": tmp_path, **options})


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "ComplexAdamW": ComplexAdamW,
    "tensor lr": lambda p, lr: torch.optim.AdamW(p, lr=torch.tensor(lr), foreach=False),
}


@pytest.fixture(params=[False, True], ids=["", "late"])
def late(request, monkeypatch):
    """The order of a GPU: flags are read at the next step. (Optimizers that take no flag skip in the step as ever.)"""
    if request.param:
        monkeypatch.setattr(TrainingGuard, "_late", lambda self: True)
    return request.param


# ---- skipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_good_steps_are_those_of_the_plain_loop(name, tmp_path, late):
    """Same weights, bit for bit, scheduler and warm-up included."""
    guard = guarded(tmp_path, OPTIMIZERS[name], lambda o: StepLR(o, 3, 0.5), warmup_steps=4)
    plain = Net()
    plain.load_state_dict(guard.model.state_dict())
    optimizer = OPTIMIZERS[name](plain.parameters(), lr=0.1)
    batches = [batch() for _ in range(8)]
    torch.manual_seed(1)
    course = run(guard, batches)
    torch.manual_seed(1)
    for step, one in enumerate(batches):
        for group in optimizer.param_groups:
            rate = 0.1 * 0.5 ** (step // 3) * min(1.0, (step + 1) / 4)
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        plain(**one).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for ours, theirs in zip(course[step], plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)
    report = guard.report()
    assert (report.steps, report.taken, report.skipped, report.files) == (8, 8, 0, ())
    assert float(guard.optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.1 * 0.25)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("cause", ["gradients", "loss"])
def test_a_bad_step_changes_no_weight_and_no_schedule(name, cause, tmp_path, late):
    guard = guarded(tmp_path, OPTIMIZERS[name], lambda o: LambdaLR(o, lambda step: 1 / (1 + step)))
    losses = []

    def loss(out: Tensor) -> Tensor:
        losses.append(out.square().mean())
        return losses[-1] * INF if cause == "loss" and len(losses) == 2 else losses[-1]

    course = run(guard, [batch(), batch(float(cause == "gradients")), batch(), batch()], loss)
    report = guard.report()
    assert same(course[0], course[1]) and not same(course[1], course[2]), "only the bad step is left out"
    assert (report.steps, report.taken, report.skipped, getattr(report, cause)) == (4, 3, 1, 1)
    assert guard.schedulers[0].last_epoch == 3, "the scheduler advanced for the steps that were taken"
    assert all(p.isfinite().all() for p in guard.model.parameters())
    assert report.lr_factor == 1 and report.rollbacks == 0
    what = "the gradient of `scale` is not finite" if cause == "gradients" else "the loss is inf"
    assert report.first == f"step 2: {what}" and f"first: step 2: {what}" in str(report)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_alone_that_is_not_finite_skips_finite_gradients(name, tmp_path, late):
    guard = guarded(tmp_path, OPTIMIZERS[name])
    before = [p.detach().clone() for p in guard.model.parameters()]
    guard.model(**batch()).square().mean().backward()
    guard.step(torch.tensor(NAN))
    assert same(before, [p.detach() for p in guard.model.parameters()])
    assert (guard.report().taken, guard.report().loss) == (0, 1)


def test_clipping_is_that_of_grad_guard(tmp_path):
    guard = guarded(tmp_path, torch.optim.SGD, max_norm=0.01)
    before = [p.detach().clone() for p in guard.model.parameters()]
    (after,) = run(guard, [batch()])
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_the_first_skip_warns_once(tmp_path):
    guard = guarded(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(guard, [batch(1.0), batch(), batch(1.0)])
    (only,) = caught
    path = tmp_path / "bad_batch_1.pt"
    assert str(only.message) == (
        f"stablekern.health.TrainingGuard: step 1 skipped: the gradient of `scale` is not finite; batch in {path}"
    )
    assert only.filename == __file__


# ---- the learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: LambdaLR(o, lambda step: 0.9**step),
        lambda o: StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=50),
    ],
    ids=["LambdaLR", "StepLR", "Cosine", "OneCycle"],
)
def test_no_scheduler_undoes_a_halving(scheduler, tmp_path, late):
    guard = guarded(tmp_path, torch.optim.SGD, scheduler, halve_after=2)
    twin = scheduler(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    used = []
    guard.optimizers[0].register_step_pre_hook(lambda o, a, k: used.append(o.param_groups[0]["lr"]))
    run(guard, [batch(), batch(1.0), batch(1.0), *(batch() for _ in range(6))])
    assert guard.report().halvings == 1 and guard.lr_factor == 0.5
    taken = used if not late else used[:1] + used[3:]  # late, the optimizer is asked and does nothing
    taken = taken if len(taken) == 7 else used[-7:]
    for step, rate in enumerate(taken):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert rate == pytest.approx(twin.get_last_lr()[0] * (1.0 if step == 0 else 0.5))
            twin.step()
    assert guard.learning_rates() == [pytest.approx(twin.get_last_lr()[0] * 0.5)]
    assert guard.optimizers[0].param_groups[0]["lr"] == pytest.approx(twin.get_last_lr()[0])


def test_a_rate_that_stays_low_is_noticed_once(tmp_path):
    guard = guarded(tmp_path, torch.optim.SGD, warmup_steps=100_000, total_steps=200)
    run(guard, [batch() for _ in range(10)])
    assert guard.report().notices == ()
    run(guard, [batch() for _ in range(5)])
    (notice,) = guard.report().notices
    assert "below 0.001 of its base for 11 steps, more than 5% of the run's 200" in notice
    assert "warm-up over 100000 steps" in notice
    quick = guarded(tmp_path, torch.optim.SGD, warmup_steps=100, total_steps=200)
    run(quick, [batch() for _ in range(15)])
    assert quick.report().notices == ()


def test_rates_that_are_low_now_and_then_are_not(tmp_path):
    guard = guarded(
        tmp_path, torch.optim.SGD, lambda o: LambdaLR(o, lambda step: 1e-4 if step % 3 else 1.0), total_steps=50
    )
    run(guard, [batch() for _ in range(12)])  # eight low steps of which two follow each other: 5 % are 2.5
    assert guard.report().notices == ()


def test_a_rate_that_is_a_tensor_stays_that_tensor(tmp_path):
    """A captured or compiled step reads it where it is: also behind a step that was left out, of a loop of its own."""
    guard = guarded(tmp_path, OPTIMIZERS["tensor lr"], lambda o: StepLR(o, 1, 0.5), warmup_steps=4)
    (optimizer,), (scheduler,) = guard.optimizers, guard.schedulers
    rate = optimizer.param_groups[0]["lr"]
    run(guard, [batch()])
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.05)
    value = guard.model(**batch(1.0)).square().mean()
    value.backward()
    guard.check(value)
    guard.withhold()
    optimizer.step()
    scheduler.step()
    guard.settle()
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.05)
    assert scheduler.last_epoch == 1


def test_a_step_that_raises_leaves_the_rates(tmp_path):
    guard = guarded(tmp_path, torch.optim.SGD, warmup_steps=10)
    optimizer, original = guard.optimizers[0], torch.Tensor.add_

    def broken():
        raise OSError("out of memory")

    value = guard.model(**batch()).sum()
    value.backward()
    with pytest.raises(OSError):
        optimizer.step(broken)
    assert torch.Tensor.add_ is original
    guard.step(value)
    assert optimizer.param_groups[0]["lr"] == 0.1


# ---- going back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "SGD", "fused", "ComplexAdamW"])
@pytest.mark.parametrize("what", ["weight", "buffer"])
def test_poisoned_weights_come_back(name, what, tmp_path, late):
    """Also the optimizer's moments; the run then goes on as if the poison had never been."""
    guard = guarded(tmp_path, OPTIMIZERS[name], keep_every=2)
    course = run(guard, [batch() for _ in range(5)])  # kept before the steps 1, 3 and 5
    with torch.no_grad():
        (guard.model.linear.weight if what == "weight" else guard.model.norm.running_mean)[0] = NAN
        for state in guard.optimizers[0].state.values():
            if "exp_avg" in state:
                state["exp_avg"].fill_(NAN)
    run(guard, [batch()])
    report = guard.report()
    assert same([p.detach() for p in guard.model.parameters()], course[3])
    assert all(v.isfinite().all() for v in guard.model.state_dict().values())
    assert report.weights == report.rollbacks == 1 and report.loss == report.gradients == 0
    name_of = "linear.weight" if what == "weight" else "norm.running_mean"
    assert report.first == f"step 6: `{name_of}` is not finite before the step"
    assert all(t.isfinite().all() for s in guard.optimizers[0].state.values() for t in s.values() if torch.is_tensor(t))
    last = run(guard, [batch(), batch()])
    assert guard.report().taken == 7 and not same(last[0], last[1])


def test_only_weights_of_a_step_that_was_taken_are_kept(tmp_path):
    """Finite weights that give nothing but NaN are not what to go back to."""
    guard = guarded(tmp_path, torch.optim.SGD, keep_every=1, rollback_after=2)
    before = [p.detach().clone() for p in guard.model.parameters()]
    course = run(guard, [batch(), batch(1.0), batch(1.0)])
    assert guard.report().rollbacks == 1 and not same(course[0], before)
    assert same([p.detach() for p in guard.model.parameters()], before)


def test_values_that_were_moved_to_other_memory_are_seen(tmp_path):
    """`p.data = ...`, as offloading and weight averaging do it."""
    guard = guarded(tmp_path)
    run(guard, [batch()])
    guard.model.linear.bias.data = torch.full((1,), NAN)
    run(guard, [batch()])
    assert guard.report().weights == 1 and guard.model.linear.bias.isfinite().all()


def test_an_infinite_moment_is_found_though_the_weights_are_finite(tmp_path):
    """Adam's v overflows for a gradient above 1e19: its weight then never moves again, and nothing is ever NaN."""
    guard = guarded(tmp_path, keep_every=3)
    run(guard, [batch(), batch()])
    guard.optimizers[0].state[guard.model.scale]["exp_avg_sq"].fill_(INF)
    run(guard, [batch(), batch()])
    assert guard.report().first == "step 4: `the optimizer's exp_avg_sq` is not finite before the step"
    assert guard.optimizers[0].state == {} or guard.report().rollbacks == 1


def test_many_bad_steps_go_back_and_give_up_with_a_report(tmp_path):
    guard = guarded(tmp_path, halve_after=2, rollback_after=3, give_up_after=7, max_files=4)
    run(guard, [batch(), batch()])
    with pytest.raises(TrainingStoppedError, match="gave up after 7 skipped steps in a row") as stopped:
        run(guard, [batch(1.0) for _ in range(20)])
    report = guard.report()
    assert (report.steps, report.taken, report.skipped, report.gradients) == (9, 2, 7, 7)
    assert report.rollbacks == 2 and report.halvings == 5 and report.lr_factor == 2**-5
    assert str(report) in str(stopped.value) and "2 of 9 steps taken, 7 skipped" in str(report)
    assert [f"bad_batch_{n}.pt" for n in (3, 4, 5, 6)] == sorted(p.name for p in tmp_path.iterdir())


def test_a_good_step_starts_the_count_anew(tmp_path):
    guard = guarded(tmp_path, give_up_after=3, halve_after=3)
    run(guard, [batch(1.0), batch(1.0), batch()] * 4)
    assert guard.report().skipped == 8 and guard.report().halvings == 0


def test_halvings_have_a_floor(tmp_path):
    guard = guarded(tmp_path, halve_after=1, give_up_after=100, directory=None)
    run(guard, [batch(1.0) for _ in range(15)])
    assert guard.lr_factor == 2**-10 and guard.report().halvings == 10


def test_weights_that_are_bad_from_the_start(tmp_path):
    guard = guarded(tmp_path)
    with torch.no_grad():
        guard.model.linear.bias.fill_(INF)
    with pytest.raises(NonFiniteError, match="the weights must be finite at the first step: got `linear.bias`"):
        run(guard, [batch()])


# ---- a run that has silently stopped to learn ------------------------------------------------------------------------


def test_weights_that_do_not_move_are_noticed(tmp_path):
    guard = guarded(tmp_path, lambda p, lr: torch.optim.SGD(p, lr=1e-12), keep_every=5)
    run(guard, [batch() for _ in range(12)])
    (notice,) = guard.report().notices
    assert "the weights moved by" in notice and "in 5 taken steps, with finite gradients" in notice
    frozen = guarded(tmp_path, lambda p, lr: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr), keep_every=5)
    run(frozen, [batch() for _ in range(6)])
    assert "moved by 0 of their norm" in frozen.report().notices[0]
    moving = guarded(tmp_path, keep_every=5)
    run(moving, [batch() for _ in range(12)])
    assert moving.report().notices == ()


def test_a_loss_at_the_level_of_a_constant_is_noticed(tmp_path):
    targets = (torch.rand(4096) < 0.3).float()
    level = constant_predictor_loss(nn.functional.binary_cross_entropy_with_logits, targets, ())
    share = targets.mean().item()
    assert level == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share), rel=1e-6)

    def train(informative: bool, warmup_steps: int = 0) -> GuardReport:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        nn.init.constant_(model.bias, math.log(share / (1 - share)))
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5 if informative else 1e-3)
        options = {"directory": None, "keep_every": 20, "constant_loss": level, "warmup_steps": warmup_steps}
        guard = TrainingGuard(model, optimizer, **options)
        for _ in range(62):
            y = (torch.rand(512) < share).float()
            x = torch.stack([y if informative else torch.zeros(512), torch.randn(512)], 1)
            value = nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(-1), y)
            value.backward()
            guard.step(value)
            optimizer.zero_grad()
        return guard.report()

    (notice,) = train(informative=False).notices
    assert "is that of a constant prediction" in notice and "nothing is learned" in notice
    assert train(informative=True).notices == ()
    assert train(informative=False, warmup_steps=500).notices == (), "not during the warm-up"


def test_constant_predictor_of_other_losses():
    targets = torch.randint(0, 3, (999,))
    shares = torch.bincount(targets).double() / len(targets)
    entropy = -(shares * shares.log()).sum().item()
    assert constant_predictor_loss(nn.functional.cross_entropy, targets, (3,)) == pytest.approx(entropy, rel=1e-6)
    numbers = torch.randn(500, 2, dtype=torch.float64)
    least = numbers.var(0, correction=0).mean().item()
    assert constant_predictor_loss(nn.functional.mse_loss, numbers, (2,)) == pytest.approx(least, rel=1e-6)
    labels = (torch.rand(2000) < 0.2).float()
    scan = torch.linspace(-6, 6, 2001, dtype=torch.float64)[:, None]
    best = focal_loss(scan.expand(-1, 2000), labels.double().expand(2001, -1)).mean(1).min().item()
    assert constant_predictor_loss(focal_loss, labels, ()) == pytest.approx(best, rel=1e-4)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_file_holds_what_a_replay_needs(tmp_path, late):
    guard = guarded(tmp_path)
    bad = batch(1.0)
    course = run(guard, [batch(), batch()])
    state = torch.get_rng_state()
    run(guard, [bad])
    guard.settle()
    (path,) = tmp_path.iterdir()
    content = load_bad_batch(path)
    assert content == content | {"step": 3, "cause": "gradients", "first_bad": "scale"}
    assert torch.equal(content["batch"]["x"], bad["x"]) and content["batch"]["poison"] == 1.0
    assert torch.equal(content["rng"]["cpu"], state), "as before the forward, so that dropout can be repeated"
    assert same([content["weights"][n] for n, _ in guard.model.named_parameters()], course[1])
    assert set(content["weights"]) == set(guard.model.state_dict())
    assert guard.report().files == (str(path),)


def test_files_can_be_left_out(tmp_path):
    guard = guarded(tmp_path, directory=None)
    run(guard, [batch(1.0)])
    assert guard.report().files == ()
    light = guarded(tmp_path / "deep" / "er", save_weights=False)
    run(light, [batch(1.0)])
    assert load_bad_batch(light.report().files[0])["weights"] is None


def test_any_batch_can_be_written(tmp_path):
    import numpy as np

    from stablekern.health.bad_batch import save_bad_batch

    class Odd:
        def __repr__(self):
            return "odd"

    things = ({"a": [np.ones(3, np.float32), np.float64(2.5)], 3: ("s", None, True)}, Odd(), np.array(["text"]), 1j)
    rng = {"cpu": torch.get_rng_state()}
    save_bad_batch(tmp_path / "f.pt", step=1, batch=things, rng=rng, model=None, cause="loss")
    first, odd, words, number = load_bad_batch(tmp_path / "f.pt")["batch"]
    assert torch.equal(first["a"][0], torch.ones(3)) and first["a"][1] == 2.5 and first[3] == ("s", None, True)
    assert odd == "odd" and words == "array(['text'], dtype='<U4')" and number == 1j
    assert [p.name for p in tmp_path.iterdir()] == ["f.pt"]


def test_other_files_are_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("text")
    for name in ("other.pt", "text.pt"):
        with pytest.raises(ValueError, match="must be a file written by `TrainingGuard`"):
            load_bad_batch(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_bad_batch(tmp_path / "absent.pt")


# ---- several processes -----------------------------------------------------------------------------------------------


def _rank(rank: int, path: str, out: str) -> None:
    """Two ranks with equal weights; the loss of one is NaN in the third step, though all gradients are finite."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    guard = guarded(out, torch.optim.SGD, lambda o: StepLR(o, 1, 0.5))
    for step in range(4):
        value = guard.model(torch.ones(8, 3)).square().mean()
        value.backward()
        for p in guard.model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
        guard.step(value.detach() * (NAN if (rank, step) == (1, 2) else 1))
        guard.optimizers[0].zero_grad()
    report = guard.report()
    assert (report.taken, report.loss, guard.schedulers[0].last_epoch) == (3, 1, 3), report
    assert [name.rpartition("bad_batch_")[2] for name in report.files] == ["3_rank1.pt" if rank else "3.pt"]
    dist.barrier()
    os._exit(0)  # all is checked; now and then gloo's threads abort while an interpreter winds down


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ranks_skip_alike(tmp_path):
    torch.multiprocessing.start_processes(
        _rank, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="spawn"
    )
    assert sorted(p.name for p in tmp_path.glob("bad_*")) == ["bad_batch_3.pt", "bad_batch_3_rank1.pt"]


# ---- the rest of the contract ----------------------------------------------------------------------------------------


def test_a_loss_scale_that_comes_down_is_no_hit(tmp_path):
    guard = guarded(tmp_path, torch.optim.SGD, lambda o: StepLR(o, 1, 0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(3):
        value = guard.model(**batch()).square().mean()
        scaler.scale(value).backward()
        if step == 0:
            guard.model.scale.grad.fill_(INF)  # float16 would have overflowed
        guard.step(value, scaler=scaler)
        guard.optimizers[0].zero_grad()
    report = guard.report()
    assert (report.taken, report.skipped, report.overflows, report.files) == (2, 0, 1, ())
    assert scaler.get_scale() == 2.0**15 and guard.schedulers[0].last_epoch == 2
    assert "1 steps left out while the loss scale came down" in str(report)


def test_a_loss_scale_that_cannot_come_down_is_one(tmp_path):
    guard = guarded(tmp_path, torch.optim.SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    value = guard.model(**batch(1.0)).square().mean()
    scaler.scale(value).backward()
    guard.step(value, scaler=scaler)
    assert (guard.report().overflows, guard.report().gradients) == (0, 1)


def test_state_survives_a_restart(tmp_path):
    guard = guarded(tmp_path, warmup_steps=10, halve_after=1)
    run(guard, [batch(), batch(1.0), batch()])
    state = guard.state_dict()
    torch.save(state, tmp_path / "guard.pt")
    again = guarded(tmp_path, warmup_steps=10, halve_after=1)
    again.load_state_dict(torch.load(tmp_path / "guard.pt", weights_only=True))
    assert again.learning_rates() == guard.learning_rates() == [pytest.approx(0.1 * 0.5 * 0.3)]
    assert again.report().steps == 3


def test_a_restart_goes_on_with_the_row_of_skipped_steps(tmp_path):
    guard, again = guarded(tmp_path), guarded(tmp_path)
    run(guard, [batch(), batch(1.0)])
    again.load_state_dict(guard.state_dict())
    run(again, [batch(1.0)])
    assert (again.lr_factor, again.report().halvings) == (0.5, 1)


def test_what_is_loaded_is_what_to_go_back_to(tmp_path):
    """A checkpoint of an earlier step, brought into a run that has kept weights of its own."""
    guard, early = guarded(tmp_path, torch.optim.SGD), guarded(tmp_path, torch.optim.SGD)
    run(guard, [batch(), batch()])
    guard.model.load_state_dict(early.model.state_dict())
    guard.load_state_dict(early.state_dict())
    (after,) = run(guard, [batch()])
    with torch.no_grad():
        guard.model.linear.weight.fill_(NAN)
    run(guard, [batch()])
    assert same([p.detach() for p in guard.model.parameters()], list(early.model.parameters())) and not same(
        after, list(early.model.parameters())
    )


def test_closed_the_rates_are_the_schedulers(tmp_path):
    guard = guarded(tmp_path, torch.optim.SGD, warmup_steps=10)
    guard.close()
    used = []
    guard.optimizers[0].register_step_pre_hook(lambda o, a, k: used.append(o.param_groups[0]["lr"]))
    guard.optimizers[0].step()
    assert used == [0.1]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"warmup_steps": -1}, ValueError, "`warmup_steps` must be"),
        ({"total_steps": 0}, ValueError, "`total_steps` must be"),
        ({"give_up_after": 0}, ValueError, "`give_up_after` must be"),
        ({"max_norm": -1.0}, ValueError, "`max_norm` must be"),
        ({"constant_loss": "low"}, TypeError, "`constant_loss` must be a number"),
    ],
)
def test_errors(options, error, text, tmp_path):
    with pytest.raises(error, match=text):
        guarded(tmp_path, **options)


def test_wrong_types(tmp_path):
    model = Net()
    with pytest.raises(TypeError, match="`model` must be a module"):
        TrainingGuard(list(model.parameters()), torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(TypeError, match="`optimizer` must be a torch optimizer: got int"):
        TrainingGuard(model, [3])
    with pytest.raises(RuntimeError, match="call `check` before `withhold`"):
        guarded(tmp_path).withhold()
