"""Exports of MAR with a batch that may change: torch.export and ONNX, with the values of the model itself."""

import io

import pytest
import torch
from helpers import relative, small_config
from torch import nn
from torch.export import Dim

import mar_fast
from mar_fast import TokenMask, masking

pytestmark = pytest.mark.compiles
CONFIG = small_config(depth=1, bridge_depth=1, decoder_depth=1)
COUNT = CONFIG.num_tokens // 2


class Masked(nn.Module):
    """A call with the test mask, of uint8, and one with a mask, normalised.

    Exporters take tensors, so a mask comes as bools; a graph cannot count them.
    """

    def __init__(self, model, num_visible=COUNT):
        super().__init__()
        self.model, self.num_visible = model, num_visible

    def forward(self, video, masked):
        mask = TokenMask.from_bool_masked(masked, num_visible=self.num_visible)
        outputs = *self.model(video), *self.model(video / 255, mask=mask, reconstruct=True)
        return [value for value in outputs if value is not None]


@torch.no_grad()
def test_a_dynamic_batch():
    torch.manual_seed(0)
    model = Masked(mar_fast.MAR(CONFIG).eval())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    inputs, others = (
        (
            torch.randint(0, 256, (batch, 3, 4, 64, 64), dtype=torch.uint8),
            masking.random(batch, CONFIG.grid, 0.5).bool_masked(),
        )
        for batch in (2, 5)
    )
    want = model(*others)
    assert len(want) == 6
    sizes = tuple({0: Dim("batch", min=1, max=64)} for _ in inputs)
    program = torch.export.export(model, inputs, dynamic_shapes=sizes, strict=False)
    assert all(relative(*pair) < 1e-5 for pair in zip(program.module()(*others), want, strict=True))
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False, optimize=False).save(file)
    session = runtime.InferenceSession(file.getvalue())
    feed = {one.name: value.numpy() for one, value in zip(session.get_inputs(), others, strict=True)}
    assert all(relative(*pair) < 1e-4 for pair in zip(session.run(None, feed), want, strict=True))


@pytest.mark.parametrize("export", [torch.export.export, torch.jit.trace])
def test_a_mask_without_a_count_is_refused_by_name(export):
    masked = masking.random(2, CONFIG.grid, 0.5).bool_masked()
    with pytest.raises(ValueError, match="num_visible: got None in a call that is exported or traced"):
        export(Masked(nn.Identity(), None), (masked, masked))
    assert TokenMask.from_bool_masked(masked).num_visible == COUNT
