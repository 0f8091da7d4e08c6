"""Ragged batches: the model on packed tokens against the plain model on each clip alone."""

from functools import partial

import pytest
import torch
from conftest import INTERPRETING
from helpers import assert_near, draw_weights, relative, small_clips, small_config, training_step, values
from test_jit_model import LARGE_TILES

import mar_fast
from mar_fast import TokenMask, masking, reference
from mar_fast.kernels.jit.launch import LaunchConfig, forced

GRID, TOKENS = (2, 4, 4), 32
LENGTHS = {"mixed": (5, 32, 1, 17), "one clip": (13,), "one token each": (1, 1, 1), "all tokens": (32, 32)}
# Of the relative error, on top of twice the plain reference's own in the same dtype.
FLOOR = {torch.float32: 2e-7, torch.bfloat16: 5e-4, "autocast": 5e-4, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def large_tiles():
    """The interpreter's time goes by the number of tiles."""
    with forced({name: LaunchConfig(*blocks) for name, blocks in LARGE_TILES.items() if INTERPRETING}):
        yield


def ragged(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return TokenMask.ragged([torch.randperm(TOKENS, generator=generator)[:n] for n in lengths], GRID)


def build(kind, dtype=torch.float32, device="cpu", **overrides):
    return draw_weights(kind(small_config(**overrides))).to(device, dtype).train()


def alone(model, video, mask, reconstruct):
    """The plain model on one clip after the other, with ordinary masks, put together by hand."""
    rows = mask.bool_masked()
    parts = [
        model(video[i : i + 1], TokenMask.from_bool_masked(rows[i : i + 1]), reconstruct=reconstruct)
        for i in range(len(rows))
    ]
    out = {"logits": torch.cat([part.logits for part in parts])}
    out["features"] = torch.cat([part.features[0] for part in parts])
    if reconstruct:
        out["pixels"] = torch.cat([part.pixels[0] for part in parts])
        wide = torch.promote_types(out["pixels"].dtype, torch.float32)
        target = torch.cat([part.targets[0] for part in parts])
        out["reconstruction_loss"] = (out["pixels"].to(wide) - target.to(wide)).square().mean()
    return out


def together(model, video, mask, reconstruct):
    out = values(model, video, mask, reconstruct)
    assert torch.equal(out.pop("cu_seqlens"), mask.cu_seqlens)
    return out


def assert_as_alone(mask, video, dtype, **overrides):
    """Never further from the truth than twice the plain model in the same dtype, clip by clip."""
    autocast = dtype == "autocast"
    own = torch.float32 if autocast else dtype
    made = partial(build, device=video.device, **overrides)
    ours = training_step(together, made(mar_fast.MAR, own), video, mask, autocast)
    theirs = training_step(alone, made(reference.MAR, own), video, mask, autocast)
    truth = training_step(alone, made(reference.MAR, torch.float64), video, mask)
    # In 16 bits PyTorch sums the gradients of a LayerNorm over a whole batch with twice the error that it makes clip by
    # clip, so the plain model's error on a batch with as many tokens counts too.
    dense = masking.random(mask.batch, GRID, len(mask.drop_idx) / (mask.batch * TOKENS), device=video.device)
    batch = training_step(values, made(reference.MAR, own), video, dense, autocast)
    batch_truth = training_step(values, made(reference.MAR, torch.float64), video, dense)
    own_error = {name: relative(theirs[name], want) for name, want in truth.items()}
    for name in own_error:
        if "norm" in name:
            own_error[name] = max(own_error[name], relative(batch[name], batch_truth[name]))
    floor = FLOOR[dtype]
    if video.is_cuda and dtype == torch.float32:
        # As in test_gpu.py: a softmax made anew from its log-sum-exp, and three TF32 products, in each layer that a
        # gradient passes. It shows in the query biases, sums over all tokens that nearly cancel.
        floor = 64 * torch.finfo(dtype).eps
    assert_near(ours, truth, own_error, floor, few=len(truth["logits"][0]))


@pytest.mark.triton_too
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_clip_as_alone(dtype, lengths):
    assert_as_alone(ragged(lengths), small_clips(len(lengths)), dtype)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("dtype", ["autocast", torch.float64], ids=str)
def test_each_clip_as_alone_in_plain_pytorch(dtype, lengths):
    """In float64 a float64 clip, since the plain model normalises bytes in float32."""
    video = small_clips(len(lengths), dtype=torch.float64 if dtype == torch.float64 else torch.uint8)
    assert_as_alone(ragged(lengths), video, dtype)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_linear_classifier_without_final_norm(dtype):
    video = small_clips(4, dtype=torch.float64 if dtype == torch.float64 else torch.uint8)
    assert_as_alone(ragged(LENGTHS["mixed"]), video, dtype, classifier="linear", final_norm=False, decoder_depth=0)


@pytest.mark.triton_too
def test_equal_lengths_are_a_dense_batch():
    """Drop path and dropout too: drawn for the same clips and tokens, in the same order."""
    lengths, overrides = (9, 9, 9), dict(drop_path_rate=0.6, bridge_dropout=0.2, head_dropout=0.2)
    overrides |= dict(decoder_depth=1, bridge_depth=1)
    mask, video, model = ragged(lengths), small_clips(3), build(mar_fast.MAR, **overrides)
    outs = []
    for form in (mask, TokenMask.from_bool_masked(mask.bool_masked())):
        torch.manual_seed(11)
        model.zero_grad()
        out = model(video, form)
        mar_fast.mar_loss(out, torch.tensor([1, 2, 3])).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        outs.append([out.logits, out.features.flatten(), out.pixels.flatten(), out.reconstruction_loss, *gradients])
    assert outs[0][1].shape == outs[1][1].shape
    assert max(relative(one, other) for one, other in zip(*outs, strict=True)) < 1e-5


def test_drop_path_is_one_draw_for_a_clip():
    mask = ragged(LENGTHS["mixed"])
    block = build(mar_fast.MAR, drop_path_rate=0.5).encoder.blocks[1]
    drawn = torch.stack([block.row_scale(torch.empty(mask.total_visible, 96), mask.segments) for _ in range(400)])
    for begin, end in zip(mask.cu_seqlens[:-1], mask.cu_seqlens[1:], strict=True):
        assert (drawn[:, begin:end] == drawn[:, begin : begin + 1]).all()
        assert sorted(drawn[:, begin].unique().tolist()) == [0.0, 2.0]
        assert abs(float(drawn[:, begin].mean()) - 1) < 0.25
    assert len(drawn[:, mask.cu_seqlens[:-1].long()].unique(dim=0)) == 16  # clips are drawn independently


@pytest.mark.triton_too
def test_clips_do_not_touch_each_other():
    """A clip of NaN leaves the others as they are."""
    mask, model = ragged(LENGTHS["mixed"]), build(mar_fast.MAR, bridge_depth=1, decoder_depth=1).eval()
    video = small_clips(4, dtype=torch.float32)
    before = model(video, mask, reconstruct=True)
    video[1] = torch.nan
    after = model(video, mask, reconstruct=True)
    others = [0, 2, 3]
    assert torch.equal(after.logits[others], before.logits[others]) and after.logits[1].isnan().all()
    begin, end = mask.cu_seqlens[1:3].tolist()
    assert torch.equal(after.features[:begin], before.features[:begin])
    assert torch.equal(after.features[end:], before.features[end:]) and after.features[begin:end].isnan().all()
    assert torch.equal(after.pixels, before.pixels)  # clip 1 keeps all of its tokens


@pytest.mark.compiles
def test_compiles_without_graph_break():
    """Which also shows that no shape and no branch depends on values of the mask."""
    torch.compiler.reset()
    overrides = dict(depth=1, decoder_depth=1, bridge_depth=1)
    mask, video, model = ragged(LENGTHS["mixed"]), small_clips(4), build(mar_fast.MAR, **overrides)
    compiled, found = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for run in (model, compiled):
        model.zero_grad()
        out = run(video, mask)
        mar_fast.mar_loss(out, torch.arange(4)).backward()
        found.append([out.logits, out.features, out.pixels, *(p.grad.clone() for p in model.parameters())])
    assert max(relative(one, other) for one, other in zip(*found, strict=True)) < 1e-5
    # Another mask of the same lengths is no reason to compile again.
    with torch.compiler.set_stance("fail_on_recompile"):
        other = ragged(LENGTHS["mixed"], seed=4)
        assert relative(compiled(video, other).logits, model(video, other).logits) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_clip_as_alone_on_a_gpu(dtype, lengths):
    assert_as_alone(ragged(lengths).to("cuda"), small_clips(len(lengths)).cuda(), dtype)


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu():
    model, mask, video = build(mar_fast.MAR, device="cuda"), ragged(LENGTHS["mixed"]).to("cuda"), small_clips(4).cuda()
    for mode in ("default", "error"):  # the first time loads the kernels, which may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = model(video, mask)
            (out.logits.square().sum() + out.reconstruction_loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("classifier", ["bridging", "linear"])
def test_empty_batch(classifier):
    model = build(mar_fast.MAR, classifier=classifier).eval()
    out = model(small_clips(0), TokenMask.ragged([], GRID), reconstruct=True)
    assert out.logits.shape == (0, 11) and out.features.shape == (0, 96)
    assert out.pixels.shape == (0, 1536) and out.reconstruction_loss == 0
