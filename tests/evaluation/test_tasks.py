"""Tasks of lm-eval from local files: the same as lm-eval by hand."""

import random

import cases
import pytest
import run_files
import torch

from hbat.config.evaluation import EvalConfig
from hbat.evaluation.suite import Suite
from hbat.evaluation.tasks import headline_of

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module", autouse=True)
def manager():
    """One index of lm-eval's tasks, which takes it seconds to build, for all that ask for a new one."""
    from lm_eval import tasks

    made = tasks.TaskManager()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", lambda: made)
        yield made


TASK = """
task: hbat_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["4", "5", "6"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path):
    rows = [{"question": f"{number} plus 2 is ", "answer": number % 3} for number in range(9)]
    run_files.write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "sums.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return str(tmp_path / "sums.yaml")


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_a_task_of_ones_own_scores_as_by_hand_and_disturbs_nothing(tmp_path, task, manager):
    from lm_eval.models.huggingface import HFLM

    def by_hand(**options):
        model.eval()
        wrapped = HFLM(model, tokenizer=tokenizer, batch_size=1)
        return lm_eval.simple_evaluate(wrapped, tasks=[task], task_manager=manager, **options)["results"]["hbat_sums"]

    model, tokenizer = cases.tiny_llama().train(), cases.tiny_tokenizer()
    suite = Suite(EvalConfig(tasks=[task], batch_size=2))
    before = torch.random.get_rng_state(), random.getstate()
    scores = suite.measure(model, tokenizer, tmp_path, identity="a")
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    expected = by_hand()
    assert scores["hbat_sums"]["acc"] == expected["acc,none"]
    assert scores["hbat_sums"]["acc_stderr"] == pytest.approx(expected["acc_stderr,none"])
    assert suite.headline("hbat_sums", scores["hbat_sums"]) == ("acc", "higher")
    three = Suite(EvalConfig(tasks=[task], limit=3)).measure(model, tokenizer, tmp_path, identity="a")["hbat_sums"]
    assert three["acc"] == by_hand(limit=3)["acc,none"]
    assert three["acc_stderr"] != scores["hbat_sums"]["acc_stderr"]


PERPLEXITY = """
task: hbat_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
"""


@pytest.mark.filterwarnings("ignore")
def test_a_perplexity_is_better_when_it_is_lower(tmp_path, task):
    (tmp_path / "words.yaml").write_text(PERPLEXITY.format(file=tmp_path / "rows.jsonl"))
    suite = Suite(EvalConfig(tasks=[str(tmp_path / "words.yaml")]))
    scores = suite.measure(cases.tiny_llama(), cases.tiny_tokenizer(), tmp_path, identity="a")
    assert suite.headline("hbat_words", scores["hbat_words"]) == ("word_perplexity", "lower")


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"`tasks` is \['arc_esay'\], which cannot be loaded.*Did you mean `arc_easy`"
    ):
        Suite(EvalConfig(tasks=["arc_esay"]))
    with pytest.raises(ValueError, match="absent"):
        Suite(EvalConfig(tasks=[str(tmp_path / "absent.yaml")]))


def test_a_task_is_known_by_its_exact_match_or_accuracy():
    assert headline_of(["exact_match_stderr_strict", "exact_match_strict", "acc"]) == "exact_match_strict"
    assert headline_of(["acc_stderr", "acc", "acc_norm"]) == "acc"
    assert headline_of(["bleu_acc", "other"]) == "bleu_acc"
    assert headline_of(["other"]) == "other"
