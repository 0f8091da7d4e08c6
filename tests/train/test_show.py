"""What --show says: token counts, memory and time against arithmetic by hand and what autograd really keeps."""

import re

import pytest
import torch

from mar_fast import MAR, masking
from mar_fast.train import read_recipe
from mar_fast.train.show import (
    activation_bytes,
    cost_of_step,
    describe,
    draw_schedule,
    memory,
    visible_tokens,
)

SMALL = ["num_frames=4", "image_size=[64, 64]", "embed_dim=96", "depth=3", "num_heads=3", "num_classes=11"]
BRIDGED = [*SMALL, "bridge_embed_dim=64", "bridge_num_heads=2"]
DECODED = ["decoder_embed_dim=48", "decoder_depth=2", "decoder_num_heads=3"]


def small(name, model, *changes):
    return read_recipe(name, [*(f"model.{change}" for change in model), *changes])


@pytest.mark.parametrize(
    ("kind", "ratio", "visible"),
    [
        ("none", 0.0, 1568),
        ("cell_running", 0.75, 392),
        ("random", 0.9, 1568 - 1411),  # 0.9 of 1568 is 1411.2
        ("tube", 0.9, 8 * (196 - 176)),  # 0.9 of 196 is 176.4
        ("frame", 0.5, 4 * 196),
    ],
)
def test_visible_tokens(kind, ratio, visible):
    changes = [f"mask.kind={kind}", f"mask.ratio={ratio}", "reconstruction_weight=0"]
    assert visible_tokens(read_recipe("mar_k400_base", changes)) == visible


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("mar_k400_base", [*BRIDGED, *DECODED]),
        ("videomae_k400_base", SMALL),
        ("videomae_pretrain_base", [*SMALL, *DECODED]),
    ],
)
def test_activations_are_what_autograd_keeps(name, model, precision):
    recipe = small(name, [*model, "drop_path_rate=0"], f"optimizer.precision={precision}")
    network = MAR(recipe.config()).train()
    known = {value.untyped_storage().data_ptr() for value in (*network.parameters(), *network.buffers())}
    sizes = {tuple(value.shape) for value in network.parameters()}
    sizes |= {shape[::-1] for shape in sizes}  # weights cast by autocast are counted with the weights
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tuple(tensor.shape) not in sizes:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its memory would be used again
        return tensor

    clips, grid = 16, recipe.config().grid
    mask = None
    if recipe.mask.kind == "tube":
        mask = masking.tube(clips, grid, recipe.mask.ratio)
    video = torch.randint(0, 256, (clips, 3, 4, 64, 64), dtype=torch.uint8)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(video, mask)
    assert sum(kept.values()) == pytest.approx(activation_bytes(recipe, clips), rel=0.12)


def test_memory():
    recipe = read_recipe("mar_k400_base", ["optimizer.ema=0.999"])
    with torch.device("meta"):
        parameters = sum(value.numel() for value in MAR(recipe.config()).parameters())
    found = memory(recipe, 16)
    activations = found.pop("activations")
    gigabytes = dict(zip(found, (4, 4, 8, 4, 2), strict=True))
    assert found == {name: size * parameters for name, size in gigabytes.items()}
    assert activations == activation_bytes(recipe, 16) == 2 * activation_bytes(recipe, 8)
    assert memory(recipe, 16, shards=4)["AdamW's two moments"] == 2 * parameters
    assert "weights in 16 bits" not in memory(read_recipe("mar_k400_base", ["optimizer.precision=fp32"]), 16)
    checkpointed = read_recipe("mar_k400_base", ["gradient_checkpointing=true"])
    assert activation_bytes(checkpointed, 16) < activations / 3


def test_work_of_a_step():
    """MAR counts 86.27 G multiply-adds of a clip for ViT-B at 50 %; with backward 3 times that, plus the decoder."""
    recipe = read_recipe("mar_k400_base")
    parts = {part.name: part.multiply_adds / 128e9 for part in cost_of_step(recipe).parts}
    encoder = sum(work for name, work in parts.items() if name.startswith(("encoder", "classifier")))
    # 784 and not 1568 tubelets are embedded, 0.925 G each way, and the clip has no gradient.
    assert encoder == pytest.approx(3 * 86.27 - 3 * 1.85 + 2 * 0.925, rel=2e-3)
    assert {"decoder.mlp", "decoder.head"} <= set(parts)
    dual = cost_of_step(read_recipe("videomaev2_pretrain_base"))
    assert not any(part.name.startswith("decoder") for part in dual.parts)  # a lower bound


def test_description():
    text = describe(read_recipe("mar_k400_base"), 240_000, 4, 8, flops=4e14)
    for expected in (
        "fine-tuning: cross-entropy + 0.01 x squared error of dropped pixels",
        "mar_vit_base: 101.12 M parameters (",
        "cell_running: 784 of 1568 tokens visible",
        "videos 240000, steps an epoch 3750",
        "videos a step 64, clips of each 2: 4 (processes) x 4 (micro-batches) x 8 (clips)",
        "epochs 100, steps 375000, clips 48000000",
        "0.001 (absolute), cosine by iteration: 1e-06 at step 0, 0.000994 at step 18750",
        "lr 0.00065 (x 0.65), weight decay 0.05: 7.078 M, "
        "encoder.blocks.11.attn.qkv.weight to encoder.blocks.11.mlp.fc2.weight\n",
        "lr 0.001 (x 1), weight decay 0: 0.149 M, ",
        "lr 0.001 (x 1), weight decay 0.05: 14.852 M, ",
        "GB a process, by arithmetic",
        "a floor, without loading",
    ):
        assert expected in text
    work, seconds = (float(re.search(pattern, text)[1]) for pattern in (r"(\S+) TFLOP a step", r"least (\S+) s a step"))
    assert seconds == pytest.approx(work * 1e12 / 4e14 / 4, rel=0.01)
    scaled = describe(read_recipe("videomaev2_pretrain_base"), 5000, flops=4e14)
    assert "0.004 (0.001 x 1024 / 256)" in scaled
    assert "the decoder predicts the dropped ones of a running 50% of cells" in scaled


def test_description_of_too_little():
    with pytest.raises(ValueError, match=r"list: got 63 videos, expected at least 64, those of a step"):
        describe(read_recipe("mar_k400_base"), 63, flops=1e12)
    with pytest.raises(ValueError, match="flops: got 0, expected a number above 0"):
        describe(read_recipe("mar_k400_base"), 64, flops=0)
    with pytest.raises(ValueError, match="processes: got 3"):
        describe(read_recipe("mar_k400_base"), 64, 3, flops=1e12)


@pytest.mark.parametrize(("name", "videos"), [("videomae_pretrain_base", 240_000), ("mar_ssv2_large", 16)])
def test_picture(tmp_path, name, videos):
    image = pytest.importorskip("matplotlib.image")
    draw_schedule(read_recipe(name), videos, tmp_path / "new/schedule.png")
    picture = image.imread(tmp_path / "new/schedule.png")
    assert picture.shape[:2] == (780, 960)
    assert picture.std() > 0.05
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["schedule.png"]
