"""KTO as an objective of a run, on both forms of its data."""

import cases
import pytest
import runs

from hbat.config.hbat import HBATConfig
from hbat.objectives.kto import KTO
from hbat.trainer import HBATTrainer


def train(model, folder, rows, *, evaluation=None, num_rounds=2, **config):
    run = HBATTrainer(
        model=model,
        args=HBATConfig(
            output_dir=str(folder),
            objectives=["sft", "kto"],
            num_rounds=num_rounds,
            sft=runs.section(),
            kto=runs.section(),
            disable_tqdm=True,
            **{"ewc": None} | config,
        ),
        train_dataset={"sft": cases.sft_rows(8), "kto": rows},
        eval_dataset=evaluation,
        processing_class=cases.tiny_tokenizer(),
    )
    run.train()
    return run


ROWS = {"judged answers": runs.kto_rows(8), "pairs": cases.preference_rows(4)}


@runs.needs_kto
@pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("full", "pairs"),
        ("lora", "judged answers"),
        pytest.param("full", "judged answers", marks=pytest.mark.slow),
        pytest.param("lora", "pairs", marks=pytest.mark.slow),
    ],
)
def test_every_stage_starts_at_its_reference(case, kind, tmp_path):
    run = train(cases.MODEL_CASES[case](0), tmp_path, ROWS[kind], ewc={"strength": 1.0})
    divergence = runs.logged(run, "kto/kl")
    assert len(divergence) == 4
    assert divergence[::2] == [0.0, 0.0]
    first_steps = [each for each in run.state.log_history if "kto/loss" in each][::2]
    sides = ("kto/rewards/chosen", "kto/rewards/rejected")  # a batch may hold one of them only
    rewards = [[each[side] for side in sides if side in each] for each in first_steps]
    assert all(rewards)
    assert {value for each in rewards for value in each} == {0.0}
    assert max(runs.logged(run, "ewc/penalty")) > 0


@runs.needs_kto
def test_it_is_scored_by_its_loss(tmp_path):
    evaluation = {"kto": runs.kto_rows(4, 9)}
    run = train(cases.tiny_llama(), tmp_path, ROWS["judged answers"], evaluation=evaluation, num_rounds=1)
    assert all(each > 0 for each in run.matrix.series("kto"))
    assert run.matrix.better_of("kto") == "lower"


@runs.needs_kto
@pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
def test_the_fisher_looks_at_good_answers(tmp_path):
    ewc = {"strength": 1.0, "source": "fisher", "fisher_samples": 4}
    train(cases.tiny_llama(), tmp_path, ROWS["judged answers"], ewc=ewc, num_rounds=1)
    assert any(each.abs().max() > 0 for each in runs.state_tensors(tmp_path, "importance-kto").values())


@runs.needs_kto
def test_a_good_answer_is_the_target_and_a_bad_one_is_none():
    row = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "label": True}
    (example,) = KTO().fisher_sequences(row)
    assert (list(example.input_ids), list(example.labels)) == ([1, 2, 3, 4], [-100, -100, 3, 4])
    assert not list(KTO().fisher_sequences(row | {"label": False}))


@pytest.mark.skipif(not runs.EXPERIMENTAL, reason="this TRL's KTOTrainer is stable")
def test_the_experimental_trainer_of_an_older_trl_is_refused():
    with pytest.raises(ImportError, match=r"'kto' needs TRL 1\.8 or newer"):
        KTO()
