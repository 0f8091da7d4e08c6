"""Accelerated models of transformers against untouched copies of themselves: values and every gradient."""

import copy

import pytest
import torch
from checkpoint_cases import FRAMES, SIZE
from helpers import relative
from test_huggingface import BATCH, MASKED, TOKENS, both_dtypes, both_shapes, build_theirs, clips

import mar_fast
from mar_fast import TokenMask, masking

transformers = pytest.importorskip("transformers")

# float64 shows what float32 hides in rounding, such as a LayerNorm eps that is not theirs.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-11}
# Gradients through the scores, of queries and keys, are differences of large numbers here, where attention is far from
# uniform, and PyTorch's fused attention rounds them more than the eager one that the copy runs: 3.0e-5 was seen.
# test_gradients_through_the_scores holds them against float64.
SCORES = {torch.float32: 5e-5, torch.float64: 1e-11}
# Model, use_mean_pooling, norm_pix_loss, and whether a mask comes with the call.
CASES = {
    "model, mean pooling, dense": ("VideoMAEModel", True, True, False),
    "model, mean pooling, masked": ("VideoMAEModel", True, True, True),
    "model, last norm, dense": ("VideoMAEModel", False, True, False),
    "model, last norm, masked": ("VideoMAEModel", False, True, True),
    "classifier, mean pooling, dense": ("VideoMAEForVideoClassification", True, True, False),
    "classifier, mean pooling, masked": ("VideoMAEForVideoClassification", True, True, True),
    "classifier, first token, dense": ("VideoMAEForVideoClassification", False, True, False),
    "pretraining, normalised target": ("VideoMAEForPreTraining", False, True, True),
    "pretraining, plain target": ("VideoMAEForPreTraining", False, False, True),
    "pretraining, mean pooling": ("VideoMAEForPreTraining", True, True, True),
}
VISIBLE = TOKENS - MASKED

all_cases = pytest.mark.parametrize("case", CASES)
all_kinds = pytest.mark.parametrize(
    "case",
    ["model, last norm, masked", "classifier, mean pooling, dense", "pretraining, normalised target"],
    ids=["model", "classifier", "pretraining"],
)


def pair(case, shape="base", dtype=torch.float32, **options):
    """A copy of one of their models, untouched, the accelerated model, and the arguments of a call."""
    kind, pooling, normalised, with_mask = CASES[case]
    model = build_theirs(kind, shape, dtype, final_norm=not pooling, norm_pix_loss=normalised, **options)
    video, masked = clips(dtype)
    model.train()
    plain = copy.deepcopy(model)
    arguments = {"pixel_values": video.transpose(1, 2)}
    if with_mask:
        arguments["bool_masked_pos"] = masked
    if kind == "VideoMAEForVideoClassification":
        arguments["labels"] = torch.arange(BATCH)
    return plain, mar_fast.accelerate(model), arguments


def objective(output):
    """A number that every value of the output has a part in, each with a weight of its own."""
    noise = torch.Generator().manual_seed(2)
    values = [value for value in output.values() if value is not None]
    weights = [torch.randn(value.shape, generator=noise, dtype=torch.float64).to(value.dtype) for value in values]
    return sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))


def gradients(model, output):
    """Of every parameter."""
    model.zero_grad()
    objective(output).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def check_same(want, got, tolerance):
    assert type(got) is type(want) and list(got.keys()) == list(want.keys())
    for name in want:
        assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype
        assert relative(got[name], want[name]) <= tolerance, name


def check_gradients(plain, fast, want, got, tolerance):
    want, got = gradients(plain, want), gradients(fast, got)
    assert got.keys() == want.keys()
    for name in want:
        if ".key.bias" in name:
            # In transformers 5.5 to 5.17. It moves all scores of a query alike: its gradient is 0 but for rounding.
            assert got[name].norm() <= 1e-4 * want[name.replace("key", "query")].norm(), name
            continue
        scores = any(part in name for part in (".query.", ".key.", ".q_bias"))
        limit = max(tolerance, SCORES[want[name].dtype]) if scores else tolerance
        assert relative(got[name], want[name]) <= limit, name  # nan, which fails, if the expected gradient is 0


@both_dtypes
@both_shapes
@all_cases
def test_values_and_every_gradient(case, shape, dtype):
    plain, fast, arguments = pair(case, shape, dtype)
    want, got = plain(**arguments), fast(**arguments)
    check_same(want, got, TOLERANCES[dtype])
    check_gradients(plain, fast, want, got, TOLERANCES[dtype])


@all_cases
@pytest.mark.parametrize("shape", ["base", "large"])
def test_gradients_through_the_scores(case, shape):
    """Of queries and keys in float32, against float64: twice the error of transformers' own default, SDPA, and 1e-5."""
    plain, fast, arguments = pair(case, shape)
    exact = copy.deepcopy(plain).double()
    for module in plain.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"
    wide = {name: value.double() if value.is_floating_point() else value for name, value in arguments.items()}
    expected = gradients(exact, exact(**wide))
    worst = []
    for model in (plain, fast):
        found = gradients(model, model(**arguments))
        names = [name for name in found if any(part in name for part in (".query.", ".key.weight", ".q_bias"))]
        worst.append(max(relative(found[name], expected[name]) for name in names))
    theirs, ours = worst
    assert ours <= 2 * theirs + 1e-5


@all_kinds
def test_gradient_of_the_clip(case):
    plain, fast, arguments = pair(case, dtype=torch.float64)
    found = []
    for model in (plain, fast):
        pixels = arguments["pixel_values"].clone().requires_grad_()
        objective(model(**{**arguments, "pixel_values": pixels})).backward()
        found.append(pixels.grad)
    # In pre-training the target does not depend on the clip for autograd: theirs is computed without gradients.
    assert relative(found[1], found[0]) <= 1e-11


@all_cases
@torch.no_grad()
def test_without_gradients_twice(case):
    """The second call takes packed weights that the first one kept."""
    plain, fast, arguments = pair(case)
    plain, fast = plain.eval(), fast.eval()
    want = plain(**arguments)
    for _ in range(2):
        check_same(want, fast(**arguments), 1e-5)


@all_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case, dtype):
    """Against float64, no more than twice the error of transformers in the same dtype."""
    plain, fast, arguments = pair(case, dtype=torch.float64)
    exact = plain(**arguments)
    rounded = {name: value.to(dtype) if value.is_floating_point() else value for name, value in arguments.items()}
    plain, fast = plain.to(dtype), fast.to(dtype)
    theirs, ours = plain(**rounded), fast(**rounded)
    for name in exact:
        assert ours[name].dtype == (torch.float32 if name == "loss" and "pretraining" in case else dtype)
        floor = torch.finfo(dtype).eps
        assert relative(ours[name], exact[name]) <= 2 * relative(theirs[name], exact[name]) + floor, name
    objective(ours).backward()
    assert all(parameter.grad.isfinite().all() for parameter in fast.parameters())


@all_kinds
def test_autocast(case):
    plain, fast, arguments = pair(case)
    exact = plain(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = plain(**arguments), fast(**arguments)
    for name in exact:
        floor = torch.finfo(torch.bfloat16).eps
        assert relative(ours[name], exact[name]) <= 2 * relative(theirs[name], exact[name]) + floor, name
    objective(ours).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in fast.parameters())


@pytest.mark.compiles
@pytest.mark.parametrize(
    "case",
    ["model, last norm, dense", "classifier, mean pooling, masked", "pretraining, normalised target"],
    ids=["model", "classifier", "pretraining"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_in_one_graph(case, training):
    plain, fast, arguments = pair(case)
    plain, fast = plain.train(training), fast.train(training)
    known = {"num_visible": VISIBLE} if "bool_masked_pos" in arguments else {}
    torch.compiler.reset()
    want, got = plain(**arguments), torch.compile(fast, fullgraph=True)(**arguments, **known)
    check_same(want, got, 1e-5)
    check_gradients(plain, fast, want, got, 1e-5)


@pytest.mark.compiles
@all_kinds
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@torch.no_grad()
def test_exported(case, strict):
    """For any batch, and as it runs here: without a convolution over all tubelets."""
    plain, fast, arguments = pair(case)
    plain, fast = plain.eval(), fast.eval()
    sizes = {name: {0: torch.export.Dim("batch", min=1, max=64)} for name in arguments}
    known = {"num_visible": VISIBLE} if "bool_masked_pos" in arguments else {}
    program = torch.export.export(
        fast, (), {**arguments, **known}, dynamic_shapes=sizes | dict.fromkeys(known), strict=strict
    )
    assert not any("conv" in str(node.target) for node in program.graph.nodes)
    fewer = {name: value[:2] for name, value in arguments.items()}
    check_same(plain(**fewer), program.module()(**fewer, **known), 1e-5)


@pytest.mark.compiles
@torch.no_grad()
def test_compiled_after_eager_calls():
    """What eager calls keep must not get in the way of a graph, nor a graph in that of eager calls."""
    plain, fast, arguments = pair("model, last norm, masked")
    fast.eval()
    mar_fast.accelerate(fast, num_visible=VISIBLE)
    compiled = torch.compile(fast, fullgraph=True)
    for call in (fast, compiled, fast, compiled):
        fast.encoder.layer[0].attention.attention.query.weight.mul_(1.1)
        plain.encoder.layer[0].attention.attention.query.weight.mul_(1.1)
        check_same(plain(**arguments), call(**arguments), 1e-5)


def test_masked_calls_compute_visible_tokens_only():
    """Masked tubelets may hold anything, and no linear layer sees more rows than there are visible tokens."""
    _, fast, arguments = pair("model, last norm, masked")
    fast.eval()
    want = fast(**arguments).last_hidden_state
    bools, pixels = arguments["bool_masked_pos"], arguments["pixel_values"]
    tubelets = bools.view(BATCH, FRAMES // 2, SIZE[0] // 16, SIZE[1] // 16)
    covered = tubelets.repeat_interleave(2, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, None]
    got = fast(pixels.masked_fill(covered, float("nan")), bool_masked_pos=bools).last_hidden_state
    assert torch.equal(got, want) and want.shape[1] == VISIBLE

    rows = []
    with _Products(rows):
        fast(**arguments)
    assert rows and max(rows) == BATCH * VISIBLE


class _Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the rows of every matrix product with a weight."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.rows.append(args[-2].shape[0])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_keep_is_running_masking_in_its_test_form():
    plain, fast, arguments = pair("classifier, mean pooling, dense")
    plain, fast = plain.eval(), fast.eval()
    dense = plain(**arguments)
    # 3 x 2 x 4 tokens, the phase counted by hand: at time t the slots t and t + 1, of 4, are masked.
    slots = torch.tensor([[0, 1, 0, 1], [2, 3, 2, 3]])
    masked = torch.stack([((slots - time) % 4) < 2 for time in range(3)]).flatten().expand(BATCH, -1)
    assert torch.equal(masked, masking.cell_running(BATCH, (3, 2, 4), 0.5, phase=0).bool_masked())
    want = plain(**arguments, bool_masked_pos=masked)
    assert relative(want.logits, dense.logits) > 0.01
    with pytest.warns(UserWarning, match="keep=0.5.*50%.*accuracy drops"):
        mar_fast.accelerate(fast, keep=0.5)
    check_same(want, fast(**arguments), 1e-5)
    # A mask of the call goes before it; hidden states come from their own code, under the same mask.
    other = masked.flip(1)
    check_same(plain(**arguments, bool_masked_pos=other), fast(**arguments, bool_masked_pos=other), 1e-5)
    with pytest.warns(UserWarning, match="output_hidden_states"):
        states = fast(**arguments, output_hidden_states=True)
    check_same(want, transformers.modeling_outputs.ImageClassifierOutput(states.loss, states.logits), 1e-5)
    assert states.hidden_states[-1].shape[1] == TOKENS // 2
    check_same(dense, mar_fast.accelerate(fast, keep=1)(**arguments), 1e-5)


def test_keep_in_training_draws_a_mask_for_each_clip(monkeypatch):
    _, fast, arguments = pair("classifier, mean pooling, dense")
    with pytest.warns(UserWarning, match="keep=0.25"):
        mar_fast.accelerate(fast, keep=0.25)
    drawn = []
    original = TokenMask.from_bool_masked.__func__
    monkeypatch.setattr(
        TokenMask,
        "from_bool_masked",
        classmethod(lambda cls, *a, **k: drawn.append(original(cls, *a, **k)) or drawn[-1]),
    )
    fast.train()
    for _ in range(4):
        fast(**arguments).loss.backward()
    assert all(mask.keep_idx.shape == (BATCH, TOKENS // 4) for mask in drawn)
    assert len({tuple(row) for mask in drawn for row in mask.keep_idx.tolist()}) > 4


@pytest.mark.parametrize("case", ["model, last norm, masked", "classifier, mean pooling, dense"])
def test_dropout_is_drawn_as_theirs(case):
    """Not in pre-training, whose decoder has its tokens in another order: the same draws drop other values."""
    plain, fast, arguments = pair(case, hidden_dropout_prob=0.3)
    without = fast.eval()(**arguments)
    outputs = []
    for model in (plain, fast):
        torch.manual_seed(5)
        outputs.append(model.train()(**arguments))
    check_same(*outputs, 1e-5)
    name = list(without)[-1]
    assert relative(outputs[1][name], without[name]) > 0.01


@all_kinds
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(case, reentrant):
    plain, fast, arguments = pair(case)
    want = plain(**arguments)
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    layer = fast.encoder.layer[0] if hasattr(fast, "encoder") else fast.videomae.encoder.layer[0]
    function = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda *a, **k: calls.append(1) or function(*a, **k)
    got = fast(**arguments)
    assert calls
    check_same(want, got, 1e-5)
    check_gradients(plain, fast, want, got, 1e-5)
