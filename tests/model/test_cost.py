"""Cost against the paper, the original's counted numbers, PyTorch's flop counter and the models' own parameters."""

import pytest
import torch
from helpers import small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mar_fast
from mar_fast import cost, list_models, named_config, reference

# MAR, arXiv 2207.11660: multiply-adds in G, dense / 50 % / 75 %, and parameters in M.
PAPER = {"base": (180, 86, 41), "large": (597, 276, 131)}
# Counted with PyTorch's flop counter on the original code, and less what it embeds in vain.
ORIGINAL = {"base": (86.27, 40.91), "large": (276.04, 131.39)}
OURS = {"base": (85.34, 39.52), "large": (274.81, 129.54)}
PARAMETERS = {"base": 93.02, "large": 310.78}  # the paper prints 94 and 311


@pytest.mark.parametrize("size", PAPER)
def test_published_numbers(size):
    dense = cost.count(named_config(f"videomae_vit_{size}", num_classes=174))
    assert round(dense.multiply_adds / 1e9) == PAPER[size][0]
    for column, ratio in enumerate((0.5, 0.75)):
        config = named_config(f"mar_vit_{size}", num_classes=174, mask_ratio=ratio)
        theirs, ours = cost.count(config, method="original"), cost.count(config)
        assert round(theirs.multiply_adds / 1e9) == PAPER[size][1 + column]
        assert round(theirs.multiply_adds / 1e9, 2) == ORIGINAL[size][column]
        assert round(ours.multiply_adds / 1e9, 2) == OURS[size][column]
        assert round(theirs.parameters / 1e6, 2) == round(ours.parameters / 1e6, 2) == PARAMETERS[size]


def counted(model, *args, backward=False, **kwargs):
    """Multiply-adds by PyTorch's counter, which sees into attention only if it is made of matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(*args, **kwargs)
        if backward:
            (out.logits.sum() + (out.reconstruction_loss if out.reconstruction_loss is not None else 0)).backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", list_models())
def test_forward_by_flop_counter(name, ratio):
    config = named_config(name, mask_ratio=ratio)
    with torch.device("meta"):
        model = mar_fast.MAR(config)
    model = model.to("meta").eval()
    video = torch.empty(2, 3, 16, *config.image_size, device="meta")
    assert counted(model, video) == pytest.approx(cost.count(config, batch=2).multiply_adds, rel=5e-3)
    if config.decoder_depth and ratio:
        want = cost.count(config, batch=2, reconstruct=True).multiply_adds
        assert counted(model, video, reconstruct=True) == pytest.approx(want, rel=5e-3)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_training_by_flop_counter(ratio):
    config = small_config(mask_ratio=ratio)
    video = torch.randint(0, 256, (2, 3, 4, 64, 64), dtype=torch.uint8)
    options = dict(batch=2, reconstruct=True, training=True)
    got = counted(mar_fast.MAR(config).train(), video, backward=True)
    assert got == pytest.approx(cost.count(config, **options).multiply_adds, rel=5e-3)
    got = counted(reference.MAR(config).train(), video, backward=True)
    assert got == pytest.approx(cost.count(config, **options, method="original").multiply_adds, rel=5e-3)


def test_original_forward_by_flop_counter():
    """One block of each kind; the whole of ViT-B is in `test_published_numbers`."""
    config = named_config("mar_vit_base", num_classes=174, decoder_depth=0, depth=1, bridge_depth=1)
    with torch.no_grad():
        got = counted(reference.MAR(config).eval(), torch.zeros(1, 3, 16, 224, 224))
    assert got == pytest.approx(cost.count(config, method="original").multiply_adds, rel=1e-3)


@pytest.mark.parametrize("name", list_models())
def test_parameters_are_the_models(name):
    config = named_config(name)
    with torch.device("meta"):
        model = mar_fast.MAR(config)
    everything = sum(p.numel() for p in model.parameters())
    assert cost.count(config, reconstruct=config.decoder_depth > 0).parameters == everything
    running = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("encoder.", "classifier.")))
    assert cost.count(config).parameters == running


def test_floors_on_an_h100():
    """The arithmetic of ViT-B, batch 32, at 800 TFLOP/s and 3.0 TB/s."""
    for ratio, embed, products in ((0.5, 74e-6, 6.2e-3), (0.75, 37e-6, 2.9e-3)):
        parts = {part.name: part for part in cost.count(named_config("mar_vit_base"), ratio, batch=32).parts}
        assert parts["encoder.patch_embed"].floor_seconds(800e12, 3e12) == pytest.approx(embed, rel=0.01)
        blocks = sum(
            2 * p.multiply_adds / 800e12 for n, p in parts.items() if n.startswith("encoder.") and "patch" not in n
        )
        assert blocks == pytest.approx(products, rel=0.01)


def test_bytes_by_hand():
    """A linear layer of 2 clips and 16 tokens, 96 -> 11, and the float32 clip it starts from."""
    config = small_config(decoder_depth=0, classifier="linear", final_norm=False, num_classes=11)
    parts = {part.name: part for part in cost.count(config, 0.5, batch=2, bytes_per_value=4, bytes_per_pixel=1).parts}
    assert parts["classifier.head"].bytes_moved == 4 * (96 * 11 + 11 + 2 * (96 + 11))
    embed = 4 * (1536 * 96 + 96 + 2 * 16 * 96) + 2 * 16 * 1536
    assert parts["encoder.patch_embed"].bytes_moved == embed
    assert parts["encoder.attention"].bytes_moved == 2 * 4 * 2 * 16 * 4 * 96  # 2 layers
    naive = {p.name: p for p in cost.count(config, 0.5, batch=2, bytes_per_value=4, method="original").parts}
    assert naive["encoder.attention"].bytes_moved == 2 * 4 * 2 * (16 * 4 * 96 + 4 * 3 * 16 * 16)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75])
def test_visible_tokens_in_place_of_a_ratio(ratio):
    """Every part is that of the ratio with as many tokens; other numbers are as PyTorch's counter says."""
    config = small_config()
    visible = round(32 * (1 - ratio))
    for options in ({}, dict(method="original"), dict(reconstruct=bool(ratio))):
        assert cost.count(config, visible=visible, **options) == cost.count(config, ratio, **options)
    mask = mar_fast.masking.random(2, config.grid, 1 - 13 / 32, device="cpu")
    got = counted(mar_fast.MAR(config).eval(), torch.zeros(2, 3, 4, 64, 64), mask)
    assert got == pytest.approx(cost.count(config, visible=13, batch=2).multiply_adds, rel=5e-3)


def test_memory_bound_floor():
    """With an infinite peak rate the floor is the bytes over the bandwidth, with infinite bandwidth the products."""
    total = cost.count(named_config("mar_vit_base"))
    assert total.floor_seconds(1e30, 1e9) == pytest.approx(total.bytes_moved / 1e9)
    assert total.floor_seconds(1e12, 1e30) == pytest.approx(2 * total.multiply_adds / 1e12)
