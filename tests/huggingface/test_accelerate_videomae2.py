"""accelerate on VideoMAE v2's class of the hub, stood in for by a plain one: the same calls, outputs and gradients."""

import copy
import pickle
import warnings

import pytest
import torch
from checkpoint_cases import clip
from helpers import relative
from torch import nn
from videomae2_cases import Block, VideoMAEv2, v2_model

import mar_fast
from mar_fast import MAR, accelerate, reference, restore
from mar_fast.huggingface.forward import is_accelerated

CLASSES = pytest.mark.parametrize("classes", [0, 7])


def fast_and_plain(**changes):
    plain = v2_model(**changes)
    return accelerate(copy.deepcopy(plain)), plain


@CLASSES
@pytest.mark.parametrize("training", [False, True])
def test_same_outputs_and_gradients(classes, training):
    fast, plain = (model.double().train(training) for model in fast_and_plain(num_classes=classes))
    assert type(fast).__name__ == "VideoMAEv2" and isinstance(fast, VideoMAEv2) and is_accelerated(fast)
    video = clip().double()
    got, want = fast(video), plain(pixel_values=video)
    assert got.shape == want.shape == (2, classes or 96) and relative(got, want) <= 1e-11
    for out in (got, want):
        out.square().sum().backward()
    theirs = dict(plain.named_parameters())
    assert theirs.keys() == dict(fast.named_parameters()).keys() == fast.state_dict().keys()
    for name, parameter in fast.named_parameters():
        assert relative(parameter.grad, theirs[name].grad) <= 1e-9, name


def test_it_is_mar_fast_that_runs(monkeypatch):
    fast, _ = fast_and_plain()
    calls, forward = [], MAR.forward
    monkeypatch.setattr(MAR, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    with torch.no_grad():
        fast(clip()), fast(pixel_values=clip())
    assert len(calls) == 2


def test_keep():
    """Half of the tokens: the reference's running mask, on the same weights."""
    plain = v2_model(num_classes=7)
    with pytest.warns(UserWarning, match=r"keep=0.5: cell running masking hides 50%"):
        fast = accelerate(copy.deepcopy(plain), keep=0.5)
    mar = fast._mar_fast.mar(fast)
    slow = reference.MAR(mar.config).eval()
    slow.load_state_dict(mar.state_dict())
    with torch.no_grad():
        assert mar.config.mask_ratio == 0.5 and relative(fast(clip()), slow(clip()).logits) <= 1e-5
        assert relative(fast(clip()), plain(clip())) > 1e-2
        assert relative(accelerate(fast)(clip()), plain(clip())) <= 1e-5  # new options


def test_restore_copy_and_pickle():
    fast, plain = fast_and_plain()
    with torch.no_grad():
        want = plain(clip())
        for model in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert is_accelerated(model) and relative(model(clip()), want) <= 1e-5
            first, second = next(model.parameters()), next(model._mar_fast.mar(model).parameters())
            assert first is second and first is not next(fast.parameters())
        back = restore(fast)
        assert type(back) is VideoMAEv2 and torch.equal(back(clip()), want) and not hasattr(back, "_mar_fast")


def test_weights_that_change():
    """In place, by load_state_dict with assign, by another dtype: the next call has them."""
    fast, other = fast_and_plain()[0], v2_model(seed=9)
    with torch.no_grad():
        fast(clip())
        fast.load_state_dict(other.state_dict())
        assert relative(fast(clip()), other(clip())) <= 1e-5
        third = v2_model(seed=10)
        fast.load_state_dict(third.state_dict(), assign=True)
        assert relative(fast(clip()), third(clip())) <= 1e-5
        assert relative(fast.double()(clip().double()), third.double()(clip().double())) <= 1e-11


def hook(model):
    seen = []
    model.model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    return lambda: seen == [1]


def replace(model):
    class Doubled(Block):
        def forward(self, x):
            return 2 * super().forward(x)

    block = Doubled(96, 3, 384, 1e-6)
    block.load_state_dict(model.model.blocks[0].state_dict())
    model.model.blocks[0] = block
    return lambda: True


@pytest.mark.parametrize("change", [hook, replace])
def test_changed_modules_run_their_own_code(change):
    fast, plain = fast_and_plain()
    with torch.no_grad():
        fast(clip())
        happened = change(fast)
        change(plain)
        with pytest.warns(UserWarning, match="the model's own code runs"):
            got = fast(clip())
        assert torch.equal(got, plain(clip())) and happened()
        with pytest.warns(UserWarning, match="the model's own code runs"):
            assert torch.equal(copy.deepcopy(fast)(clip()), got)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast(clip())  # one warning only


def test_dropout_in_training_is_its_own():
    fast, plain = fast_and_plain(drop_path_rate=0.1)
    with pytest.warns(UserWarning, match="runs training with dropout or stochastic depth"):
        assert torch.equal(fast.train()(clip()), plain.train()(clip()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.eval()(clip())


class Other(nn.Module):
    """Names of VideoMAE v2, but another computation."""

    def forward(self, x):
        return self.head(self.fc_norm(self.patch_embed(x).mean(1)))


def another_computation():
    model = v2_model()
    model.model.__class__ = Other
    return model


def another_eps():
    model = v2_model(layer_norm_eps=0.5)
    model.config.model_config["layer_norm_eps"] = 1e-6
    return model


def failing():
    model = v2_model()
    model.model.blocks = nn.ModuleList([nn.Identity()])
    return model


def extra():
    model = v2_model()
    model.model.scale = nn.Parameter(torch.ones(1))
    return model


REFUSED = {
    "another computation": (another_computation, "whose own code computes something else .relative difference"),
    "another eps": (another_eps, "whose own code computes something else"),
    "other blocks": (
        failing,
        r"model.blocks.0.norm1.weight: got none, expected shape \(96,\), .*from_pretrained reads",
    ),
    "another parameter": (extra, r"a VideoMAEv2 with model.scale, expected one without; mar_fast.from_pretrained"),
    "no mean pooling": (lambda: v2_model(use_mean_pooling=False), "without mean pooling, expected .*from_pretrained"),
    "cosine attention": (lambda: v2_model(cos_attn=True), "model_config.cos_attn: got True, expected False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert not is_accelerated(model) and not model.training


def test_arguments():
    model = v2_model()
    for given, message in (
        (dict(num_visible=8), "num_visible: got 8, expected None: a VideoMAEv2 takes no masks"),
        (dict(keep=0.3), "keep: got 0.3, expected None or one of 0.25"),
    ):
        with pytest.raises(ValueError, match=message):
            mar_fast.accelerate(model, **given)
    with pytest.raises(ValueError, match=r"cell: got \(1, 2, 2\), expected a cell whose sides divide"):
        mar_fast.accelerate(v2_model(img_size=[48, 64]), keep=0.5)
    model.forward = lambda pixel_values: pixel_values
    with pytest.raises(ValueError, match="got a VideoMAEv2 with another forward"):
        mar_fast.accelerate(model)
