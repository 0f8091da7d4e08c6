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
    """Exporters take tensors, so a mask comes as bools; a graph cannot count them."""

    def __init__(self, model, num_visible=COUNT):
        super().__init__()
        self.model, self.num_visible = model, num_visible

    def forward(self, video, masked):
        mask = TokenMask.from_bool_masked(masked, num_visible=self.num_visible)
        return self.model(video, mask=mask, reconstruct=True)


def built(masked):
    """The model in eval mode; inputs of 2 and of 5 clips, uint8 with the test mask, else normalised."""
    torch.manual_seed(0)
    model = mar_fast.MAR(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    inputs = []
    for batch in (2, 5):
        clips = torch.randint(0, 256, (batch, 3, 4, 64, 64), dtype=torch.uint8)
        mask = masking.random(batch, CONFIG.grid, 0.5).bool_masked()
        inputs.append((clips / 255, mask) if masked else (clips,))
    return Masked(model) if masked else model, *inputs


@pytest.mark.parametrize("masked", [False, True], ids=["test mask", "mask and pixels"])
@torch.no_grad()
def test_a_dynamic_batch(masked):
    model, inputs, others = built(masked)
    want = [value for value in model(*others) if value is not None]
    assert len(want) == (4 if masked else 2)
    sizes = tuple({0: Dim("batch", min=1, max=64)} for _ in inputs)
    program = torch.export.export(model, inputs, dynamic_shapes=sizes, strict=False)
    got = [value for value in program.module()(*others) if value is not None]
    assert all(relative(*pair) < 1e-5 for pair in zip(got, want, strict=True))
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue())
    feed = {one.name: value.numpy() for one, value in zip(session.get_inputs(), others, strict=True)}
    assert all(relative(*pair) < 1e-4 for pair in zip(session.run(None, feed), want, strict=True))


@pytest.mark.parametrize("export", [torch.export.export, torch.jit.trace])
def test_a_mask_without_a_count_is_refused_by_name(export):
    masked = masking.random(2, CONFIG.grid, 0.5).bool_masked()
    with pytest.raises(ValueError, match="num_visible: got None in a call that is exported or traced"):
        export(Masked(nn.Identity(), None), (masked, masked))
    assert TokenMask.from_bool_masked(masked).num_visible == COUNT
