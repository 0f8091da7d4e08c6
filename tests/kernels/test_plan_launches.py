"""What a planned launch hands to its compiled kernel, without a GPU: a stand-in takes what would be launched."""

import itertools
import sys
import threading

import pytest
import torch
import triton
from plan_cases import assert_same, every_op, misaligned, outcome, small_call, tensors, unplanned
from triton.tools.tensor_descriptor import TensorDescriptor

from mar_fast.kernels import checks, device, plan
from mar_fast.kernels.jit import launch
from mar_fast.kernels.jit.launch import Launch

pytestmark = pytest.mark.interpreter


def alignment(tensors):
    """What a kernel is compiled for besides dtypes: which addresses are multiples of 16 bytes."""
    return [None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]


class Gpu:
    """Compiled kernels that run nothing: what was compiled, and what was launched without being looked up."""

    def __init__(self, monkeypatch):
        self.device, self.streams, self.asked = 0, itertools.count(100), []
        self.compiled, self.launched = {}, []
        look_up, ready = Launch._look_up, Launch._ready

        def compile_first(made, operands):
            self.compiled[id(made), self.device] = made, alignment(operands)
            look_up(made, operands)

        def stand_in(made, index, run, handles):
            def record(*arguments):
                grid, stream, handles, operands = arguments[:3], arguments[3], arguments[4:9], arguments[9:]
                self.launched.append((made, grid, stream, handles, operands))

            ready(made, index, record, handles)

        def stream(index):
            self.asked.append(index)
            return next(self.streams)

        monkeypatch.setattr(Launch, "_look_up", compile_first)
        monkeypatch.setattr(Launch, "_ready", stand_in)
        monkeypatch.setattr(launch, "current_device", lambda: self.device)
        monkeypatch.setattr(launch, "current_stream", stream)

    def take(self):
        """What was launched since the last time."""
        launched, self.launched = self.launched, []
        return launched


@pytest.fixture
def gpu(monkeypatch):
    with launch.stubbed():
        yield Gpu(monkeypatch)


def given(made, operands):
    """The tensors among a launch's arguments, in the kernel's order; descriptors must be what their class makes."""
    held = list(operands[: len(operands) - len(made.numbers) - len(made.constants)])
    for i, block in made.blocks.items():
        assert held[i] == TensorDescriptor(held[i].base, *map(list, block))
        held[i] = held[i].base
    return held


@every_op
def test_a_launch_gets_what_its_kernel_takes(name, gpu):
    """Tensors, numbers and constants, in the order of the kernel's parameters."""
    op, operands = small_call(name)
    for _ in range(3):
        outcome(op, operands)
    launched = gpu.take()
    assert launched
    for made, grid, _, handles, arguments in launched:
        names = made.kernel.arg_names
        assert len(arguments) == len(names) and len(grid) == 3 and handles == (None,) * 5
        by_name = dict(zip(names, arguments, strict=True))
        assert all(by_name[key] is value for key, value in made.constants.items())
        held = given(made, arguments)
        assert all(value is None or torch.is_tensor(value) for value in held)
        assert tuple(arguments[len(held) :][: len(made.numbers)]) == made.numbers
        assert all(isinstance(extent, int) and extent > 0 for extent in grid)


@every_op
def test_a_launch_is_on_the_stream_of_its_call(name, gpu):
    """Asked for anew each time, and each launch gets the answer to its own question."""
    op, operands = small_call(name)
    outcome(op, operands)
    for _ in range(3):
        gpu.asked.clear()
        first = next(gpu.streams) + 1
        outcome(op, operands)
        launched = gpu.take()
        assert [stream for _, _, stream, _, _ in launched] == list(range(first, first + len(launched)))
        assert launched and gpu.asked == [0] * len(launched)


@every_op
def test_a_launch_is_on_the_current_device(name, gpu):
    """A kernel that was compiled for another one is looked up again, there and back."""
    op, operands = small_call(name)
    op(**operands)
    op(**operands)
    kernels = len(gpu.take())
    assert kernels
    for index in (1, 0, 3):
        gpu.device = index
        gpu.compiled.clear()
        op(**operands)
        assert len(gpu.compiled) == kernels and not gpu.take()
        gpu.asked.clear()
        op(**operands)
        assert len(gpu.take()) == kernels and gpu.asked == [index] * kernels


@every_op
def test_a_launch_gets_only_what_it_was_compiled_for(name, gpu):
    """A misaligned tensor, in forward or backward, never comes to a kernel that was compiled for aligned ones."""
    op, operands = small_call(name)
    names = [key for key, value in operands.items() if torch.is_tensor(value)]
    calls = [operands, *(operands | {key: misaligned(operands[key])} for key in names)]
    _, seeds = outcome(op, operands)
    moved = [misaligned(seed) if seed.ndim else seed for seed in seeds]
    for inputs, gradients in [*itertools.product(calls, (seeds, moved))] * 2:
        outcome(op, inputs, gradients)
    launched = gpu.take()
    for made, _, _, _, arguments in launched:
        assert alignment(given(made, arguments)) == gpu.compiled[id(made), 0][1], made.choice.kernel
    assert len(launched) > len(calls)


@every_op
def test_a_launch_gets_the_tensors_of_its_call(name, gpu):
    """Nothing of the call that the plan was made with, nor of any other one before."""
    op, operands = small_call(name)
    before, held = set(), []
    for number in range(3):
        inputs = {key: value.clone() if torch.is_tensor(value) else value for key, value in operands.items()}
        held.append((inputs, tensors(op(**inputs))))
        addresses = {value.data_ptr() for value in (*inputs.values(), *held[-1][1]) if torch.is_tensor(value)}
        launched = {
            value.data_ptr() for made, *_, rest in gpu.take() for value in given(made, rest) if value is not None
        }
        assert bool(launched & addresses) == (number > 0) and not launched & before
        before |= addresses


def test_a_profiler_sees_launches(gpu):
    """Where a hook on launches is set, a kernel goes the way on which Triton calls it."""
    op, operands = small_call("bias_gelu")
    op(**operands)
    op(**operands)
    assert len(gpu.take()) == 1
    hook = triton.knobs.runtime.launch_enter_hook

    def told(metadata):
        pass

    hook.add(told)
    try:
        op(**operands)
        assert not gpu.take()
    finally:
        hook.remove(told)
    op(**operands)
    op(**operands)
    assert gpu.take()


# Threads.


@pytest.fixture
def one_at_a_time(monkeypatch):
    """The interpreter is not made for threads: kernels take turns, and all else does not."""
    turn, look_up = threading.Lock(), Launch._look_up

    def locked(made, operands):
        with turn:
            look_up(made, operands)

    monkeypatch.setattr(Launch, "_look_up", locked)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("limit", [2, 512])
@pytest.mark.parametrize("names", [("bias_gelu",), ("bias_gelu", "add_layer_norm", "scatter_tokens")], ids=str)
def test_threads(names, limit, monkeypatch):
    """The same and other keys at once, forward and backward, while plans are thrown away: all as without plans."""
    monkeypatch.setattr(plan, "LIMIT", limit)
    calls = [small_call(name, count=count) for name in names for count in (2, 3, 4)]
    with unplanned():
        want = [outcome(*call) for call in calls]
    faults, start = [], threading.Barrier(6)

    def work(number):
        try:
            start.wait()
            for step in range(9):
                place = (number * step + step) % len(calls)
                results, seeds = want[place]
                assert_same(outcome(*calls[place], seeds)[0], results)
                if number == 0 and step == 5:
                    plan.forget()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_modes_of_a_thread_are_its_own():
    """Autocast and gradients are modes of a thread; a plan made in one is not served in another."""
    op, operands = small_call("add_layer_norm")
    operands["weight"].requires_grad_()
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        op(**operands)
        here = op(**operands)[0]
        found = []
        thread = threading.Thread(target=lambda: found.append(op(**operands)[0]))
        thread.start()
        thread.join()
    assert (here.dtype, here.requires_grad) == (torch.float16, False)
    assert (found[0].dtype, found[0].requires_grad) == (torch.float32, True)


def test_stubbed_leaves_nothing_behind(poisoned):
    op, operands = small_call("bias_gelu")
    interpreting = device.INTERPRETING
    with launch.stubbed():
        op(**operands)
        poisoned.allocated = 0
    assert interpreting == device.INTERPRETING and checks.may_read(torch.ones(1))
    with unplanned():
        want = tensors(op(**operands))
    assert_same(tensors(op(**operands)), want)
