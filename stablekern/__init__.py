"""Kernels that keep deep-learning training finite and fast, for PyTorch, on a CPU or an NVIDIA GPU.

`stablekern.<op>` is one autograd operation with a float64 reference, on the best backend that the machine has; the
first call of an op that has a native kernel compiles it. Importing the package compiles and loads nothing.
"""

from stablekern._registry import available_backends, use_backend
from stablekern.ops.focal_loss import focal_loss

__version__ = "0.1.0"

__all__ = [
    "available_backends",
    "focal_loss",
    "use_backend",
]
