"""Reward functions of a run and the objectives that take them."""

import cases
import pytest
import scorers
import trl
from transformers import LlamaForSequenceClassification

from hbat.objectives.objective import Objective
from hbat.objectives.rewards import reward_names, with_rewards


def length(completions, **kwargs):
    return [float(len(each)) for each in completions]


def objective(name, **options):
    return Objective(name=name, trainer_class=trl.SFTTrainer, config_class=trl.SFTConfig, **options)


def test_only_objectives_that_take_rewards_get_them():
    plain, online = objective("sft"), objective("mine", takes_rewards=True, trainer_kwargs={"more": 1})
    first, second = with_rewards([plain, online], length)
    assert first is plain
    assert second.trainer_kwargs == {"reward_funcs": [length], "more": 1}


def test_tokenizers_of_reward_models_are_passed_on_where_given():
    (found,) = with_rewards([objective("mine", takes_rewards=True)], (length,), ["tokenizer"])
    assert found.trainer_kwargs == {"reward_funcs": [length], "reward_processing_classes": ["tokenizer"]}


def test_an_objective_with_rewards_of_its_own_keeps_them():
    own = objective("own", takes_rewards=True, trainer_kwargs={"reward_funcs": ["a"]})
    assert with_rewards([own], None) == [own]
    assert with_rewards([own, objective("other", takes_rewards=True)], length)[0] is own


def test_the_list_that_was_given_is_left_alone():
    given = [length]
    (found,) = with_rewards([objective("mine", takes_rewards=True)], given)
    found.trainer_kwargs["reward_funcs"][0] = "replaced"
    assert given == [length]


def test_a_model_by_name_is_loaded_once_for_all_objectives(tmp_path):
    config = cases.tiny_llama().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    takers = [objective(name, takes_rewards=True) for name in ("first", "second")]
    first, second = with_rewards(takers, [str(tmp_path), length])
    model, function = first.trainer_kwargs["reward_funcs"]
    assert isinstance(model, LlamaForSequenceClassification)
    assert function is length
    assert second.trainer_kwargs["reward_funcs"][0] is model


def test_rewards_are_named_by_objective():
    own = objective("own", takes_rewards=True, trainer_kwargs={"reward_funcs": len})
    found = with_rewards([objective("sft"), own, objective("mine", takes_rewards=True)], [length, Fixed()])
    assert reward_names(found) == {"own": ["len"], "mine": ["length", "Fixed"]}


def test_the_name_of_a_model_tells_other_weights_apart():
    first, same, other = (
        reward_names([objective("own", trainer_kwargs={"reward_funcs": scorers.tiny_scorer(seed)})])
        for seed in (0, 0, 1)
    )
    assert first == same
    assert first != other
    assert first["own"][0].startswith("LlamaForSequenceClassification ")


class Fixed:
    def __call__(self, completions, **kwargs):
        return [1.0] * len(completions)


@pytest.mark.parametrize("nothing", [None, []])
def test_rewards_that_are_missing_are_asked_for(nothing):
    with pytest.raises(ValueError, match=r"'mine' learns from rewards, but `reward_funcs` is .*Pass `reward_funcs`"):
        with_rewards([objective("sft"), objective("mine", takes_rewards=True)], nothing)


def test_rewards_that_nothing_takes_are_refused():
    with pytest.raises(ValueError, match=r"`reward_funcs` is given, but no objective .* takes rewards \(sft\)"):
        with_rewards([objective("sft")], length)
    with pytest.raises(ValueError, match="`reward_processing_classes` is given without `reward_funcs`"):
        with_rewards([objective("sft")], None, ["tokenizer"])
