"""compile_for_inference: the same numbers, constant weights, one shape, and settings left as found.

Without a GPU a stand-in takes the place of a CUDA graph.
"""

import copy
import gc
import math
import subprocess
import sys
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch._dynamo as dynamo
import torch._inductor.config as inductor
from helpers import relative, small_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import mar_fast
from mar_fast import inference, masking
from mar_fast.inference import compile_for_inference

pytestmark = pytest.mark.compiles

CLIP = (2, 3, 4, 64, 64)


@pytest.fixture(autouse=True)
def _fresh():
    dynamo.reset()


def model_and_clip(dtype=torch.float32, **overrides):
    model = mar_fast.MAR(small_config(decoder_depth=0, **overrides)).eval().to(dtype)
    return model, torch.randn(CLIP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_numbers(dtype):
    model, clip = model_and_clip(dtype)
    exact = copy.deepcopy(model).double()(clip.double())
    plain = model(clip)
    compiled = compile_for_inference(model, clip)
    with pytest.raises(ValueError, match=r"arguments: got tuple\(float32 \(1, 3, .*, which it was compiled for"):
        compiled(clip[:1])
    for clips in (clip, torch.randn(CLIP)):
        got = compiled(clips)
        want = copy.deepcopy(model).double()(clips.double())
        for name in ("logits", "features"):
            error = relative(getattr(plain, name), getattr(exact, name))
            assert relative(getattr(got, name), getattr(want, name)) <= 2 * error + 1e-6
        assert got.pixels is None and got.reconstruction_loss is None and not got.logits.requires_grad
    assert compiled.compile_seconds > 0 and compiled.settings["freezing"] and not compiled.settings["max_autotune"]


def test_uint8_clip_and_a_mask_as_arguments():
    model, _ = model_and_clip()
    clip = torch.randint(256, CLIP, dtype=torch.uint8)
    mask = masking.random(2, model.config.grid, 0.75)
    compiled = compile_for_inference(model, (clip, mask))
    for seed in range(2):
        other = masking.random(2, model.config.grid, 0.75, generator=torch.Generator().manual_seed(seed))
        assert relative(compiled(clip, other).logits, model(clip, other).logits) < 1e-5


def test_weights_are_constants_and_settings_are_left_as_found():
    """In whatever mode it is called, nothing is compiled a second time, which would read the live weights."""
    model, clip = model_and_clip()
    settings = inductor.save_config_portable()
    dynamo.utils.counters.clear()
    compiled = compile_for_inference(model, clip)
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    before = compiled(clip).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(compiled(clip).logits, before)
    with torch.inference_mode():
        assert torch.equal(compiled(clip).logits, before)
    with torch.no_grad():
        assert torch.equal(compiled(clip).logits, before)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1
    assert inductor.save_config_portable() == settings
    with pytest.raises(RuntimeError), torch.no_grad():
        compile_for_inference(_Broken().eval(), clip)
    assert inductor.save_config_portable() == settings


class _Broken(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def test_bad_arguments():
    model, clip = model_and_clip()
    with pytest.raises(ValueError, match="model: got a model in training mode, expected one in eval mode"):
        compile_for_inference(model.train(), clip)
    with pytest.raises(TypeError, match="model: got function, expected a torch"):
        compile_for_inference(lambda x: x, clip)
    with pytest.raises(TypeError, match="example: got dict, expected a tensor or a tuple"):
        compile_for_inference(model.eval(), {"video": clip})


def test_no_compiler_is_said_in_one_sentence():
    code = """
import torch, mar_fast
model = torch.nn.Linear(3, 3).eval()
try:
    mar_fast.compile_for_inference(model, torch.zeros(2, 3))
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "", "CXX": "/nowhere/g++"}
    )
    assert done.stdout.strip().startswith("compile_for_inference needs a C++ compiler on a CPU and found none"), done


def test_any_module_will_do():
    """Autotuned: the products that inductor tries are all of the same function."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)).eval()
    x = torch.randn(4, 16)
    compiled = compile_for_inference(model, x, autotune=True)
    assert relative(compiled(x), model(x)) < 1e-6 and compiled.settings["max_autotune"]


# Backend "graph".


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


class Operand:
    def __init__(self, get):
        self.get = get

    def alive(self):
        tensor = self.get()
        assert tensor is not None, "the graph reads memory that was freed"
        return tensor


class Tape(TorchDispatchMode):
    """What a CUDA graph is: every op of a call, run again on the memory that it read and wrote then.

    Only memory that the call itself allocates is kept; to run again when other memory is freed is an error.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.made = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        operands = tree_map_only(torch.Tensor, self.reference, (args, kwargs))
        out = func(*args, **kwargs)
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.made |= {id(tensor): tensor for tensor in written}
        # Views and what is changed in place need no copy: they are the memory of an operand.
        self.calls.append((func, operands, [None if storage(tensor) in read else tensor for tensor in written]))
        return out

    def reference(self, tensor):
        return Operand((lambda: tensor) if id(tensor) in self.made else weakref.ref(tensor))

    def poison(self):
        """Recording computes nothing."""
        for _, _, written in self.calls:
            for tensor in written:
                if tensor is not None and tensor.is_floating_point():
                    tensor.fill_(math.nan)

    def replay(self):
        for func, operands, written in self.calls:
            args, kwargs = tree_map_only(Operand, Operand.alive, operands)
            out = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for kept, new in zip(written, out, strict=True):
                if kept is not None:
                    kept.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """A tape for every CUDA graph, on the CPU."""
    tapes = []

    def captured(run, device):
        run()
        tape = Tape()
        with tape:
            result = run()
        tape.poison()
        tapes.append(tape)

        def replay():
            tape.replay()
            return result

        return replay

    monkeypatch.setattr(inference, "captured", captured)
    monkeypatch.setattr(inference, "_GRAPH_DEVICES", ("cpu",))
    return tapes


def clips_alone(config, generator):
    return (torch.randn(CLIP, generator=generator),)


def clips_and_mask(config, generator):
    clip = torch.randint(256, CLIP, dtype=torch.uint8, generator=generator)
    return clip, masking.random(2, config.grid, 0.75, generator=generator)


def clips_and_ragged_mask(config, generator):
    """Of the same number of tokens in all, and at most as many in a clip, but now in the first, now in the second."""
    clip = torch.randint(256, CLIP, dtype=torch.uint8, generator=generator)
    order = [torch.randperm(config.num_tokens, generator=generator) for _ in range(2)]
    counts = (5, 9) if clip[0, 0, 0, 0, 0] % 2 else (9, 5)
    kept = [index[:count] for index, count in zip(order, counts, strict=True)]
    return clip, masking.TokenMask.ragged(kept, config.grid)


@pytest.mark.parametrize("arguments", [clips_alone, clips_and_mask, clips_and_ragged_mask])
def test_graph(graphs, arguments):
    """The model's own results for every argument, when the model is changed and gone, and they stay."""
    model, _ = model_and_clip()
    example, *calls = (arguments(model.config, torch.Generator().manual_seed(seed)) for seed in range(5))
    want = [model(*call) for call in calls]
    compiled = compile_for_inference(model, example, backend="graph")
    assert compiled.compile_seconds > 0 and compiled.settings == {} and graphs[0].calls
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    del model, example
    gc.collect()
    got = [compiled(*call) for call in calls]
    for out, right in zip(got, want, strict=True):
        assert type(out) is mar_fast.MAROutput and out.pixels is None and out.reconstruction_loss is None
        for name in ("logits", "features", "cu_seqlens"):
            one, other = getattr(out, name), getattr(right, name)
            assert (one is None and other is None) or torch.equal(one, other), name
        assert not out.logits.requires_grad
    assert not torch.equal(got[0].logits, got[1].logits)


def test_graph_leaves_the_example_alone(graphs):
    model, _ = model_and_clip()
    example, other = (clips_and_mask(model.config, torch.Generator().manual_seed(seed)) for seed in range(2))
    before = [tensor.clone() for tensor in (example[0], example[1].keep_idx, example[1].drop_idx)]
    compiled = compile_for_inference(model, example, backend="graph")
    want = compiled(*example).logits
    compiled(*other)
    for tensor, value in zip((example[0], example[1].keep_idx, example[1].drop_idx), before, strict=True):
        assert torch.equal(tensor, value)
    example[0].zero_()
    assert not torch.equal(compiled(*example).logits, want)


def test_graph_takes_any_strides(graphs):
    model, clip = model_and_clip()
    compiled = compile_for_inference(model, torch.randn(CLIP[1:]).expand(CLIP), backend="graph")
    for clips in (clip, clip.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3), clip[:1].expand(CLIP)):
        assert torch.equal(compiled(clips).logits, model(clips.contiguous()).logits)


def test_two_graphs_share_no_memory(graphs):
    model, clip = model_and_clip()
    one = compile_for_inference(model, clip, backend="graph")
    before = one(clip).logits
    with torch.no_grad():
        model.classifier.head.bias.add_(1)
    other = compile_for_inference(model, clip, backend="graph")
    assert torch.equal(one(clip).logits, before)
    assert torch.equal(other(clip).logits, model(clip).logits)
    assert not {storage(t) for t in graphs[0].made.values()} & {storage(t) for t in graphs[1].made.values()}


def test_graph_in_inference_mode(graphs):
    """Compiled and called there or not, with what was made there or not."""
    model, clip = model_and_clip()
    with torch.inference_mode():
        inside, other = compile_for_inference(model, clip.clone(), backend="graph"), torch.randn(CLIP)
    outside = compile_for_inference(model, clip, backend="graph")
    want = [model(clip).logits, model(other.clone()).logits]
    for compiled in (inside, outside):
        for clips, right in zip((clip, other), want, strict=True):
            with torch.inference_mode():
                logits = compiled(clips).logits
            assert torch.equal(logits, right) and torch.equal(compiled(clips).logits, right)
            assert not logits.is_inference()


def test_graph_under_autocast(graphs):
    """It is recorded with the casts, which autocast keeps no longer than it lasts."""
    model, clip = model_and_clip()
    with torch.autocast("cpu", torch.bfloat16):
        compiled = compile_for_inference(model, clip, backend="graph")
        assert torch.is_autocast_cache_enabled()
        with torch.no_grad():
            want = model(clip).logits
    gc.collect()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(clip).logits, want)
    with pytest.raises(ValueError, match=r"autocast: got off, expected torch.bfloat16, as when this was compiled"):
        compiled(clip)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=r"autocast: got torch.float16, expe"):
        compiled(clip)
    plain = compile_for_inference(model, clip, backend="graph")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"got torch.bfloat16, expected off"):
        plain(clip)


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class Scaled:
    pair: Pair
    by: float


class Nested(torch.nn.Module):
    def forward(self, scaled, parts):
        total = (scaled.pair.left - scaled.pair.right) * scaled.by + parts["more"][0]
        return {"total": total, "same": scaled, "by": scaled.by}


def test_graph_of_nested_arguments_and_results(graphs):
    def arguments(by=3.0):
        return Scaled(Pair(torch.randn(4), torch.randn(4)), by), {"more": [torch.randn(4)]}

    model, example = Nested().eval(), arguments()
    compiled = compile_for_inference(model, example, backend="graph")
    calls = [arguments() for _ in range(3)]
    got = [compiled(*call) for call in calls]
    for out, call in zip(got, calls, strict=True):
        assert torch.equal(out["total"], model(*call)["total"]) and out["by"] == 3.0
        assert type(out["same"]) is Scaled and torch.equal(out["same"].pair.right, call[0].pair.right)
    for wrong in (arguments(by=2.0), (example[0], {"less": example[1]["more"]})):
        with pytest.raises(ValueError, match=r"arguments: got tuple\(Scaled\(Pair\("):
            compiled(*wrong)


def test_graph_of_another_shape_is_refused(graphs):
    model, clip = model_and_clip()
    mask = masking.random(2, model.config.grid, 0.75)
    compiled = compile_for_inference(model, (clip, mask), backend="graph")
    flat = masking.TokenMask(mask.keep_idx, mask.drop_idx, (model.config.num_tokens,))
    for wrong in ((clip[:1], mask), (clip.double(), mask), (clip.to("meta"), mask), (clip, flat), (clip,)):
        with pytest.raises(ValueError, match=r"arguments: got tuple\(.*expected tuple\(float32 \(2, 3, 4, 64, 64\)"):
            compiled(*wrong)


def test_bad_backends(graphs):
    model, clip = model_and_clip()
    with pytest.raises(ValueError, match="backend: got 'cuda', expected 'inductor' or 'graph'"):
        compile_for_inference(model, clip, backend="cuda")
    for autotune in (False, True):
        with pytest.raises(ValueError, match=f"autotune: got {autotune} with backend 'graph', expected None"):
            compile_for_inference(model, clip, backend="graph", autotune=autotune)
    with pytest.raises(ValueError, match="backend: got 'graph' for tensors on cpu and meta, expected 'inductor', or"):
        compile_for_inference(model, (clip, masking.random(2, model.config.grid, 0.75, device="meta")), backend="graph")
    with pytest.raises(ValueError, match="backend: got 'graph' for tensors on no device"):
        compile_for_inference(model, (), backend="graph")


def test_no_graph_on_a_cpu():
    model, clip = model_and_clip()
    with pytest.raises(ValueError, match=r"backend: got 'graph' for tensors on cpu, expected .* on one CUDA device"):
        compile_for_inference(model, clip, backend="graph")
