"""Training steps that stay finite: the optimizer, the gradient guard in front of it, and its parameter groups."""

from stablekern.optim.complex_adamw import ComplexAdamW
from stablekern.optim.grad_guard import GradGuard
from stablekern.optim.parameter_groups import parameter_groups

__all__ = ["ComplexAdamW", "GradGuard", "parameter_groups"]
