"""Bad calls of the public face: each error names the argument, what was got and what is accepted."""

import re

import pytest
import torch
from helpers import small_config

import mar_fast
from mar_fast import MAROutput, TokenMask, cost, create_model, mar_loss, masking, named_config

GRID = (2, 4, 4)


def model(**overrides):
    return mar_fast.MAR(small_config(**overrides)).eval()


def video(**changes):
    shape = {"b": 2, "c": 3, "t": 4, "h": 64, "w": 64, **changes}
    return torch.zeros(tuple(shape.values()), dtype=torch.uint8)


def mask(batch=2, grid=GRID):
    return masking.random(batch, grid, 0.5)


def index(*values):
    return torch.tensor([values], dtype=torch.int32)


def output(**changes):
    return MAROutput(
        **{**dict(logits=torch.zeros(2, 5), features=None, reconstruction_loss=None, pixels=None), **changes}
    )


# call, error, what the message must contain: the argument, what was got, what is accepted
BAD_CALLS = {
    "unknown model": (
        lambda: create_model("vit_base"),
        ValueError,
        "name: got 'vit_base', expected one of mar_vit_small",
    ),
    "unknown field": (
        lambda: create_model("mar_vit_base", heads=3),
        TypeError,
        "heads: got an unknown field, expected one",
    ),
    "ratio off the cell": (
        lambda: named_config("mar_vit_base", mask_ratio=0.6),
        ValueError,
        "mask_ratio: got 0.6.*1/4, 2/4",
    ),
    "ratio 1": (
        lambda: named_config("mar_vit_base", mask_ratio=1.0),
        ValueError,
        r"mask_ratio: got 1.0, expected .*\[0, 1\)",
    ),
    "heads": (lambda: small_config(num_heads=5), ValueError, "num_heads: got 5, expected a divisor of embed_dim 96"),
    "bridge heads": (
        lambda: small_config(bridge_num_heads=3),
        ValueError,
        "bridge_num_heads: got 3, .*bridge_embed_dim 64",
    ),
    "depth": (lambda: small_config(depth=0), ValueError, "depth: got 0, expected a whole number, 1 or more"),
    "depth of float": (lambda: small_config(depth=2.0), ValueError, "depth: got 2.0, expected a whole number"),
    "decoder depth": (lambda: small_config(decoder_depth=-1), ValueError, "decoder_depth: got -1.* 0 or more"),
    "frames": (
        lambda: small_config(num_frames=5),
        ValueError,
        "num_frames: got 5, expected a multiple of the patch's 2",
    ),
    "image": (
        lambda: small_config(image_size=(64, 60)),
        ValueError,
        "image_size: got 60, .*multiple of the patch's 16",
    ),
    "image of one side": (lambda: small_config(image_size=64), TypeError, "image_size: got 64, expected a tuple"),
    "cell": (
        lambda: small_config(cell=(1, 3, 3), mask_ratio=1 / 3),
        ValueError,
        r"cell: got \(1, 3, 3\).*divide the grid",
    ),
    "std": (lambda: small_config(std=(0.2, 0.0, 0.2)), ValueError, "std: got .*above 0"),
    "mean": (lambda: small_config(mean=(0.5,)), ValueError, r"mean: got \(0.5,\), expected 3 numbers"),
    "classifier": (
        lambda: small_config(classifier="mlp"),
        ValueError,
        "classifier: got 'mlp', expected 'bridging', 'linear'",
    ),
    "attention dropout": (
        lambda: small_config(attention_dropout=0.1),
        ValueError,
        "attention_dropout: got 0.1, expected 0",
    ),
    "drop path": (
        lambda: small_config(drop_path_rate=1.5),
        ValueError,
        r"drop_path_rate: got 1.5, expected a number in \[0, 1\)",
    ),
    "eps": (lambda: small_config(encoder_eps=0), ValueError, "encoder_eps: got 0, expected a number above 0"),
    "video missing batch": (
        lambda: model()(video()[0]),
        ValueError,
        r"video: got shape \(3, 4, 64, 64\).*\(B, C, T, H, W\)",
    ),
    "video in another order": (
        lambda: model()(video().permute(0, 2, 1, 3, 4)),
        ValueError,
        r"video: got shape \(2, 4, 3, 64, 64\), .*\(2, 3, 4",
    ),
    "video size": (lambda: model()(video(h=32)), ValueError, r"video: got shape .* expected \(2, 3, 4, 64, 64\)"),
    "video dtype": (lambda: model()(video().int()), TypeError, "video: got torch.int32, expected uint8 or float32"),
    "video of numpy": (lambda: model()(video().numpy()), TypeError, "video: got ndarray, expected a tensor"),
    "video device": (
        lambda: model()(video().to("meta")),
        ValueError,
        "video: got a tensor on meta, expected one on cpu",
    ),
    "mask of bools": (
        lambda: model()(video(), mask().bool_masked()),
        TypeError,
        "mask: got Tensor, expected a TokenMask .*from_bool_masked",
    ),
    "mask batch": (lambda: model()(video(), mask(3)), ValueError, "mask: got 3 clips, expected 2, as video has"),
    "mask grid": (
        lambda: model()(video(), mask(2, (4, 4, 4))),
        ValueError,
        r"mask: got a grid \(4, 4, 4\), expected \(2, 4, 4\)",
    ),
    "mask of another order": (
        lambda: model()(video(), mask(2, (4, 2, 4))),
        ValueError,
        r"mask: got a grid \(4, 2, 4\)",
    ),
    "mask without visible": (
        lambda: model()(video(), TokenMask.from_bool_masked(torch.ones(2, 32, dtype=torch.bool))),
        ValueError,
        "mask: got no visible token, expected at least one",
    ),
    "reconstruct without decoder": (
        lambda: model(decoder_depth=0)(video(), reconstruct=True),
        ValueError,
        "reconstruct: got True, expected False: .*no decoder",
    ),
    "loss without logits": (
        lambda: mar_loss(output(logits=None), torch.zeros(2)),
        ValueError,
        "out: got no logits, expected",
    ),
    "target shape": (
        lambda: mar_loss(output(), torch.zeros(3, dtype=torch.int64)),
        ValueError,
        r"target: got torch.int64 of shape \(3,\), expected \(2,\)",
    ),
    "target range": (
        lambda: mar_loss(output(), torch.tensor([0, 5])),
        ValueError,
        "target: got values from 0 to 5, .*0 to 4",
    ),
    "soft target shape": (
        lambda: mar_loss(output(), torch.zeros(2, 4)),
        ValueError,
        r"target: got .*\(2, 4\).*\(2, 5\) floating",
    ),
    "target list": (lambda: mar_loss(output(), [1, 2]), ValueError, "target: got list, expected"),
    "loss not computed": (
        lambda: mar_loss(output(), torch.tensor([0, 1])),
        ValueError,
        "reconstruction_weight: got 0.1 without reconstruction_loss, expected 0, or",
    ),
    "negative weight": (
        lambda: mar_loss(output(), torch.tensor([0, 1]), -1),
        ValueError,
        "reconstruction_weight: got -1, expected 0 or more",
    ),
    "running ratio": (lambda: masking.cell_running(1, GRID, 0.3), ValueError, "ratio: got 0.3, .*0/4, 1/4, 2/4, 3/4"),
    "running cell": (
        lambda: masking.cell_running(1, GRID, 0.5, cell=(1, 3, 2)),
        ValueError,
        "cell: got .*divide the grid",
    ),
    "running cell list": (
        lambda: masking.cell_running(1, GRID, 0.5, cell=(2, 2)),
        ValueError,
        r"cell: got \(2, 2\), .*three whole",
    ),
    "direction": (
        lambda: masking.cell_running(1, GRID, 0.5, direction=0),
        ValueError,
        "direction: got 0, expected 1 or -1",
    ),
    "phase": (
        lambda: masking.cell_running(1, GRID, 0.5, phase=0.5),
        TypeError,
        "phase: got 0.5, expected a whole number",
    ),
    "phase shape": (
        lambda: masking.cell_running(2, GRID, 0.5, phase=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        r"phase: got torch.int64 of shape \(3,\), expected .*\(2,\) or \(2, 4\)",
    ),
    "batch": (lambda: masking.random(-1, GRID, 0.5), ValueError, "batch: got -1, expected a whole number, 0 or more"),
    "grid": (lambda: masking.tube(1, (4, 4), 0.5), ValueError, r"grid: got \(4, 4\), expected a tuple \(T', "),
    "ratio": (lambda: masking.frame(1, GRID, 1.0), ValueError, r"ratio: got 1.0, expected a number in \[0, 1\)"),
    "bool mask of ints": (
        lambda: TokenMask.from_bool_masked(index(0, 1)),
        TypeError,
        "masked: got torch.int32, expected a bool",
    ),
    "bool mask shape": (
        lambda: TokenMask.from_bool_masked(torch.ones(4, dtype=torch.bool)),
        ValueError,
        r"masked: got shape \(4,\), expected \(B, L\)",
    ),
    "unequal bool masks": (
        lambda: TokenMask.from_bool_masked(torch.tensor([[True, False], [True, True]])),
        ValueError,
        r"masked: got clips with \[0, 1\] visible tokens, expected the same number",
    ),
    "num_visible": (
        lambda: TokenMask.from_bool_masked(torch.tensor([[True, False]]), num_visible=2),
        ValueError,
        "num_visible: got 2, expected 1",
    ),
    "overlap": (
        lambda: TokenMask(index(0, 1), index(1, 2), (4,)),
        ValueError,
        "keep_idx and drop_idx together: got .*unique",
    ),
    "unsorted": (
        lambda: TokenMask(index(1, 0), index(2, 3), (4,)),
        ValueError,
        "keep_idx: got rows that are not .*ascending",
    ),
    "out of range": (
        lambda: TokenMask(index(0, 4), index(1, 2), (4,)),
        ValueError,
        "keep_idx: got values from 0 to 4, .*0 to 3",
    ),
    "wrong grid": (
        lambda: TokenMask(index(0, 1), index(2, 3), (1, 2, 3)),
        ValueError,
        r"keep_idx and drop_idx: got 2 and 2 values, expected 6 .*grid \(1, 2, 3\)",
    ),
    "cost of a name": (lambda: cost.count("mar_vit_base"), TypeError, "config: got str, expected a MARConfig"),
    "cost method": (
        lambda: cost.count(small_config(), method="fast"),
        ValueError,
        "method: got 'fast', expected 'visible' or 'original'",
    ),
    "cost batch": (lambda: cost.count(small_config(), batch=-1), ValueError, "batch: got -1, expected a whole number"),
    "cost without decoder": (
        lambda: cost.count(small_config(decoder_depth=0), reconstruct=True),
        ValueError,
        "reconstruct: got True, expected False",
    ),
    "peak rate": (
        lambda: cost.count(small_config()).floor_seconds(0, 1e9),
        ValueError,
        "peak_flops: got 0, expected a number above 0",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error) as caught:
        call()
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "got" in str(caught.value) and "expected" in str(caught.value)


def test_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match="has no attribute 'from_nowhere'"):
        mar_fast.from_nowhere  # noqa: B018
