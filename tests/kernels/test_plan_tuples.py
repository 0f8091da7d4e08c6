"""Tuples among the options of a call stand as numbers in the keys of plans."""

from collections import namedtuple

import torch

from mar_fast.kernels import plan


def test_keys_of_tuples():
    plans, x = plan.Plans(), torch.ones(3)

    def key(value):
        return plans.find(x, value)[0]

    assert key((2, 3)) == key(tuple([2, 3])) and key((0.5,)) == key((0.25 + 0.25,))
    named = namedtuple("named", "a b")
    different = [(2, 3), (3, 2), (2, 3.0), (2, True), (2,), (), (2, 3, 3), ("2", 3), named(2, 3), 2, None, True]
    assert len({key(value) for value in different}) == len(different)
    assert plans.find(x, ([],)) == (None, None)


def test_tuples_that_come_and_go(monkeypatch):
    """Under the identity of another one, and more of them than are held."""
    monkeypatch.setattr(plan, "LIMIT", 8)
    plans, x, keys = plan.Plans(), torch.ones(3), {}
    for number in range(100):
        value = tuple([number % 50, 1])
        key, run = plans.find(x, value)
        assert run is None or run() == value
        keys[key] = value
        plans.keep(key, lambda value=value: value)
        assert plans.find(x, tuple([number % 50, 1]))[1]() == value
        assert len(plan._tuples) <= 8
        del value
