"""Every kernel compiled for GPUs that are not here, and what the machine code looks like; no GPU is needed.

The gate compiles a part of the calls; ``make matrix`` all of them, with the pinned Triton and with an older one.
"""

import importlib.util
import json
import os
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mar_fast.kernels import bias_gelu, device

if importlib.util.find_spec("triton") is None or device.INTERPRETING:
    pytest.skip("needs a Triton that compiles", allow_module_level=True)

import triton
import triton.language as tl

from mar_fast.bench import __main__, kernel_calls, matrix
from mar_fast.kernels.jit import attention, attention_backward, compile_check
from mar_fast.kernels.jit.compile_check import STRICT, TARGETS, check, code, recorded
from mar_fast.kernels.jit.launch import Choice, Launch, LaunchConfig, forced, forget_choices


@pytest.fixture(autouse=True)
def only_our_choices(monkeypatch, tmp_path):
    """Not those of the user who runs the tests."""
    monkeypatch.setenv("MAR_FAST_CONFIGS", str(tmp_path / "none.json"))
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def first_call(monkeypatch):
    """Only one call: bias_gelu in bfloat16."""
    call = kernel_calls.calls("meta")[0]
    monkeypatch.setattr(matrix, "calls", lambda device: (call,))
    return call


def chosen_for_the_gate():
    """The first half-precision and the first float32 call of each op on sm_90; one call on each other target."""
    first = {}
    for call in kernel_calls.calls("meta"):
        first.setdefault((call.op, call.dtype != torch.float32), call)
    ops = sorted({op for op, _ in first})
    wanted = {(call, "sm_90") for call in first.values()}
    for number, target in enumerate(target for target in TARGETS if target != "sm_90"):
        wanted.add((first[ops[number % len(ops)], True], target))
    return lambda call, target: (call, target) in wanted


def compiled(entries, jobs):
    reports = [report for _, report in compile_check.check_all([entry.code for entry in entries], jobs)]
    assert not [(report.kernel, report.target, report.faults()) for report in reports if report.failed]
    return reports


def test_kernels_compile_without_faults():
    reports = compiled(matrix.plan(chosen=chosen_for_the_gate()), jobs=0)
    assert {report.target for report in reports} == set(TARGETS)
    assert all(report.registers > 0 and report.widest_load > 0 for report in reports)
    every = {entry.code.kernel for entry in matrix.plan(["sm_90"])}
    here = {report.kernel for report in reports if report.target == "sm_90"}
    assert every - here == {"gather_patch_embed_backward_video"}


@pytest.mark.matrix
def test_whole_matrix(capsys):
    reports = compiled(matrix.plan(), jobs=os.cpu_count())
    with capsys.disabled():
        print(f"\n{len(reports)} compiled with Triton {triton.__version__}")
        for report in reports:
            if report.faults():
                print(f"allowed: {report.kernel}, {report.target}: {report.faults()}")


def test_every_choice_is_reached(monkeypatch):
    """Each line of the launch choices, and each row of their tables, by some call; nothing is compiled for it."""
    reached, taken, look_up = {}, set(), attention.by_head_dim

    def spy(table, arch, head_dim):
        arch = arch if arch in table else ""
        taken.add((id(table), arch, next(limit for limit in table[arch] if head_dim <= limit)))
        return look_up(table, arch, head_dim)

    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "by_head_dim", spy)

    def trace(frame, event, value):
        if frame.f_code.co_name.startswith("config") and "/jit/" in frame.f_code.co_filename:
            reached.setdefault(frame.f_code, set()).add(frame.f_lineno)
            return trace
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        matrix.plan([*TARGETS, "interpreter"])
    finally:
        sys.settrace(before)
    for function, lines in reached.items():
        never = {line for _, _, line in function.co_lines() if line} - lines - {function.co_firstlineno}
        assert not never, (function.co_filename, sorted(never))
    tables = [
        value for module in (attention, attention_backward) for value in vars(module).values()
        if isinstance(value, dict) and "" in value and "sm_90" in value
    ]  # fmt: skip
    rows = {(id(table), arch, limit) for table in tables for arch, every in table.items() for limit in every}
    assert len(tables) == 6 and rows == taken


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


GOOD, SMALL = LaunchConfig(128, 128, 32, num_warps=8, num_stages=3), LaunchConfig(64, 64, 32, num_stages=2)


@pytest.mark.parametrize("target", TARGETS)
def test_good_product(target):
    """Tensor-core instructions and 16-byte loads are found on every target: HMMA, HGMMA, UTCHMMA, v_mfma."""
    report = product(GOOD, target)
    assert not report.faults() and report.dots == 1 and report.tensor_core > 0
    assert report.widest_load == 16 and report.registers > 32
    if target.startswith("sm_"):
        report = product(SMALL, target, torch.float32, "tf32x3")
        assert not report.faults() and (report.dots, report.products) == (1, 3)


@pytest.mark.parametrize(
    ("fault", "config", "target", "options"),
    [
        (r"\d+ bytes spilled, [1-9]\d* bytes of stack", LaunchConfig(256, 128, 32, 2, 2), "sm_80", ()),
        (r"\d+ bytes of shared memory, \d+ is the limit", LaunchConfig(128, 256, 128, 8, 4), "sm_80", ()),
        (r"\d+ bytes of shared memory, \d+ is the limit", LaunchConfig(128, 256, 128, 8, 4), "sm_120", ()),
        ("no tensor core instruction", LaunchConfig(64, 64, 16, 8), "sm_90", (torch.float32, "ieee")),
        ("does not compile: .*", replace(GOOD, block_m=8, block_k=8), "sm_90", ()),
        *(
            ("1 float32 products by one of TF32, three are needed", SMALL, target, (torch.float32, "tf32"))
            for target in TARGETS[:4]
        ),
    ],
)
def test_bad_product(fault, config, target, options):
    """Too few warps, too large tiles, multiply-adds, blocks that no instruction has, one product of TF32."""
    report = product(config, target, *options)
    assert any(re.fullmatch(fault, found, re.DOTALL) for found in report.faults()), report
    assert report.failed == (target in STRICT)


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
    assert report.faults() == ["float32 products by 2.00 of TF32, three are needed"] and report.failed


@pytest.mark.parametrize(
    ("kernel", "config", "size"),
    [
        ("attention_forward", LaunchConfig(64, 16, 32, 8, 1, False), 80),
        *(
            pytest.param(*case, marks=pytest.mark.matrix)
            for case in (
                ("attention_forward", LaunchConfig(64, 16, 32, 8, 1, False), 88),
                ("attention_forward", LaunchConfig(64, 16, 32, 8, 1, False), 128),
                ("attention_backward_key_value", LaunchConfig(16, 64, 16, 8, 1, False), 128),
            )
        ),
    ],
)
def test_layout_that_was_wrong_on_hardware(kernel, config, size):
    """float32 heads of 80, 88 and 128, as launched when an H200 gave results wrong by 2e-4, and as launched now."""
    wanted = re.compile(rf"attention, .* heads of {size}, float32")
    (call,) = [call for call in kernel_calls.calls("meta") if wanted.fullmatch(str(call))]
    now = recorded(call.everything, "sm_90")
    with forced({kernel: config}):
        then = recorded(call.everything, "sm_90")
    then, now = (
        next(check(code(*one, "sm_90")) for one in launches if one[0].choice.kernel == kernel)
        for launches in (then, now)
    )
    assert then.failed and re.fullmatch(r"\d+ m64n8k8 wgmma, which are wrong for float32", then.faults()[0])
    assert not now.faults() and now.products == 3


def gelu(stride, start=0, config=None):
    """bias_gelu on 3072 columns of rows of ``stride`` values."""
    x = torch.empty(64, stride, dtype=torch.bfloat16, device="meta")[:, start : start + 3072]
    bias = torch.empty(3072, dtype=torch.bfloat16, device="meta")
    with forced({"bias_gelu_forward": config} if config else {}):
        (launch,) = recorded(lambda: bias_gelu(x, bias), "sm_90")
    return check(code(*launch, "sm_90"))


def test_scalar_loads():
    """Of rows, or a crop, that do not begin on multiples of 16 bytes, and with a forced configuration."""
    assert gelu(3072).widest_load == gelu(3088).widest_load == gelu(3088, start=8).widest_load == 16
    for report in (gelu(3073), gelu(3088, start=1), gelu(3072, config=LaunchConfig(2, 64, num_warps=1))):
        assert report.widest_load < 16 and report.failed
        assert report.faults() == [f"widest global load {report.widest_load} bytes"]


def test_bytes_of_a_load():
    """As disassembled for sm_80 to sm_120 (256 bits: by ptxas for sm_100 from ld.global.v8.b32)."""
    known = {
        "LDG.E R2": 4, "LDG.E.64 R2": 8, "LDG.E.128.CONSTANT R2": 16, "LDG.E.LTC128B.64 R2": 8, "LDG.E.U8 R2": 1,
        "LDG.E.ENL2.256 R12": 32, "LDG.E.S16.CONSTANT R2": 2, "LDG.E.U16 R2": 2, "LDGSTS.E.64 [R2]": 8,
        "LDGSTS.E.BYPASS.LTC128B.128 [R2]": 16, "LDGSTS.E.BYPASS.128 [R2]": 16, "LDGSTS.E [R2]": 4,
    }  # fmt: skip
    for instruction, size in known.items():
        (options,) = compile_check._LOAD.findall(f"/*0030*/ @!P0 {instruction}, desc[UR4][R2.64] ;")
        assert compile_check.load_bytes(options) == size, instruction


# The command.


def test_same_launch_is_compiled_once(monkeypatch, first_call):
    monkeypatch.setattr(matrix, "calls", lambda device: (first_call, replace(first_call, label="its twin")))
    entries = matrix.plan(["sm_90"], ["bias_gelu"])
    assert [entry.code.kernel for entry in entries] == ["bias_gelu_forward", "bias_gelu_backward", "sum_parts"]
    assert all(len(entry.calls) == 2 for entry in entries)


def test_command(first_call, capsys):
    """A table and its faults, exit code 1; as JSON a line for each launch; names that are not known."""
    arguments = ["matrix", "--target", "sm_90", "--kernel", "bias_gelu_forward", "--jobs", "0"]
    assert __main__.main(arguments) == 0
    line = r"bias_gelu_forward +sm_90 +16 x 256, 4 warps, 1 stages .*bias_gelu, 32 clips"
    assert re.search(line, capsys.readouterr().out)
    with forced({"bias_gelu_forward": LaunchConfig(2, 64, num_warps=1)}):
        assert __main__.main(arguments) == 1
        assert re.search(r"bias_gelu_forward, .*, sm_90: widest global load \d bytes", capsys.readouterr().out)
        assert __main__.main([*arguments, "--json"]) == 1
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["failed"] and line["block_n"] == 64 and line["calls"] == [str(first_call)]
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


def test_processes(first_call):
    """They give what this one gives; if the compiler ends one, only the code that does it is lost."""
    codes = [entry.code for entry in matrix.plan(["sm_90", "gfx942"], ["bias_gelu_forward"])]
    here = dict(compile_check.check_all(codes, jobs=0))
    bad = replace(codes[0], kernel="bad", constants={"BLOCK_M": EndsItsProcess()})
    there = dict(compile_check.check_all([codes[0], bad, codes[1]], jobs=2))
    assert there[1].failed and there[1].faults() == ["does not compile: the compiler ended its process"]
    assert len(here) == 2 and len(there) == 3
    for mine, other in ((here[0], there[0]), (here[1], there[2])):
        assert replace(mine, seconds=0) == replace(other, seconds=0)
