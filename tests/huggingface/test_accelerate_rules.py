"""What must hold around the numbers of accelerated models: parameters, files, copies, kept weights, training."""

import copy
import io
import pickle
import sys
import warnings

import pytest
import torch
from helpers import relative
from test_accelerate import all_kinds, check_same, pair
from test_huggingface import BATCH, build_theirs
from torch import nn

import mar_fast
from mar_fast.huggingface import dropin
from mar_fast.huggingface.forward import is_accelerated

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
    model, _, arguments = pair(case)
    before, tensors = snapshot(model), dict(model.state_dict(keep_vars=True))
    want = model(**arguments)
    for _ in range(2):  # a second time changes nothing more
        assert mar_fast.accelerate(model) is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors) and all(after[name] is tensors[name] for name in tensors)
    assert isinstance(model, before[0][1]) and str(type(model)) == str(before[0][1])
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


def _fused_step(model):
    """In eval mode, as from_pretrained leaves a model; a fused optimizer changes weights and counts no version."""
    model(**pair(CLASSIFIER)[2]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()
    model.zero_grad()


def _write_data(model):
    """An optimizer of the old kind, between train() and eval()."""
    model.train()
    first_attention(model).value.weight.data.mul_(1.5)
    model.eval()


def _new_parameter(model):
    first_attention(model).key.weight = nn.Parameter(first_attention(model).key.weight.detach() * 1.5)


def _bias(model):
    attention = first_attention(model)
    nn.init.constant_(attention.q_bias if hasattr(attention, "q_bias") else attention.query.bias, 2)


CHANGES = {
    "optimizer step": _step,
    "fused optimizer step": _fused_step,
    "load_state_dict": _load,
    "load_state_dict, assign": _assign,
    "to another dtype and back": _round,
    "through .data in training": _write_data,
    "a new parameter": _new_parameter,
    "a bias": _bias,
}


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
def test_weights_in_shared_memory_are_not_kept():
    """Another process may write to them; its changes are not counted here. A NumPy view stands for that process."""
    plain, fast, arguments = pair(CLASSIFIER)
    plain, fast = plain.eval(), fast.eval()
    fast.share_memory()
    before = fast(**arguments)
    for model in (plain, fast):
        first_attention(model).key.weight.numpy()[:] *= 1.5
    got = fast(**arguments)
    check_same(plain(**arguments), got, 2e-5)
    assert relative(got.logits, before.logits) > 1e-4


@torch.no_grad()
def test_weights_are_packed_once_without_gradients(monkeypatch):
    _, fast, arguments = pair(MODEL)
    fast.eval()
    packed = []
    original = mar_fast.huggingface.layers._pack
    monkeypatch.setattr(mar_fast.huggingface.layers, "_pack", lambda *sources: packed.append(1) or original(*sources))
    for _ in range(3):
        fast(**arguments)
    assert len(packed) == len(fast.encoder.layer)
    with torch.enable_grad():
        fast(**arguments).last_hidden_state.sum().backward()
    assert first_attention(fast).key.weight.grad is not None


def test_position_tables_move_to_the_device_once():
    state, source = mar_fast.huggingface.layers.State(), torch.randn(1, 6, 4)
    device = torch.device("meta")
    assert state.table("encoder", source, source.device).data_ptr() == source.data_ptr()
    moved = state.table("encoder", source, device)
    assert moved.device == device and moved.shape == (6, 4) and state.table("encoder", source, device) is moved
    source.add_(1)
    assert state.table("encoder", source, device) is not moved
    assert state.table("encoder", source.clone(), device) is not moved


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


@pytest.mark.parametrize("case", [CLASSIFIER, PRETRAINING], ids=["classifier", "pretraining"])
def test_trainer_takes_two_steps(case, tmp_path):
    """The same losses as without mar_fast, and weights that have moved alike."""
    pytest.importorskip("accelerate")
    plain, fast, arguments = pair(case)
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
        found.append(([*losses, metrics.get("eval_loss", 0.0)], model))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    for name, parameter in fast.named_parameters():
        # Adam's step of a gradient near 0 is rounding: few values, but whole steps.
        assert relative(parameter, dict(plain.named_parameters())[name]) <= 1e-3, name


def test_patch_transformers_is_scoped():
    kinds = [getattr(transformers, name) for name in dropin._NAMES]
    config = build_theirs("VideoMAEForPreTraining", "base", torch.float32, final_norm=True).config
    before = [dict(vars(type(kind(config)))) for kind in kinds]  # the first model leaves something in its class

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


def test_patch_transformers_in_contexts_that_overlap():
    """As in two threads: the first to come is the first to go, and the second still holds."""
    kind = transformers.VideoMAEModel
    config = pair(MODEL)[0].config
    before = dict(vars(kind))
    first, second = mar_fast.patch_transformers(), mar_fast.patch_transformers()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_accelerated(kind(config))
    second.__exit__(None, None, None)
    assert dict(vars(kind)) == before and not is_accelerated(kind(config))


@pytest.mark.parametrize("case", [MODEL, PRETRAINING], ids=["model", "pretraining"])
def test_the_class_of_an_accelerated_model_builds_others(case, tmp_path):
    plain, fast, arguments = pair(case)
    fast.save_pretrained(tmp_path)
    config = copy.deepcopy(fast.config)
    config._attn_implementation = "eager"
    built = type(fast)(config)
    built.load_state_dict(fast.state_dict())
    want = plain.eval()(**arguments)
    for other in (built.eval(), type(fast).from_pretrained(tmp_path)):
        with warnings.catch_warnings():  # of parts that were left as they are
            warnings.simplefilter("error")
            check_same(want, other(**arguments), 1e-5)
        assert type(mar_fast.restore(other)) is type(plain)


@pytest.mark.parametrize("version", ["5.4.2", "5.5.0", "5.17.1", "5.18.0"])
def test_lost_biases_are_said(tmp_path, monkeypatch, version):
    model = build_theirs("VideoMAEForVideoClassification", "base", torch.float32, final_norm=False)
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
            monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
            call()
        assert [f"transformers {version} loses" in str(one.message) for one in said] == [True] * loses
    # One bias that is not 0, or a model that comes from no file, is nothing to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = transformers.VideoMAEConfig(hidden_size=12, num_hidden_layers=1)
        mar_fast.accelerate(type(mar_fast.restore(model))(small))
        nn.init.ones_(model.videomae.encoder.layer[-1].attention.attention.value.bias)
        mar_fast.accelerate(model)


def _patched(kind, path):
    with mar_fast.patch_transformers():
        return kind.from_pretrained(path)
