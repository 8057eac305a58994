import dataclasses

import pytest
import runs
import trl

from hbat.cli.run_file import SECTIONS
from hbat.config.hbat import HBATConfig
from hbat.objectives.built_in import BUILT_IN, resolve
from hbat.objectives.objective import Objective


def test_names_become_objectives_in_their_order_with_their_sections(tmp_path):
    config = runs.config(tmp_path, objectives=["dpo", "sft"], dpo={"beta": 0.7})
    first, second = resolve(config)
    assert (first.name, first.trainer_class, first.uses_reference) == ("dpo", trl.DPOTrainer, True)
    assert (second.name, second.trainer_class, second.uses_reference) == ("sft", trl.SFTTrainer, False)
    assert first.base_args(str(tmp_path)).beta == 0.7


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_every_built_in_objective_checks_its_rows_and_knows_its_sequences(name, tmp_path):
    assert name in BUILT_IN
    (objective,) = resolve(runs.config(tmp_path, objectives=[name]))
    assert [fault.kind for fault in objective.row_check()({"other": "a"})] == ["missing column"]
    assert objective.has_fisher


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo"])
def test_every_online_objective_takes_rewards_and_checks_its_prompts(name, tmp_path):
    (objective,) = resolve(HBATConfig(output_dir=str(tmp_path), objectives=[name], ewc=None))
    assert (objective.name, objective.takes_rewards, objective.metric) == (name, True, "reward")
    assert objective.greater_is_better
    assert [fault.kind for fault in objective.row_check()({"text": "a"})] == ["missing column"]


def test_the_names_are_those_of_the_sections():
    sections = {each.name for each in dataclasses.fields(HBATConfig)}
    assert set(BUILT_IN) <= sections
    assert set(SECTIONS) == {*BUILT_IN, "ewc"}


def test_an_objective_of_the_users_own_stays_what_it_is(tmp_path):
    own = Objective(name="mine", trainer_class=trl.SFTTrainer, config_class=trl.SFTConfig)
    assert resolve(runs.config(tmp_path, objectives=[own])) == [own]


def test_an_unknown_name_says_how_another_trainer_becomes_an_objective(tmp_path):
    with pytest.raises(ValueError, match=r"'orpo', which is not built in \(sft, .*a mapping of `name`, `trainer`"):
        resolve(runs.config(tmp_path, objectives=["orpo"]))
