"""scatter_tokens' Triton kernels beyond test_ops.py's cases: TRITON_INTERPRET=1 pytest -m interpreter."""

import oracle
import pytest
import torch
from op_cases import leaves, make_index, plain_scatter, scatter_operands

from mar_fast import kernels
from mar_fast.kernels.jit.launch import Launch, LaunchConfig, forced

pytestmark = pytest.mark.interpreter

FLOATS = ("visible", "mask_token", "pos_embed")


def tiles(places, columns):
    config = LaunchConfig(block_m=places, block_n=columns)
    return forced({"scatter_tokens_forward": config, "scatter_tokens_backward": config})


@pytest.fixture(autouse=True)
def _large_tiles():
    """The interpreter's cost follows the number of programs."""
    with tiles(64, 64):
        yield


def operands_of(keep_idx, places, width=5, dtype=torch.float32):
    return dict(
        visible=torch.randn(*keep_idx.shape, width).to(dtype),
        keep_idx=keep_idx,
        mask_token=torch.randn(width).to(dtype),
        pos_embed=torch.randn(places, width),
    )


def check(operands):
    return oracle.compare(kernels.scatter_tokens, oracle.scatter_tokens, plain_scatter, operands)[0]


PICKED = {
    "the first": range(40),
    "the last": range(114, 154),
    "all but the first": range(1, 154),
    "all but the last": range(153),
    "every second": range(0, 154, 2),
    "whole tiles": [*range(32, 64), *range(96, 128)],
    "the ends": [0, 153],
    "the sample is the first of a tile": [*range(0, 31), *range(63, 154)],
}


@pytest.mark.parametrize("places", [16, 32])
@pytest.mark.parametrize("picked", PICKED.values(), ids=PICKED)
def test_where_the_visible_are(picked, places):
    """Tiles without any, full ones, and every place in the search: a tile's tokens may begin on each side of a step."""
    with tiles(places, 8):
        check(operands_of(torch.tensor([[*picked]]), 154))


def test_every_shift_of_a_tile_against_the_search():
    """Runs of every length before a tile: its first token is at each distance from a sample, that of a sample too."""
    rows = [[*range(skipped), *range(70, 134 - skipped)] for skipped in range(0, 64, 5)]
    with tiles(32, 8):
        operands = operands_of(torch.tensor(rows), 140)
        out = kernels.scatter_tokens(**operands)
    assert torch.equal(out, plain_scatter(**operands))


@pytest.mark.parametrize("step", [1, 2, 8])
def test_other_steps_of_the_search(step, monkeypatch):
    from mar_fast.kernels.jit import scatter_tokens as launcher

    monkeypatch.setattr(launcher, "STEP", step)
    with tiles(32, 64):
        check(scatter_operands(torch.float32, 2, 98))


@pytest.mark.parametrize(
    ("width", "places", "columns"), [(33, 256, 64), (33, 64, 8), (33, 128, 32), (64, 64, 32), (1, 32, 8), (1, 256, 1)]
)
def test_tiles(width, places, columns):
    """The last tile of places, 154 of them, and of columns; and tiles that are larger than all there is."""
    with tiles(places, columns):
        check(scatter_operands(torch.float32, 2, 17, width))


@pytest.mark.parametrize("clips", [2, 3, 8])
@pytest.mark.parametrize("frozen", [(), ("pos_embed",)], ids=str)
def test_backward_walks_over_clips(clips, frozen, monkeypatch):
    """5 clips: the last program may have fewer than the others, or be the only one."""
    from mar_fast.kernels.jit import scatter_tokens as launcher

    monkeypatch.setattr(launcher, "CLIPS", clips)
    monkeypatch.setattr(launcher, "CLIPS_WITH_POSITIONS", clips)
    operands = operands_of(make_index(5, 17), 154)
    seed = torch.randn(5, 154, 5)
    values, plain = leaves(operands, frozen), leaves(operands, frozen)
    kernels.scatter_tokens(**values).backward(seed)
    plain_scatter(**plain).backward(seed)
    for name in FLOATS:
        if name in frozen:
            assert values[name].grad is None
        else:
            torch.testing.assert_close(values[name].grad, plain[name].grad)


def test_dtypes_side_by_side():
    """float32 parameters beside half tokens, and a half table of positions: rounded once, at the end."""
    operands = scatter_operands(torch.float16)
    operands["mask_token"] = operands["mask_token"].float()
    assert check(operands).dtype == torch.float16
    operands = scatter_operands(torch.float32)
    operands["pos_embed"] = operands["pos_embed"].half()
    assert check(operands).dtype == torch.float32


# What may be read.


def test_one_row_for_all_clips():
    """As the fixed masks of a test: expanded, and not copied."""
    keep_idx = make_index(1, 17).expand(3, -1)
    assert keep_idx.stride(0) == 0
    check(operands_of(keep_idx, 154))


def test_the_mask_token_keeps_to_its_places():
    """Not NaN, but NaN exactly there; and a NaN gradient at the visible places never gets into its own."""
    operands = operands_of(make_index(2, 17), 154)
    operands["mask_token"].fill_(torch.nan)
    visible = torch.zeros(2, 154, dtype=torch.bool).scatter(1, operands["keep_idx"].long(), True)
    assert torch.equal(kernels.scatter_tokens(**operands).isnan(), ~visible[..., None].expand(-1, -1, 5))
    operands["mask_token"].fill_(1)
    seed = torch.ones(2, 154, 5).masked_fill(visible[..., None], torch.nan)
    _, _, gradients = oracle.outcome(kernels.scatter_tokens, operands, [seed])
    assert torch.equal(gradients["mask_token"], torch.full((5,), 2.0 * (154 - 17)))


def test_a_clip_keeps_to_itself():
    """One that has become NaN leaves its neighbour as it is."""
    operands = operands_of(make_index(2, 17), 154)
    clean = kernels.scatter_tokens(**operands)
    operands["visible"][0] = torch.nan
    assert torch.equal(kernels.scatter_tokens(**operands)[1], clean[1])


# What is not wanted is not made.


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5, 6])
def test_frozen(wanted, monkeypatch):
    seen, launch = [], Launch.__call__

    def spy(self, *tensors):
        if self.kernel.fn.__name__ == "scatter_tokens_backward_kernel":
            seen[:] = tensors[-3:]
        launch(self, *tensors)

    operands = operands_of(make_index(3, 17), 154)
    seed = torch.randn(3, 154, 5)
    _, _, every = oracle.outcome(kernels.scatter_tokens, operands, [seed])
    monkeypatch.setattr(Launch, "__call__", spy)
    frozen = [name for place, name in enumerate(FLOATS) if not wanted >> place & 1]
    values = leaves(operands, frozen)
    kernels.scatter_tokens(**values).backward(seed)
    for name, part in zip(FLOATS, seen, strict=True):
        assert (part is None) == (name in frozen)
        if name in frozen:
            assert values[name].grad is None
        else:
            torch.testing.assert_close(values[name].grad, every[name])


def test_nothing_but_visible_gradients_is_read():
    """For the gradient of visible alone the rest of the incoming one has no influence, and is not loaded."""
    operands = operands_of(make_index(2, 17), 154)
    values = leaves(operands, ("mask_token", "pos_embed"))
    seed = torch.randn(2, 154, 5)
    kernels.scatter_tokens(**values).backward(seed)
    want = seed.gather(1, operands["keep_idx"].long()[..., None].expand(-1, -1, 5))
    assert torch.equal(values["visible"].grad, want)


@pytest.mark.parametrize(
    ("batch", "count", "places", "width"), [(0, 3, 5, 4), (2, 0, 5, 4), (2, 0, 0, 4), (2, 3, 5, 0)]
)
def test_nothing(batch, count, places, width, poisoned):
    operands = operands_of(make_index(batch, count, tokens=places), places, width)
    (out,), _, gradients = oracle.outcome(kernels.scatter_tokens, operands)
    assert out.shape == (batch, places, width)
    for name in FLOATS:
        assert gradients[name].shape == operands[name].shape and gradients[name].isfinite().all()
