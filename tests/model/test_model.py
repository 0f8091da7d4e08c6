"""The fast model against reference.py: values and every gradient, all masks, all dtypes."""

import copy
import functools

import pytest
import torch
import torch._inductor.config as inductor
from helpers import assert_near, draw_weights, relative, small_clips, small_config, training_step, values

import mar_fast
from mar_fast import TokenMask, masking, reference

# Small models with the head size and the proportions of ViT-B and ViT-L.
SHAPES = {
    "B": dict(embed_dim=192, num_heads=3, depth=3, decoder_embed_dim=96, decoder_num_heads=3, decoder_depth=2),
    "L": dict(embed_dim=256, num_heads=4, depth=4, decoder_embed_dim=128, decoder_num_heads=2, decoder_depth=3),
}
GRID = (2, 4, 4)
# Of the relative error, on top of twice the plain reference's own in the same dtype.
FLOOR = {"fp32": 2e-7, "bf16": 5e-4, "autocast": 5e-4}


def masks(kind):
    generator = torch.Generator().manual_seed(3)
    if kind == "running":
        return masking.cell_running(2, GRID, 0.5, phase=torch.tensor([0, 1]))
    if kind == "running, training form":
        return masking.cell_running(2, GRID, 0.75, temporal_shuffle=True, spatial_repeat=False, generator=generator)
    if kind == "keep one":
        return TokenMask.from_bool_masked(torch.arange(32) != torch.tensor([[0], [31]]))
    if kind == "keep all":
        return masking.random(2, GRID, 0.0)
    return {"random": masking.random, "tube": masking.tube, "frame": masking.frame}[kind](
        2, GRID, 0.5, generator=generator
    )


MASKS = ["running", "running, training form", "random", "tube", "frame", "keep one", "keep all"]


@functools.cache
def pair(shape, classifier):
    """Both models with the same weights."""
    config = small_config(**SHAPES[shape], classifier=classifier, final_norm=classifier == "bridging")
    plain, fast = draw_weights(reference.MAR(config)), mar_fast.MAR(config)
    fast.load_state_dict(plain.state_dict())
    return fast, plain


def step(model, mask, dtype):
    model.to({"bf16": torch.bfloat16, "fp64": torch.float64}.get(dtype, torch.float32))
    return training_step(values, model, small_clips(), mask, dtype == "autocast")


def assert_close(fast, plain, mask, dtype):
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    ours, theirs = step(fast, mask, dtype), step(plain, mask, dtype)
    for model in (fast, plain):  # undo the rounding of .bfloat16()
        model.float().load_state_dict(weights)
    exact = step(plain, mask, "fp64")
    plain.float().load_state_dict(weights)
    assert_near(ours, exact, {name: relative(theirs[name], value) for name, value in exact.items()}, FLOOR[dtype])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOOR)
def test_values_and_gradients(shape, kind, dtype):
    assert_close(*pair(shape, "bridging"), masks(kind), dtype)


@pytest.mark.parametrize("dtype", FLOOR)
def test_linear_classifier_without_final_norm(dtype):
    assert_close(*pair("B", "linear"), masks("random"), dtype)


@pytest.mark.parametrize("ragged", [False, True])
def test_keep_all_has_zero_reconstruction_loss_and_finite_gradients(ragged):
    fast, _ = pair("B", "bridging")
    fast.train().zero_grad()
    out = fast(small_clips(), TokenMask.ragged(torch.zeros(2, *GRID).bool()) if ragged else masks("keep all"))
    assert out.pixels.shape == ((0, 1536) if ragged else (2, 0, 1536)) and out.reconstruction_loss == 0
    assert (out.cu_seqlens is not None) == ragged
    mar_fast.mar_loss(out, torch.tensor([1, 2])).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fast.parameters())


@pytest.mark.parametrize("ragged", [False, True])
def test_dropped_pixels_are_never_read(ragged):
    fast, _ = pair("B", "bridging")
    mask = masks("random")
    mask = TokenMask.ragged(mask.bool_masked(), GRID) if ragged else mask
    video = torch.randn(2, 3, 4, 64, 64)
    holes = mask.bool_masked().reshape(2, 2, 4, 4).repeat_interleave(2, 1)
    holes = holes.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, None]
    with torch.no_grad():
        out = fast.eval()(video.masked_fill(holes, float("nan")), mask)
        assert torch.equal(out.logits, fast(video, mask).logits)
        assert fast(video.masked_fill(~holes, float("nan")), mask).logits.isnan().all()


def test_empty_batch():
    fast, _ = pair("B", "bridging")
    out = fast.eval()(small_clips()[:0])
    assert out.logits.shape == (0, 11) and out.features.shape == (0, 16, 192)


@pytest.mark.parametrize("layout", ["channels last", "crop", "flipped frames"])
def test_any_strides(layout):
    fast, _ = pair("B", "bridging")
    video = small_clips()
    views = {
        "channels last": lambda: video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
        "crop": lambda: torch.nn.functional.pad(video, (3, 5, 1, 2))[..., 1:-2, 3:-5],
        "flipped frames": lambda: video[:, :, ::2].repeat_interleave(2, 2),
    }
    view = views[layout]()
    with torch.no_grad():
        assert torch.equal(fast.eval()(view).logits, fast(view.contiguous()).logits)


def test_uint8_is_normalised_on_the_fly():
    fast, _ = pair("B", "bridging")
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (fast.config.mean, fast.config.std))
    with torch.no_grad():
        floats = fast.eval()((small_clips().float() / 255 - mean) / std, reconstruct=True)
        bytes_ = fast(small_clips(), reconstruct=True)
    assert relative(bytes_.logits, floats.logits) < 1e-6
    assert relative(bytes_.reconstruction_loss, floats.reconstruction_loss) < 1e-6


@pytest.mark.parametrize("build", [mar_fast.MAR, reference.MAR])
def test_default_masks(build):
    """Eval: the running mask at phase 0. Training: drawn from the generator, another one each time."""
    model = build(small_config(decoder_depth=1, num_frames=16, mask_ratio=0.75))
    video = torch.randint(0, 256, (2, 3, 16, 64, 64), dtype=torch.uint8)
    test_mask = masking.cell_running(2, (8, 4, 4), 0.75, phase=0)
    with torch.no_grad():
        assert torch.equal(model.eval()(video).logits, model(video, test_mask).logits)
        runs = [model.train()(video, generator=torch.Generator().manual_seed(s)).features for s in (1, 1, 2)]
    assert runs[0].shape == (2, 32, 96)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_reconstruct_follows_training_unless_told():
    model = mar_fast.MAR(small_config())
    assert model.train()(small_clips()).pixels.shape == (2, 16, 1536)
    assert model(small_clips(), reconstruct=False).pixels is None
    assert model.eval()(small_clips()).pixels is None
    assert model(small_clips(), reconstruct=True).reconstruction_loss.dtype == torch.float32
    headless = mar_fast.MAR(small_config(classifier=None, decoder_depth=0)).train()(small_clips())
    assert headless.logits is None and headless.reconstruction_loss is None


@pytest.mark.parametrize("ragged", [False, True])
def test_gradient_checkpointing_changes_no_number(ragged):
    """Drop path too is drawn again as before."""
    results = []
    mask = TokenMask.ragged([torch.arange(5), torch.arange(9, 32)], GRID) if ragged else masks("random")
    for checkpointing in (False, True):
        config = small_config(
            gradient_checkpointing=checkpointing, drop_path_rate=0.5, bridge_dropout=0.1, head_dropout=0.1
        )
        torch.manual_seed(1)
        model = mar_fast.MAR(config).train()
        torch.manual_seed(2)
        out = model(small_clips(), mask)
        mar_fast.mar_loss(out, torch.tensor([1, 2])).backward()
        results.append((out.logits, *(p.grad for p in model.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_checkpointing_recomputes_blocks(monkeypatch):
    calls = []
    forward = mar_fast.layers.Block.forward
    monkeypatch.setattr(mar_fast.layers.Block, "forward", lambda self, *a: (calls.append(1), forward(self, *a))[1])
    for checkpointing, times in ((False, 1), (True, 2)):
        calls.clear()
        model = mar_fast.MAR(small_config(gradient_checkpointing=checkpointing)).train()
        mar_fast.mar_loss(model(small_clips()), torch.tensor([1, 2])).backward()
        assert len(calls) == times * 6  # 2 encoder, 2 bridging, 2 decoder blocks


def test_drop_path_grows_linearly_and_keeps_the_mean():
    model = mar_fast.MAR(small_config(depth=5, drop_path_rate=0.4))
    assert [round(b.drop_path_rate, 6) for b in model.encoder.blocks] == [0, 0.1, 0.2, 0.3, 0.4]
    assert all(b.drop_path_rate == 0 for b in [*model.decoder.blocks, *model.classifier.blocks])
    last = model.encoder.blocks[-1].train()
    scale = last.row_scale(torch.empty(20_000, 1, 1))
    assert scale.unique().tolist() == [0, pytest.approx(1 / 0.6)]
    assert scale.mean() == pytest.approx(1, abs=0.03)
    assert last.eval().row_scale(torch.empty(3, 1, 1)) is None


def test_drop_path_drops_whole_samples():
    """At a rate near 1 all that the last block adds is gone: the block is the identity."""
    model = mar_fast.MAR(small_config(depth=2, drop_path_rate=0.999999, classifier=None, decoder_depth=0)).train()
    block = model.encoder.blocks[1]
    x = torch.randn(2, 5, 96)
    out, residual, scale, _ = block(mar_fast.layers.Stream(x))
    assert torch.equal(residual, x) and out.any() and torch.equal(scale, torch.zeros(2))
    last_features = model(small_clips(), masks("random")).features
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(3)
    assert torch.equal(model(small_clips(), masks("random")).features, last_features)


@pytest.mark.parametrize("field", ["bridge_dropout", "head_dropout"])
def test_dropout_only_in_training(field):
    model = mar_fast.MAR(small_config(**{field: 0.5}))
    mask = masks("running")
    with torch.no_grad():
        assert not torch.equal(model.train()(small_clips(), mask).logits, model(small_clips(), mask).logits)
        assert torch.equal(model.eval()(small_clips(), mask).logits, model(small_clips(), mask).logits)


@pytest.mark.compiles
@inductor.patch(fallback_random=True)  # draws what eager calls draw
def test_compiles_without_graph_break():
    """Eager and compiled agree: training with a drawn mask by inductor, with gradients; eval with both masks."""
    torch.compiler.reset()
    eager = mar_fast.MAR(small_config(depth=1, decoder_depth=1, bridge_depth=1)).train()
    gradients = []
    for model in (eager, torch.compile(eager, fullgraph=True)):
        torch.manual_seed(1)
        eager.zero_grad()
        mar_fast.mar_loss(model(small_clips()), torch.tensor([1, 2])).backward()
        gradients.append([p.grad.clone() for p in eager.parameters()])
    assert max(relative(a, b) for a, b in zip(*gradients, strict=True)) < 1e-5
    captured = torch.compile(eager.eval(), fullgraph=True, backend="aot_eager")
    for mask in (None, masks("random")):
        assert relative(captured(small_clips(), mask).logits, eager(small_clips(), mask).logits) < 1e-6


def test_key_bias():
    """Softmax cannot see a bias that all keys share, so only the parameters tell: bridging blocks have one."""
    model = mar_fast.MAR(small_config())
    attention, bridging = model.encoder.blocks[0].attn, model.classifier.blocks[0].attn
    with torch.no_grad():
        for parameter in (attention.q_bias, attention.v_bias, bridging.qkv.bias):
            parameter.normal_()
    assert torch.equal(attention.qkv_bias(), torch.cat((attention.q_bias, torch.zeros(96), attention.v_bias)))
    assert bridging.q_bias is None and torch.equal(bridging.qkv_bias(), bridging.qkv.bias)


def dual_masks():
    """VideoMAE v2's: a tube for the encoder, a running half that runs the other way for the decoder."""
    generator = torch.Generator().manual_seed(4)
    decoder = masking.cell_running(2, GRID, 0.5, direction=-1, generator=generator)
    return masking.tube(2, GRID, 0.75, generator=generator), decoder


@pytest.mark.parametrize("video", ["uint8", "float64"])
def test_dual_masking_in_float64(video):
    mask, decoder_mask = dual_masks()
    visible, decoded = (~part.bool_masked() for part in (mask, decoder_mask))
    assert (visible & decoded).any() and (~visible & decoded).any()
    video = small_clips() if video == "uint8" else torch.randn(2, 3, 4, 64, 64, dtype=torch.float64)
    results = []
    for model in pair("B", "bridging"):
        model = copy.deepcopy(model).double().train()
        out = model(video, mask, decoder_mask=decoder_mask)
        out.reconstruction_loss.backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (ours, gradients), (theirs, expected) = results
    assert ours.pixels.shape == theirs.pixels.shape == (2, 16, 1536)
    for name in ("pixels", "reconstruction_loss"):
        assert relative(getattr(ours, name), getattr(theirs, name)) <= 1e-12
    assert set(gradients) == set(expected)
    for name, want in expected.items():
        assert relative(gradients[name], want) <= 1e-10, name
    counted = ~visible & decoded
    squares = (theirs.pixels - theirs.targets).square().mean(-1)
    assert relative(ours.reconstruction_loss, squares[counted[decoded].view(2, -1)].mean()) <= 1e-12


def test_dual_masking_under_autocast_and_where_nothing_counts():
    fast, _ = pair("B", "bridging")
    mask, decoder_mask = dual_masks()
    with torch.autocast("cpu", torch.bfloat16):
        low = fast.train()(small_clips(), mask, decoder_mask=decoder_mask)
    full = fast(small_clips(), mask, decoder_mask=decoder_mask)
    assert relative(low.reconstruction_loss, full.reconstruction_loss) < 1e-2
    assert fast(small_clips(), mask, decoder_mask=mask).reconstruction_loss == 0


def test_bad_decoder_masks():
    fast, _ = pair("B", "bridging")
    mask, decoder_mask = dual_masks()
    ragged = TokenMask.ragged(mask.bool_masked(), GRID)
    for options, said in (
        (dict(mask=mask, decoder_mask=ragged), "decoder_mask: got a ragged mask"),
        (dict(mask=ragged, decoder_mask=mask), "mask: got a ragged mask"),
        (dict(mask=mask, decoder_mask=mask.bool_masked()), "decoder_mask: got Tensor"),
        (dict(mask=mask, decoder_mask=masking.tube(1, GRID, 0.5)), "decoder_mask: got 1 clips"),
        (dict(mask=mask, decoder_mask=masking.tube(2, (2, 2, 4), 0.5)), "decoder_mask: got a grid"),
        (dict(mask=mask, decoder_mask=decoder_mask, reconstruct=False), "decoder_mask: got a mask without"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            fast.train()(small_clips(), **options)
