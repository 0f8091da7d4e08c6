"""What all tests of the benchmarks share."""

import gc

import pytest


@pytest.fixture(autouse=True)
def quick_collections():
    """The harness collects garbage for each provider, which takes half a second among all that was imported before."""
    gc.freeze()
    yield
    gc.collect()
    gc.unfreeze()
