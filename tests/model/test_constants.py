"""Position tables and test masks: right after every way of moving a model."""

import copy
import io

import pytest
import torch
from helpers import small_config

import mar_fast
from mar_fast import reference
from mar_fast.layers import sinusoid_table

TABLES = ("encoder.pos_embed", "decoder.pos_embed")


@pytest.mark.parametrize(("tokens", "width"), [(1568, 768), (32, 96), (7, 5)])
def test_table_is_the_references(tokens, width):
    assert torch.equal(sinusoid_table(tokens, width), reference.position_table(tokens, width))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MOVES = {
    "bfloat16": lambda model: model.bfloat16(),
    "half and back": lambda model: model.half().float(),
    "double": lambda model: model.double(),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "by way of meta": lambda model: model.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
}


@pytest.mark.parametrize("move", MOVES)
def test_constants_survive(move):
    model = mar_fast.MAR(small_config())
    moved = MOVES[move](mar_fast.MAR(small_config()))
    for name in (*TABLES, "test_keep_idx", "test_drop_idx"):
        before, after = model.get_submodule(name).value, moved.get_submodule(name).value
        assert after.dtype == before.dtype and torch.equal(after, before), name


def test_built_on_meta_then_materialised():
    with torch.device("meta"):
        model = mar_fast.MAR(small_config())
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # what is in empty memory
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not model.encoder.blocks[0].attn.v_bias.any()
    assert torch.equal(model.encoder.pos_embed.value, sinusoid_table(32, 96))
    assert torch.equal(model.test_keep_idx.value, mar_fast.MAR(small_config()).test_keep_idx.value)


def test_state_dict_holds_parameters_only():
    model, plain = mar_fast.MAR(small_config()), reference.MAR(small_config())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} == set(plain.state_dict())
    assert {"encoder.patch_embed.proj.weight", "encoder.blocks.0.attn.q_bias", "mask_token"} <= set(model.state_dict())
