"""Bad calls of the drop-in for transformers: each error names the argument, what was got and what is accepted."""

import re
import sys

import pytest
import torch
from test_accelerate import TOKENS, pair
from test_accelerate_rules import CLASSIFIER, MODEL, PRETRAINING
from test_huggingface import BATCH
from torch import nn
from torch.nn.utils import parametrize

import mar_fast

transformers = pytest.importorskip("transformers")


def call(case, **changes):
    _, fast, arguments = pair(case)
    fast.eval()
    return fast(**{**arguments, **changes})


def uneven():
    masked = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    masked[0, :3], masked[1:, :2] = True, True
    return masked


def with_another_forward():
    """As a wrapper for mixed precision leaves it: a forward in the instance goes before that of any class."""
    model = pair(CLASSIFIER)[0]
    original = model.videomae.forward
    model.videomae.forward = lambda *args, **kwargs: original(*args, **kwargs)
    return model


# call, error, what the message must contain
BAD_CALLS = {
    "not a model": (lambda: mar_fast.accelerate(nn.Linear(2, 2)), TypeError, "model: got Linear, expected VideoMAEModel"),
    "a compiled model": (
        lambda: mar_fast.accelerate(torch.compile(pair(MODEL)[0])), TypeError, "model: got OptimizedModule",
    ),
    "another forward": (
        lambda: mar_fast.accelerate(with_another_forward(), keep=0.5), ValueError,
        "model: got a VideoMAEModel with another forward, expected the original",
    ),
    "restore": (lambda: mar_fast.restore("x"), TypeError, "model: got str"),
    "keep of a model": (
        lambda: mar_fast.accelerate(pair(MODEL)[0], keep=0.5), ValueError, "keep: got 0.5 for VideoMAEModel",
    ),
    "keep without pooling": (
        lambda: mar_fast.accelerate(pair("classifier, first token, dense")[0], keep=0.5), ValueError,
        "keep: got 0.5 for VideoMAEForVideoClassification, expected None",
    ),
    "keep off the cell": (
        lambda: mar_fast.accelerate(pair(CLASSIFIER)[0], keep=0.3), ValueError, "keep: got 0.3, .*0.25, 0.5, 0.75, 1.0",
    ),
    "keep nothing": (lambda: mar_fast.accelerate(pair(CLASSIFIER)[0], keep=0), ValueError, "keep: got 0, expected"),
    "keep, odd grid": (
        lambda: mar_fast.accelerate(
            transformers.VideoMAEForVideoClassification(
                transformers.VideoMAEConfig(image_size=48, num_hidden_layers=0, hidden_size=12)
            ), keep=0.5,
        ), ValueError, "keep: got 0.5, expected None: cells of 2 x 2 patches do not fill a grid of 3 x 3",
    ),
    "num_visible": (
        lambda: mar_fast.accelerate(pair(MODEL)[0], num_visible=25), ValueError, "num_visible: got 25, .*from 1 to 24",
    ),
    "num_visible without a mask": (
        lambda: call(CLASSIFIER, num_visible=3), ValueError, "num_visible: got 3, expected None",
    ),
    "uint8": (
        lambda: call(MODEL, pixel_values=torch.zeros(BATCH, 6, 3, 32, 64, dtype=torch.uint8)), TypeError,
        "pixel_values: got torch.uint8, expected float32",
    ),
    "channels first": (
        lambda: call(MODEL, pixel_values=torch.zeros(BATCH, 3, 6, 32, 64)), ValueError,
        re.escape("pixel_values: got shape (3, 3, 6, 32, 64), expected (3, 3, 3, 32, 64)"),
    ),
    "frames": (
        lambda: call(MODEL, pixel_values=torch.zeros(BATCH, 8, 3, 32, 64)), ValueError,
        "pixel_values: got 8 frames, 32 tokens, expected 24 tokens",
    ),
    "mask of numbers": (
        lambda: call(MODEL, bool_masked_pos=torch.zeros(BATCH, TOKENS)), TypeError, "bool_masked_pos: got torch.float32",
    ),
    "mask of another size": (
        lambda: call(MODEL, bool_masked_pos=uneven()[:, 1:]), ValueError, r"bool_masked_pos: got shape \(3, 23\)",
    ),
    "uneven mask": (
        lambda: call(MODEL, bool_masked_pos=uneven()), ValueError,
        "bool_masked_pos: got clips with 21 to 22 visible tokens, expected the same in every clip",
    ),
    "everything masked": (
        lambda: call(MODEL, bool_masked_pos=torch.ones(BATCH, TOKENS).bool()), ValueError,
        "bool_masked_pos: got no visible token",
    ),
    "nothing to reconstruct": (
        lambda: call(PRETRAINING, bool_masked_pos=torch.zeros(BATCH, TOKENS).bool()), ValueError,
        "bool_masked_pos: got no masked token",
    ),
    "pre-training without a mask": (
        lambda: call(PRETRAINING, bool_masked_pos=None), TypeError, "bool_masked_pos: got None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    run, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        run()


def test_restore_does_not_undo_what_came_after():
    """It would take the parametrization's class away and leave a model that cannot be called."""
    plain, fast, arguments = pair(PRETRAINING)
    parametrize.register_parametrization(fast, "mask_token", nn.Tanh())
    with pytest.raises(ValueError, match="model: got a ParametrizedVideoMAEForPreTraining whose class or forward"):
        mar_fast.restore(fast)
    assert fast(**arguments).loss.isfinite()  # neither did it do half of its work
    parametrize.remove_parametrizations(fast, "mask_token", leave_parametrized=False)
    assert torch.equal(mar_fast.restore(fast)(**arguments).loss, plain(**arguments).loss)


OLD_CALLS = {
    "accelerate": mar_fast.accelerate,
    "patch_transformers": lambda model: mar_fast.patch_transformers().__enter__(),
    "register_attention": lambda model: mar_fast.register_attention(),
}


@pytest.mark.parametrize("name", OLD_CALLS)
def test_old_transformers_are_refused(monkeypatch, name):
    model = pair(MODEL)[0]
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"transformers: got 4\.57\.6, expected 5\.0 or newer"):
        OLD_CALLS[name](model)
