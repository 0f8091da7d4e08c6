import os

import pytest
import torch
from hypothesis import settings

# The first large float32 sqrt of a process is now and then wrong by 3e-4 with torch 2.13 on a CPU; a small one first
# prevents it.
torch.ones(8).sqrt()

# Small models gain nothing from a second thread, and lose much where another process keeps a core busy.
torch.set_num_threads(1)

settings.register_profile("repo", deadline=None, max_examples=60)
settings.load_profile("repo")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "interpreter" in item.keywords and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: make test runs it separately"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
