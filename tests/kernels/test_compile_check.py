"""Every kernel compiled for GPUs that are not here, and what the machine code looks like; no GPU is needed.

The gate compiles a part of the calls; ``make matrix`` all of them, with the pinned Triton and with an older one.
"""

import itertools
import os
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mar_fast.kernels import bias_gelu, device

pytest.importorskip("triton")
if device.INTERPRETING:
    pytest.skip("needs a Triton that compiles", allow_module_level=True)

import triton
import triton.language as tl

from mar_fast.bench import __main__, matrix
from mar_fast.bench.matrix import calls, launched, launches
from mar_fast.kernels.jit import attention, attention_backward, compile_check
from mar_fast.kernels.jit.compile_check import STRICT, TARGETS, check, check_all, code, recorded
from mar_fast.kernels.jit.launch import Choice, Launch, LaunchConfig, forced


def test_kernels_compile_without_faults():
    """The first half-precision and the first float32 call of each op on sm_90; one call on each other target."""
    first, every = {}, launched(code, TARGETS)
    for call, case in calls("meta").items():
        first.setdefault((case.dtype == torch.float32, case.op), call)
    half = [call for (single, _), call in sorted(first.items()) if not single]
    others = [target for target in TARGETS if target != "sm_90"]
    wanted = {(call, "sm_90") for call in first.values()} | {*zip(half, others, strict=False)}
    chosen = [told for told, made_by in every.items() if any((call, told.target) in wanted for call in made_by)]
    with forced({"attention_backward_key_value": LaunchConfig(32, 64, 64, 4, 3, fused=True)}):  # no default takes it
        made = [code(*one, "sm_90") for one in launches(first[False, "attention"], "sm_90")]
        chosen += [one for one in made if one.source[0].endswith("fused_kernel")]
    reports = [*check_all(chosen, jobs=0)]
    assert not [report for report in reports if report.failed]
    assert {report.code.target for report in reports} == set(TARGETS)
    assert all(report.figures["registers"] > 0 and report.figures["wide loads"] > 0 for report in reports)
    left_out = {told.kernel for told in every} - {told.kernel for told in chosen if told.target == "sm_90"}
    assert left_out == {"gather_patch_embed_backward_video"}


@pytest.mark.matrix
def test_whole_matrix(capsys):
    with capsys.disabled():
        assert __main__.main(["matrix"]) == 0


def test_every_choice_is_reached(monkeypatch):
    """Each line of the launch choices, and each row of their tables, by some call; nothing is compiled for it."""
    lines, left, before = {}, {}, sys.gettrace()

    class Row(tuple):
        def __iter__(self):  # it is taken
            left.pop(id(self), None)
            return super().__iter__()

    for table in (*attention.FORWARD, *attention_backward.QUERY, *attention_backward.KEY_VALUE):
        for arch, rows in table.items():
            watched = {shape: Row(row) for shape, row in rows.items()}
            monkeypatch.setitem(table, arch, watched)
            left |= {id(row): (arch, shape, row) for shape, row in watched.items()}

    def trace(frame, event, value):
        if frame.f_code.co_name.startswith("config") and "/jit/" in frame.f_code.co_filename:
            lines.setdefault(frame.f_code, set()).add(frame.f_lineno)
            return trace
        return None

    sys.settrace(trace)
    try:
        for call, target in itertools.product(calls("meta"), (*TARGETS, "interpreter")):
            launches(call, target)
    finally:
        sys.settrace(before)
    for function, reached in lines.items():
        never = {line for _, _, line in function.co_lines() if line} - reached - {function.co_firstlineno}
        assert not never, (function.co_filename, sorted(never))
    assert not left


def test_what_embeds_uint8_clips():
    """A gather and a product for many tubelets where there is TMA, one kernel elsewhere, after the weight's own."""
    fused, two = ["gather_patch_embed_forward"], ["gather_tubelets", "gather_patch_embed_product"]
    for target, clips, expected in (("sm_90", 32, two), ("sm_90", 1, fused), ("sm_80", 32, fused)):
        call = f"gather_patch_embed, {clips} clips, 784 of 1568 tubelets, width 768, uint8 clip, other layout, bfloat16"
        names = [launch.kernel.fn.__name__.removesuffix("_kernel") for launch, _ in launches(call, target, ["forward"])]
        assert names == ["fold_weight"] * (expected == fused) + expected


# The check can fail. Plain matrix products without masks, 4096 x 4096 x 768, compiled with what the test says.


@triton.jit
def product_kernel(left, right, out, size, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_left = tl.load(left + o_row[:, None] * stride + o_k[None, :])
        b_right = tl.load(right + o_column[None, :] * stride + o_k[:, None])
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
    tl.store(out + o_row[:, None] * 4096 + o_column[None, :], b_sum.to(out.dtype.element_ty))


def product(config, target="sm_90", dtype=torch.bfloat16, precision="tf32"):
    sizes = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, PRECISION=precision)
    launch = Launch(product_kernel, (1,), (768, 768), Choice("product", config, "", {}), **sizes)
    return check(code(launch, [torch.empty(4096, 768, dtype=dtype, device="meta")] * 3, target))


GOOD, LARGE = LaunchConfig(128, 128, 32, num_warps=8, num_stages=3), LaunchConfig(128, 256, 128, 8, 4)
SMALL, SINGLE = LaunchConfig(64, 64, 32, num_stages=2), "1 float32 products by one of TF32, three are needed"


PRODUCTS = [
    ("", GOOD, TARGETS, ()),  # HMMA, HGMMA, UTCHMMA, v_mfma
    ("", SMALL, TARGETS[:4], (torch.float32, "tf32x3")),
    (r"[1-9]\d* bytes of spills and stack", LaunchConfig(256, 128, 32, 2, 2), ["sm_80"], ()),
    (r"\d+ bytes of shared memory, \d+ is the limit", LARGE, ["sm_80", "sm_120"], ()),
    ("no tensor core instruction", LaunchConfig(64, 64, 16, 8), ["sm_90"], (torch.float32, "ieee")),
    ("does not compile: .*", replace(GOOD, block_m=8, block_k=8), ["sm_90"], ()),
    (SINGLE, SMALL, TARGETS[:4], (torch.float32, "tf32")),
]


@pytest.mark.parametrize(("fault", "config", "targets", "options"), PRODUCTS)
def test_product(fault, config, targets, options):
    """Good ones, too few warps, too large tiles, multiply-adds, blocks that no instruction has, one product of TF32."""
    for target in targets:
        report = product(config, target, *options)
        assert any(re.fullmatch(fault, found, re.DOTALL) for found in report.faults or [""]), report
        assert report.failed == (fault != "" and target in STRICT)
        if not fault:
            assert all(report.figures[name] > 0 for name in ("registers", "tensor core", "wide loads"))


@pytest.mark.parametrize("target", STRICT)
def test_product_that_the_compiler_loses(monkeypatch, target):
    """One is missing in the last stage before instructions."""
    compile_it = triton.compile

    def losing(*arguments):
        whole = compile_it(*arguments)
        dot = re.compile(r"\n[^\n]*(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) [^\n]*")
        stages = dict(whole.asm) | {"ttgir": dot.sub("", whole.asm["ttgir"], count=1)}
        return SimpleNamespace(asm=stages, metadata=whole.metadata)

    monkeypatch.setattr(triton, "compile", losing)
    report = product(SMALL, target, torch.float32, "tf32x3")
    assert report.faults == ["float32 products by 2.00 of TF32, three are needed"] and report.failed


FORWARD, KEY_VALUE = (64, 16, 32, 8, 1, False), (16, 64, 16, 8, 1, False)
LAYOUTS = [(88, "forward", FORWARD), (128, "forward", FORWARD), (128, "backward_key_value", KEY_VALUE)]
MATRIX = [pytest.param(*case, marks=pytest.mark.matrix) for case in LAYOUTS]


@pytest.mark.parametrize(("size", "kernel", "config"), [(80, "forward", FORWARD), *MATRIX])
def test_layout_that_was_wrong_on_hardware(size, kernel, config):
    """float32 heads of 80, 88 and 128, as launched when an H200 gave results wrong by 2e-4, and as launched now."""
    call, kernel = f"attention, 16 clips, 784 tokens, 16 heads of {size}, float32", f"attention_{kernel}"
    wrong = {kernel: LaunchConfig(*config)}
    for configs, fault in ((wrong, r"\d+ m64n8k8 wgmma, which are wrong for float32"), ({}, "")):
        with forced(configs):
            one = next(one for one in launches(call, "sm_90") if one[0].choice.kernel == kernel)
        assert re.fullmatch(fault, "".join(check(code(*one, "sm_90")).faults[:1]))


def test_scalar_loads():
    """Of rows, or a crop, that do not begin on multiples of 16 bytes, and with a forced configuration."""
    tiny, bias = {"bias_gelu_forward": LaunchConfig(2, 64, num_warps=1)}, torch.empty(3072, device="meta").bfloat16()
    for stride, start, config in ((3072, 0, {}), (3088, 8, {}), (3073, 0, {}), (3088, 1, {}), (3072, 0, tiny)):
        x = torch.empty(64, stride, dtype=torch.bfloat16, device="meta")[:, start : start + 3072]
        with forced(config):
            (launch,) = recorded(lambda x=x: bias_gelu(x, bias), "sm_90")
        report = check(code(*launch, "sm_90"))
        scalar = stride % 8 or start % 8 or config
        assert report.faults == (["no global load of 16 bytes"] if scalar else []) and report.failed == bool(scalar)


def test_loads_as_disassembled():
    """For sm_80 to sm_120 (256 bits: by ptxas for sm_100 from ld.global.v8.b32)."""
    narrow = "LDG.E R2, LDG.E.64, LDG.E.LTC128B.64, LDG.E.U8, LDG.E.S16.CONSTANT, LDGSTS.E.64, LDGSTS.E, STG.E.128"
    wide = "LDG.E.128.CONSTANT, LDG.E.ENL2.256, LDGSTS.E.BYPASS.LTC128B.128, LDGSTS.E.BYPASS.128, LDG.E.128"
    for one in f"{narrow}, {wide}".split(", "):
        found = compile_check.count(compile_check.FIGURES["wide loads"], f"/*0030*/ @!P0 {one} R2, desc[UR4][R2.64] ;")
        assert bool(found) == (one in wide.split(", ")), one


# The command.


@pytest.fixture
def twins(monkeypatch):
    """Only bias_gelu in bfloat16, twice."""
    name, first = next(iter(calls("meta").items()))
    monkeypatch.setattr(matrix, "calls", lambda device: {name: first, "its twin": first})


def test_command(twins, capsys):
    """A table and its faults, exit code 1; names that are not known. The same launch is compiled once."""
    entries = launched(code, ["sm_90"], ["bias_gelu"])
    assert [told.kernel for told in entries] == ["bias_gelu_forward", "bias_gelu_backward", "sum_parts"]
    assert all(made_by == [*matrix.calls("meta")] for made_by in entries.values())
    arguments = ["matrix", "--target", "sm_90", "--kernel", "bias_gelu_forward", "--jobs", "0"]
    assert __main__.main(arguments) == 0
    line = r"bias_gelu_forward +sm_90 +16 x 256, 4 warps, 1 stages +registers .*bias_gelu, 32 clips"
    assert re.search(line, capsys.readouterr().out)
    with forced({"bias_gelu_forward": LaunchConfig(2, 64, num_warps=1)}):
        assert __main__.main(arguments) == 1
    assert re.search(r"bias_gelu_forward, .*, sm_90: no global load of 16 bytes", capsys.readouterr().out)
    for wrong, value, words in (
        ("--kernel", "bias", "expected an op or a kernel of bias_gelu, bias_gelu_b"),
        ("--target", "bias", "choose from"),
        ("--jobs", "-1", "--jobs: got -1, expected a number of processes, or 0"),
    ):
        with pytest.raises(SystemExit):
            __main__.main(["matrix", wrong, value])
        assert words in capsys.readouterr().err


class EndsItsProcess:
    """Where it is unpickled."""

    def __reduce__(self):
        return os._exit, (1,)


def test_processes(twins):
    """They give what this one gives; if the compiler ends one, only the code that does it is lost."""
    first, second = launched(code, ["sm_90", "gfx942"], ["bias_gelu_forward"])
    bad = replace(first, kernel="bad", source=(EndsItsProcess(),))
    mine, lost, last = check_all([first, bad, second], jobs=2)
    assert lost.failed and lost.faults == ["does not compile: the compiler ended its process"]
    assert [mine, last] == [*check_all([first, second], jobs=0)]
