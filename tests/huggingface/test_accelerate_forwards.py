"""Forwards that tools put back or replace, and classes in place of VideoMAEModel: accelerated, or left alone."""

import copy
import functools
import inspect
import re

import pytest
import torch
from test_accelerate import all_kinds, check_same, pair
from test_accelerate_rules import CLASSIFIER, MODEL, PRETRAINING

import mar_fast
from mar_fast.huggingface import forward as ours
from mar_fast.huggingface.forward import is_accelerated

transformers = pytest.importorskip("transformers")
modeling_videomae = pytest.importorskip("transformers.models.videomae.modeling_videomae")


def inner(model):
    return getattr(model, "videomae", model)


class Halved(transformers.VideoMAEModel):
    def forward(self, pixel_values, bool_masked_pos=None, **kwargs):
        output = super().forward(pixel_values, bool_masked_pos, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 0.5
        return output


class Quiet(transformers.VideoMAEModel):
    """A subclass without a forward of its own."""


class VideoMAEModel(Quiet):
    """One of the same name."""

    def forward(self, pixel_values, bool_masked_pos=None, **kwargs):
        return super().forward(pixel_values, bool_masked_pos, **kwargs)


@all_kinds
@pytest.mark.parametrize("when", ["before", "after", "of the plain class, after"])
def test_a_forward_put_back_counts_as_none(case, when, monkeypatch):
    plain, _, arguments = pair(case)
    model, stacks = copy.deepcopy(plain), []
    run_layers = ours.run_layers
    monkeypatch.setattr(ours, "run_layers", lambda *a: stacks.append(1) or run_layers(*a))
    kept = [(part, part.forward) for part in (model, inner(model))]
    if when != "after":
        for part, forward in kept:
            part.forward = forward
    mar_fast.accelerate(model)
    if when != "before":
        for part, forward in kept:
            part.forward = forward if "plain" in when else part.forward
        mar_fast.accelerate(copy.deepcopy(model))(**arguments)
        assert stacks
    if "plain" not in when:
        check_same(plain(**arguments), model(**arguments), 1e-5)
        assert len(stacks) >= 1 + (case == PRETRAINING)
    mar_fast.restore(model)
    stacks.clear()
    check_same(plain(**arguments), model(**arguments), 0)
    assert not stacks and not any(is_accelerated(part) for part in model.modules())


def test_bf16_training_with_accelerate():
    accelerate = pytest.importorskip("accelerate")
    _, model, arguments = pair(PRETRAINING)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    try:
        prepared = accelerator.prepare(model)
        prepared(**arguments).loss.backward()
        with pytest.raises(ValueError, match="class or forward was changed"):
            mar_fast.restore(model)
        mar_fast.restore(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))(**arguments).loss.backward()
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def test_offloading_by_device_map(tmp_path):
    """Its hooks replace forwards as the model is loaded: what the error advises works."""
    pytest.importorskip("accelerate")
    plain, _, arguments = pair(CLASSIFIER)
    plain.eval().save_pretrained(tmp_path)
    places = {"videomae": "disk", "fc_norm": "cpu", "classifier": "cpu"}
    load = functools.partial(type(plain).from_pretrained, tmp_path, device_map=places, offload_folder=tmp_path / "off")
    with pytest.raises(ValueError, match=r"device_map has replaced it, so load within mar_fast.patch_transformers\(\)"):
        mar_fast.accelerate(load())
    with mar_fast.patch_transformers():
        loaded = load()
    assert is_accelerated(loaded.videomae)
    with torch.no_grad(), pytest.warns(UserWarning, match="transformers' own code runs"):  # what is on the disk
        check_same(plain(**arguments), loaded(**arguments), 1e-5)


@pytest.mark.parametrize("case", [CLASSIFIER, PRETRAINING], ids=["classifier", "pretraining"])
@pytest.mark.parametrize("kind", [Halved, Quiet, VideoMAEModel])
def test_another_class_inside(case, kind, monkeypatch):
    """As transformers' monkey patching leaves it: refused by name, and left alone by patch_transformers."""
    plain, fast, arguments = pair(case)
    mar_fast.accelerate(fast)
    monkeypatch.setattr(modeling_videomae, "VideoMAEModel", kind)
    assert type(inner(type(fast)(plain.config))) is kind
    built = type(plain)(plain.config)
    name = re.escape(f"{kind.__module__}.{kind.__name__}")
    with pytest.raises(ValueError, match=f"model: got a {name} in place of VideoMAEModel, expected the orig"):
        mar_fast.accelerate(built)
    with mar_fast.patch_transformers():
        built = type(plain)(plain.config)
    assert type(inner(built)) is kind and not any(is_accelerated(part) for part in built.modules())
    plain.load_state_dict(built.state_dict())
    inner(plain).__class__ = kind
    check_same(plain.eval()(**arguments), built.eval()(**arguments), 0)


@pytest.mark.parametrize("name", ["VideoMAEModel", "VideoMAEForPreTraining"])
def test_a_forward_replaced_in_the_class(name, monkeypatch):
    """Under its old name, as functools.wraps leaves it."""
    kind = getattr(transformers, name)
    original, config = kind.forward, pair(MODEL)[0].config

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(ValueError, match=f"model: got a {name} with another forward"):
        mar_fast.accelerate(kind(config))
    with mar_fast.patch_transformers():
        assert not is_accelerated(kind(config))


@pytest.mark.parametrize("case", [MODEL, PRETRAINING], ids=["model", "pretraining"])
def test_the_signature_is_theirs_and_num_visible(case):
    plain, fast, _ = pair(case)
    theirs, mine = (inspect.signature(model.forward) for model in (plain, fast))
    found = dict(mine.parameters)
    assert found.pop("num_visible").kind is inspect.Parameter.KEYWORD_ONLY
    shared = {name: value for name, value in theirs.parameters.items() if name in found}
    assert {name: str(value) for name, value in found.items()} == {name: str(value) for name, value in shared.items()}
    assert mine.return_annotation == theirs.return_annotation
