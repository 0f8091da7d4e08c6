"""Clips of another size than the checkpoint's: position tables by formula or interpolated, fast model and reference."""

import pytest

pytest.importorskip("safetensors")

import argparse

import torch
from checkpoint_cases import LINEAR, PRETRAINING, clip, fine_tuned_names, mar_names, random_weights, small_model
from helpers import relative, small_config

import mar_fast
from mar_fast import MARConfig, from_pretrained, masking, reference, save_checkpoint
from mar_fast.layers import position_table, sinusoid_table

# The clip's grid, the grid that the table is made for.
GRIDS = {
    "more frames": ((16, 14, 14), (8, 14, 14)),
    "fewer frames": ((4, 14, 14), (8, 14, 14)),
    "192": ((8, 12, 12), (8, 14, 14)),
    "320": ((8, 20, 20), (8, 14, 14)),
    "not square": ((16, 12, 20), (8, 14, 14)),
    "from one": ((3, 2, 5), (1, 1, 1)),
    "to one": ((1, 1, 1), (3, 2, 5)),
    "odd": ((5, 3, 7), (2, 6, 4)),
}


def config_for(grid, made_for, **more):
    t, h, w = grid
    return MARConfig(num_frames=2 * t, image_size=(16 * h, 16 * w), position_grid=made_for, mask_ratio=0.0, **more)


@pytest.mark.parametrize("width", [96, 5])
@pytest.mark.parametrize("case", GRIDS)
def test_table_is_the_references(case, width):
    grid, made_for = GRIDS[case]
    got = position_table(grid, made_for, width)
    want = reference.resized_table(config_for(grid, made_for), width)
    assert got.shape == want.shape == (torch.tensor(grid).prod(), width) and got.dtype == torch.float32
    assert (got - want).abs().max() <= 1.2e-7  # both are rounded once, from float64
    assert relative(got, sinusoid_table(got.shape[0], width)) > 0.01 or got.shape[0] == 1


def test_table_by_hand():
    """From 2 frames to 4: the centres 0.25 and 0.75 of the way between, the outermost ones as they are."""
    table = sinusoid_table(2, 6)
    got = position_table((4, 1, 1), (2, 1, 1), 6)
    want = torch.stack([table[0], 0.75 * table[0] + 0.25 * table[1], 0.25 * table[0] + 0.75 * table[1], table[1]])
    assert torch.allclose(got, want, atol=1e-7, rtol=0)
    # Along the width only: rows and frames stay what they were.
    got = position_table((2, 3, 8), (2, 3, 4), 6).reshape(2, 3, 8, 6)
    old = sinusoid_table(24, 6).reshape(2, 3, 4, 6)
    assert torch.allclose(got[:, :, 0], old[:, :, 0], atol=1e-7) and torch.allclose(
        got[:, :, 7], old[:, :, 3], atol=1e-7
    )
    assert torch.allclose(got[:, :, 1], 0.75 * old[:, :, 0] + 0.25 * old[:, :, 1], atol=1e-6)


def test_the_own_grid_changes_nothing():
    for made_for in (None, (8, 14, 14)):
        assert torch.equal(position_table((8, 14, 14), made_for, 768), sinusoid_table(1568, 768))


@pytest.mark.parametrize("grid", [(3, 2, 4), (1, 4, 2)])
def test_model_and_reference(grid):
    """Values and gradients of the whole model, pixel decoder included; moving it does not change the tables."""
    t, h, w = grid
    config = small_config(num_frames=2 * t, image_size=(16 * h, 16 * w), position_grid=(2, 3, 3))
    plain = random_weights(reference.MAR(config))
    fast = mar_fast.MAR(config).eval()
    fast.load_state_dict(plain.state_dict())
    video, mask = clip(2, 2 * t, (16 * h, 16 * w)), masking.random(2, grid, 0.5)
    outs = [model.train()(video, mask) for model in (fast, plain)]
    for out in outs:
        (out.logits.square().mean() + out.reconstruction_loss).backward()
    for name in ("logits", "features", "pixels", "reconstruction_loss"):
        assert relative(getattr(outs[0], name), getattr(outs[1], name)) <= 2e-6, name
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert relative(ours.grad, theirs.grad) <= 2e-5, name
    moved = mar_fast.MAR(config).bfloat16().to("meta").to_empty(device="cpu")
    for name in ("encoder", "decoder"):
        want = fast.get_submodule(name).pos_embed.value
        assert torch.equal(moved.get_submodule(name).pos_embed.value, want)
    assert not torch.equal(fast.encoder.pos_embed.value, sinusoid_table(t * h * w, 96))


SOURCE = dict(num_frames=8, image_size=(64, 64))  # 4 x 4 x 4
SIZES = {
    "8 frames to 32": dict(num_frames=32),
    "8 frames to 4": dict(num_frames=4),
    "192": dict(image_size=(192, 192)),
    "320 x 192, 16 frames": dict(num_frames=16, image_size=(320, 192)),
}


@pytest.mark.parametrize("position", [None, "interpolate", "formula"])
@pytest.mark.parametrize("case", SIZES)
def test_any_size(tmp_path, case, position):
    """What comes out is the reference of that configuration, with the checkpoint's weights."""
    source = small_model(**SOURCE)
    path = save_checkpoint(source, tmp_path / "a.safetensors", layout="mar")
    model = from_pretrained(path, position=position, **SIZES[case])
    config = model.config
    assert config.position_grid == (None if position == "formula" else (4, 4, 4))
    remark = " ".join(model.load_report.remarks)
    assert f"to {config.grid}" in remark or f"for the grid {config.grid}" in remark
    assert ("the default where the size" in remark) == (position is None)
    assert ("by the formula" in remark) == (position == "formula")
    plain = reference.MAR(config).eval()
    plain.load_state_dict(source.state_dict())
    video = clip(1, config.num_frames, config.image_size)
    with torch.no_grad():
        assert relative(model(video).logits, plain(video).logits) <= 2e-6
    # And it comes back: the table of a model that was resized once is made for the first grid still.
    again = from_pretrained(save_checkpoint(model, tmp_path / "b.safetensors"))
    assert again.config == config and torch.equal(again.encoder.pos_embed.value, model.encoder.pos_embed.value)
    back = from_pretrained(tmp_path / "b.safetensors", position="interpolate", **SOURCE)
    assert position == "formula" or torch.equal(back.encoder.pos_embed.value, source.encoder.pos_embed.value)


def test_same_size_needs_no_choice(tmp_path):
    path = save_checkpoint(small_model(**SOURCE), tmp_path / "a.safetensors", layout="mar")
    for position in (None, "interpolate", "formula"):
        model = from_pretrained(path, position=position, **SOURCE)
        assert model.config.position_grid is None and not model.load_report.remarks


def test_size_that_the_file_does_not_say():
    """Clips of 16 x 224 x 224 are likely, but not known: another size is a choice to make."""
    state = fine_tuned_names(small_model(**{**LINEAR, **SOURCE}).state_dict())
    with pytest.raises(ValueError, match=r"position: got none, .*expected 'formula' if .* 'interpolate' from 16 fr"):
        from_pretrained(state, num_heads=3, **SOURCE)
    model = from_pretrained(state, num_heads=3, position="interpolate", **SOURCE)
    assert model.config.position_grid == (8, 14, 14) and "assumed" in " ".join(model.load_report.remarks)
    model = from_pretrained(state, num_heads=3, position="formula", **SOURCE)
    assert model.config.position_grid is None
    model = from_pretrained(state, num_heads=3, position_grid=(2, 2, 2), **SOURCE)
    assert model.config.position_grid == (2, 2, 2)
    assert from_pretrained(state, num_heads=3).config.grid == (8, 14, 14)


def test_args_in_the_file_say_it(tmp_path):
    """VideoMAE's own files keep num_frames and input_size: that is the grid of the position table."""
    content = {
        "model": small_model(**{**PRETRAINING, **SOURCE}).state_dict(),
        "args": argparse.Namespace(num_frames=8, input_size=64),
    }
    torch.save(content, tmp_path / "a.pth")
    for num_frames, grid, origin in ((8, None, "args in the file"), (16, (4, 4, 4), "given")):
        told = {} if origin != "given" else dict(num_frames=num_frames)
        model = from_pretrained(tmp_path / "a.pth", num_heads=3, decoder_num_heads=3, **told)
        assert (model.config.num_frames, model.config.position_grid) == (num_frames, grid)
        assert model.config.image_size == (64, 64) and model.load_report.origins["num_frames"] == origin


def test_position_table_in_a_mar_file():
    """MAR saves the decoder's table: its length says, or confirms, how large the clips were."""
    state = {**mar_names(small_model(**SOURCE).state_dict()), "pos_embed": sinusoid_table(64, 48)[None]}
    told = dict(num_heads=3, decoder_num_heads=3, bridge_num_heads=2)
    with pytest.raises(ValueError, match=r"num_frames and image_size: got none .* table has 64 tokens"):
        from_pretrained(state, **told)
    model = from_pretrained(state, **told, **SOURCE)
    assert model.config.position_grid is None
    assert "pos_embed" in model.load_report.ignored
    with pytest.raises(ValueError, match=r"got a position table of 64 tokens, expected 1568"):
        from_pretrained(state, **told, num_frames=16, image_size=(64, 64))
    state["pos_embed"] = sinusoid_table(1568, 48)[None]
    assert from_pretrained(state, **told, num_frames=8).config.position_grid == (8, 14, 14)
    state["pos_embed"] = sinusoid_table(1568, 48)[None].half()
    from_pretrained(state, **told)
    state["pos_embed"] = sinusoid_table(1568, 48)[None] + 0.01
    with pytest.raises(ValueError, match=r"unknown \(pos_embed \(values up to 1.0e-02 from the sinusoid"):
        from_pretrained(state, **told)


BAD = {
    "position": (dict(position="learned"), "position: got 'learned', expected 'formula', 'interpolate' or None"),
    "both": (
        dict(position="formula", position_grid=(1, 1, 1)),
        "position: got 'formula', expected None where position_g",
    ),
    "grid": (dict(position_grid=(0, 1, 1)), r"position_grid: got \(0, 1, 1\), expected 3 whole numbers above 0"),
    "type": (dict(position_grid=8), "position_grid: got 8, expected a tuple"),
    "frames": (dict(num_frames=5), "num_frames: got 5, expected a multiple of the patch's 2"),
    "size": (dict(image_size=(60, 64)), "image_size: got 60, expected a multiple"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_positions(tmp_path, case):
    overrides, message = BAD[case]
    path = save_checkpoint(small_model(**SOURCE), tmp_path / "a.safetensors", layout="mar")
    with pytest.raises(TypeError if case == "type" else ValueError, match=message):
        from_pretrained(path, **overrides)
