"""Exports of accelerated models: what transformers' own model exports, the accelerated one does, same values."""

import io

import pytest
import torch
from test_accelerate import TOKENS, VISIBLE, check_same, pair
from test_accelerate_rules import CLASSIFIER, MODEL, PRETRAINING
from torch.export import Dim

import mar_fast

pytest.importorskip("transformers")
pytestmark = pytest.mark.compiles


def built(case, **options):
    """In eval mode, without labels: (transformers' model, accelerated model, names, inputs, other inputs)."""
    plain, fast, arguments = pair(case)
    arguments.pop("labels", None)
    mar_fast.accelerate(fast, **options)
    other = {name: value.flip(1) for name, value in arguments.items()}
    return plain.eval(), fast.eval(), tuple(arguments.values()), tuple(other.values())


def known(case):
    return {} if case == CLASSIFIER else {"num_visible": VISIBLE}


class First(torch.nn.Module):
    """The output named, as exporters want it."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs):
        return self.model(*inputs)[self.name]


def onnx(model, inputs, others, **options):
    """The values of onnxruntime for ``others``."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    if options.get("dynamo"):
        torch.onnx.export(model, inputs, verbose=False, **options).save(file)
    else:
        torch.onnx.export(model, inputs, file, input_names=["a", "b"][: len(inputs)], **options)
    session = runtime.InferenceSession(file.getvalue())
    feed = {one.name: value.numpy() for one, value in zip(session.get_inputs(), others, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("way", ["plain", "not optimised", "any batch", "traced"])
@pytest.mark.parametrize("case", [CLASSIFIER, MODEL, PRETRAINING], ids=["classifier", "model", "pretraining"])
@torch.no_grad()
def test_onnx(case, way):
    plain, fast, inputs, others = built(case, **known(case))
    name = "last_hidden_state" if case == MODEL else "logits"
    options = {
        "plain": dict(dynamo=True),
        "not optimised": dict(dynamo=True, optimize=False),
        "any batch": dict(dynamo=True, dynamic_shapes=(({0: Dim("batch", min=1, max=64)},) * len(inputs),)),
        "traced": dict(dynamo=False, dynamic_axes={name: {0: "batch"} for name in ["a", "b"][: len(inputs)]}),
    }
    if way in ("any batch", "traced"):
        others = tuple(value[:2] for value in others)
    got = onnx(First(fast, name), inputs, others, **options[way])
    torch.testing.assert_close(got, plain(*others)[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [MODEL, PRETRAINING], ids=["model", "pretraining"])
@torch.no_grad()
def test_masks_whose_sizes_are_traced(case):
    plain, fast, inputs, others = built(case, **known(case))
    sizes = tuple(dict.fromkeys(range(value.ndim), Dim.AUTO) for value in inputs)
    program = torch.export.export(fast, inputs, dynamic_shapes=sizes, strict=False).module()
    check_same(plain(*others), program(*others), 1e-5)
    traced = torch.jit.trace(fast, inputs, strict=False, check_trace=False)
    want = plain(*others)
    for name, value in traced(*others).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_keep_with_a_dynamic_batch():
    with pytest.warns(UserWarning, match="keep=0.5"):
        _, fast, inputs, others = built(CLASSIFIER, keep=0.5)
    program = torch.export.export(fast, inputs, dynamic_shapes=({0: Dim.AUTO},), strict=False).module()
    fewer = others[0][:2]
    check_same(fast(fewer), program(fewer), 1e-5)
    got = onnx(First(fast, "logits"), inputs, (fewer,), dynamo=True, dynamic_shapes=(({0: Dim.AUTO},),))
    torch.testing.assert_close(got, fast(fewer).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False, None], ids=["strict", "not strict", "trace"])
@pytest.mark.parametrize("case", [MODEL, PRETRAINING], ids=["model", "pretraining"])
def test_a_mask_without_a_count_is_refused_by_name(case, strict):
    _, fast, inputs, _ = built(case)
    with pytest.raises(Exception, match="num_visible: got None in a call that is exported or traced"):
        if strict is None:
            torch.jit.trace(fast, inputs, strict=False)
        else:
            torch.export.export(fast, inputs, strict=strict)
    assert TOKENS > VISIBLE
    fast(*inputs)
