"""Stopping at a step's end instead of in the middle of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interrupt"]


class Interrupt:
    """The first Ctrl-C sets `seen`; the second ends the program where it is."""

    def __init__(self) -> None:
        self.seen = False

    @contextmanager
    def watching(self) -> Iterator[Interrupt]:
        def first(*_: Any) -> None:
            self.seen = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstablekern: stopping after this step; Ctrl-C again stops at once\n")

        before = signal.signal(signal.SIGINT, first)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def __call__(self) -> bool:
        return self.seen
