"""reconstruct against hand computation: order, statistics, and that no dropped pixel is looked at."""

import itertools
import math

import numpy as np
import pytest
import torch
from checkpoint_cases import FRAMES, SIZE, random_weights, small_model

import mar_fast
from mar_fast import TokenMask, masking
from mar_fast.eval import reconstruct
from mar_fast.reference import patch_targets

GRID = (3, 2, 4)
MASKED = torch.rand(2, 24, generator=torch.Generator().manual_seed(5)).argsort(1) < 14
UNEQUAL = torch.rand(2, 24, generator=torch.Generator().manual_seed(6)) < 0.6


def textured(seed=0, batch=2):
    """Bytes with another mean and contrast in every tubelet and channel."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(1, 50, (batch, 3, *GRID)).repeat(2, 2).repeat(16, 3).repeat(16, 4)
    mean = rng.uniform(60, 190, (batch, 3, *GRID)).repeat(2, 2).repeat(16, 3).repeat(16, 4)
    noise = rng.uniform(-1, 1, (batch, 3, FRAMES, *SIZE))
    return torch.from_numpy(np.rint(mean + scale * noise).clip(0, 255).astype(np.uint8))


def spread(masked):
    """(B, L) bool -> (B, C, T, H, W), the mask of each pixel."""
    pixels = masked.view(-1, 1, *GRID).repeat_interleave(2, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)
    return pixels.expand(-1, 3, -1, -1, -1)


class Says(torch.nn.Module):
    """A decoder that predicts what it is told."""

    def __init__(self, pixels):
        super().__init__()
        self.pixels = pixels

    def forward(self, *_):
        return self.pixels


def predicting(pixels, **overrides):
    model = small_model(**overrides)
    model.decoder = Says(pixels)
    return model


def places(masked):
    """(clip, t, y, x) of every True, in order."""
    return [
        (b, *np.unravel_index(i, GRID)) for b, i in itertools.product(range(len(masked)), range(24)) if masked[b, i]
    ]


def block(t, y, x):
    return np.s_[:, 2 * t : 2 * t + 2, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]


def statistics(tubelet):
    """(C, t, h, w) in [0, 1] -> mean and unbiased standard deviation of each channel, in plain Python."""
    found = []
    for channel in tubelet.reshape(len(tubelet), -1).tolist():
        mean = math.fsum(channel) / len(channel)
        found.append((mean, math.sqrt(math.fsum((v - mean) ** 2 for v in channel) / (len(channel) - 1))))
    return np.array(found).T


def naive(video, masked, pixels, own=False):
    """The filled clips in [0, 1], float64, tubelet by tubelet; pixels (K, t * h * w * C), the channel last."""
    filled = video.numpy() / 255
    seen = {place: statistics(filled[place[0]][block(*place[1:])]) for place in places(~masked)}
    result = filled.copy()
    for place, values in zip(places(masked), pixels.double().numpy(), strict=True):
        clip, *where = place
        if own:
            mean, deviation = statistics(filled[clip][block(*where)])
        else:
            near = {other: math.dist(other[1:], where) ** -4 for other in seen if other[0] == clip}
            mean, deviation = sum(w * seen[o] for o, w in near.items()) / sum(near.values())
        for number, value in enumerate(values):
            t, y, x, c = np.unravel_index(number, (2, 16, 16, 3))
            place_of_pixel = (c, 2 * where[0] + t, 16 * where[1] + y, 16 * where[2] + x)
            result[clip][place_of_pixel] = value * (deviation[c] + 1e-6) + mean[c]
    return result


def bytes_of(unit):
    return torch.from_numpy(np.rint(unit * 255).clip(0, 255)).to(torch.uint8)


MASKS = {
    "equal": (MASKED, TokenMask.from_bool_masked(MASKED.view(2, *GRID))),
    "flat grid": (MASKED, TokenMask.from_bool_masked(MASKED)),
    "ragged": (UNEQUAL, TokenMask.ragged(list(UNEQUAL.view(2, *GRID)))),
}
every_mask = pytest.mark.parametrize("case", MASKS)


@every_mask
@pytest.mark.parametrize("own", [False, True])
def test_hand_computation(case, own):
    masked, mask = MASKS[case]
    video = textured()
    pixels = torch.randn(int(masked.sum()), 1536, generator=torch.Generator().manual_seed(1))
    shape = (-1, 1536) if case == "ragged" else (2, -1, 1536)
    got = reconstruct(predicting(pixels.view(shape)), video, mask, ground_truth_statistics=own)
    want = bytes_of(naive(video, masked, pixels, own))
    assert got.video.dtype == torch.uint8 and got.video.shape == video.shape
    assert (got.video.int() - want.int()).abs().max() <= 1 and (got.video != want).float().mean() < 1e-3
    if not own:
        assert not torch.equal(
            got.video, reconstruct(predicting(pixels.view(shape)), video, mask, ground_truth_statistics=True).video
        )


@every_mask
def test_the_exact_target_gives_the_clip_back(case):
    """With the clip's own statistics the inverse of the reference's target is the clip, to rounding."""
    masked, mask = MASKS[case]
    video = textured()
    target = patch_targets(video / 255, small_model().config)[masked]
    model = predicting(target if case == "ragged" else target.view(2, -1, 1536))
    got = reconstruct(model, video, mask, ground_truth_statistics=True)
    assert (got.video.int() - video.int()).abs().max() <= 1 and (got.video == video).float().mean() > 0.999
    assert got.loss < 1e-6


@every_mask
@pytest.mark.parametrize("normalize", [True, False])
def test_no_dropped_pixel_is_used(case, normalize):
    """Other dropped pixels, even NaN, and the same bits come out; with the clip's own statistics others do."""
    masked, mask = MASKS[case]
    model = small_model(norm_pix_loss=normalize)
    video, other = textured(), textured(seed=9)
    hidden = spread(masked)
    changed = torch.where(hidden, other, video)
    first, second = reconstruct(model, video, mask), reconstruct(model, changed, mask)
    assert torch.equal(first.video, second.video) and first.loss != second.loss
    assert torch.equal(first.video[~hidden], video[~hidden])
    assert not torch.equal(first.video, video)
    # Other visible pixels do give another prediction.
    assert not torch.equal(first.video[hidden], reconstruct(model, other, mask).video[hidden])
    floats = torch.where(hidden, torch.nan, video / 255)
    assert bool(reconstruct(model, floats, mask).video.isfinite().all())
    if normalize:
        own = [reconstruct(model, clip, mask, ground_truth_statistics=True).video for clip in (video, changed)]
        assert not torch.equal(*own)


def test_pixels_as_target():
    """Without normalisation the prediction is the pixels in [0, 1]."""
    masked, mask = MASKS["equal"]
    video, wanted = textured(), textured(seed=4)
    config = small_model(norm_pix_loss=False).config
    target = patch_targets(wanted / 255, config)[masked].view(2, -1, 1536)
    got = reconstruct(predicting(target, norm_pix_loss=False), video, mask)
    hidden = spread(masked)
    assert torch.equal(got.video, torch.where(hidden, wanted, video))
    with pytest.raises(ValueError, match=r"ground_truth_statistics: got True, expected False: this model predicts"):
        reconstruct(predicting(target, norm_pix_loss=False), video, mask, ground_truth_statistics=True)


@pytest.mark.parametrize("own", [False, True])
def test_normalised_clips(own):
    """A floating-point clip comes back in its own units, not clipped, and says the same as its bytes."""
    masked, mask = MASKS["equal"]
    video = textured()
    pixels = 3 * torch.randn(2, 14, 1536, generator=torch.Generator().manual_seed(1))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    model = predicting(pixels, mean=mean, std=std)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (mean, std))
    clip = (video / 255 - mean) / std
    got = reconstruct(model, clip, mask, ground_truth_statistics=own).video
    want = naive(video, masked, pixels.flatten(0, 1), own)
    assert got.dtype == torch.float32 and want.max() > 1.05
    assert np.abs((got * std + mean).numpy() - want).max() < 1e-5
    hidden = spread(masked)
    assert torch.equal(got[~hidden], clip[~hidden])


def test_loss_and_prediction_are_the_models():
    masked, mask = MASKS["ragged"]
    model, video = small_model(), textured()
    before = video.clone()
    with torch.no_grad():
        out = model(video, mask, reconstruct=True)
    got = reconstruct(model, video, mask)
    assert got.loss == float(out.reconstruction_loss) and torch.equal(video, before)
    want = bytes_of(naive(video, masked, out.pixels))
    assert (got.video.int() - want.int()).abs().max() <= 1 and (got.video != want).float().mean() < 1e-3
    # A permuted view, as clips are decoded, gives the same.
    strided = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert torch.equal(reconstruct(model, strided, mask).video, got.video)


def test_clips_do_not_mix():
    masked, mask = MASKS["ragged"]
    model, video = small_model(), textured()
    together = reconstruct(model, video, mask).video
    for number in range(2):
        alone = TokenMask.from_bool_masked(masked[number : number + 1].view(1, *GRID))
        apart = (reconstruct(model, video[number : number + 1], alone).video[0].int() - together[number].int()).abs()
        assert apart.max() <= 1


def test_other_patches_and_nothing_dropped():
    config = small_model().config
    model = random_weights(mar_fast.MAR(mar_fast.named_config("mar_vit_base", **{
        **{name: getattr(config, name) for name in (
            "embed_dim", "depth", "num_heads", "bridge_embed_dim", "bridge_num_heads", "decoder_embed_dim",
            "decoder_depth", "decoder_num_heads", "num_classes",
        )},
        "num_frames": 6, "image_size": (32, 64), "patch_size": (3, 8, 16),
    })))  # fmt: skip
    video = textured()
    mask = masking.random(2, model.config.grid, 0.75)
    got = reconstruct(model, video, mask).video
    hidden = mask.bool_masked().view(2, 1, 2, 4, 4).repeat_interleave(3, 2).repeat_interleave(8, 3)
    hidden = hidden.repeat_interleave(16, 4).expand_as(video)
    assert torch.equal(got[~hidden], video[~hidden]) and (got[hidden] != video[hidden]).float().mean() > 0.5
    everything = reconstruct(model, video, masking.random(2, model.config.grid, 0.0))
    assert torch.equal(everything.video, video) and everything.loss == 0


def test_half_precision():
    mask = MASKS["equal"][1]
    model, video = small_model(), textured()
    want = reconstruct(model, video, mask).video
    got = reconstruct(model.bfloat16(), video, mask).video
    assert (got.int() - want.int()).abs().float().mean() < 1


def test_errors():
    mask, video = MASKS["equal"][1], textured()
    for model, message in (
        (small_model(decoder_depth=0), "model: got one without a pixel decoder, expected one with a pixel decoder"),
        (small_model().train(), r"model: got one in training mode, expected model.eval\(\)"),
        (
            predicting(torch.full((2, 14, 1536), torch.nan)),
            "model: got predictions that are not finite in torch.float32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruct(model, video, mask)
    with pytest.raises(TypeError, match="mask: got Tensor, expected a TokenMask"):
        reconstruct(small_model(), video, MASKED)
    with pytest.raises(ValueError, match="video: got shape"):
        reconstruct(small_model(), video[:, :, :4], mask)
