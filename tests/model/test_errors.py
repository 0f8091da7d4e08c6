"""Bad calls of the public face: each error names the argument, what was got and what is accepted."""

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


# What is called, and what the error says: the argument, what was got, what is accepted.
VALUE_ERRORS = [
    (lambda: create_model("vit_base"), "name: got 'vit_base', expected one of mar_vit_small"),
    (lambda: named_config("mar_vit_base", mask_ratio=0.6), "mask_ratio: got 0.6.*1/4, 2/4"),
    (lambda: named_config("mar_vit_base", mask_ratio=1.0), r"mask_ratio: got 1.0, expected .*\[0, 1\)"),
    (lambda: small_config(final_norm="True"), "final_norm: got 'True', expected true or false"),
    (lambda: small_config(num_heads=5), "num_heads: got 5, expected a divisor of embed_dim 96"),
    (lambda: small_config(bridge_num_heads=3), "bridge_num_heads: got 3, .*bridge_embed_dim 64"),
    (lambda: small_config(depth=0), "depth: got 0, expected a whole number, 1 or more"),
    (lambda: small_config(depth=2.0), "depth: got 2.0, expected a whole number"),
    (lambda: small_config(decoder_depth=-1), "decoder_depth: got -1.* 0 or more"),
    (lambda: small_config(num_frames=5), "num_frames: got 5, expected a multiple of the patch's 2"),
    (lambda: small_config(image_size=(64, 60)), "image_size: got 60, .*multiple of the patch's 16"),
    (lambda: small_config(cell=(1, 3, 3), mask_ratio=1 / 3), r"cell: got \(1, 3, 3\).*divide the grid"),
    (lambda: small_config(std=(0.2, 0.0, 0.2)), "std: got .*above 0"),
    (lambda: small_config(mean=(0.5,)), r"mean: got \(0.5,\), expected 3 numbers"),
    (lambda: small_config(classifier="mlp"), "classifier: got 'mlp', expected 'bridging', 'linear'"),
    (lambda: small_config(attention_dropout=0.1), "attention_dropout: got 0.1, expected 0"),
    (lambda: small_config(drop_path_rate=1.5), r"drop_path_rate: got 1.5, expected a number in \[0, 1\)"),
    (lambda: small_config(encoder_eps=0), "encoder_eps: got 0, expected a number above 0"),
    (lambda: model()(video()[0]), r"video: got shape \(3, 4, 64, 64\).*\(B, C, T, H, W\)"),
    (lambda: model()(video().permute(0, 2, 1, 3, 4)), r"video: got shape \(2, 4, 3, 64, 64\), .*\(2, 3, 4"),
    (lambda: model()(video(h=32)), r"video: got shape .* expected \(2, 3, 4, 64, 64\)"),
    (lambda: model()(video().to("meta")), "video: got a tensor on meta, expected one on cpu"),
    (lambda: model()(video(), mask(3)), "mask: got 3 clips, expected 2, as video has"),
    (lambda: model()(video(), mask(2, (4, 4, 4))), r"mask: got a grid \(4, 4, 4\), expected \(2, 4, 4\)"),
    (lambda: model()(video(), mask(2, (4, 2, 4))), r"mask: got a grid \(4, 2, 4\)"),
    (
        lambda: model()(video(), TokenMask.from_bool_masked(torch.ones(2, 32, dtype=torch.bool))),
        "mask: got no visible token, expected at least one",
    ),
    (lambda: model(decoder_depth=0)(video(), reconstruct=True), "reconstruct: got True, expected False: .*no decoder"),
    (lambda: mar_loss(output(logits=None), torch.zeros(2)), "out: got no logits, expected"),
    (
        lambda: mar_loss(output(), torch.zeros(3, dtype=torch.int64)),
        r"target: got torch.int64 of shape \(3,\), expected \(2,\)",
    ),
    (lambda: mar_loss(output(), torch.tensor([0, 5])), "target: got values from 0 to 5, .*0 to 4"),
    (lambda: mar_loss(output(), torch.zeros(2, 4)), r"target: got .*\(2, 4\).*\(2, 5\) floating"),
    (lambda: mar_loss(output(), [1, 2]), "target: got list, expected"),
    (
        lambda: mar_loss(output(), torch.tensor([0, 1])),
        "reconstruction_weight: got 0.1 without reconstruction_loss, expected 0, or",
    ),
    (lambda: mar_loss(output(), torch.tensor([0, 1]), -1), "reconstruction_weight: got -1, expected 0 or more"),
    (lambda: masking.cell_running(1, GRID, 0.3), "ratio: got 0.3, .*0/4, 1/4, 2/4, 3/4"),
    (lambda: masking.cell_running(1, GRID, 0.5, cell=(1, 3, 2)), "cell: got .*divide the grid"),
    (lambda: masking.cell_running(1, GRID, 0.5, cell=(2, 2)), r"cell: got \(2, 2\), .*three whole"),
    (lambda: masking.cell_running(1, GRID, 0.5, direction=0), "direction: got 0, expected 1 or -1"),
    (
        lambda: masking.cell_running(2, GRID, 0.5, phase=torch.zeros(3, dtype=torch.int64)),
        r"phase: got torch.int64 of shape \(3,\), expected .*\(2,\) or \(2, 4\)",
    ),
    (lambda: masking.random(-1, GRID, 0.5), "batch: got -1, expected a whole number, 0 or more"),
    (lambda: masking.tube(1, (4, 4), 0.5), r"grid: got \(4, 4\), expected a tuple \(T', "),
    (lambda: masking.frame(1, GRID, 1.0), r"ratio: got 1.0, expected a number in \[0, 1\)"),
    (
        lambda: TokenMask.from_bool_masked(torch.ones(4, dtype=torch.bool)),
        r"masked: got shape \(4,\), expected \(B, L\)",
    ),
    (
        lambda: TokenMask.from_bool_masked(torch.tensor([[True, False], [True, True]])),
        r"masked: got clips with \[0, 1\] visible tokens, expected the same number",
    ),
    (lambda: TokenMask.ragged([torch.tensor([0])], (4,)).take(slice(1)), "mask: got a ragged mask, expected one whose"),
    (
        lambda: TokenMask.from_bool_masked(torch.tensor([[True, False]]), num_visible=2),
        "num_visible: got 2, expected 1",
    ),
    (lambda: TokenMask(index(0, 1), index(1, 2), (4,)), "keep_idx and drop_idx together: got .*unique"),
    (lambda: TokenMask(index(1, 0), index(2, 3), (4,)), "keep_idx: got rows that are not .*ascending"),
    (lambda: TokenMask(index(0, 4), index(1, 2), (4,)), "keep_idx: got values from 0 to 4, .*0 to 3"),
    (
        lambda: TokenMask(index(0, 1), index(2, 3), (1, 2, 3)),
        r"keep_idx and drop_idx: got 2 and 2 values, expected 6 .*grid \(1, 2, 3\)",
    ),
    (lambda: cost.count(small_config(), visible=0), "visible: got 0, expected a whole number from 1 to 32"),
    (lambda: cost.count(small_config(), visible=33), "visible: got 33"),
    (lambda: cost.count(small_config(), visible=2.5), "visible: got 2.5"),
    (
        lambda: cost.count(small_config(), 0.5, visible=16),
        "mask_ratio and visible: got 0.5 and 16, expected one of them",
    ),
    (lambda: cost.count(small_config(), method="fast"), "method: got 'fast', expected 'visible' or 'original'"),
    (lambda: cost.count(small_config(), batch=-1), "batch: got -1, expected a whole number"),
    (lambda: cost.count(small_config(decoder_depth=0), reconstruct=True), "reconstruct: got True, expected False"),
    (lambda: cost.count(small_config()).floor_seconds(0, 1e9), "peak_flops: got 0, expected a number above 0"),
]
TYPE_ERRORS = [
    (lambda: create_model("mar_vit_base", heads=3), "heads: got an unknown field, expected one"),
    (lambda: small_config(image_size=64), "image_size: got 64, expected a tuple"),
    (lambda: model()(video().int()), "video: got torch.int32, expected uint8 or float32"),
    (lambda: model()(video().numpy()), "video: got ndarray, expected a tensor"),
    (lambda: model()(video(), mask().bool_masked()), "mask: got Tensor, expected a TokenMask .*from_bool_masked"),
    (lambda: masking.cell_running(1, GRID, 0.5, phase=0.5), "phase: got 0.5, expected a whole number"),
    (lambda: TokenMask.from_bool_masked(index(0, 1)), "masked: got torch.int32, expected a bool"),
    (lambda: cost.count("mar_vit_base"), "config: got str, expected a MARConfig"),
]
BAD_CALLS = [*((ValueError, *row) for row in VALUE_ERRORS), *((TypeError, *row) for row in TYPE_ERRORS)]


@pytest.mark.parametrize(("error", "call", "message"), BAD_CALLS, ids=[message for *_, message in BAD_CALLS])
def test_bad_call(error, call, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "got" in str(caught.value) and "expected" in str(caught.value)


def test_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match="has no attribute 'from_nowhere'"):
        mar_fast.from_nowhere  # noqa: B018
