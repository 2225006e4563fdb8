"""Frozen values: equal while code that reads them computes the same, and their differences have places and names."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsespec_compile.passes.proofs.readings import (
    ABSENT,
    MOST_ITEMS,
    Freezer,
    Same,
    attribute_names,
    describe,
    difference,
)


def freeze(value):
    return Freezer(lambda name: not name.startswith("_")).freeze(value)


def adds(number, extra=(1,)):
    def add(x, *, factor=2):
        return (x + number) * factor + extra[0]

    return add


def doubles(x):
    return 2 * x


class Holder:
    """An object that holds a number, and itself."""

    def __init__(self, number):
        self.number = number
        self._hidden = 0
        self.own = self

    def method(self, x):
        return x * self.number


EQUAL = {
    "numbers": (1, 1.0),
    "lists": ([1, [2, "a"]], [1, [2, "a"]]),
    "functions of one source": (adds(3), adds(3)),
    "partials": (functools.partial(doubles, 1), functools.partial(doubles, 1)),
    "arrays": (np.arange(3), np.arange(3)),
    "NumPy's numbers": (np.float64(0.5), 0.5),
    "not a number": ([math.nan], [math.nan]),
    "sets": ({1, 2}, {2, 1}),
}

UNEQUAL = {
    "numbers": (1, 2),
    "a list's item": ([1, [2, 3]], [1, [2, 4]]),
    "list and tuple": ([1], (1,)),
    "closures": (adds(3), adds(4)),
    "what a closure holds": (adds(3, [1]), adds(3, [2])),
    "code": (doubles, lambda x: 3 * x),
    "partials' arguments": (functools.partial(doubles, 1), functools.partial(doubles, x=1)),
    "arrays": (np.arange(3), np.arange(3.0)),
    "tensors in other places": (torch.zeros(2), torch.zeros(2)),
    "other objects": (Holder(1), Holder(1)),
    "methods of other objects": (Holder(1).method, Holder(1).method),
}


@pytest.mark.parametrize("case", EQUAL)
def test_what_computes_the_same_is_equal(case):
    before, after = map(freeze, EQUAL[case])
    assert before == after
    assert difference(before, after, "x") is None


@pytest.mark.parametrize("case", UNEQUAL)
def test_what_may_compute_something_else_differs(case):
    before, after = map(freeze, UNEQUAL[case])
    assert before != after
    found = difference(before, after, "x")
    assert found.where.startswith("x")
    assert describe(found.before) != ""


def test_a_difference_says_where_it_is_and_the_order_of_names_is_none():
    value = {"a": [0.5, SimpleNamespace(rate=1)], "b": 2}
    before = freeze(value)
    value["a"][1].rate = 3
    assert difference(before, freeze(value), "x") == ("x['a'][1].rate", 1, 3)
    del value["b"]
    value["a"][1].rate = 1
    assert difference(before, freeze(value), "x") == ("x['b']", 2, ABSENT)
    ordered = {"b": 2, **value}
    assert difference(before, freeze(ordered), "x") is None


def test_objects_are_read_as_far_as_names_go_also_in_circles():
    holder = Holder(1)
    before, method = freeze(holder), freeze(holder.method)
    holder._hidden = 5
    assert freeze(holder) == before
    holder.number = 2
    assert difference(before, freeze(holder), "x").where == "x.number"
    assert difference(method, freeze(holder.method), "x").where == "x.object.number"


def test_long_containers_are_compared_by_identity_and_length():
    long = list(range(MOST_ITEMS + 1))
    before = freeze(long)
    long[0] = -1
    assert freeze(long) == before
    long.append(0)
    assert difference(before, freeze(long), "x") == ("x['length']", MOST_ITEMS + 1, MOST_ITEMS + 2)
    assert freeze(list(long)) != freeze(long)


def test_tensors_are_equal_while_they_lie_where_they_were():
    tensor = torch.zeros(3, 3)
    before = freeze(tensor)
    tensor.add_(1)
    assert freeze(tensor) == before
    assert freeze(tensor.T) != before
    assert freeze(tensor[0]) != before


def test_identities_are_not_looked_into():
    holder = Holder(1)
    assert Freezer(lambda name: True, [holder]).freeze([holder]).values == (Same(holder),)


def reads_attributes(module):
    return module.scaling * getattr(module, "rate", 1.0) + calls(module)


def calls(module):
    return [item.depth for item in module.items]


def test_names_of_attributes_come_from_code_and_what_it_calls():
    assert {"scaling", "rate", "depth", "items"} <= attribute_names([reads_attributes])
    assert "depth" not in attribute_names([reads_attributes], depth=0)
    wrapped = functools.wraps(doubles)(lambda x: reads_attributes(x))
    assert "rate" in attribute_names([property(wrapped), Holder(1).method])
    assert "number" in attribute_names([functools.partial(Holder(1).method)])
