"""What a call costs the host: the limits of DESIGN's table hold on any machine, the launches stubbed."""

import importlib.util

import pytest
import torch

from mar_fast.kernels import device

if importlib.util.find_spec("triton") is None or device.INTERPRETING:
    pytest.skip("needs a Triton that is not interpreted", allow_module_level=True)

from mar_fast.bench import host


@pytest.fixture(scope="module")
def figures():
    return host.measure(torch.device("cpu"), quick=True)


def test_a_call_is_cheap(figures):
    """At most 2.5 times F.layer_norm, 5 with gradients, 1.5 times its forward and backward for a backward pass.

    Measured 1.0 to 1.9, 2.1 to 3.9 and 0.7 to 1.1; before plans 5.2 to 9.5 without gradients.
    """
    over = {
        (op, mode): round(ratio.p50, 2)
        for (op, mode), (_, ratio) in figures.items()
        if not op.startswith("model: ") and ratio.p50 > host.LIMITS[mode]
    }
    assert not over
    assert {mode for _, mode in figures} == set(host.LIMITS)


def test_a_model_is_cheap(figures):
    """At most 0.65 times the same model in plain PyTorch; 1.38 before plans."""
    assert host.median_ratio(figures, "model: mar_fast", "no gradients") <= host.MODEL_LIMIT


def test_the_table_says_the_limits(figures):
    text = host.table(figures, torch.device("cpu"))
    assert text.count("2.5\n") == text.count(" no gradients") - 3 and "model: PyTorch SDPA" in text
    rows = host.rows(figures, torch.device("cpu"))
    assert len(rows) == 2 * len(figures) and {row.metric for row in rows} == {"host time", "host ratio"}
