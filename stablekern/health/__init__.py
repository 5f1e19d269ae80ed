"""What goes wrong in a training run, and where: checks of tensors and gradients, and a watch over a whole run."""

from stablekern.health.checks import assert_finite, check_covariances, check_gradients, clamp_and_check
from stablekern.health.watch import watch

__all__ = ["assert_finite", "check_covariances", "check_gradients", "clamp_and_check", "watch"]
