"""What accelerated models leave to transformers' own code: same results, and one warning that says why."""

import copy
import warnings

import pytest
import torch
from checkpoint_cases import random_weights
from helpers import relative
from test_accelerate import check_same, pair
from test_accelerate_rules import MODEL, PRETRAINING, first_attention
from test_huggingface import CLASSES
from torch import nn

import mar_fast

transformers = pytest.importorskip("transformers")

# What is left to transformers' own code: a change of the model, arguments of the call, what the warning says.
OWN = {
    "hidden states": (MODEL, None, {"output_hidden_states": True}, "output_hidden_states"),
    "hidden states by index": (MODEL, None, {"output_hidden_states": 0}, "output_hidden_states"),
    "attentions": (MODEL, None, {"output_attentions": True}, "output_attentions"),
    "hidden states in pre-training": (PRETRAINING, None, {"output_hidden_states": True}, "output_hidden_states"),
    "hidden states by the config": (
        MODEL, lambda model: setattr(model.config, "output_hidden_states", True), {}, "output_hidden_states",
    ),
    "another argument": (MODEL, None, {"head_mask": torch.ones(3)}, "head_mask"),
    "hook on a layer": (
        MODEL, lambda model: model.encoder.layer[1].register_forward_hook(lambda m, a, out: out.cos()), {}, "layers",
    ),
    "hook within a layer": (
        MODEL,
        lambda model: model.encoder.layer[0].output.dense.register_forward_pre_hook(lambda m, a: (a[0].cos(),)), {},
        "layers",
    ),
    "an adapter of queries": (
        MODEL, lambda model: adapt(first_attention(model), "query"), {}, "layers",
    ),
    "an adapter of the projection": (
        MODEL, lambda model: adapt(model.embeddings.patch_embeddings, "projection"), {}, "embeddings",
    ),
    "a projection of other strides": (
        MODEL,
        lambda model: vars(model.embeddings.patch_embeddings.projection).update(stride=(2, 16, 14)), {}, "embeddings",
    ),
    "a wrapped projection, in pre-training": (
        PRETRAINING, lambda model: wrap(model.videomae.embeddings.patch_embeddings, "projection"), {}, "embeddings",
    ),
    "an adapter behind attention": (
        MODEL, lambda model: adapt(model.encoder.layer[0].attention.output, "dense"), {}, "layers",
    ),
    "another forward": (
        MODEL, lambda model: setattr(model.encoder.layer[0].output, "forward", lambda a, b: a.mean() + b), {}, "layers",
    ),
    "no bias in the projection": (
        MODEL, lambda model: setattr(model.embeddings.patch_embeddings.projection, "bias", None), {}, "embeddings",
    ),
    "hook on the encoder": (
        MODEL,
        lambda model: model.encoder.register_forward_pre_hook(lambda m, a: (a[0].cos(),)), {}, "encoder",
    ),
    "hook on the projection": (
        MODEL,
        lambda model: model.embeddings.patch_embeddings.projection.register_forward_hook(lambda m, a, out: out.cos()),
        {}, "embeddings",
    ),
    "hook on the decoder": (
        PRETRAINING, lambda model: model.decoder.norm.register_forward_hook(lambda m, a, out: out.cos()), {}, "decoder",
    ),
    "hook on the last decoder layer": (
        PRETRAINING,
        lambda model: model.decoder.decoder_layers[-1].register_forward_hook(lambda m, a, out: out.cos()), {}, "layers",
    ),
    "hook on the model within": (
        PRETRAINING,
        lambda model: model.videomae.register_forward_pre_hook(lambda m, a: (a[0].cos(),)), {}, "videomae",
    ),
}  # fmt: skip


class Adapter(nn.Module):
    """As LoRA puts it in place of a linear layer, with the weight of that still to be read."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return 1.5 * self.base(x)


def wrap(module, name):
    """As modules_to_save of PEFT does: a module that has nothing but its call."""
    setattr(module, name, nn.Sequential(getattr(module, name), nn.Tanh()))


def adapt(module, name):
    setattr(module, name, Adapter(getattr(module, name)))


@pytest.mark.parametrize("case", OWN)
def test_what_is_left_to_their_own_code(case):
    kind, change, extra, said = OWN[case]
    plain, fast, arguments = pair(kind)
    untouched = plain(**arguments)
    if change is not None:
        for model in (plain, fast):
            change(model)
    want = plain(**arguments, **extra)
    with pytest.warns(UserWarning, match=said) as record:
        got = fast(**arguments, **extra)
    assert len(record) == 1 and list(got.keys()) == list(want.keys())
    for name in want:
        values = (got[name], want[name]) if torch.is_tensor(want[name]) else (got[name][-1], want[name][-1])
        assert relative(*values) <= 1e-5
    # transformers 5.0 to 5.4 read the weights of queries, and no more of what stands there.
    unseen = case == "an adapter of queries" and hasattr(first_attention(plain), "q_bias")
    if change is not None and "hidden" not in case and not unseen:
        assert relative(want[list(want)[-1]], untouched[list(want)[-1]]) > 1e-3
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        fast(**arguments, **extra)


@pytest.mark.parametrize("patched", ["VideoMAEOutput", "VideoMAESelfAttention", "Linear"])
def test_a_class_that_was_patched(patched, monkeypatch):
    """A forward that was replaced in a class, for all models, counts for accelerated ones."""
    plain, fast, arguments = pair(MODEL)
    untouched = plain(**arguments)
    layer = plain.encoder.layer[0]
    kinds = {type(part).__name__: type(part) for part in (layer.output, layer.attention.attention, layer.output.dense)}
    original = kinds[patched].forward

    def forward(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return (0.5 * result[0], *result[1:]) if isinstance(result, tuple) else 0.5 * result

    monkeypatch.setattr(kinds[patched], "forward", forward)
    want = plain(**arguments)
    with pytest.warns(UserWarning, match="layers"):
        check_same(want, fast(**arguments), 1e-5)
    assert relative(want.last_hidden_state, untouched.last_hidden_state) > 1e-3


def test_attentions_and_hidden_states_then_fast_again():
    """What transformers leaves on a model to record hidden states does not slow later calls down."""
    plain, fast, arguments = pair(MODEL)
    asked = dict(output_attentions=True, output_hidden_states=True)
    want = plain(**arguments, **asked)
    with pytest.warns(UserWarning, match="output_hidden_states"):
        got = fast(**arguments, **asked)
    for name in ("hidden_states", "attentions"):
        assert len(got[name]) == len(want[name]) > 0
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got[name], want[name], strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same(plain(**arguments), fast(**arguments), 1e-5)


def test_attention_dropout_is_left_to_them_in_training_only():
    plain, fast, arguments = pair(MODEL, attention_probs_dropout_prob=0.4)
    outputs = []
    with pytest.warns(UserWarning, match="attention_probs_dropout_prob"):
        for model in (plain, fast):
            torch.manual_seed(3)
            outputs.append(model.train()(**arguments))
    check_same(*outputs, 1e-5)
    plain, fast, _ = pair(MODEL, attention_probs_dropout_prob=0.4)
    check_same(plain.eval()(**arguments), fast.eval()(**arguments), 1e-5)


@pytest.mark.parametrize("act", ["gelu_new", "relu", nn.GELU()], ids=["gelu_new", "relu", "module"])
def test_other_activations(act):
    plain, fast, arguments = pair(MODEL)
    for model in (plain, fast):
        for layer in model.encoder.layer:
            layer.intermediate.intermediate_act_fn = (
                transformers.activations.ACT2FN[act] if isinstance(act, str) else act
            )
    check_same(plain(**arguments), fast(**arguments), 1e-5)


def test_odd_sizes_go_through_their_convolution():
    """What is over at the edges of a clip is left out by it."""
    size = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.VideoMAEConfig(image_size=(40, 50), num_frames=5, num_labels=CLASSES, **size)
    plain = transformers.VideoMAEForVideoClassification(config)
    random_weights(plain)
    fast = mar_fast.accelerate(copy.deepcopy(plain))
    pixels = torch.randn(2, 5, 3, 40, 50)
    with pytest.warns(UserWarning, match="odd sizes"):
        check_same(plain(pixels), fast(pixels), 1e-5)
