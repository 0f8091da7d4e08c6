"""What must hold around the numbers of accelerated models: parameters, files, copies, caches, what is left to theirs."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from helpers import relative
from test_accelerate import TOKENS, all_kinds, check_same, pair
from test_huggingface import BATCH, CLASSES, build_theirs, randomise
from torch import nn

import mar_fast
from mar_fast import huggingface
from mar_fast.huggingface_forward import is_accelerated

transformers = pytest.importorskip("transformers")

MODEL, CLASSIFIER = "model, last norm, masked", "classifier, mean pooling, dense"
PRETRAINING = "pretraining, normalised target"


def first_attention(model):
    return getattr(model, "videomae", model).encoder.layer[0].attention.attention


def snapshot(model):
    """Everything of a model that may not change: classes, attributes, and the identity of what they hold."""
    return [
        (name, type(module), {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]


@all_kinds
def test_state_dict_is_the_same_and_restore_is_exact(case):
    _, model, arguments = pair(case)
    mar_fast.restore(model)
    before, tensors = snapshot(model), dict(model.state_dict(keep_vars=True))
    want = model(**arguments)
    for _ in range(2):  # a second time changes nothing more
        assert mar_fast.accelerate(model) is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors) and all(after[name] is tensors[name] for name in tensors)
    assert isinstance(model, type(want).__mro__[0]) or type(model).__name__ in str(before[0][1])
    with torch.no_grad():
        model.eval()(**arguments)  # fills what is kept between calls
    model.train()
    assert any(is_accelerated(module) for module in model.modules())
    for _ in range(2):
        assert mar_fast.restore(model) is model
    assert snapshot(model) == before
    got = model(**arguments)
    assert all(torch.equal(got[name], want[name]) for name in want)


@all_kinds
def test_save_and_load(case, tmp_path):
    plain, fast, arguments = pair(case)
    fast.save_pretrained(tmp_path / "fast")
    plain.save_pretrained(tmp_path / "plain")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    with mar_fast.patch_transformers():
        loaded = type(plain).from_pretrained(tmp_path / "fast", attn_implementation="eager")
    assert any(is_accelerated(module) for module in loaded.modules())
    check_same(plain.eval()(**arguments), loaded(**arguments), 1e-5)


@all_kinds
def test_copies_and_pickles(case):
    plain, fast, arguments = pair(case)
    plain, fast = plain.eval(), fast.eval()
    with torch.no_grad():
        want = plain(**arguments)
        fast(**arguments)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(file, weights_only=False)]
    kept = fast if is_accelerated(fast) else fast.videomae
    assert len(pickle.dumps(kept._mar_fast)) < 1000  # packed weights do not travel
    with torch.no_grad():
        first_attention(fast).query.weight.zero_()
        for other in copies:
            assert any(is_accelerated(module) for module in other.modules())
            check_same(want, other(**arguments), 1e-5)
            assert type(mar_fast.restore(other)) is type(plain)
            check_same(want, other(**arguments), 1e-5)


def _step(model):
    model(**pair(CLASSIFIER)[2]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


def _load(model):
    state = {name: tensor.flip(0) if tensor.ndim > 1 else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)


def _assign(model):
    model.load_state_dict({name: tensor.clone() * 1.1 for name, tensor in model.state_dict().items()}, assign=True)


def _round(model):
    model.to(torch.bfloat16).to(torch.float32)


def _write_data(model):
    """An optimizer of the old kind, between train() and eval()."""
    model.train()
    first_attention(model).value.weight.data.mul_(1.5)
    model.eval()


def _new_parameter(model):
    first_attention(model).key.weight = nn.Parameter(first_attention(model).key.weight.detach() * 1.5)


CHANGES = {
    "optimizer step": _step,
    "load_state_dict": _load,
    "load_state_dict, assign": _assign,
    "to another dtype and back": _round,
    "through .data in training": _write_data,
    "a new parameter": _new_parameter,
    "a bias": lambda model: nn.init.constant_(getattr(first_attention(model), "q_bias", first_attention(model).query.bias), 2),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_kept_weights_follow_changes(change):
    plain, fast, arguments = pair(CLASSIFIER)
    plain, fast = plain.eval(), fast.eval()
    with torch.no_grad():
        before = fast(**arguments)
    for model in (plain, fast):
        CHANGES[change](model)
    with torch.no_grad():
        want, got = plain(**arguments), fast(**arguments)
    check_same(want, got, 2e-5)
    assert relative(got.logits, before.logits) > 1e-4


@torch.no_grad()
def test_weights_are_packed_once_without_gradients(monkeypatch):
    _, fast, arguments = pair(MODEL)
    fast.eval()
    packed = []
    original = mar_fast.huggingface_layers._pack
    monkeypatch.setattr(mar_fast.huggingface_layers, "_pack", lambda sources: packed.append(1) or original(sources))
    for _ in range(3):
        fast(**arguments)
    assert len(packed) == len(fast.encoder.layer)
    with torch.enable_grad():
        fast(**arguments).last_hidden_state.sum().backward()
    assert first_attention(fast).key.weight.grad is not None


def test_position_tables_move_to_the_device_once():
    caches, source = mar_fast.huggingface_layers.Caches(), torch.randn(1, 6, 4)
    device = torch.device("meta")
    assert caches.table("encoder", source, source.device).data_ptr() == source.data_ptr()
    moved = caches.table("encoder", source, device)
    assert moved.device == device and moved.shape == (6, 4) and caches.table("encoder", source, device) is moved
    source.add_(1)
    assert caches.table("encoder", source, device) is not moved
    assert caches.table("encoder", source.clone(), device) is not moved


# What is left to transformers' own code: a change of the model, arguments of the call, what the warning says.
OWN = {
    "hidden states": (MODEL, None, {"output_hidden_states": True}, "output_hidden_states"),
    "hidden states by index": (MODEL, None, {"output_hidden_states": 0}, "output_hidden_states"),
    "attentions": (MODEL, None, {"output_attentions": True}, "output_attentions"),
    "hidden states in pre-training": (PRETRAINING, None, {"output_hidden_states": True}, "output_hidden_states"),
    "hidden states by the config": (
        MODEL, lambda model: setattr(model.config, "output_hidden_states", True), {}, "output_hidden_states",
    ),
    "another argument": (MODEL, None, {"head_mask": torch.ones(3)}, "head_mask"),
    "hook on a layer": (
        MODEL, lambda model: model.encoder.layer[1].register_forward_hook(lambda m, a, out: out * 1.5), {}, "layers",
    ),
    "hook within a layer": (
        MODEL,
        lambda model: first_attention(model).value.register_forward_pre_hook(lambda m, a: (a[0] * 1.5,)), {}, "layers",
    ),
    "an adapter": (
        MODEL, lambda model: setattr(first_attention(model), "query", Adapter(first_attention(model).query)), {}, "layers",
    ),
    "another forward": (
        MODEL, lambda model: setattr(model.encoder.layer[0].output, "forward", lambda a, b: a.mean() + b), {}, "layers",
    ),
    "hook on the encoder": (
        MODEL,
        lambda model: model.encoder.register_forward_pre_hook(lambda m, a: (a[0] * 1.5,)), {}, "encoder",
    ),
    "hook on the projection": (
        MODEL,
        lambda model: model.embeddings.patch_embeddings.projection.register_forward_hook(lambda m, a, out: out * 1.5),
        {}, "embeddings",
    ),
    "hook on the decoder": (
        PRETRAINING, lambda model: model.decoder.norm.register_forward_hook(lambda m, a, out: out * 1.5), {}, "decoder",
    ),
    "hook on the last decoder layer": (
        PRETRAINING,
        lambda model: model.decoder.decoder_layers[-1].register_forward_hook(lambda m, a, out: out * 1.5), {}, "layers",
    ),
    "hook on the model within": (
        PRETRAINING,
        lambda model: model.videomae.register_forward_pre_hook(lambda m, a: (a[0] * 1.5,)), {}, "videomae",
    ),
}  # fmt: skip


class Adapter(nn.Module):
    """As LoRA puts it in place of a linear layer, with the weight of that still to be read."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + 0.5 * x


@pytest.mark.parametrize("case", OWN)
def test_what_is_left_to_their_own_code(case):
    kind, change, extra, said = OWN[case]
    plain, fast, arguments = pair(kind)
    untouched = plain(**arguments)
    if change is not None:
        for model in (plain, fast):
            change(model)
    want = plain(**arguments, **extra)
    with pytest.warns(UserWarning, match=said) as record:
        got = fast(**arguments, **extra)
    assert len(record) == 1 and list(got.keys()) == list(want.keys())
    for name in want:
        values = (got[name], want[name]) if torch.is_tensor(want[name]) else (got[name][-1], want[name][-1])
        assert relative(*values) <= 1e-5
    if change is not None and not extra and "hidden" not in case:
        assert relative(want[next(iter(want))], untouched[next(iter(want))]) > 1e-3
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        fast(**arguments, **extra)


def test_attentions_and_hidden_states_then_fast_again():
    """What transformers leaves on a model to record hidden states does not slow later calls down."""
    plain, fast, arguments = pair(MODEL)
    asked = dict(output_attentions=True, output_hidden_states=True)
    want = plain(**arguments, **asked)
    with pytest.warns(UserWarning, match="output_hidden_states"):
        got = fast(**arguments, **asked)
    for name in ("hidden_states", "attentions"):
        assert len(got[name]) == len(want[name]) > 0
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got[name], want[name], strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same(plain(**arguments), fast(**arguments), 1e-5)


def test_attention_dropout_is_left_to_them_in_training_only():
    plain, fast, arguments = pair(MODEL, attention_probs_dropout_prob=0.4)
    outputs = []
    with pytest.warns(UserWarning, match="attention_probs_dropout_prob"):
        for model in (plain, fast):
            torch.manual_seed(3)
            outputs.append(model.train()(**arguments))
    check_same(*outputs, 1e-5)
    plain, fast, _ = pair(MODEL, attention_probs_dropout_prob=0.4)
    check_same(plain.eval()(**arguments), fast.eval()(**arguments), 1e-5)


@pytest.mark.parametrize("act", ["gelu_new", "relu", nn.GELU()], ids=["gelu_new", "relu", "module"])
def test_other_activations(act):
    plain, fast, arguments = pair(MODEL)
    for model in (plain, fast):
        for layer in model.encoder.layer:
            layer.intermediate.intermediate_act_fn = (
                transformers.activations.ACT2FN[act] if isinstance(act, str) else act
            )
    check_same(plain(**arguments), fast(**arguments), 1e-5)


def test_without_biases_of_queries_and_values():
    option = "qv_bias" if hasattr(transformers.VideoMAEConfig(), "qv_bias") else "qkv_bias"
    plain, fast, arguments = pair(MODEL, **{option: False})
    assert getattr(first_attention(fast), "q_bias", None) is None and first_attention(fast).query.bias is None
    check_same(plain(**arguments), fast(**arguments), 1e-5)


def test_tuples():
    plain, fast, arguments = pair(PRETRAINING)
    want, got = (model(**arguments, return_dict=False) for model in (plain, fast))
    assert type(got) is tuple and len(got) == len(want) == 2 and relative(got[1], want[1]) <= 1e-5
    _, fast, arguments = pair(MODEL)
    assert type(fast(**arguments, return_dict=False)) is tuple


def test_a_number_of_visible_tokens():
    plain, fast, arguments = pair(MODEL)
    with pytest.raises(ValueError, match=r"num_visible: got 9, expected 10"):
        fast(**arguments, num_visible=9)
    mar_fast.accelerate(fast, num_visible=9)
    with pytest.raises(ValueError, match=r"num_visible: got 9, expected 10"):
        fast(**arguments)
    check_same(plain(**arguments), fast(**arguments, num_visible=10), 1e-5)


@all_kinds
def test_trainer_takes_two_steps(case, tmp_path):
    """The same losses as without mar_fast, and weights that have moved to the same place."""
    pytest.importorskip("accelerate")
    plain, fast, arguments = pair(case)
    if case == MODEL:
        pytest.skip("it has no loss")
    rows = [{name: value[row] for name, value in arguments.items()} for row in range(BATCH)] * 2
    found = []
    for model in (plain, fast):
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=4,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=options, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 2
        metrics = trainer.evaluate(rows)
        trainer.save_model(str(tmp_path / "saved"))
        found.append((losses + [metrics.get("eval_loss", 0.0)], model))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    for name, parameter in fast.named_parameters():
        # Adam's step of a gradient near 0 is rounding: few values, but whole steps.
        assert relative(parameter, dict(plain.named_parameters())[name]) <= 1e-3, name


def test_patch_transformers_is_scoped():
    kinds = [getattr(transformers, name) for name in huggingface._NAMES]
    before = [dict(vars(kind)) for kind in kinds]
    config = build_theirs("VideoMAEForPreTraining", "base", torch.float32, final_norm=True)[0].config

    class Subclass(transformers.VideoMAEModel):
        pass

    with pytest.raises(KeyError), mar_fast.patch_transformers():
        with mar_fast.patch_transformers():
            pass
        for kind in kinds:
            model = kind(config)
            assert any(is_accelerated(module) for module in model.modules()) and isinstance(model, kind)
            assert type(mar_fast.restore(model)) is kind
        assert not is_accelerated(Subclass(config))
        assert is_accelerated(transformers.AutoModel.from_config(config))
        raise KeyError
    assert [dict(vars(kind)) for kind in kinds] == before
    assert not any(is_accelerated(module) for kind in kinds for module in kind(config).modules())


@pytest.mark.parametrize("version", ["5.4.2", "5.5.0", "5.17.1", "5.18.0"])
def test_lost_biases_are_said(tmp_path, monkeypatch, version):
    model = build_theirs("VideoMAEForVideoClassification", "base", torch.float32, final_norm=False)[0]
    for layer in model.videomae.encoder.layer:
        for part in (layer.attention.attention.query, layer.attention.attention.value):
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    if first_attention(model).query.bias is None:
        pytest.skip("this version of transformers has no such biases, and does not lose them")
    loses = version in ("5.5.0", "5.17.1")
    for call in (lambda: mar_fast.accelerate(model), lambda: _patched(type(model), tmp_path)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            monkeypatch.setattr(transformers, "__version__", version)
            call()
        assert [f"transformers {version} loses" in str(one.message) for one in said] == [True] * loses
    # One bias that is not 0, or a model that comes from no file, is nothing to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mar_fast.accelerate(type(mar_fast.restore(model))(model.config.__class__()))
        nn.init.ones_(model.videomae.encoder.layer[-1].attention.attention.value.bias)
        mar_fast.accelerate(model)


def _patched(kind, path):
    with mar_fast.patch_transformers():
        return kind.from_pretrained(path)


class TestAttentionImplementation:
    def build(self, **options):
        mar_fast.register_attention()
        plain, *_ = build_theirs("VideoMAEForVideoClassification", "base", torch.float64, final_norm=False, **options)
        other = copy.deepcopy(plain)
        other.set_attn_implementation("mar_fast")
        assert other.config._attn_implementation == "mar_fast"
        return plain, other, torch.randn(2, 6, 3, 32, 64, dtype=torch.float64)

    def test_values_and_gradients(self, monkeypatch):
        plain, other, pixels = self.build()
        calls = []
        monkeypatch.setattr(
            huggingface, "attention", lambda *a, **k: calls.append(1) or mar_fast.kernels.attention(*a, **k)
        )
        want, got = plain(pixels), other(pixels)
        assert len(calls) == len(plain.videomae.encoder.layer)
        check_same(want, got, 1e-11)
        for output in (want, got):
            output.logits.square().sum().backward()
        for theirs, ours in zip(plain.parameters(), other.parameters(), strict=True):
            assert relative(ours.grad, theirs.grad) <= 1e-11

    def test_dropout_is_refused(self):
        _, other, pixels = self.build(attention_probs_dropout_prob=0.2)
        other.eval()(pixels)
        with pytest.raises(ValueError, match="attn_implementation='mar_fast': dropout: got 0.2, expected 0"):
            other.train()(pixels)

    def test_padding_is_refused_not_ignored(self):
        mar_fast.register_attention()
        model = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                attn_implementation="mar_fast",
            )
        ).eval()  # fmt: skip
        tokens = torch.randint(20, (2, 5))
        plain = copy.deepcopy(model)
        plain.set_attn_implementation("eager")
        assert relative(model(tokens).last_hidden_state, plain(tokens).last_hidden_state) <= 1e-5
        padding = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        with pytest.raises(ValueError, match="attn_implementation='mar_fast': attention_mask: got a mask"):
            model(tokens, attention_mask=padding)

    @pytest.mark.parametrize("name", ["softcap", "sliding_window", "position_bias", "output_attentions"])
    def test_what_it_does_not_do_is_refused(self, name):
        part = torch.randn(1, 2, 4, 8)
        with pytest.raises(ValueError, match=f"{name}: got a value, expected None"):
            huggingface._attention(nn.Module(), part, part, part, None, **{name: 3})

    def test_shapes(self):
        part = torch.randn(1, 2, 4, 8)
        with pytest.raises(ValueError, match="is_causal: got True"):
            huggingface._attention(nn.Module(), part, part, part, None, is_causal=True)
        with pytest.raises(ValueError, match=re.escape("key: got (1, 1, 4, 8), expected (1, 2, 4, 8)")):
            huggingface._attention(nn.Module(), part, part[:, :1], part[:, :1], None)


def call(case, **changes):
    _, fast, arguments = pair(case)
    fast.eval()
    return fast(**{**arguments, **changes})


def uneven():
    masked = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    masked[0, :3], masked[1:, :2] = True, True
    return masked


# call, error, what the message must contain
BAD_CALLS = {
    "not a model": (lambda: mar_fast.accelerate(nn.Linear(2, 2)), TypeError, "model: got Linear, expected VideoMAEModel"),
    "a compiled model": (
        lambda: mar_fast.accelerate(torch.compile(pair(MODEL)[0])), TypeError, "model: got OptimizedModule",
    ),
    "restore": (lambda: mar_fast.restore("x"), TypeError, "model: got str"),
    "keep of a model": (
        lambda: mar_fast.accelerate(pair(MODEL)[0], keep=0.5), ValueError, "keep: got 0.5 for VideoMAEModel",
    ),
    "keep without pooling": (
        lambda: mar_fast.accelerate(pair("classifier, first token, dense")[0], keep=0.5), ValueError,
        "keep: got 0.5 for VideoMAEForVideoClassification, expected None",
    ),
    "keep off the cell": (
        lambda: mar_fast.accelerate(pair(CLASSIFIER)[0], keep=0.3), ValueError, "keep: got 0.3, .*0.25, 0.5, 0.75, 1.0",
    ),
    "keep nothing": (lambda: mar_fast.accelerate(pair(CLASSIFIER)[0], keep=0), ValueError, "keep: got 0, expected"),
    "keep, odd grid": (
        lambda: mar_fast.accelerate(
            transformers.VideoMAEForVideoClassification(
                transformers.VideoMAEConfig(image_size=48, num_hidden_layers=0, hidden_size=12)
            ), keep=0.5,
        ), ValueError, "keep: got 0.5, expected None: cells of 2 x 2 patches do not fill a grid of 3 x 3",
    ),
    "num_visible": (
        lambda: mar_fast.accelerate(pair(MODEL)[0], num_visible=25), ValueError, "num_visible: got 25, .*from 1 to 24",
    ),
    "num_visible without a mask": (
        lambda: call(CLASSIFIER, num_visible=3), ValueError, "num_visible: got 3, expected None",
    ),
    "uint8": (
        lambda: call(MODEL, pixel_values=torch.zeros(BATCH, 6, 3, 32, 64, dtype=torch.uint8)), TypeError,
        "pixel_values: got torch.uint8, expected float32",
    ),
    "channels first": (
        lambda: call(MODEL, pixel_values=torch.zeros(BATCH, 3, 6, 32, 64)), ValueError,
        re.escape("pixel_values: got shape (3, 3, 6, 32, 64), expected (3, 3, 3, 32, 64)"),
    ),
    "frames": (
        lambda: call(MODEL, pixel_values=torch.zeros(BATCH, 8, 3, 32, 64)), ValueError,
        "pixel_values: got 8 frames, 32 tokens, expected 24 tokens",
    ),
    "mask of numbers": (
        lambda: call(MODEL, bool_masked_pos=torch.zeros(BATCH, TOKENS)), TypeError, "bool_masked_pos: got torch.float32",
    ),
    "mask of another size": (
        lambda: call(MODEL, bool_masked_pos=uneven()[:, 1:]), ValueError, r"bool_masked_pos: got shape \(3, 23\)",
    ),
    "uneven mask": (
        lambda: call(MODEL, bool_masked_pos=uneven()), ValueError,
        "bool_masked_pos: got clips with 21 to 22 visible tokens, expected the same in every clip",
    ),
    "everything masked": (
        lambda: call(MODEL, bool_masked_pos=torch.ones(BATCH, TOKENS).bool()), ValueError,
        "bool_masked_pos: got no visible token",
    ),
    "nothing to reconstruct": (
        lambda: call(PRETRAINING, bool_masked_pos=torch.zeros(BATCH, TOKENS).bool()), ValueError,
        "bool_masked_pos: got no masked token",
    ),
    "pre-training without a mask": (
        lambda: call(PRETRAINING, bool_masked_pos=None), TypeError, "bool_masked_pos: got None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    run, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize("entry", ["accelerate", "patch_transformers", "register_attention"])
def test_old_transformers_are_refused(monkeypatch, entry):
    model = pair(MODEL)[0]
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"transformers: got 4\.57\.6, expected 5\.0 or newer"):
        if entry == "accelerate":
            mar_fast.accelerate(model)
        elif entry == "register_attention":
            mar_fast.register_attention()
        else:
            with mar_fast.patch_transformers():
                pass


def test_odd_sizes_go_through_their_convolution():
    """What is over at the edges of a clip is left out by it."""
    config = transformers.VideoMAEConfig(
        image_size=(40, 50),
        num_frames=5,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=CLASSES,
    )
    plain = transformers.VideoMAEForVideoClassification(config)
    randomise(plain, torch.Generator().manual_seed(0))
    fast = mar_fast.accelerate(copy.deepcopy(plain))
    pixels = torch.randn(2, 5, 3, 40, 50)
    with pytest.warns(UserWarning, match="odd sizes"):
        check_same(plain(pixels), fast(pixels), 1e-5)
