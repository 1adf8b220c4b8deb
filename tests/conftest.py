"""What all tests share: the gloo pool, hypothesis's profile, and the markers that need a surrounding."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.gloo_pool import GlooPool

# The same examples on every run, and no deadline: a busy machine is no failure.
hypothesis.settings.register_profile("alimm", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("alimm")

SIMULATOR = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, with the reason, where it was asked for by hand."""
    has_cuda: bool | None = None
    for item in items:
        if item.get_closest_marker("cudasim") and not SIMULATOR:
            item.add_marker(pytest.mark.skip(reason="needs NUMBA_ENABLE_CUDASIM=1 in the environment"))
        if item.get_closest_marker("gpu"):
            if has_cuda is None:
                import torch

                has_cuda = torch.cuda.is_available()
            if not has_cuda:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    """The pool of gloo workers; ``gloo.run(world_size, function, *arguments)`` gives the results by rank."""
    pool = GlooPool()
    yield pool
    pool.close()
