"""torch.compile sees the kernels themselves, and copies no input for them; no GPU is needed."""

import importlib.util
import operator
from contextlib import contextmanager

import pytest
import torch

from mar_fast import MAR, MARConfig, masking
from mar_fast.kernels import device

if importlib.util.find_spec("triton") is None or device.INTERPRETING:
    pytest.skip("needs a Triton that is not interpreted", allow_module_level=True)

import triton
from functorch.compile import make_boxed_func
from op_cases import OPS, call
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

from mar_fast.kernels.jit.launch import stubbed

pytestmark = pytest.mark.compiles


class StandIn:
    """A driver that knows a target and launches nothing: without one inductor takes every operand for written."""

    class Utils:
        def load_binary(self, *arguments):
            return 0, 0, 32, 0, 1024

        def get_device_properties(self, index):
            return dict(max_shared_mem=232448)

        def unload_module(self, module):
            pass

    utils = Utils()

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, index=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture
def driver():
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(StandIn())
    torch.compiler.reset()
    yield
    triton.runtime.driver._active = before


# Passes that stay an op of the library: where an index says at which address something is stored, inductor takes the
# index for written.
OPAQUE = {
    "attention_varlen": ("forward", "backward"),
    "gather_patch_embed": ("backward",),
    "scatter_tokens": ("backward",),
    "masked_patch_loss": ("backward",),
}


@contextmanager
def kept_graphs():
    """A backend of torch.compile, and the list to which it appends the calls of each graph that it gets."""
    graphs = []

    def keep(graph, example):
        graphs.append([node for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    yield aot_autograd(fw_compiler=keep, bw_compiler=keep), graphs


def assert_written_are_fresh(graph):
    """Inductor copies what a kernel writes unless it was allocated for that, and only kernels in turn write it."""
    for node in graph:
        if "triton_kernel_wrapper" in str(node.target):
            for name in node.kwargs["tensors_to_clone"]:
                written = node.kwargs["kwargs"][name]
                while written.target is operator.getitem and len(written.users) == 1:
                    kernel, before = written.args
                    written = kernel.kwargs["kwargs"][before]
                assert "empty" in str(written.target), (node, name)


@pytest.mark.parametrize("name", OPS)
def test_kernels_are_in_the_graph(name, driver):
    """Forward and backward: launches and what allocates for them, no op that hides them and no clone of an operand."""
    op, operands = call(name)
    for value in operands.values():
        if torch.is_tensor(value) and value.is_floating_point():
            value.requires_grad_()
    with kept_graphs() as (backend, graphs), stubbed():
        outputs = torch.compile(op, fullgraph=True, backend=backend)(**operands)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(out.sum() for out in outputs).backward()
    assert len(graphs) == 2
    for which, graph in zip(("forward", "backward"), graphs, strict=True):
        names, hidden = [str(node.target) for node in graph], which in OPAQUE.get(op.func.__name__, ())
        assert any("triton_kernel_wrapper" in target for target in names) != hidden
        assert any(target.startswith("mar_fast.") for target in names) == hidden
        assert not any("clone" in target for target in names), names
        assert_written_are_fresh(graph)


def test_training_step_is_one_graph(driver):
    """Forward and backward of MAR with all its kernels, one graph each; nothing is copied for a kernel."""
    config = MARConfig(
        image_size=(32, 32), num_frames=4, patch_size=(2, 8, 8), embed_dim=32, depth=2, num_heads=2, num_classes=4,
        decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2,
        bridge_embed_dim=32, bridge_depth=1, bridge_num_heads=2,
    )  # fmt: skip
    mask = masking.cell_running(2, config.grid, config.mask_ratio, cell=config.cell, phase=0)
    video = torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8)
    with kept_graphs() as (backend, graphs), stubbed():
        model = torch.compile(MAR(config).train(), fullgraph=True, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(video, mask)
        (out.logits.sum() + out.reconstruction_loss).backward()
    assert len(graphs) == 2
    for graph, kernels in zip(graphs, (27, 49), strict=True):
        assert sum("triton_kernel_wrapper" in str(node.target) for node in graph) == kernels
        assert_written_are_fresh(graph)
