"""Attention alone, as transformers takes it: attn_implementation="mar_fast"."""

import copy
import re

import pytest
import torch
from helpers import relative
from test_accelerate import check_gradients, check_same
from test_huggingface import build_theirs
from torch import nn

import mar_fast
from mar_fast.huggingface import dropin

transformers = pytest.importorskip("transformers")


def build(**options):
    mar_fast.register_attention()
    plain = build_theirs("VideoMAEForVideoClassification", "base", torch.float64, final_norm=False, **options)
    other = copy.deepcopy(plain)
    other.set_attn_implementation("mar_fast")
    assert other.config._attn_implementation == "mar_fast"
    return plain, other, torch.randn(2, 6, 3, 32, 64, dtype=torch.float64)


def test_values_and_gradients(monkeypatch):
    plain, other, pixels = build()
    calls = []
    monkeypatch.setattr(dropin, "attention", lambda *a, **k: calls.append(1) or mar_fast.kernels.attention(*a, **k))
    want, got = plain(pixels), other(pixels)
    assert len(calls) == len(plain.videomae.encoder.layer)
    check_same(want, got, 1e-11)
    check_gradients(plain, other, want, got, 1e-11)


def test_dropout_is_refused():
    _, other, pixels = build(attention_probs_dropout_prob=0.2)
    other.eval()(pixels)
    with pytest.raises(ValueError, match=r"attn_implementation='mar_fast': dropout: got 0\.2, expected 0"):
        other.train()(pixels)


def test_padding_is_refused_not_ignored():
    mar_fast.register_attention()
    sizes = dict(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = transformers.BertModel(transformers.BertConfig(**sizes, attn_implementation="mar_fast")).eval()
    tokens = torch.randint(20, (2, 5))
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    assert relative(model(tokens).last_hidden_state, plain(tokens).last_hidden_state) <= 1e-5
    padding = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match="attn_implementation='mar_fast': attention_mask: got a mask"):
        model(tokens, attention_mask=padding)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softcap", 3),
        ("sliding_window", 3),
        ("output_attentions", True),
        # Of T5 and of models with sinks; tensors have no truth value of their own, and [0] would pass for False.
        ("position_bias", torch.zeros(1, 2, 4, 4)),
        ("position_bias", torch.zeros(1)),
        ("s_aux", torch.zeros(2)),
    ],
)
def test_what_it_does_not_do_is_refused(name, value):
    part = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=f"{name}: got a value, expected None"):
        dropin._attention(nn.Module(), part, part, part, None, **{name: value})


def test_shapes():
    part = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="is_causal: got True"):
        dropin._attention(nn.Module(), part, part, part, None, is_causal=True)
    with pytest.raises(ValueError, match=re.escape("key: got (1, 1, 4, 8), expected (1, 2, 4, 8)")):
        dropin._attention(nn.Module(), part, part[:, :1], part[:, :1], None)
