"""Triton kernels, one module per op; imported by launchers only. No defaults, no dtype or device policy here."""
