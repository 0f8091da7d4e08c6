"""What a training step keeps for backward."""

import pytest
import torch

pytest.importorskip("triton")

from mar_fast import MARConfig, masking
from mar_fast.bench.kept import kept, table
from mar_fast.bench.suites.common import model_config

CONFIG = MARConfig(
    image_size=(32, 32), num_frames=4, patch_size=(2, 8, 8), embed_dim=32, depth=2, num_heads=2, num_classes=4,
    decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, bridge_embed_dim=32, bridge_depth=1,
    bridge_num_heads=2,
)  # fmt: skip


def test_one_hidden_activation_of_each_mlp():
    """Of B * N tokens, 4 D values of 16 bits in each of the blocks; in the decoder's last one of dropped tokens."""
    found, clips = kept(CONFIG, 3), 3
    visible = masking.cell_running(clips, CONFIG.grid, 0.5, phase=0).num_visible
    hidden = {size: 0 for size in (128, 64)}
    for (shape, dtype, _), count in found.items():
        if shape[-1] in hidden and dtype == torch.bfloat16 and len(shape) == 3:
            hidden[shape[-1]] += count
    assert hidden == {128: 3 * clips * visible * 128 * 2, 64: clips * (CONFIG.num_tokens + visible) * 64 * 2}
    assert f"{sum(found.values()) / 1e9:.2f} GB" in table(found)


def test_a_step_of_mar_base():
    """With weights, gradients and AdamW's two moments, 1.6 GB, a step fits 11 GiB."""
    found = kept(model_config("base", 0.5, decoder=True), 32)
    assert 9.5e9 < sum(found.values()) < 9.8e9
