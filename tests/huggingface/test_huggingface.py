"""The model against transformers' VideoMAE classes: random weights, carried over here by hand, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from checkpoint_cases import FRAMES, SIZE
from helpers import relative
from huggingface_cases import their_model

import mar_fast
from mar_fast import MARConfig, TokenMask
from mar_fast.config import IMAGENET_MEAN, IMAGENET_STD

transformers = pytest.importorskip("transformers")

# float32 is what users run. float64 shows what float32 hides in rounding, such as a LayerNorm eps of 1e-6 for 1e-12:
# its tolerances are far below every such effect. Position tables are rounded to float32 in both models, alike.
VALUES = {torch.float32: 1e-5, torch.float64: 1e-11}
GRADIENTS = {torch.float32: 1e-4, torch.float64: 1e-11}
SHAPES = {
    "base": dict(layer_norm_eps=1e-12),
    "large": dict(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=512, decoder_hidden_size=64,
        decoder_num_hidden_layers=3, decoder_num_attention_heads=2, decoder_intermediate_size=256,
    ),
}  # fmt: skip
TOKENS, MASKED = 24, 14
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
    options |= dict(use_mean_pooling=not final_norm, norm_pix_loss=norm_pix_loss, num_labels=CLASSES)
    return their_model(kind, scores=2, dtype=dtype, **SHAPES[shape], **options)


def clips(dtype):
    """Clips in our layout (B, C, T, H, W), with a colour each and little noise, and bools.

    Equally many, but not the same, tokens are masked in each.
    """
    generator = torch.Generator().manual_seed(1)
    colour = torch.rand(BATCH, 3, 1, 1, 1, generator=generator, dtype=torch.float64)
    pixels = 0.7 * colour + 0.3 * torch.rand(BATCH, 3, FRAMES, *SIZE, generator=generator, dtype=torch.float64)
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    masked = torch.rand(BATCH, TOKENS, generator=generator).argsort(1) < MASKED
    assert not torch.equal(masked[0], masked[1])
    return ((pixels - mean) / std).to(dtype), masked


def build(kind, shape, dtype, *, final_norm, norm_pix_loss=True, classifier=None):
    """One of their models with random weights, ours with the same, a clip in our layout (B, C, T, H, W), and bools."""
    theirs = build_theirs(kind, shape, dtype, final_norm=final_norm, norm_pix_loss=norm_pix_loss)
    their = theirs.config
    config = MARConfig(
        num_frames=FRAMES, image_size=SIZE, mask_ratio=0.0, classifier=classifier, num_classes=CLASSES,
        embed_dim=their.hidden_size, depth=their.num_hidden_layers, num_heads=their.num_attention_heads,
        encoder_eps=their.layer_norm_eps, final_norm=final_norm, final_norm_eps=their.layer_norm_eps,
        decoder_embed_dim=their.decoder_hidden_size, decoder_num_heads=their.decoder_num_attention_heads,
        decoder_depth=their.decoder_num_hidden_layers if hasattr(theirs, "decoder") else 0,
        decoder_mlp_ratio=their.decoder_intermediate_size / their.decoder_hidden_size,
        # Their fc_norm and decoder.norm have PyTorch's default whatever their config says.
        decoder_eps=their.layer_norm_eps, classifier_norm_eps=1e-5, decoder_norm_eps=1e-5, norm_pix_loss=norm_pix_loss,
    )  # fmt: skip
    ours = mar_fast.MAR(config).to(dtype)
    ours.load_state_dict(in_our_layout(dict(theirs.named_parameters())))
    return theirs, ours, *clips(dtype)


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
