"""Tensors in the main memory that are fetched piece by piece. On a CPU the streams do nothing, and copies are made."""

import re

import pytest
import torch

from hbat.ewc.kernels import block_elements
from hbat.ewc.offload import Offloaded
from hbat.ewc.penalty import add_penalty_gradient_, measure_penalty, proximal_step_

CPU = torch.device("cpu")


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"even": (4, 4), "empty": (0, 3), "uneven": (7,), "one": (1, 1), "half": (5, 3), "single": ()}
    return {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16 if name == "half" else torch.float32)
        for name, shape in shapes.items()
    }


def walked(offloaded, names):
    return {name: torch.cat([each.clone() for each in offloaded.pieces(name)]) for name in names}


@pytest.mark.parametrize("piece", [1, 3, 4, 100])
@pytest.mark.parametrize(
    "order",
    [
        ["even", "empty", "uneven", "one", "half", "single"],
        ["single", "half", "one", "uneven", "empty", "even"],
        ["uneven"],
        ["even", "half"],
    ],
)
def test_the_pieces_make_up_the_tensors_in_whatever_order_one_walks(piece, order):
    whole = tensors()
    offloaded = Offloaded(whole, CPU, piece)
    for _ in range(3):
        found = walked(offloaded, order)
        assert list(found) == order
        assert all(torch.equal(each, whole[name].reshape(-1)) for name, each in found.items())
        assert all(each.dtype == whole[name].dtype for name, each in found.items())


def test_it_is_a_mapping_of_what_was_given():
    whole = tensors() | {"number": 2.0}
    offloaded = Offloaded(whole, CPU, 4)
    assert list(offloaded) == list(whole)
    assert len(offloaded) == len(whole)
    assert offloaded["number"] == 2.0
    assert all(offloaded[name] is each or torch.equal(offloaded[name], each) for name, each in whole.items())


def test_two_pieces_at_a_time_lie_on_the_device():
    offloaded = Offloaded({"a": torch.randn(50), "b": torch.randn(30)}, CPU, 8)
    places = {each.data_ptr() for _ in range(2) for name in offloaded for each in offloaded.pieces(name)}
    assert len(places) == 2


def test_the_next_walk_begins_with_two_pieces_that_were_fetched_ahead():
    whole = {"a": torch.zeros(12), "b": torch.zeros(4)}
    offloaded = Offloaded(whole, CPU, 4)
    walked(offloaded, whole)
    for each in whole.values():
        each.fill_(1.0)
    assert walked(offloaded, whole)["a"].tolist() == [0.0] * 8 + [1.0] * 4


class Streams:
    """Stands for a device's streams and events, and notes who waits for whom."""

    def __init__(self):
        self.notes = []

    def get_device_module(self, device):
        return self

    def Stream(self):  # noqa: N802 - as torch spells it
        return "copying"

    def current_stream(self):
        return self

    def wait_stream(self, stream):
        self.notes.append(f"wait for {stream}")

    def stream(self, stream):
        return torch.no_grad()

    def Event(self):  # noqa: N802 - as torch spells it
        return Event(self)


class Event:
    made = 0

    def __init__(self, streams):
        self.streams, self.name = streams, Event.made
        Event.made += 1

    def note(self, what, stream):
        self.streams.notes.append((self.name, what + (" copying" if stream == "copying" else " computing")))

    def record(self, stream):
        self.note("record", stream)

    def wait(self, stream):
        self.note("wait", stream)


@pytest.mark.parametrize("order", ["aabb", "abab", "bbab"])
def test_a_piece_is_used_once_it_is_there_and_replaced_once_it_was_used(monkeypatch, order):
    """Of each place: what had it before is done, then (fetch after that; use after the fetch; done) over and over."""
    streams = Streams()
    monkeypatch.setattr("hbat.ewc.offload.torch.get_device_module", streams.get_device_module)
    Event.made = 0
    offloaded = Offloaded({"a": torch.randn(9), "b": torch.randn(5)}, CPU, 2)
    for name in order:
        walked(offloaded, [name])
    offloaded.close()
    assert streams.notes.pop() == "wait for copying"
    for filled, used in [(0, 1), (2, 3)]:
        own = [
            {
                (filled, "record copying"): "fetched ", (filled, "wait computing"): "use ",
                (used, "record computing"): "done ", (used, "wait copying"): "fetch ",
            }[each]
            for each in streams.notes
            if each[0] in {filled, used}
        ]  # fmt: skip
        assert re.fullmatch(r"done ((fetch fetched )+use done )*(fetch fetched )*", "".join(own))
        assert own.count("use ") > 5


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(1)
    shapes = {"large": (1 << 20, 1), "half": (300, 1000), "frozen": (10,), "last": (1 << 20, 1)}

    def random(name):
        return torch.randn(shapes[name], generator=generator)

    dtypes = {"half": torch.bfloat16}
    parameters = {name: random(name).to(dtypes.get(name)) for name in shapes}
    for name, each in parameters.items():
        each.grad = None if name == "frozen" else random(name).to(each.dtype)
    anchor = {name: random(name).to(each.dtype) for name, each in parameters.items()}
    importance = {name: random(name).square() for name in shapes} | {"last": 0.5}
    return parameters, anchor, importance


def copied(parameters):
    result = {name: each.clone() for name, each in parameters.items()}
    for name, each in result.items():
        each.grad = None if parameters[name].grad is None else parameters[name].grad.clone()
    return result


def test_penalty_statistics_and_proximal_step_are_those_of_tensors_on_the_device(problem):
    parameters, anchor, importance = problem
    rates = dict.fromkeys(parameters, 0.1)
    ends = []
    for where in ("device", "main memory"):
        own, start, weight = copied(parameters), anchor, importance
        if where == "main memory":
            start, weight = (Offloaded(each, CPU, block_elements(CPU)) for each in (anchor, importance))
        measured = []
        for _ in range(2):
            measured.append(add_penalty_gradient_(own, start, weight, strength=3.0, measure=True))
            measured.append(measure_penalty(own, start, weight))
            proximal_step_(own, start, weight, strength=3.0, learning_rates=rates)
        ends.append((own, measured))
    (first, numbers), (second, other_numbers) = ends
    assert numbers == other_numbers
    for name, each in first.items():
        assert torch.equal(each, second[name])
        assert name == "frozen" or torch.equal(each.grad, second[name].grad)
        assert not torch.equal(each, parameters[name])
