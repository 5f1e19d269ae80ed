"""What goes wrong in a training run, and where: checks of tensors and gradients."""

from stablekern.health.checks import assert_finite, check_covariances, check_gradients, clamp_and_check

__all__ = ["assert_finite", "check_covariances", "check_gradients", "clamp_and_check"]
