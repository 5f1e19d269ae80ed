"""One per cent of the soaks."""

from __future__ import annotations

import pytest

import soak


@pytest.mark.parametrize("name", list(soak.SOAKS))
def test_first_cases(name):
    for case in range(100):
        soak.SOAKS[name](case)
