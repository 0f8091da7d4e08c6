"""attention in blocks on a CPU: any blocks give the same result, as near to float64 as plain PyTorch in bfloat16."""

import oracle
import pytest
import torch
from helpers import relative

from mar_fast import kernels
from mar_fast.kernels import cpu_attention
from mar_fast.kernels.attention import eager_attention


@pytest.fixture(autouse=True)
def _on_any_cpu(monkeypatch):
    """Where blocks would not be chosen they are right all the same."""
    monkeypatch.setattr(cpu_attention, "PREFERRED", True)


def packed(batch=2, tokens=37, heads=5, size=16, dtype=torch.bfloat16):
    return torch.randn(batch, tokens, 3, heads, size).to(dtype)


# Blocks of all heads, of some, of one, of a part of its queries (where the last ones are fewer), of one query.
@pytest.mark.parametrize("block", [2**20, 2 * 37 * 37, 37 * 37, 10 * 37, 1])
@pytest.mark.parametrize("scale", [16**-0.5, 1.0])
def test_any_block(monkeypatch, block, scale):
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    qkv = packed()
    exact = oracle.attention(qkv.double(), scale=scale)
    got, plain = cpu_attention.attention(qkv, scale), oracle.attention(qkv, scale=scale)
    assert got.dtype == torch.bfloat16 and got.shape == (2, 37, 80)
    assert relative(got, exact) <= 2 * relative(plain, exact) + 0.5 * torch.finfo(torch.bfloat16).eps
    # No head, clip or query has another's result: their errors are as small one by one.
    for part, expected in zip(got.flatten(0, 1), exact.flatten(0, 1), strict=True):
        assert relative(part, expected) < 0.03


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 1, 1), (2, 784, 3, 1, 64), (1, 17, 3, 3, 80), (0, 5, 3, 2, 8), (2, 0, 3, 2, 8)]
)
def test_shapes_through_the_op(shape):
    qkv = torch.randn(shape).bfloat16()
    got = kernels.attention(qkv)
    exact = oracle.attention(qkv.double())
    assert got.shape == exact.shape and got.dtype == torch.bfloat16
    if qkv.numel():
        assert relative(got, exact) < 0.02


def test_any_strides():
    qkv = packed()
    want = cpu_attention.attention(qkv, 0.25)
    wide = torch.empty(2, 37, 3, 5, 33, dtype=qkv.dtype)[..., 1::2]
    swapped = torch.empty(5, 3, 37, 2, 16, dtype=qkv.dtype).permute(3, 2, 1, 0, 4)
    for view in (wide, swapped):
        assert torch.equal(cpu_attention.attention(view.copy_(qkv), 0.25), want)


def test_when_it_is_taken(monkeypatch):
    """Not with gradients, in another dtype, or on a CPU where it would not be faster."""
    qkv = packed()
    assert cpu_attention.takes(qkv, torch.bfloat16)
    assert not cpu_attention.takes(qkv.float(), torch.float32)
    assert not cpu_attention.takes(qkv.to("meta"), torch.bfloat16)
    with torch.no_grad():
        assert cpu_attention.takes(qkv.clone().requires_grad_(), torch.bfloat16)
    learning = qkv.clone().requires_grad_()
    assert not cpu_attention.takes(learning, torch.bfloat16)
    kernels.attention(learning).float().sum().backward()
    assert learning.grad.abs().sum() > 0
    monkeypatch.setattr(cpu_attention, "PREFERRED", False)
    assert not cpu_attention.takes(qkv, torch.bfloat16)


def test_under_autocast():
    qkv = packed(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(eager_attention(qkv, 0.25), cpu_attention.attention(qkv.bfloat16(), 0.25))


@pytest.mark.compiles
def test_one_node_under_compile():
    qkv = packed()
    torch._dynamo.reset()
    compiled = torch.compile(lambda qkv: kernels.attention(qkv) * 2, fullgraph=True)
    # dynamo of torch 2.11 takes is_exporting() for true and traces plain ops.
    exporting = torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")(torch.zeros(()))
    atol = 2**-6 if exporting else 0.0
    with torch.no_grad():
        torch.testing.assert_close(compiled(qkv), kernels.attention(qkv) * 2, rtol=0.0, atol=atol)
    torch.library.opcheck(torch.ops.mar_fast.cpu_attention.default, (qkv, 0.25))
