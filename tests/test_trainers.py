"""`TrainingGuard` as a callback of Lightning and of transformers, each with the real Trainer."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from stablekern.errors import TrainingStoppedError
from stablekern.health import load_bad_batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that we do not own, while they are imported
    lightning = pytest.importorskip("lightning", reason="`make test` installs it; the callback needs it")
    pytest.importorskip("accelerate", reason="`make test` installs it; the Trainer needs it")
    transformers = pytest.importorskip("transformers", reason="`make test` installs it; the callback needs it")
    from stablekern.adapters import lightning as for_lightning
    from stablekern.adapters import transformers as for_transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers warn about workers, loggers and the like

ITEMS, SIZE = 12, 4  # three batches to an epoch


def data(bad: list[int]) -> list[dict[str, Tensor]]:
    """Items in order; a batch that holds one of `bad` gets a NaN gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ITEMS * SIZE, 3, generator=generator)
    marks = torch.tensor([float(i // SIZE in bad) for i in range(ITEMS * SIZE)])
    return [{"x": row, "mark": mark, "labels": row.sum()} for row, mark in zip(x, marks, strict=True)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, mark: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.linear(x).squeeze(-1) * self.scale
        out = out + (0 * self.scale).sqrt() if mark.any() else out  # adds 0, whose gradient is 0 / 0
        return {"loss": (out - labels).square().mean(), "logits": out}


class Course:
    """The weights and the scheduler's step, behind each step of the optimizer and the scheduler."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.steps: list[int] = []
        self.rates: list[float] = []

    def note(self, model: nn.Module, scheduler) -> None:
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        self.steps.append(scheduler.last_epoch)
        self.rates.append(float(scheduler.optimizer.param_groups[0]["lr"]))

    def changed(self) -> list[bool]:
        return [not torch.equal(a, b) for a, b in zip(self.weights, self.weights[1:], strict=False)]


def with_lightning(tmp_path, bad, *, optimizer=torch.optim.AdamW, accumulate=1, guarded=True, **options):
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch, batch_idx):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            chosen = optimizer(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 0.9**step)
            return {"optimizer": chosen, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    course = Course()

    class Note(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (batch_idx + 1) % accumulate == 0:
                course.note(module.net, trainer.lr_scheduler_configs[0].scheduler)

    callback = for_lightning.TrainingGuardCallback(**options)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        accumulate_grad_batches=accumulate,
        default_root_dir=tmp_path,
        callbacks=[*([callback] if guarded else []), Note()],
    )
    error = None
    try:
        trainer.fit(Module(), torch.utils.data.DataLoader(data(bad), batch_size=SIZE))
    except TrainingStoppedError as stopped:
        error = stopped
    return callback.guard, course, error


def with_transformers(tmp_path, bad, *, optimizer=torch.optim.AdamW, accumulate=1, guarded=True, **options):
    course, model = Course(), Net()
    chosen = optimizer(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 0.9**step)

    class Note(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            course.note(model, scheduler)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=accumulate,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        max_grad_norm=1.0,
    )

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    callback = for_transformers.TrainingGuardCallback(**options)
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=data(bad),
        callbacks=[*([callback] if guarded else []), Note()],
        optimizers=(chosen, scheduler),
    )
    error = None
    try:
        trainer.train()
    except TrainingStoppedError as stopped:
        error = stopped
    return callback.guard, course, error


TRAINERS = {"lightning": with_lightning, "transformers": with_transformers}
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)}


@pytest.fixture(params=TRAINERS)
def train(request, tmp_path):
    return lambda *args, **options: TRAINERS[request.param](tmp_path, *args, **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_a_bad_batch_is_skipped_and_the_schedule_waits(train, optimizer, late, monkeypatch):
    if late and optimizer == "AdamW":
        pytest.skip("reads its flag in the step")
    if late:
        from stablekern.health import TrainingGuard

        monkeypatch.setattr(TrainingGuard, "_late", lambda self: True)
    guard, course, error = train([4], optimizer=OPTIMIZERS[optimizer])
    report = guard.report()
    assert error is None and (report.steps, report.taken, report.gradients) == (ITEMS, ITEMS - 1, 1)
    assert course.changed() == [step != 4 for step in range(1, ITEMS)]
    assert torch.stack(course.weights).isfinite().all()
    assert guard.schedulers[0].last_epoch == ITEMS - 1
    expected = [step + 1 if step < 4 else step for step in range(ITEMS)]
    assert course.steps == expected or late, "late, the scheduler is put back at the next step"
    assert course.rates == [pytest.approx(0.1 * 0.9**step) for step in course.steps], "the rate waits, too"
    content = load_bad_batch(report.files[0])
    (batch,) = [content["batch"]] if isinstance(content["batch"], dict) else content["batch"]
    assert content["step"] == 5 and batch["mark"].tolist() == [1.0] * SIZE
    assert torch.equal(batch["x"], torch.stack([item["x"] for item in data([])[4 * SIZE : 5 * SIZE]]))


def test_a_good_run_is_that_without_the_guard(train):
    _, without, _ = train([], guarded=False)
    _, guarded, _ = train([])
    assert len(guarded.weights) == ITEMS
    for ours, plain in zip(guarded.weights, without.weights, strict=True):
        assert torch.equal(ours, plain)


def test_halving_acts_though_the_trainer_steps_the_scheduler(train):
    guard, course, _ = train([4, 5], halve_after=2)
    assert guard.report().halvings == 1 and guard.lr_factor == 0.5
    assert guard.learning_rates() == [pytest.approx(0.1 * 0.9**10 * 0.5)]
    assert guard.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**10)


def test_accumulated_batches_are_one_step(train):
    guard, course, _ = train([5], accumulate=2)
    report = guard.report()
    assert (report.steps, report.taken) == (6, 5)
    batches = load_bad_batch(report.files[0])["batch"]
    assert [float(b["mark"][0]) for b in batches] == [0.0, 1.0]
    assert course.changed() == [True, False, True, True, True]


def test_the_run_ends_with_a_report(train):
    guard, course, error = train(list(range(3, ITEMS)), give_up_after=5)
    assert "gave up after 5 skipped steps in a row" in str(error) and "3 of 8 steps taken" in str(error)
    assert len(guard.report().files) == 5


def test_both_refuse_a_norm():
    for module in (for_lightning, for_transformers):
        with pytest.raises(TypeError, match="`max_norm` is"):
            module.TrainingGuardCallback(max_norm=1.0)


def test_total_steps_are_the_trainers(train):
    guard, _, _ = train([], warmup_steps=3)
    assert guard.total_steps == ITEMS and guard.report().notices == ()


def test_a_checkpoint_of_lightning_carries_the_factor(tmp_path):
    guard, _, _ = with_lightning(tmp_path, [4, 5])
    callback = for_lightning.TrainingGuardCallback()
    assert callback.state_dict() == {}
    callback.guard = guard
    again = for_lightning.TrainingGuardCallback(directory=tmp_path)
    again.load_state_dict(callback.state_dict())
    module = lightning.LightningModule()
    module.net = Net()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=3)
    trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), lr=1.0)]
    again.on_train_start(trainer, module)
    assert again.guard.lr_factor == 0.5 and again.guard.report().steps == ITEMS
