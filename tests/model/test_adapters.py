"""Adapters, hooks and other changes of a layer of MAR: what its module computes counts, and one warning says so.

The expected values are those of an unchanged model: each change doubles what its layer gives, as twice the weight does.
"""

import copy
import functools
import warnings

import pytest
import torch
from helpers import relative, small_config
from torch import nn
from torch.nn.utils import parametrize

import mar_fast
from mar_fast import TokenMask, masking
from mar_fast.kernels import device

CONFIG = small_config(bridge_depth=1, decoder_depth=1)
LAYERS = [
    *(f"encoder.{name}" for name in ("patch_embed.proj", "norm", "blocks.0.norm1", "blocks.1.norm2")),
    *(f"encoder.blocks.{name}" for name in ("1.attn.qkv", "0.attn.proj", "0.mlp.fc1", "1.mlp.fc2")),
    *(f"classifier.{name}" for name in ("proj", "norm", "head", "blocks.0.attn.qkv")),
    *(f"decoder.{name}" for name in ("norm", "head", "blocks.0.attn.qkv", "blocks.0.norm2")),
    "encoder_to_decoder",
]
# These are called as modules in any case.
CALLED = ("attn.proj", "fc2", "classifier.proj", "classifier.norm", "head", "encoder_to_decoder")
CLIPS = torch.randint(0, 256, (2, 3, 4, 64, 64), dtype=torch.uint8)
DROPPED = torch.arange(32).view(1, -1) % 3 == torch.tensor([[0], [1]])
MASKS = {"equal": masking.random(2, CONFIG.grid, 0.5), "ragged": TokenMask.ragged(DROPPED, CONFIG.grid)}


class Doubled(nn.Module):
    """As PEFT wraps a layer, whose weight can still be read."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return 2 * self.base_layer(x)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _wrap(model, name):
    part, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(part), attribute, Doubled(model.get_submodule(name)))


def _subclass(model, name):
    layer = model.get_submodule(name)
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


def _parametrize(model, name):
    layer = model.get_submodule(name)
    for parameter in list(layer._parameters):
        if getattr(layer, parameter) is not None:
            parametrize.register_parametrization(layer, parameter, Twice())


def _replace_forward(model, name):
    layer = model.get_submodule(name)
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)


CHANGES = {
    "adapter": _wrap,
    "forward hook": lambda model, name: model.get_submodule(name).register_forward_hook(lambda m, a, out: 2 * out),
    "subclass": _subclass,
    "parametrization": _parametrize,
    "forward": _replace_forward,
}


def build():
    torch.manual_seed(0)
    model = mar_fast.MAR(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def double(model, *names):
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            parameter.mul_(2)
    return model


def close(got, want, tolerance=1e-5):
    pairs = [pair for pair in zip(got, want, strict=True) if pair[1] is not None and pair[1].is_floating_point()]
    return all(relative(*pair) <= tolerance for pair in pairs)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mask", MASKS)
def test_a_changed_layer(change, mask):
    plain, call = build(), functools.partial(mar_fast.MAR.__call__, video=CLIPS, mask=MASKS[mask], reconstruct=True)
    before = call(plain)
    for name in LAYERS:
        changed, expected = copy.deepcopy(plain), double(copy.deepcopy(plain), name)
        CHANGES[change](changed, name)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            got, _ = call(changed), call(changed)
        want = call(expected)
        assert close(got, want) and not close(got, before, 1e-3), name
        kind = "a patch embedding" if "patch_embed" in name else "layers"
        texts = [str(one.message) for one in said]
        assert texts == [f"mar_fast: each module's own code runs {kind} with hooks or changed parts"] * (
            not name.endswith(CALLED)
        )
        got.logits.sum().backward()
        want.logits.sum().backward()
        weights = [model.encoder.blocks[0].norm1.bias for model in (changed, expected) if "norm1" not in name]
        assert not weights or relative(*(weight.grad for weight in weights)) < 1e-4, name


def test_floating_point_clips_and_another_stride():
    """A convolution of other steps has its say, too, and a Linear with a bias where the model has one of its own."""
    plain, changed = build(), build()
    CHANGES["adapter"](changed, "encoder.patch_embed.proj")
    clips = torch.randn(CLIPS.shape)
    with pytest.warns(UserWarning, match="a patch embedding"):
        assert close(changed(clips), double(plain, "encoder.patch_embed.proj")(clips))
    plain, changed = build(), build()
    with torch.no_grad():
        attention = changed.encoder.blocks[0].attn
        attention.qkv.bias = nn.Parameter(torch.cat((attention.q_bias, attention.k_bias.value, attention.v_bias)))
        for model, factor in ((changed, 0), (plain, 1)):
            model.encoder.blocks[0].attn.q_bias.mul_(factor)
            model.encoder.blocks[0].attn.v_bias.mul_(factor)
        changed.encoder.patch_embed.proj.stride = (2, 16, 14)
    with pytest.warns(UserWarning, match="a patch embedding"):
        changed(CLIPS)
    changed.encoder.patch_embed.proj.stride = (2, 16, 16)
    assert close(changed(CLIPS), plain(CLIPS))


def test_hooks_of_every_part_are_called():
    model, called = build(), []
    names = [name for name, part in model.named_modules() if name and not isinstance(part, nn.ModuleList)]
    names = [name for name in names if type(model.get_submodule(name)) is not mar_fast.layers.Constant]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    with pytest.warns(UserWarning, match="each module's own code"):
        model(CLIPS, reconstruct=True)
    assert sorted(called) == sorted(names)


def test_changes_of_all_layers_of_a_class(monkeypatch):
    """A forward that is replaced in the class, under its old name too, and hooks of all modules."""
    plain = build()
    want = double(build(), *(name for name, part in plain.named_modules() if type(part) is nn.Linear))(CLIPS)
    original = nn.Linear.forward

    @functools.wraps(original)
    def forward(self, x):
        return 2 * original(self, x)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="layers"):
        patch.setattr(nn.Linear, "forward", forward)
        assert close(plain(CLIPS), want)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: 2 * out if type(module) is nn.Linear else None
    )
    try:
        with pytest.warns(UserWarning, match="layers"):
            got = copy.deepcopy(plain)(CLIPS)
    finally:
        hook.remove()
    assert close(got, want)
    with torch.utils.flop_counter.FlopCounterMode(display=False):  # its hooks only look on: no warning
        plain(CLIPS)


def test_the_own_forward_put_back_is_no_change():
    model = build()
    for part in model.modules():
        part.forward = part.forward
    assert close(model(CLIPS), build()(CLIPS), 0)
    copied = copy.deepcopy(model)
    copied.encoder.norm.forward = model.encoder.norm.forward  # another module's
    with pytest.warns(UserWarning, match="layers"):
        copied(CLIPS)


def test_dynamic_quantisation():
    quantised = torch.ao.quantization.quantize_dynamic(build(), {nn.Linear}, dtype=torch.qint8)
    with pytest.warns(UserWarning, match="layers"):
        got = quantised(CLIPS, reconstruct=True)
    assert not close(got, build()(CLIPS, reconstruct=True), 1e-4)
    assert close(got[:1], build()(CLIPS)[:1], 0.1)


@pytest.mark.parametrize("targets", [["qkv"], ["proj"], ["fc1", "fc2"], "all-linear"], ids=str)
def test_lora_of_peft(targets):
    """As its own merging into plain layers gives it; every adapter is trained."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(build(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model(CLIPS, mask=MASKS["equal"], reconstruct=True)
    (got.logits.sum() + got.reconstruction_loss).backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(grad is not None and grad.any() for grad in trained)
    merged = model.merge_and_unload()
    assert close(got, merged(CLIPS, mask=MASKS["equal"], reconstruct=True)) and not close(got, build()(CLIPS), 1e-3)


@pytest.mark.compiles
@pytest.mark.parametrize("how", ["compile", "compile_for_inference", "export"])
def test_in_a_graph(how):
    names = ["encoder.patch_embed.proj", "encoder.norm", "encoder.blocks.0.norm1", "classifier.blocks.0.attn.qkv"]
    names += ["encoder.blocks.1.attn.qkv", "encoder.blocks.0.mlp.fc1"]
    changed, want = build(), double(build(), *names)
    for name, change in zip(names, [_wrap, *CHANGES.values()], strict=True):
        change(changed, name)
    torch.compiler.reset()
    with pytest.warns(UserWarning) as said, torch.no_grad():
        if how == "export":
            run = torch.export.export(changed, (CLIPS,), strict=True).module()
        else:
            run = {"compile": functools.partial(torch.compile, fullgraph=True)}.get(
                how, lambda model: mar_fast.compile_for_inference(model, CLIPS)
            )(changed)
        got = [run(CLIPS) for _ in range(2)]
    assert sum("mar_fast: each module's own code" in str(one.message) for one in said) == 2
    assert all(relative(one.logits, want(CLIPS).logits) < 1e-5 for one in got)


PARTS = ("attn.proj", "mlp.fc2")
BLOCKS = {f"encoder.blocks.{number}.{part}" for number in (0, 1) for part in PARTS}


def _freeze(model, name):
    model.get_submodule(name).bias.requires_grad_(False)


def _hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda *_: None)


def _dropout(model, name):
    model.get_submodule(name).dropout = 0.1


# Which biases the next norm adds after a change: those of the encoder but for these.
DEFERRED = {
    "nothing": (lambda model, name: None, "encoder", set()),
    "a hook of a linear layer": (_hook, "encoder.blocks.0.attn.proj", {"encoder.blocks.0.attn.proj"}),
    "a hook of a part": (_hook, "encoder.blocks.1.mlp", {"encoder.blocks.1.mlp.fc2"}),
    # FSDP2's frees the weights of the block, which its last bias would leave.
    "a hook of a block": (_hook, "encoder.blocks.0", {"encoder.blocks.0.mlp.fc2"}),
    "another part": (_subclass, "encoder.blocks.1.mlp", {"encoder.blocks.1.mlp.fc2"}),
    "an adapter": (_wrap, "encoder.blocks.1.attn.proj", {"encoder.blocks.1.attn.proj"}),
    "dropout of a block": (_dropout, "encoder.blocks.1", {f"encoder.blocks.1.{part}" for part in PARTS}),
    "no gradient": (_freeze, "encoder.blocks.0.mlp.fc2", {"encoder.blocks.0.mlp.fc2"}),
}


@pytest.mark.parametrize(("change", "name", "kept"), DEFERRED.values(), ids=DEFERRED)
def test_biases_are_left_to_the_next_norm(change, name, kept, monkeypatch):
    """On the Triton path in training, here stubbed, but for layers whose own code must run."""
    launch = pytest.importorskip("mar_fast.kernels.jit.launch")
    model, seen, norm = build().train(), [], mar_fast.layers.add_layer_norm
    biases = {id(model.get_submodule(layer).bias): layer for layer in BLOCKS}
    monkeypatch.setattr(
        mar_fast.layers, "add_layer_norm", lambda *a, **o: (seen.append(id(o["x_bias"])), norm(*a, **o))[1]
    )
    change(model, name)

    def deferred():
        seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.encoder(CLIPS, MASKS["equal"].keep_idx)
        return {biases[one] for one in seen if one in biases}

    with launch.stubbed():
        assert deferred() == BLOCKS - kept
        with torch.no_grad():
            assert not deferred()
    if not device.INTERPRETING:
        assert not deferred()
