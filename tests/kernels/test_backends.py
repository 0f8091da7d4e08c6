"""attention by flash-attn and xformers, against stand-ins with the signatures of the real packages.

Neither package runs here: flash-attn is built from source for a GPU, and xformers 0.0.35 has no CPU path. The stand-ins
compute with the naive float64 definitions and record what they were given.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import oracle
import pytest
import torch
from helpers import relative
from op_cases import attention_operands, varlen_operands

from mar_fast import kernels
from mar_fast.kernels import backends, device

SCALE = 0.3


def packed(query, key, value):
    return torch.stack([query, key, value], dim=-3)


def record(calls, arguments):
    calls.append({name: value for name, value in arguments.items() if value is not calls})


def heads(out, like):
    """(..., H * d) as (..., H, d)."""
    return out.unflatten(-1, like.shape[-2:]).to(like.dtype)


@pytest.fixture
def flash_attn(monkeypatch):
    """flash_attn 2's two functions on packed qkv; gives the list of calls, each its arguments by name."""
    calls = []

    def flash_attn_qkvpacked_func(
        qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        record(calls, locals())
        out, lse = oracle.attention(qkv.double(), scale=softmax_scale, return_lse=True)
        out = heads(out, qkv)
        return (out, lse.float(), None) if return_attn_probs else out

    def flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        record(calls, locals())
        return heads(oracle.attention_varlen(qkv.double(), cu_seqlens, max_seqlen, scale=softmax_scale), qkv)

    module = ModuleType("flash_attn")
    module.flash_attn_qkvpacked_func = flash_attn_qkvpacked_func
    module.flash_attn_varlen_qkvpacked_func = flash_attn_varlen_qkvpacked_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


class BlockDiagonalMask:
    def __init__(self, lengths, device):
        self.lengths, self.device = lengths, device

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert not torch.is_tensor(q_seqlen) and kv_seqlen is None
        return cls(q_seqlen, device)


@pytest.fixture
def xformers(monkeypatch):
    """xformers.ops 0.0.35, as far as it is used; its log-sum-exp has rows padded to 32, as its CUTLASS kernel's."""
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        record(calls, locals())
        qkv = packed(query, key, value)
        if attn_bias is None:
            return heads(oracle.attention(qkv.double(), scale=scale), query)
        assert attn_bias.device == query.device and query.shape[0] == 1
        offsets = torch.tensor([0, *attn_bias.lengths]).cumsum(0)
        longest = max(attn_bias.lengths)
        return heads(oracle.attention_varlen(qkv[0].double(), offsets, longest, scale=scale), query)[None]

    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        record(calls, locals())
        out, lse = oracle.attention(packed(query, key, value).double(), scale=scale, return_lse=True)
        return heads(out, query), torch.nn.functional.pad(lse.float(), (0, -lse.shape[-1] % 32), value=torch.inf)

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    ops.fmha = SimpleNamespace(
        BlockDiagonalMask=BlockDiagonalMask,
        memory_efficient_attention_forward_requires_grad=memory_efficient_attention_forward_requires_grad,
    )
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


@pytest.fixture(params=["flash_attn", "xformers"])
def package(request):
    """The name of a backend, and the calls of its stand-in."""
    return request.param, request.getfixturevalue(request.param)


def strided(qkv):
    """The same values, with a stride of 2 in the last dimension."""
    return torch.stack([qkv, qkv], dim=-1)[..., 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attn(flash_attn, dtype):
    qkv = attention_operands(dtype)["qkv"]
    out = backends.flash_attn_attention(qkv, SCALE)
    assert out.dtype == dtype and out.shape == (2, 17, 64)
    assert relative(out, oracle.attention(qkv.double(), scale=SCALE)) < 1e-2
    (call,) = flash_attn
    assert call.pop("qkv") is qkv  # packed as it is, nothing copied
    assert call == dict(
        dropout_p=0.0,
        softmax_scale=SCALE,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
        return_attn_probs=False,
    )


def test_flash_attn_log_sum_exp(flash_attn):
    qkv = attention_operands(torch.float16)["qkv"].requires_grad_()
    out, lse = backends.flash_attn_attention(qkv, SCALE, return_lse=True)
    want, want_lse = oracle.attention(qkv.double(), scale=SCALE, return_lse=True)
    assert relative(out, want) < 1e-2
    assert lse.dtype == torch.float32 and relative(lse, want_lse) < 1e-5
    assert flash_attn[0]["return_attn_probs"] is True and flash_attn[0]["deterministic"] is True
    out.sum().backward()
    assert qkv.grad is not None
    with pytest.raises(RuntimeError, match=r"'flash_attn' has no gradient of the log-sum-exp"):
        backends.flash_attn_attention(qkv, SCALE, return_lse=True)[1].sum().backward()


def test_flash_attn_varlen(flash_attn):
    operands = varlen_operands(torch.float16, (5, 0, 12))
    qkv, offsets = operands["qkv"], operands["cu_seqlens"].long()
    out = backends.flash_attn_varlen(qkv, offsets, 12, SCALE)
    assert relative(out, oracle.attention_varlen(qkv.double(), offsets, 12, scale=SCALE)) < 1e-2
    (call,) = flash_attn
    assert call["qkv"] is qkv and call["max_seqlen"] == 12
    assert call["cu_seqlens"].dtype == torch.int32 and call["cu_seqlens"].tolist() == offsets.tolist()
    assert call["softmax_scale"] == SCALE and call["dropout_p"] == 0.0 and call["deterministic"] is True
    assert not call["causal"] and not call["return_attn_probs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.clone, strided])
def test_xformers(xformers, layout, dtype):
    qkv = layout(attention_operands(dtype)["qkv"])
    out = backends.xformers_attention(qkv, SCALE)
    assert out.dtype == dtype and out.shape == (2, 17, 64)
    assert relative(out, oracle.attention(qkv.double(), scale=SCALE)) < 1e-2
    (call,) = xformers
    parts = [call.pop(name) for name in ("query", "key", "value")]
    assert all(part.stride(-1) == 1 and part.shape == (2, 17, 2, 32) for part in parts)  # all that it asks for
    if layout is torch.clone:
        assert [part.data_ptr() for part in parts] == [qkv[:, :, index].data_ptr() for index in range(3)]  # views
    assert call["scale"] == SCALE and call["p"] == 0.0 and call["attn_bias"] is None and call["op"] is None


def test_xformers_log_sum_exp(xformers):
    qkv = attention_operands(torch.float32)["qkv"].requires_grad_()
    with torch.no_grad():
        out, lse = backends.xformers_attention(qkv, SCALE, return_lse=True)
    want, want_lse = oracle.attention(qkv.detach().double(), scale=SCALE, return_lse=True)
    assert relative(out, want) < 1e-5 and lse.shape == (2, 2, 17) and relative(lse, want_lse) < 1e-5
    assert xformers[0]["scale"] == SCALE
    with pytest.raises(RuntimeError, match=r"log-sum-exp only without gradients.*torch.no_grad\(\)"):
        backends.xformers_attention(qkv, SCALE, return_lse=True)


def test_xformers_varlen(xformers):
    operands = varlen_operands(torch.float32, (5, 0, 12))
    qkv, offsets = operands["qkv"], operands["cu_seqlens"]
    out = backends.xformers_varlen(qkv, offsets, 12, SCALE)
    assert relative(out, oracle.attention_varlen(qkv.double(), offsets, 12, scale=SCALE)) < 1e-5
    (call,) = xformers
    assert call["attn_bias"].lengths == [5, 0, 12] and call["scale"] == SCALE and call["query"].shape == (1, 17, 2, 32)


def test_nothing(package):
    """Without tokens the package is not called, and shapes and dtypes are those of any other call."""
    backend, calls = package
    out, lse = backends.ATTENTION[backend](torch.empty(2, 0, 3, 4, 8).half(), SCALE, return_lse=True)
    assert out.shape == (2, 0, 32) and out.dtype == torch.float16 and lse.shape == (2, 4, 0)
    assert backends.ATTENTION[backend](torch.empty(0, 5, 3, 4, 8).half(), SCALE).shape == (0, 5, 32)
    out = backends.VARLEN[backend](torch.empty(0, 3, 4, 8).half(), torch.zeros(3, dtype=torch.int32), 0, SCALE)
    assert out.shape == (0, 32) and out.dtype == torch.float16 and not calls


def test_autocast(package, monkeypatch):
    backend, _ = package
    monkeypatch.setattr(sys.modules["mar_fast.kernels.attention"], "attention_backend", lambda *args: backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.attention(attention_operands(torch.float32)["qkv"]).dtype == torch.bfloat16
        assert kernels.attention_varlen(**varlen_operands(torch.float32, (5, 12))).dtype == torch.bfloat16


# The choice.


def cuda(dtype):
    """As much of a CUDA tensor as the choice looks at."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))


def test_choice(package):
    backend, _ = package
    assert device.attention_backend(torch.empty(0, dtype=torch.float64)) == "eager"
    with kernels.use_backend(backend):
        assert device.attention_backend(cuda(torch.bfloat16)) == backend
        assert device.attention_backend(cuda(torch.float16), "attention_varlen") == backend
        assert device.attention_backend(cuda(torch.float32), dtype=torch.bfloat16) == backend  # under autocast
        with kernels.use_backend("eager"):
            assert device.attention_backend(cuda(torch.bfloat16)) == "eager"
        assert not device.takes_triton("bias_gelu", torch.empty(0, dtype=torch.float64))  # other ops: as ever
        assert device.takes_triton("bias_gelu", cuda(torch.float32)) == device.HAS_TRITON
    assert device._forced is None


def test_choice_of_triton(monkeypatch):
    monkeypatch.setattr(device, "HAS_TRITON", True)
    assert device.attention_backend(cuda(torch.bfloat16)) == "triton"
    assert device.attention_backend(cuda(torch.bfloat16), limit="heads of at most 128, got 256") == "eager"
    with kernels.use_backend("triton"), pytest.raises(RuntimeError, match="runs attention_varlen with heads of"):
        device.attention_backend(cuda(torch.bfloat16), "attention_varlen", "with heads of at most 128, got 256")


@pytest.mark.parametrize(
    ("backend", "operand", "message"),
    [
        ("flash_attn", cuda(torch.float32), "of float16 or bfloat16, got float32 on cuda:0"),
        ("flash_attn", torch.empty(0).half(), "of float16 or bfloat16, got float16 on cpu"),
        ("xformers", cuda(torch.float64), "of float32 or float16 or bfloat16, got float64 on cuda:0"),
        ("xformers", torch.empty(0), "of float32 or float16 or bfloat16, got float32 on cpu"),
    ],
)
def test_what_a_package_cannot_run(backend, operand, message, request):
    request.getfixturevalue(backend)
    with kernels.use_backend(backend), pytest.raises(RuntimeError) as caught:
        device.attention_backend(operand)
    assert str(caught.value) == f"backend {backend!r} runs attention on CUDA tensors {message}"


@pytest.mark.parametrize(("backend", "extra"), [("flash_attn", "flash-attn"), ("xformers", "xformers")])
def test_package_that_is_missing(backend, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, backend, None)
    monkeypatch.delitem(sys.modules, f"{backend}.ops", raising=False)
    message = rf"got '{backend}', but importing {backend}.* fails .*pip install 'mar-fast\[{extra}\]'"
    with pytest.raises(RuntimeError, match=message), kernels.use_backend(backend):
        pass
    assert device._forced is None


def test_extras_are_in_setup():
    text = (Path(__file__).parents[2] / "setup.py").read_text()
    assert all(f'"{extra}": [' in text for _, extra, _ in device.ATTENTION_PACKAGES.values())


# The ops themselves.


def test_ops_take_the_backend(package, monkeypatch):
    """On a CPU the choice is a clear error; once it is made, the op gives the package's result."""
    backend, calls = package
    dense, ragged = attention_operands(torch.float16), varlen_operands(torch.float16, (5, 12))
    want, want_lse = oracle.attention(dense["qkv"].double(), scale=SCALE, return_lse=True)
    with kernels.use_backend(backend):
        for op, operands in ((kernels.attention, dense), (kernels.attention_varlen, ragged)):
            with pytest.raises(RuntimeError, match=f"backend '{backend}' runs {op.__name__} on CUDA tensors"):
                op(**operands)
        monkeypatch.setattr(sys.modules["mar_fast.kernels.attention"], "attention_backend", lambda *args: backend)
        out, lse = kernels.attention(dense["qkv"], scale=SCALE, return_lse=True)
        assert relative(out, want) < 1e-2 and relative(lse, want_lse) < 1e-5
        assert relative(kernels.attention(dense["qkv"], scale=SCALE), want) < 1e-2
        out = kernels.attention_varlen(**ragged, scale=SCALE)
    naive = {**ragged, "qkv": ragged["qkv"].double()}
    assert relative(out, oracle.attention_varlen(**naive, scale=SCALE)) < 1e-2 and len(calls) == 3
