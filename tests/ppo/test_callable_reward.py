import functools
import inspect

import pytest
import torch

from hbat.ppo.rewards.function import CallableReward, RewardError, function_name, shortened

COMPLETIONS = ["one", "two", "three"]
INPUTS = {
    "answer": [1, 2, 3],
    "prompts": ["a", "b", "c"],
    "completions": COMPLETIONS,
    "completion_ids": [[1], [2], [3]],
    "trainer_state": None,
}


def asked(function):
    return CallableReward(function, "mine").arguments(INPUTS)


def values(result):
    return CallableReward(lambda completions: result, "mine").values(result, COMPLETIONS)


# --- signatures ------------------------------------------------------------------------------------------------------


def test_a_function_with_any_keywords_gets_everything():
    assert asked(lambda **kwargs: None) == INPUTS
    assert asked(lambda prompts, completions, **kwargs: None) == INPUTS


def test_a_function_without_them_gets_what_it_names():
    assert asked(lambda completions: None).keys() == {"completions"}
    assert asked(lambda prompts, *, answer, other=3: None).keys() == {"prompts", "answer"}
    assert asked(lambda completions, trainer_state, completion_ids: None).keys() == {
        "completions",
        "trainer_state",
        "completion_ids",
    }


def test_what_a_partial_holds_already_is_not_asked_for():
    def f(completions, threshold):
        return [threshold] * len(completions)

    bound = functools.partial(f, threshold=0.5)
    assert CallableReward(bound, "mine").call(asked(bound)) == [0.5, 0.5, 0.5]


def test_a_callable_that_hides_its_signature_gets_everything():
    with pytest.raises(ValueError, match="no signature found"):
        inspect.signature(max)
    assert asked(max) == INPUTS


@pytest.mark.parametrize("function", [list, lambda answer: [], lambda *args: [], lambda *prompts: []])
def test_a_function_that_takes_neither_prompts_nor_completions_is_refused(function):
    with pytest.raises(ValueError, match=r"'mine' takes \[.*\], which names neither `prompts` nor `completions`"):
        CallableReward(function, "mine")


def test_a_function_with_parameters_by_position_only_is_refused():
    def f(prompts, /, completions, **kwargs):
        return []

    with pytest.raises(ValueError, match=r"'mine' takes \['prompts'\] by position only"):
        CallableReward(f, "mine")


def test_a_parameter_that_is_no_column_is_named_with_the_columns_there_are():
    reward = CallableReward(lambda completions, solution, level=1: [], "mine")
    with pytest.raises(RewardError, match=r"'mine' needs \['solution'\], .* columns of the data set are \['answer'\]"):
        reward.arguments(INPUTS)


# --- calls -----------------------------------------------------------------------------------------------------------


def test_an_exception_is_told_with_the_rewards_name_its_type_and_text():
    def f(completions):
        raise KeyError("judge")

    with pytest.raises(RewardError, match="The reward 'mine' raised KeyError: 'judge'") as caught:
        CallableReward(f, "mine").call({"completions": []})
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value, RuntimeError)


def test_an_interrupt_passes_through():
    def f(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CallableReward(f, "mine").call({"completions": []})


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.5, True],
        (1, 2.5, 1.0),
        torch.tensor([1, 2.5, 1]),
        torch.tensor([1, 2.5, 1], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0, requires_grad=True), torch.tensor([2.5]), 1],
        torch.tensor([1, 2.5, 1]).numpy(),
        list(torch.tensor([1, 2.5, 1]).double().numpy()),
    ],
)
def test_numbers_are_taken_from_lists_tuples_tensors_and_arrays(result):
    found = values(result)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.tolist() == [1.0, 2.5, 1.0]


def test_none_becomes_nan():
    found = values([None, 2, 3])
    assert found.isnan().tolist() == [True, False, False]


def test_no_completions_give_no_values():
    assert CallableReward(lambda completions: [], "mine").values([], []).shape == (0,)


def test_a_wrong_number_of_values_is_refused():
    with pytest.raises(RewardError, match="'mine' returned 2 values for 3 completions"):
        values([1, 2])
    with pytest.raises(RewardError, match=r"returned an array of shape \(3, 1\) for 3 completions"):
        values(torch.zeros(3, 1))


@pytest.mark.parametrize("result", [None, 1.0, "123", {1: 2, 3: 4, 5: 6}, {1, 2, 3}, iter([1, 2, 3])])
def test_what_is_no_list_of_numbers_is_refused(result):
    with pytest.raises(RewardError, match=f"'mine' returned .* of type {type(result).__name__}. Return a list"):
        values(result)


@pytest.mark.parametrize("value", ["1.0", b"1", [1.0, 2.0], {}, 1j, torch.zeros(2)])
def test_a_value_that_is_no_number_is_refused_with_its_row(value):
    with pytest.raises(RewardError, match=f"of type {type(value).__name__} for row 1, the completion 'two'"):
        values([1.0, value, 1.0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39, 10**400])
def test_a_value_that_is_not_finite_is_refused_with_its_row(value):
    with pytest.raises(RewardError, match=r"'mine' returned .* for row 2, the completion 'three'\. Return a finite"):
        values([1.0, None, value])


def test_nan_in_a_tensor_is_refused_too():
    with pytest.raises(RewardError, match="returned nan of type float for row 0"):
        values(torch.tensor([float("nan"), 1, 1]))


# --- names and messages ----------------------------------------------------------------------------------------------


def test_callables_are_named_as_their_authors_named_them():
    class Judge:
        def __call__(self, completions):
            return []

        def strict(self, completions):
            return []

    def length(completions):
        return []

    assert function_name(length) == "length"
    assert function_name(Judge()) == "Judge"
    assert function_name(Judge().strict) == "strict"
    assert function_name(functools.partial(functools.partial(length), completions=[])) == "length"


def test_long_completions_are_shortened_and_conversations_shown_by_their_last_message():
    assert shortened("short") == "'short'"
    assert len(shortened("x" * 500)) == 82
    assert shortened("x" * 500).endswith("xxx...'")
    assert shortened([{"role": "assistant", "content": "first"}, {"role": "assistant", "content": "last"}]) == "'last'"
    assert shortened([]) == "'[]'"
