"""The model against transformers' VideoMAE classes: random weights, carried over here by hand, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from checkpoint_cases import random_weights
from helpers import relative

import mar_fast
from mar_fast import MARConfig, TokenMask
from mar_fast.config import IMAGENET_MEAN, IMAGENET_STD

transformers = pytest.importorskip("transformers")

# float32 is what users run. float64 shows what float32 hides in rounding, such as a LayerNorm eps of 1e-6 for 1e-12:
# its tolerances are far below every such effect. Position tables are rounded to float32 in both models, alike.
VALUES = {torch.float32: 1e-5, torch.float64: 1e-11}
GRADIENTS = {torch.float32: 1e-4, torch.float64: 1e-11}
SHAPES = {
    "base": dict(
        embed_dim=96, depth=2, num_heads=3, decoder_embed_dim=48, decoder_depth=2, decoder_num_heads=3, eps=1e-12
    ),
    "large": dict(
        embed_dim=128, depth=4, num_heads=2, decoder_embed_dim=64, decoder_depth=3, decoder_num_heads=2, eps=1e-4
    ),
}
# Three sides that differ, so that no two can be taken for one another: 3 x 2 x 4 tokens.
FRAMES, SIZE, TOKENS, MASKED = 6, (32, 64), 24, 14
BATCH, CLASSES = 3, 7

both_dtypes = pytest.mark.parametrize("dtype", VALUES, ids=lambda dtype: str(dtype).removeprefix("torch."))
both_shapes = pytest.mark.parametrize("shape", SHAPES)

# Theirs on the left, ours on the right, replaced in this order.
_RENAMED = (
    ("classifier.", "classifier.head."),
    ("fc_norm.", "classifier.norm."),
    ("videomae.", ""),
    ("embeddings.patch_embeddings.projection.", "encoder.patch_embed.proj."),
    ("encoder.layer.", "encoder.blocks."),
    ("decoder.decoder_layers.", "decoder.blocks."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("layernorm.", "encoder.norm."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    # Older versions of transformers have parameters q_bias and v_bias, newer ones biases of linear layers.
    ("attention.attention.query.bias", "attn.q_bias"),
    ("attention.attention.value.bias", "attn.v_bias"),
    ("attention.attention.", "attn."),
)


def in_our_layout(tensors):
    """Their parameters, or the gradients of these, by our names. A name that is not known stays and fails a test."""
    ours = {}
    for name, tensor in tensors.items():
        for theirs, renamed in _RENAMED:
            name = name.replace(theirs, renamed)
        ours[name] = tensor
    for name in [name for name in ours if name.endswith(".attn.query.weight")]:
        parts = [ours.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        ours[name.replace("query", "qkv")] = torch.cat(parts)
    return ours


def build_theirs(kind, shape, dtype, *, final_norm, norm_pix_loss=True, **options):
    """One of their models with random weights, the size of it by our names, and the source of its randomness."""
    size = dict(SHAPES[shape])
    eps = size.pop("eps")
    if kind != "VideoMAEForPreTraining":
        size["decoder_depth"] = 0
    generator = torch.Generator().manual_seed(1)
    theirs = getattr(transformers, kind)(
        transformers.VideoMAEConfig(
            image_size=SIZE, num_frames=FRAMES, hidden_size=size["embed_dim"], num_hidden_layers=size["depth"],
            num_attention_heads=size["num_heads"], intermediate_size=4 * size["embed_dim"],
            decoder_hidden_size=size["decoder_embed_dim"], decoder_num_hidden_layers=size["decoder_depth"],
            decoder_num_attention_heads=size["decoder_num_heads"],
            decoder_intermediate_size=4 * size["decoder_embed_dim"],
            layer_norm_eps=eps, use_mean_pooling=not final_norm, norm_pix_loss=norm_pix_loss, num_labels=CLASSES,
            attn_implementation="eager",  # not the function that ours calls
            **options,
        )
    ).to(dtype)  # fmt: skip
    # No bias is 0, no norm is the identity, attention is far from uniform: every parameter matters.
    random_weights(theirs, generator, scores=2, dtype=torch.float64)
    return theirs, size, eps, generator


def clips(dtype, generator):
    """Clips in our layout (B, C, T, H, W), with a colour each and little noise, and bools.

    Equally many, but not the same, tokens are masked in each.
    """
    colour = torch.rand(BATCH, 3, 1, 1, 1, generator=generator, dtype=torch.float64)
    pixels = 0.7 * colour + 0.3 * torch.rand(BATCH, 3, FRAMES, *SIZE, generator=generator, dtype=torch.float64)
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    masked = torch.rand(BATCH, TOKENS, generator=generator).argsort(1) < MASKED
    assert not torch.equal(masked[0], masked[1])
    return ((pixels - mean) / std).to(dtype), masked


def build(kind, shape, dtype, *, final_norm, norm_pix_loss=True, classifier=None):
    """One of their models with random weights, ours with the same, a clip in our layout (B, C, T, H, W), and bools."""
    theirs, size, eps, generator = build_theirs(kind, shape, dtype, final_norm=final_norm, norm_pix_loss=norm_pix_loss)
    config = MARConfig(
        num_frames=FRAMES, image_size=SIZE, mask_ratio=0.0, classifier=classifier, num_classes=CLASSES,
        encoder_eps=eps, final_norm=final_norm, final_norm_eps=eps, decoder_eps=eps,
        # Their fc_norm and decoder.norm have PyTorch's default whatever their config says.
        classifier_norm_eps=1e-5, decoder_norm_eps=1e-5, norm_pix_loss=norm_pix_loss, **size,
    )  # fmt: skip
    ours = mar_fast.MAR(config).to(dtype)
    ours.load_state_dict(in_our_layout(dict(theirs.named_parameters())))
    return theirs, ours, *clips(dtype, generator)


def check_gradients(theirs, ours, dtype):
    want = in_our_layout({name: parameter.grad for name, parameter in theirs.named_parameters()})
    got = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert got.keys() == want.keys()
    # Query, key and value by themselves: the value's gradient is the largest, and could hide errors in the others.
    # A gradient of zeros proves nothing: the error is nan then, which fails.
    for name in want:
        parts = 3 if ".qkv." in name else 1
        for part, expected in zip(got[name].chunk(parts), want[name].chunk(parts), strict=True):
            assert relative(part, expected) <= GRADIENTS[dtype], name


@both_dtypes
@both_shapes
@pytest.mark.parametrize("final_norm", [True, False])
@torch.no_grad()
def test_features(shape, dtype, final_norm):
    theirs, ours, video, masked = build("VideoMAEModel", shape, dtype, final_norm=final_norm)
    for bools, mask in ((masked, TokenMask.from_bool_masked(masked)), (None, None)):
        want = theirs(video.transpose(1, 2), bool_masked_pos=bools).last_hidden_state
        got = ours(video, mask).features
        assert got.shape == want.shape == (BATCH, TOKENS if bools is None else TOKENS - MASKED, ours.config.embed_dim)
        assert relative(got, want) <= VALUES[dtype]


@both_dtypes
@both_shapes
def test_logits_and_gradients(shape, dtype):
    options = dict(final_norm=False, classifier="linear")
    theirs, ours, video, _ = build("VideoMAEForVideoClassification", shape, dtype, **options)
    want, got = theirs(video.transpose(1, 2)).logits, ours(video).logits
    assert got.shape == want.shape == (BATCH, CLASSES)
    assert relative(got, want) <= VALUES[dtype]
    for logits in (want, got):
        F.cross_entropy(logits, torch.arange(BATCH)).backward()
    check_gradients(theirs, ours, dtype)


@both_dtypes
@both_shapes
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pixels_loss_and_gradients(shape, dtype, norm_pix_loss):
    """Their decoder sees visible tokens first, then masked ones, ours all in place: without effect on the numbers."""
    options = dict(final_norm=True, norm_pix_loss=norm_pix_loss)
    theirs, ours, video, masked = build("VideoMAEForPreTraining", shape, dtype, **options)
    want = theirs(video.transpose(1, 2), bool_masked_pos=masked)
    got = ours.train()(video, TokenMask.from_bool_masked(masked))
    assert got.pixels.shape == want.logits.shape == (BATCH, MASKED, 2 * 16 * 16 * 3)
    assert relative(got.pixels, want.logits) <= VALUES[dtype]
    assert relative(got.reconstruction_loss, want.loss) <= VALUES[dtype]
    want.loss.backward()
    got.reconstruction_loss.backward()
    check_gradients(theirs, ours, dtype)
