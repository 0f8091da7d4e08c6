"""compile_for_inference: the same numbers, constant weights, one shape, and settings left as found."""

import copy
import subprocess
import sys

import pytest
import torch
import torch._dynamo as dynamo
import torch._inductor.config as inductor
from helpers import relative, small_config

import mar_fast
from mar_fast import masking
from mar_fast.inference import compile_for_inference

pytestmark = pytest.mark.compiles

CLIP = (2, 3, 4, 64, 64)


@pytest.fixture(autouse=True)
def _fresh():
    dynamo.reset()


def model_and_clip(dtype=torch.float32, **overrides):
    model = mar_fast.MAR(small_config(decoder_depth=0, **overrides)).eval().to(dtype)
    return model, torch.randn(CLIP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_numbers(dtype):
    model, clip = model_and_clip(dtype)
    exact = copy.deepcopy(model).double()(clip.double())
    plain = model(clip)
    compiled = compile_for_inference(model, clip)
    for clips in (clip, torch.randn(CLIP)):
        got = compiled(clips)
        want = copy.deepcopy(model).double()(clips.double())
        for name in ("logits", "features"):
            error = relative(getattr(plain, name), getattr(exact, name))
            assert relative(getattr(got, name), getattr(want, name)) <= 2 * error + 1e-6
        assert got.pixels is None and got.reconstruction_loss is None and not got.logits.requires_grad
    assert compiled.compile_seconds > 0 and compiled.settings["freezing"] and not compiled.settings["max_autotune"]


def test_uint8_clip_and_a_mask_as_arguments():
    model, _ = model_and_clip()
    clip = torch.randint(256, CLIP, dtype=torch.uint8)
    mask = masking.random(2, model.config.grid, 0.75)
    compiled = compile_for_inference(model, (clip, mask))
    for seed in range(2):
        other = masking.random(2, model.config.grid, 0.75, generator=torch.Generator().manual_seed(seed))
        assert relative(compiled(clip, other).logits, model(clip, other).logits) < 1e-5


def test_weights_are_constants_and_stay_so():
    """In whatever mode it is called, nothing is compiled a second time, which would read the live weights."""
    model, clip = model_and_clip()
    dynamo.utils.counters.clear()
    compiled = compile_for_inference(model, clip)
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    before = compiled(clip).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(compiled(clip).logits, before)
    with torch.inference_mode():
        assert torch.equal(compiled(clip).logits, before)
    with torch.no_grad():
        assert torch.equal(compiled(clip).logits, before)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1


def test_settings_are_left_as_found():
    model, clip = model_and_clip()
    before = inductor.save_config_portable()
    compiled = compile_for_inference(model, clip)
    compiled(clip)
    assert inductor.save_config_portable() == before
    with pytest.raises(RuntimeError), torch.no_grad():
        compile_for_inference(_Broken().eval(), clip)
    assert inductor.save_config_portable() == before


class _Broken(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def test_another_shape_is_refused():
    model, clip = model_and_clip()
    compiled = compile_for_inference(model, clip)
    for wrong in (clip[:1], clip.double(), clip.to("meta")):
        with pytest.raises(ValueError, match=r"arguments: got tuple\(.*expected tuple\(float32 \(2, 3, 4, 64, 64\)"):
            compiled(wrong)
    with pytest.raises(ValueError, match="which it was compiled for"):
        compiled(clip, masking.random(2, model.config.grid, 0.75))


def test_bad_arguments():
    model, clip = model_and_clip()
    with pytest.raises(ValueError, match="model: got a model in training mode, expected one in eval mode"):
        compile_for_inference(model.train(), clip)
    with pytest.raises(TypeError, match="model: got function, expected a torch"):
        compile_for_inference(lambda x: x, clip)
    with pytest.raises(TypeError, match="example: got dict, expected a tensor or a tuple"):
        compile_for_inference(model.eval(), {"video": clip})


def test_no_compiler_is_said_in_one_sentence():
    code = """
import torch, mar_fast
model = torch.nn.Linear(3, 3).eval()
try:
    mar_fast.compile_for_inference(model, torch.zeros(2, 3))
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "", "CXX": "/nowhere/g++"}
    )
    assert done.stdout.strip().startswith("compile_for_inference needs a C++ compiler on a CPU and found none"), done


def test_any_module_will_do():
    """Autotuned: the products that inductor tries are all of the same function."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)).eval()
    x = torch.randn(4, 16)
    compiled = compile_for_inference(model, x, autotune=True)
    assert relative(compiled(x), model(x)) < 1e-6 and compiled.settings["max_autotune"]
