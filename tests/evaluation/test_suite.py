"""What is measured of one model, what stays in its folder, and what is refused before anything is measured."""

import json

import cases
import judge_server
import pytest
import run_files
from judge_server import judge

from hbat.config.evaluation import EvalConfig
from hbat.config.fields import build_section
from hbat.data.load import DatasetError
from hbat.evaluation.endpoint import JudgeError
from hbat.evaluation.suite import Suite

ROWS = [{"prompt": f"{number} plus 1 is", "completion": f" {number + 1}"} for number in range(4)]


@pytest.fixture
def prompts(tmp_path):
    return run_files.write_rows(tmp_path / "prompts.jsonl", ROWS)


def measure(folder, config, *, seed=0, identity="a"):
    folder.mkdir(exist_ok=True)
    return Suite(config).measure(cases.tiny_llama(seed), cases.tiny_tokenizer(), folder, identity=identity)


def test_one_temperature_has_plain_names_and_several_have_their_own(tmp_path, prompts):
    options = {"prompts": prompts, "max_new_tokens": 4}
    assert set(measure(tmp_path / "one", EvalConfig(**options))) == {"completions", "rouge"}
    scores = measure(tmp_path / "two", EvalConfig(temperatures=[0.0, 0.75], **options))
    assert set(scores) == {"completions@0", "rouge@0", "completions@0.75", "rouge@0.75"}


def test_a_model_is_compared_with_references_and_with_another_model(tmp_path, prompts):
    with judge() as server:
        options = {"prompts": prompts, "max_new_tokens": 4}
        own = {"model": "judge", "base_url": server.url}
        first = measure(tmp_path / "first", EvalConfig(judge=own, **options))
        assert first["win_rate"]["pairs"] == 4
        against = own | {"against": str(tmp_path / "first")}
        itself = measure(tmp_path / "same", EvalConfig(judge=against, **options))
        assert (itself["win_rate"]["win_rate"], itself["win_rate"]["tie"]) == (0.5, 1.0)
        other = measure(tmp_path / "other", EvalConfig(judge=against, **options), seed=3)
        assert other["win_rate"]["pairs"] == 4


def test_a_biased_judge_shows_in_the_scores(tmp_path, prompts):
    with judge(judge_server.biased) as server:
        own = {"model": "judge", "base_url": server.url}
        found = measure(tmp_path / "a", EvalConfig(prompts=prompts, max_new_tokens=4, judge=own))["win_rate"]
    assert (found["win_rate"], found["agreement"], found["first"]) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"seed": 1}, "seed"),
        ({"limit": 2}, "prompts"),
    ],
)
def test_completions_of_other_settings_are_not_taken_for_these(tmp_path, prompts, changed, name):
    options = {"prompts": prompts, "max_new_tokens": 4}
    measure(tmp_path / "a", EvalConfig(**options))
    with pytest.raises(ValueError, match=f"another `{name}`"):
        measure(tmp_path / "a", EvalConfig(**options | changed))


def test_completions_of_another_model_are_not_taken_for_its_own(tmp_path, prompts):
    config = EvalConfig(prompts=prompts, max_new_tokens=4)
    measure(tmp_path / "a", config)
    with pytest.raises(ValueError, match="another `model`"):
        measure(tmp_path / "a", config, identity="b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Nothing is measured"),
        ({"pairs": "x", "judge": {"model": "m", "base_url": "http://x"}}, "give `prompts`"),
        ({"prompts": "x", "judge": {}}, "either a `reward_model`, or the `model`"),
        ({"prompts": "x", "judge": {"reward_model": "r", "model": "m"}}, "either a `reward_model`, or the `model`"),
        ({"prompts": "x", "judge": {"modle": "m"}}, "`judge.modle`.*Did you mean `model`"),
        ({"prompts": "x", "judge": "gpt"}, "must be a mapping or null"),
        ({"prompts": "x", "temperatures": []}, "`temperatures`"),
        ({"prompts": "x", "temperatures": [0.5, 0.5]}, "different numbers"),
        ({"prompts": "x", "temperatures": [-1.0]}, "`temperatures`"),
        ({"prompts": "x", "temperatures": ["hot"]}, "`temperatures`"),
        ({"prompts": "x", "samples": 0}, "`samples`"),
        ({"prompts": "x", "limit": 0}, "`limit`"),
        ({"prompts": "x", "after": "step"}, "`after`"),
        ({"tasks": []}, "Nothing is measured"),
        ({"texts": "x", "max_length": 1}, "`max_length`"),
        ({"promts": "x"}, "`promts`.*Did you mean `prompts`"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_section("", EvalConfig, values)


@pytest.mark.parametrize("values", [{"prompts": "x", "temperatures": 0.7}, {"tasks": "arc_easy"}])
def test_what_is_no_list_is_refused_in_python(values):
    with pytest.raises(TypeError, match="it must be a list"):
        EvalConfig(**values)


def test_a_model_that_belongs_to_a_run_gets_completions_of_its_own(tmp_path, prompts):
    config = EvalConfig(prompts=prompts, max_new_tokens=4)

    def of_run(seed, identity):
        suite = Suite(config, in_run=True)
        suite.measure(cases.tiny_llama(seed), cases.tiny_tokenizer(), tmp_path / "stage-0", identity=identity)
        return (tmp_path / "stage-0" / "completions.jsonl").read_text()

    first, again, other = of_run(0, "a"), of_run(3, "a"), of_run(3, "b")
    assert first == again != other


def test_a_judge_that_fails_costs_a_run_its_win_rate_alone(tmp_path, prompts, caplog):
    with judge(faults=[401] * 99) as server:
        own = {"model": "judge", "base_url": server.url}
        config = EvalConfig(prompts=prompts, max_new_tokens=4, judge=own)
        suite = Suite(config, in_run=True)
        scores = suite.measure(cases.tiny_llama(), cases.tiny_tokenizer(), tmp_path / "a", identity="a")
        assert set(scores) == {"completions", "rouge"}
        assert "The run continues without a win rate." in caplog.text
        with pytest.raises(JudgeError, match="status 401"):
            measure(tmp_path / "b", config)


def test_rows_that_do_not_fit_are_refused_before_anything_is_completed(tmp_path, prompts):
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        })
        + "\n"
    )
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = None
    suite = Suite(EvalConfig(prompts=prompts, max_new_tokens=4, pairs=str(tmp_path / "pairs.jsonl")))
    with pytest.raises(ValueError, match=r"`pairs`, row 0: .*template"):
        suite.measure(cases.tiny_llama(), tokenizer, tmp_path / "a", identity="a")
    assert not (tmp_path / "a").exists()


def test_a_judge_needs_completions_at_the_same_temperatures(tmp_path, prompts):
    measure(tmp_path / "first", EvalConfig(prompts=prompts, max_new_tokens=4))
    own = {"model": "judge", "base_url": "http://127.0.0.1:1", "against": str(tmp_path / "first")}
    with pytest.raises(ValueError, match="has no completions at temperature 1"):
        measure(tmp_path / "a", EvalConfig(prompts=prompts, max_new_tokens=4, temperatures=[1], judge=own))


def test_models_of_one_folder_share_the_answers_of_their_judge(tmp_path, prompts):
    with judge() as server:
        config = EvalConfig(prompts=prompts, max_new_tokens=4, judge={"model": "judge", "base_url": server.url})
        first = measure(tmp_path / "a", config)
        assert measure(tmp_path / "b", config) == first
    assert len(server.asked) == len(set(server.asked)) > 0


def test_plain_texts_for_a_chat_model_are_told_of(tmp_path, prompts, caplog):
    measure(tmp_path / "a", EvalConfig(prompts=prompts, max_new_tokens=4))
    assert "without the tokenizer's chat template" in caplog.text


def test_what_is_missing_is_refused_before_anything_is_completed(tmp_path, prompts):
    with pytest.raises(DatasetError, match=r"absent\.jsonl"):
        Suite(EvalConfig(prompts="absent.jsonl"))
    (tmp_path / "bare.jsonl").write_text('{"prompt": "a"}\n')
    judge_options = {"model": "judge", "base_url": "http://127.0.0.1:1"}
    with pytest.raises(ValueError, match="the rows of `prompts` have none"):
        Suite(EvalConfig(prompts=str(tmp_path / "bare.jsonl"), judge=judge_options))
    with pytest.raises(ValueError, match="holds no evaluation of the same prompts"):
        measure(
            tmp_path / "a",
            EvalConfig(prompts=prompts, max_new_tokens=4, judge=judge_options | {"against": str(tmp_path)}),
        )
    assert not (tmp_path / "a" / "completions.jsonl").exists()
