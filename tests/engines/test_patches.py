import itertools

import pytest
import torch
from accelerate import Accelerator

from hbat.engines.patches import after_backward


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def backward(accelerator, weight):
    accelerator.backward((weight**2).sum())


def test_action_runs_once_after_each_backward_pass_with_the_loss(accelerator):
    weight, seen = torch.tensor([3.0], requires_grad=True), []
    after_backward(accelerator, lambda loss: seen.append((loss.item(), loss.requires_grad, weight.grad.item())))
    backward(accelerator, weight)
    backward(accelerator, weight)
    assert seen == [(9.0, False, 6.0), (9.0, False, 12.0)]  # the gradient was there already


def test_arguments_of_the_backward_pass_go_through(accelerator):
    after_backward(accelerator, lambda loss: None)
    weight = torch.tensor([3.0], requires_grad=True)
    loss = (weight**2).sum()
    accelerator.backward(loss, retain_graph=True)
    accelerator.backward(loss)
    assert weight.grad.item() == 12.0


def test_undone_the_accelerator_is_as_it_was(accelerator):
    before, seen = dict(accelerator.__dict__), []
    undo = after_backward(accelerator, seen.append)
    undo()
    undo()
    backward(accelerator, torch.tensor([1.0], requires_grad=True))
    assert accelerator.__dict__ == before
    assert seen == []


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_nested_actions_can_be_undone_in_any_order(accelerator, order):
    before, seen = dict(accelerator.__dict__), []
    undos = [after_backward(accelerator, lambda loss, index=index: seen.append(index)) for index in range(3)]
    remaining = {0, 1, 2}
    for each in order:
        undos[each]()
        remaining.remove(each)
        seen.clear()
        weight = torch.tensor([1.0], requires_grad=True)
        backward(accelerator, weight)
        assert seen == sorted(remaining)
        assert weight.grad.item() == 2.0
    assert accelerator.__dict__ == before


def test_a_foreign_wrapper_beneath_is_put_back(accelerator):
    original, seen = accelerator.backward, []

    def foreign(loss, **kwargs):
        seen.append("foreign")
        original(loss, **kwargs)

    accelerator.backward = foreign
    after_backward(accelerator, lambda loss: seen.append("ours"))()
    backward(accelerator, torch.tensor([1.0], requires_grad=True))
    assert accelerator.backward is foreign
    assert seen == ["foreign"]


def test_an_action_can_be_set_again_after_it_was_undone(accelerator):
    seen = []
    after_backward(accelerator, lambda loss: seen.append("first"))()
    after_backward(accelerator, lambda loss: seen.append("second"))
    backward(accelerator, torch.tensor([1.0], requires_grad=True))
    assert seen == ["second"]
