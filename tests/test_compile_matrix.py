"""Every kernel compiled for GPUs that are not here, and what the machine code looks like; no GPU is needed.

The gate compiles a part of the cases; ``make matrix`` all of them, with the pinned Triton and with an older one.
"""

import importlib.util
import json
import os
import re
from dataclasses import replace

import pytest
import torch

from mar_fast.kernels import device, launch_config
from mar_fast.kernels.launch_config import LaunchConfig, Row, forced

if importlib.util.find_spec("triton") is None or device.INTERPRETING:
    pytest.skip("needs a Triton that compiles", allow_module_level=True)

import bad_kernels

from mar_fast.kernels.jit import bias_gelu, cases, compile_matrix, matrix
from mar_fast.kernels.jit.launch import Launch

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def only_our_tables(monkeypatch, tmp_path):
    """No table of the user who runs the tests."""
    monkeypatch.setenv("MAR_FAST_CONFIGS", str(tmp_path))
    launch_config.forget_tables()
    yield
    launch_config.forget_tables()


def chosen_for_the_gate():
    """The first half-precision and the first float32 case of each op on sm_90; one case on each other target."""
    first = {}
    for case in cases.cases():
        first.setdefault((case.op, case.dtype in HALF), case)
    ops = sorted({case.op for case in first.values()})
    others = [target for target in compile_matrix.TARGETS if target != "sm_90"]
    elsewhere = {target: first[ops[number % len(ops)], True] for number, target in enumerate(others)}
    here = {(case.op, case.label, case.dtype) for case in first.values()}

    def chosen(case, target):
        key = (case.op, case.label, case.dtype)
        if target == "sm_90":
            return key in here
        return key == (elsewhere[target].op, elsewhere[target].label, elsewhere[target].dtype)

    return chosen


def faults(reports):
    return [
        f"{line.kernel}, {line.case}, {line.dtype}, {line.target}: {line.faults()}" for line in reports if line.failed
    ]


def test_kernels_compile_without_faults():
    made = matrix.plan(chosen=chosen_for_the_gate())
    reports = matrix.reports(made, jobs=0)
    assert not faults(reports)
    assert {line.target for line in reports} == set(compile_matrix.TARGETS)
    found = {line.kernel.split(".")[0] for line in reports if line.target == "sm_90"}
    assert found == {case.op.removesuffix("_varlen") for case in cases.cases()}
    assert all(line.registers > 0 and line.widest_load > 0 for line in reports)


def test_every_row_is_covered():
    """Of all tables, by some case; nothing is compiled for it."""
    assert not faults(matrix.plan().faults)


@pytest.mark.matrix
def test_whole_matrix(capsys):
    made = matrix.plan()
    reports = matrix.reports(made, jobs=os.cpu_count())
    with capsys.disabled():
        print(f"\n{len(reports)} lines, {len(made.found)} compiled with Triton {compile_matrix.TRITON}")
        for line in reports:
            if line.faults() and not line.failed:
                print(f"allowed: {line.kernel}, {line.case}, {line.dtype}, {line.target}: {line.faults()}")
    assert not faults(reports)


# The check can fail. A matrix product as a case of its own, compiled with what the test says.


def product(config, target="sm_90", dtype=torch.bfloat16, stride=768):
    """One launch of a plain matrix product, 4096 x 4096 x 768."""
    left, right = (torch.empty(4096, stride, dtype=dtype, device="meta") for _ in range(2))
    out = torch.empty(4096, 4096, dtype=dtype, device="meta")
    sizes = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k)
    launch = Launch("product", bad_kernels.product, (left, right, out, 768, stride), sizes, config)
    return compile_matrix.compile_launch(launch, target)


GOOD = LaunchConfig(128, 128, 32, num_warps=8, num_stages=3)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_good_product(target):
    """Tensor-core instructions and 16-byte loads are found on every target: HMMA, HGMMA, UTCHMMA, v_mfma."""
    line = product(GOOD, target)
    assert not line.faults() and line.matrix and line.tensor_core > 0 and line.widest_load == 16 and line.registers > 32


def test_too_few_warps_spill():
    line = product(LaunchConfig(256, 128, 32, num_warps=2, num_stages=2), "sm_80")
    assert line.stack_bytes + line.spilled_bytes > 0 and line.failed
    assert re.search(r"\d+ bytes spilled, [1-9]\d* bytes of stack", line.faults()[0])


@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_too_much_shared_memory(target):
    line = product(LaunchConfig(128, 256, 128, num_warps=8, num_stages=4), target)
    assert any("bytes of shared memory" in fault for fault in line.faults())
    assert line.failed == (target in compile_matrix.STRICT)


def test_no_tensor_core_instruction():
    """float32 operands at full precision: plain multiply-adds."""
    left = torch.empty(512, 512, device="meta")
    sizes = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16)
    config = LaunchConfig(64, 64, 16, num_warps=8)
    launch = Launch("product", bad_kernels.product_ieee, (left, left, left, 512, 512), sizes, config)
    line = compile_matrix.compile_launch(launch, "sm_90")
    assert line.tensor_core == 0 and "no tensor core instruction" in line.faults() and line.failed


def gelu_launch(columns, stride):
    x = torch.empty(4096, stride, dtype=torch.bfloat16, device="meta")[:, :columns]
    bias = torch.empty(columns, dtype=torch.bfloat16, device="meta")
    (launch,) = compile_matrix.launches(lambda: bias_gelu.forward(x, bias), "sm_90")
    return launch


def test_scalar_loads():
    """Rows that do not begin on multiples of 16 bytes are read element by element."""
    assert compile_matrix.compile_launch(gelu_launch(3072, 3072), "sm_90").widest_load == 16
    line = compile_matrix.compile_launch(gelu_launch(3072, 3073), "sm_90")
    assert line.widest_load < 16 and any("widest global load" in fault for fault in line.faults()) and line.failed


def test_misaligned_view_is_not_taken_for_aligned():
    """A crop begins at an odd address, which the compiler must not be told is a multiple of 16."""
    whole = torch.empty(64, 3088, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(3072, dtype=torch.bfloat16, device="meta")
    loads = {}
    for start in (0, 8, 1):
        (launch,) = compile_matrix.launches(
            lambda start=start: bias_gelu.forward(whole[:, start : start + 3072], bias), "sm_90"
        )
        loads[start] = compile_matrix.compile_launch(launch, "sm_90").widest_load
    assert loads[0] == loads[8] == 16 and loads[1] < 16


def test_what_does_not_compile_is_said():
    line = product(replace(GOOD, block_m=8, block_k=8))
    assert line.failed and line.faults()[0].startswith("does not compile: ")


def test_forced_configuration_is_compiled():
    case = next(case for case in cases.cases() if case.op == "bias_gelu")
    with forced({"bias_gelu.forward": LaunchConfig(2, 64, num_warps=1)}):
        (launch,) = compile_matrix.launches(case.calls("meta")["forward"], "sm_90")
    line = compile_matrix.compile_launch(launch, "sm_90", case.label, "bfloat16")
    assert line.config == "block_m 2, block_n 64, num_warps 1, num_stages 1"
    assert any("widest global load" in fault for fault in line.faults())


@pytest.mark.parametrize(
    ("instruction", "size"),
    [
        ("LDG.E R2", 4),
        ("LDG.E.64 R2", 8),
        ("LDG.E.128.CONSTANT R2", 16),
        ("LDG.E.LTC128B.64 R2", 8),
        ("LDG.E.ENL2.256 R12", 32),
        ("LDG.E.U8 R2", 1),
        ("LDG.E.S16.CONSTANT R2", 2),
        ("LDG.E.U16 R2", 2),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R2]", 16),
        ("LDGSTS.E.BYPASS.128 [R2]", 16),
        ("LDGSTS.E.64 [R2]", 8),
        ("LDGSTS.E [R2]", 4),
    ],
)
def test_bytes_of_a_load(instruction, size):
    """As disassembled for sm_80 to sm_120 (256 bits: by ptxas for sm_100 from ld.global.v8.b32)."""
    (options,) = compile_matrix._GLOBAL_LOAD.findall(f"/*0030*/ @!P0 {instruction}, desc[UR4][R2.64] ;")
    assert compile_matrix._load_bytes(options) == size


# Rows, cases, names.


def test_row_without_a_case(tmp_path):
    """The user's table has a row that no case reaches: a fault, and not one that asks for a compiler."""
    rows = [
        {"where": {"never": [0, 9]}, "dtypes": ["float16"], "config": {"block_m": 8, "block_n": 64}, "origin": "mine"},
        {"config": {"block_m": 8, "block_n": 128}, "origin": "mine too"},
    ]
    (tmp_path / "sm_90.json").write_text(json.dumps({"bias_gelu.forward": rows}))
    launch_config.forget_tables()
    made = matrix.plan(["sm_90"], ["bias_gelu.forward"])
    (fault,) = made.faults
    assert fault.failed and fault.target == "sm_90" and fault.origin == "mine"
    assert fault.faults() == ["no case covers this row of sm_90.json, for float16, never 0 to 9"]
    assert {line["origin"] for lines in made.lines.values() for line in lines} == {"mine too"}


def test_row_hidden_by_the_users_table_is_not_asked_for(tmp_path):
    row = Row(tmp_path / "sm_90.json", "k", ("float16",), (("n", 0, 64),), LaunchConfig(8))
    mine = tmp_path / "mine/sm_90.json"
    assert matrix._hides(Row(mine, "k", (), (), LaunchConfig(8)), row)
    assert matrix._hides(Row(mine, "k", ("float16", "bfloat16"), (("n", 0, 64),), LaunchConfig(8)), row)
    assert not matrix._hides(Row(mine, "k", ("bfloat16",), (), LaunchConfig(8)), row)
    assert not matrix._hides(Row(mine, "k", (), (("n", 0, 63),), LaunchConfig(8)), row)
    assert not matrix._hides(Row(mine, "k", (), (("other", 0, 64),), LaunchConfig(8)), row)
    assert not matrix._hides(Row(row.table, "k", (), (), LaunchConfig(8)), row)  # in one table it is a mistake


def test_same_launch_is_compiled_once(monkeypatch):
    case = next(case for case in cases.cases() if case.op == "bias_gelu")
    twins = [case, replace(case, label="its twin")]
    monkeypatch.setattr(cases, "cases", lambda: twins)
    monkeypatch.setattr(matrix, "_calls", lambda place: twins[place].calls("meta"))
    made = matrix.plan(["sm_90"], ["bias_gelu"])
    reports = matrix.reports(made, jobs=0)
    assert len(made.found) == 2 and len(reports) == 4
    assert {(line.kernel, line.case) for line in reports} == {
        (f"bias_gelu.{call}", label) for call in ("forward", "backward") for label in (case.label, "its twin")
    }
    assert all(line.origin and line.dtype == "bfloat16" for line in reports)


def test_launcher_that_fails(monkeypatch):
    def broken(device):
        raise KeyError("no launch configuration")

    broken_case = cases.Case("bias_gelu", "broken", torch.float32, broken)
    monkeypatch.setattr(cases, "cases", lambda: [broken_case])
    monkeypatch.setattr(matrix, "_calls", lambda place: broken_case.calls("meta"))
    made = matrix.plan(["sm_90"], ["bias_gelu"], chosen=lambda case, target: True)
    assert not made.found and made.faults[0].faults() == ["the launcher fails: KeyError: 'no launch configuration'"]


def test_names():
    assert matrix.matching(["bias_gelu"]) == ["bias_gelu.backward", "bias_gelu.forward"]
    assert matrix.matching([]) == matrix.kernel_names()
    with pytest.raises(
        ValueError, match=r"kernel: got 'bias', expected an op or a kernel of these: .*bias_gelu.forward"
    ):
        matrix.plan(kernels=["bias"])
    with pytest.raises(ValueError, match=r"target: got 'sm_86', expected one of sm_80, sm_90, sm_100, sm_120, gfx942"):
        matrix.plan(["sm_86"])


def test_compiler_that_ends_its_process():
    """Only the launch that does it is lost."""
    found = [matrix.Found("some.kernel", 0, "forward", place, "sm_90") for place in (0, 1)]
    done = dict(matrix.each(bad_kernels.end_process, found, jobs=2))
    assert [done[place].error for place in range(2)] == ["", "does not compile: the compiler ended its process"]


def test_processes_give_the_same():
    made = matrix.plan(["sm_90", "gfx942"], ["bias_gelu.forward"])
    here, there = ({line.as_json() for line in stripped(matrix.reports(made, jobs))} for jobs in (0, 1))
    assert here == there and len(here) == 6


def stripped(reports):
    return [replace(line, seconds=0.0) for line in reports]
