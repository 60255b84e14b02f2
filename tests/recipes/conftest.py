"""Runs that are killed."""

import pytest

from tests.forks import server


@pytest.fixture(scope="session")
def killed():
    """``killed(folder, die_at, **settings)``: the tiny run of these settings dies at its n-th write; how it ended."""
    with server("tests.recipes.tiny") as ask:
        yield lambda folder, die_at, **settings: ask({"folder": str(folder), "die_at": die_at, **settings})[0]
