"""What is kept of weights: made once while they stay as they are, and never served for others."""

import copy
import gc
import io
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from mar_fast.kernels import derived
from mar_fast.kernels.derived import Derived, Slot


class Doubling:
    """A function of weights that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *sources):
        self.calls += 1
        return sum(2 * source.float().sum() for source in sources if source is not None)


@pytest.fixture
def made():
    return Doubling()


def get(cache, made, *sources, options=None):
    """Without gradients, and right in any case."""
    with torch.no_grad():
        result = cache.get(sources, options, made)
        assert torch.equal(result, sum(2 * source.float().sum() for source in sources if source is not None))
    return result


def weights(*shape):
    return nn.Parameter(torch.randn(*(shape or (5, 7))))


def test_made_once(made):
    cache, weight, bias = Derived(), weights(), weights(5)
    first = get(cache, made, weight, bias)
    assert get(cache, made, weight, bias) is first and get(cache, made, weight, bias) is first
    assert made.calls == 1 and len(cache) == 1


def test_each_way_is_another(made):
    cache, weight = Derived(), weights()
    for options in (None, 1, 2, "a"):
        assert get(cache, made, weight, options=options) is get(cache, made, weight, options=options)
    assert made.calls == len(cache) == 4


def test_missing_sources(made):
    cache, weight, bias = Derived(), weights(), weights(5)
    for _ in range(2):
        get(cache, made, weight, None)
    assert made.calls == 1
    get(cache, made, weight, bias)
    get(cache, made, weight, None)
    assert made.calls == 3


# What changes them.


def by_data(weight):
    weight.data = torch.randn(5, 7)


def by_another_view(weight):
    """The same memory in another order: a product with it would be another."""
    weight.data = weight.data.T


CHANGES = {
    "in place": lambda weight: weight.mul_(3),
    "a part of it": lambda weight: weight[1].zero_(),
    "copied": lambda weight: weight.copy_(torch.randn(5, 7)),
    "other memory": by_data,
    "another view": by_another_view,
    "another dtype": lambda weight: setattr(weight, "data", weight.data.half()),
    "fewer rows": lambda weight: setattr(weight, "data", weight.data[:3]),
}


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_made_again_after_a_change(change, position, made):
    cache, sources = Derived(), [weights(), weights()]
    get(cache, made, *sources)
    with torch.no_grad():
        CHANGES[change](sources[position])
    get(cache, made, *sources)
    get(cache, made, *sources)
    assert made.calls == 2 and len(cache) == 1


def test_load_state_dict(made):
    cache, layer, other = Derived(), nn.Linear(7, 5), nn.Linear(7, 5)
    get(cache, made, layer.weight, layer.bias)
    layer.load_state_dict(other.state_dict())
    get(cache, made, layer.weight, layer.bias)
    layer.load_state_dict(nn.Linear(7, 5).state_dict(), assign=True)
    get(cache, made, layer.weight, layer.bias)
    assert made.calls == 3


def test_to_another_dtype_and_back(made):
    cache, layer = Derived(), nn.Linear(7, 5)
    for dtype in (torch.float32, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        get(cache, made, layer.weight, layer.bias)
    assert made.calls == 4


def test_writing_through_data_is_not_counted(made):
    """As the docstring says: `forget` is for that."""
    cache, weight = Derived(), weights()
    first = get(cache, made, weight)
    weight.data.mul_(3)
    with torch.no_grad():
        assert cache.get((weight,), None, made) is first
    cache.forget(weight)
    get(cache, made, weight)
    assert made.calls == 2


# Training.


def test_with_gradients_it_is_made_every_time(made):
    cache, weight = Derived(), weights()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(cache.get((weight,), None, made), weight)
        assert torch.equal(gradient, torch.full((5, 7), 2.0))
    assert made.calls == 2 and not len(cache)


def test_a_call_with_gradients_forgets(made):
    cache, weight = Derived(), weights()
    get(cache, made, weight)
    cache.get((weight,), None, made)
    weight.data.mul_(3)  # counts as little as a fused kernel's writing
    get(cache, made, weight)


@pytest.mark.parametrize(
    ("how", "compiled"),
    [(dict(fused=True), False), (dict(fused=True), True), (dict(foreach=True), False), (dict(foreach=False), False)],
    ids=["fused", "fused, compiled", "foreach", "one by one"],
)
def test_an_optimizer_forgets(how, compiled, made):
    """A fused step counts no version, and a compiled one passes no cache on its way."""
    cache, weight = Derived(), weights()
    get(cache, made, weight)
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=0.1, **how)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    before = weight.detach().clone()
    for _ in range(2):
        step()
        assert not torch.equal(weight, before)
        get(cache, made, weight)


# Who lives how long.


def test_weights_are_not_kept_alive(made):
    cache, weight, bias = Derived(), weights(), weights(5)
    get(cache, made, weight, bias)
    alive = weakref.ref(weight)
    del weight
    gc.collect()
    assert alive() is None and not len(cache)


def test_another_source_that_dies(made):
    cache, weight = Derived(), weights()
    bias = weights(5)
    get(cache, made, weight, bias)
    del bias
    gc.collect()
    assert not len(cache)


def test_ids_and_memory_that_are_used_again(made):
    """Tensors under the id of another one, or where that lay."""
    cache, ids = Derived(), set()
    for _ in range(50):
        weight = weights()
        ids.add(id(weight))
        get(cache, made, weight)
        del weight
    assert len(ids) < 50 and made.calls == 50
    weight = weights()
    for _ in range(50):
        weight.data = torch.randn(5, 7)
        get(cache, made, weight)
    assert made.calls == 100 and len(cache) == 1


def test_memory_is_held_until_the_next_look(made):
    """Else another tensor could come to lie at the address that stands for it."""
    cache, weight, array = Derived(), weights(), np.ones((5, 7), dtype=np.float32)
    weight.data, memory = torch.from_numpy(array), weakref.ref(array)
    get(cache, made, weight)
    weight.data = torch.zeros(1)
    del array
    gc.collect()
    assert memory() is not None
    get(cache, made, weight)
    assert memory() is None


def test_two_tensors_on_one_memory(made):
    """Each counts its own versions, so that one may stand where the other did with the same number."""
    cache, weight, first = Derived(), weights(), weights(5)
    with torch.no_grad():
        first.mul_(2)
        get(cache, made, weight, first)
        second = nn.Parameter(first.data)
        second.mul_(2)
    assert (second.data_ptr(), second._version) == (first.data_ptr(), first._version)
    get(cache, made, weight, second)
    assert made.calls == 2


def test_a_cache_that_dies_before_its_weights(made):
    cache, weight = Derived(), weights()
    get(cache, made, weight)
    del cache
    gc.collect()
    del weight
    gc.collect()


def test_the_number_of_weights_is_bounded(made, monkeypatch):
    monkeypatch.setattr(derived, "SOURCES", 4)
    monkeypatch.setattr(derived, "VARIANTS", 3)
    cache, every = Derived(), [weights() for _ in range(11)]
    for weight in every:
        for options in range(5):
            get(cache, made, weight, options=options)
            assert len(cache) <= 4 * 3


def test_a_copy_begins_empty(made):
    cache, weight = Derived(), weights()
    get(cache, made, weight)
    for other in (copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        assert not len(other)
        get(other, made, weight)
    layer = nn.Linear(7, 5)
    layer.cache = cache
    torch.save(layer, io.BytesIO())


def test_forget(made):
    cache, other, weight = Derived(), Derived(), weights()
    get(cache, made, weight)
    get(other, made, weight)
    derived.forget()
    assert not len(cache) and not len(other)


# What is never kept.


def test_inference_tensors(made):
    cache = Derived()
    with torch.inference_mode():
        weight = torch.randn(5, 7)
        for _ in range(2):
            get(cache, made, weight)
            weight.mul_(3)
    assert made.calls == 2 and not len(cache)


def test_made_in_inference_mode(made):
    """It is an ordinary tensor all the same."""
    cache, weight = Derived(), weights()
    with torch.inference_mode():
        first = cache.get((weight,), None, made)
    assert not first.is_inference() and not first.requires_grad
    assert get(cache, made, weight) is first


def test_shared_memory(made):
    cache, weight = Derived(), weights()
    get(cache, made, weight)
    weight.share_memory_()
    get(cache, made, weight)
    weight.data.mul_(3)  # as another process may
    get(cache, made, weight)
    assert made.calls == 3


def test_other_kinds_of_tensors(made):
    class Odd(torch.Tensor):
        pass

    cache, weight = Derived(), torch.randn(5, 7).as_subclass(Odd)
    for _ in range(2):
        get(cache, made, weight)
    assert made.calls == 2 and not len(cache)


def test_fake_tensors(made):
    from torch._subclasses.fake_tensor import FakeTensorMode

    cache, weight = Derived(), weights()
    real = get(cache, made, weight)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert type(cache.get((weight,), None, made)) is not torch.Tensor
        fake = torch.randn(5, 7)
        cache.get((fake,), None, made)
    with torch.no_grad():
        cache.get((fake,), None, made)
    assert len(cache) == 1 and get(cache, made, weight) is real


def test_compiled(made):
    cache, layer = Derived(), nn.Linear(7, 5)

    def program(x):
        return x * cache.get((layer.weight, layer.bias), None, lambda weight, bias: weight.sum() + bias.sum())

    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, backend="eager")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(torch.ones(1)), layer.weight.sum() + layer.bias.sum()[None])
            layer.weight.data.mul_(3)
    assert not len(cache)


def test_vmap(made):
    cache, stacked = Derived(), torch.randn(3, 5, 7)
    with torch.no_grad():
        results = torch.vmap(lambda weight: cache.get((weight,), None, made))(stacked)
        torch.testing.assert_close(results, 2 * stacked.sum((1, 2)))
        outer = weights()
        torch.vmap(lambda scale: scale * cache.get((outer,), None, made))(torch.ones(3))
    assert not len(cache)


# Devices and threads.


def test_two_devices(made):
    cache, layer = Derived(), nn.Linear(7, 5)
    get(cache, made, layer.weight)
    other = nn.Linear(7, 5, device="meta")
    with torch.no_grad():
        assert cache.get((other.weight,), None, made).is_meta
        assert cache.get((other.weight,), None, made).is_meta
        assert not cache.get((layer.weight,), None, made).is_meta
        layer.to_empty(device="meta")
        assert cache.get((layer.weight,), None, made).is_meta
    assert made.calls == 3


def test_slot(made):
    """For one layout, which is not compared; all else is, and another slot of the same way finds the same."""
    cache, weight, bias = Derived(), weights(), weights(5)

    def through(slot):
        with torch.no_grad():
            result = slot(weight, bias)
        assert torch.equal(result, 2 * weight.detach().sum() + 2 * bias.detach().sum())
        return result

    slot = Slot(cache, "a", made)
    first = through(slot)
    assert through(slot) is first and through(Slot(cache, "a", made)) is first
    through(Slot(cache, "b", made))
    weight.data = weight.data.T
    assert through(Slot(cache, "a", made)) is not first
    weight.data = weight.data.T
    assert made.calls == 3
    calls = 3
    for change in (
        lambda: weight.mul_(3),
        lambda: bias.mul_(3),
        lambda: setattr(weight, "data", torch.randn(5, 7)),
        cache.forget,
        lambda: cache.forget(weight),
        derived.forget,
    ):
        through(slot)
        with torch.no_grad():
            change()
        calls += 1 if made.calls == calls else 2
        through(slot)
        assert through(slot) is through(slot) and made.calls == calls, change


def test_a_slot_keeps_nothing_alive(made):
    cache, weight = Derived(), weights()
    slot = Slot(cache, None, made)
    with torch.no_grad():
        result = weakref.ref(slot(weight))
    del weight
    gc.collect()
    assert result() is None
    for _ in range(50):
        weight = weights()
        with torch.no_grad():
            assert torch.equal(slot(weight), 2 * weight.sum())
        del weight


def test_threads():
    """Weights of their own and one that all share, forgotten again and again."""
    cache, shared, wrong = Derived(), weights(), []
    expected = 2 * shared.detach().sum()

    def work():
        with torch.no_grad():
            for number in range(200):
                own = weights()
                for weight, value in ((own, 2 * own.detach().sum()), (shared, expected)):
                    result = cache.get((weight,), number % 3, lambda weight: 2 * weight.sum())
                    if not torch.equal(result, value):
                        wrong.append(number)
                if number % 7 == 0:
                    derived.forget()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    assert len(cache) <= 3
