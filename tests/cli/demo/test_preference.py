"""The demo's preference objectives: the same prompts, and the judge as the reward of PPO."""

from hbat.cli.demo.preference import data, judge, section
from hbat.cli.demo.scoring import LONGEST_ANSWER
from hbat.cli.demo.settings import DemoSettings
from hbat.cli.demo.task import utility
from hbat.ppo.config import PPOConfig

SETTINGS = DemoSettings()


def test_ppo_takes_the_prompts_of_the_pairs_that_dpo_takes():
    pairs, prompts = (data(name, 3, 20) for name in ("dpo", "ppo"))
    assert prompts.column_names == ["prompt"]
    assert prompts["prompt"] == pairs["prompt"]
    assert set(pairs.column_names) == {"prompt", "chosen", "rejected"}


def test_the_reward_of_ppo_is_the_judges_utility():
    prompts, answers = ["copy a b c =>"] * 3, ["sure a b c thanks", "a b um", ""]
    assert judge(prompts, answers, completion_ids=[[1], [2], [3]]) == [
        utility(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_the_rows_are_whole_rollouts(tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **section("ppo", SETTINGS))
    assert SETTINGS.preference_rows % args.rollout_size == 0
    assert args.max_completion_length == LONGEST_ANSWER
