"""What goes wrong in a training run, and where: checks, a watch over a whole run, and a loop that survives it."""

from stablekern.health._causes import TensorStats
from stablekern.health.bad_batch import load_bad_batch
from stablekern.health.checks import assert_finite, check_covariances, check_gradients, clamp_and_check
from stablekern.health.replay import Replay, replay
from stablekern.health.training_guard import GuardReport, TrainingGuard, constant_predictor_loss
from stablekern.health.watch import Report, watch

__all__ = [
    "GuardReport",
    "Replay",
    "Report",
    "TensorStats",
    "TrainingGuard",
    "assert_finite",
    "check_covariances",
    "check_gradients",
    "clamp_and_check",
    "constant_predictor_loss",
    "load_bad_batch",
    "replay",
    "watch",
]
