"""Chains that are longer than two objectives in equal parts: the same stages as plain TRL trainers run one by one."""

import cases
import pytest
import runs
from kills import CutOffError, Kill, assert_equal, options

from hbat import HBATConfig, HBATTrainer, RunStateError


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Rows of a round in which an objective trains twice, and the weights at the end of plain trainers on them."""
    data = {"sft": cases.sft_rows(8, 1), "dpo": cases.preference_rows(8, 2), "sft_2": cases.sft_rows(8, 3)}
    return data, runs.by_hand(cases.tiny_llama, tmp_path_factory.mktemp("by-hand"), data=data)[-1]


def test_an_objective_trains_twice_in_a_round_with_rows_of_its_own(twice, tmp_path):
    data, expected = twice
    run = runs.train(cases.tiny_llama(), tmp_path, data=data, objectives=["sft", "dpo", "sft"])
    assert runs.same(cases.weights(run.model), expected)


def test_each_of_the_two_has_importance_of_its_own(tmp_path):
    data = runs.rows() | {"sft_2": cases.sft_rows(8, 4)}
    runs.train(
        cases.tiny_llama(), tmp_path, data=data, objectives=["sft", "dpo", "sft"], num_rounds=1, ewc={"strength": 0.5}
    )
    first, second = (runs.state_tensors(tmp_path, f"displacement-{name}") for name in ("sft", "sft_2"))
    assert first.keys() == second.keys()
    assert not runs.same(first, second)


ROUNDS = [{"sft": 0.5, "dpo": 0.25}, {"sft": 0.25}, {"dpo": 0.75}]


def shared_parts(data):
    """Rows of each stage of `ROUNDS`, of 8 rows an objective: the order is that of equal parts."""
    order = {name: [runs.part_indices(8, 8, index, runs.SEED)[0] for index in range(8)] for name in data}
    cuts = {(0, "sft"): (0, 4), (0, "dpo"): (0, 2), (1, "sft"): (4, 6), (2, "dpo"): (2, 8)}
    return {
        (number, name): data[name].select(sorted(order[name][start:end]))
        for (number, name), (start, end) in cuts.items()
    }


def test_rounds_train_on_their_shares(tmp_path):
    data = runs.rows()
    expected = runs.by_hand(cases.tiny_llama, tmp_path / "by-hand", data=data, parts=shared_parts(data))[-1]
    run = runs.train(cases.tiny_llama(), tmp_path / "run", data=data, num_rounds=1, rounds=ROUNDS)
    assert runs.same(cases.weights(run.model), expected)


def test_a_run_of_uneven_rounds_that_was_cut_off_resumes(tmp_path):
    settings = options("carry", 1) | {"num_rounds": 1, "rounds": ROUNDS, "lr_schedule": {"dpo": "run"}}
    whole = runs.train(cases.tiny_llama(), tmp_path / "whole", **settings)
    with pytest.raises(CutOffError):
        runs.train(cases.tiny_llama(), tmp_path / "cut", callbacks=[Kill(3, "step", 2)], **settings)
    assert_equal(runs.train(cases.tiny_llama(), tmp_path / "cut", resume=True, **settings), whole)


def test_the_steps_ahead_of_a_schedule_over_uneven_rounds_follow_the_shares(tmp_path):
    run = runs.build_run(cases.tiny_llama(), tmp_path, num_rounds=1, rounds=ROUNDS)
    assert run.tracks["sft"].rows_ahead(3, 0) == pytest.approx(1.5)
    assert run.tracks["dpo"].rows_ahead(3, 2) == pytest.approx(1)


def test_a_share_that_leaves_too_few_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has too few rows: 0\.01 of its 8 \(`rounds\[0\]`\) is 0, but"):
        runs.build_run(cases.tiny_llama(), tmp_path, num_rounds=1, rounds=[{"sft": 0.01, "dpo": 1}])


def test_a_trainer_is_named_by_its_class_and_has_the_checks_of_its_kind(twice, tmp_path):
    entry = {"name": "code", "trainer": "trl.SFTTrainer", "args": runs.section()}
    data, expected = twice
    named = HBATConfig(
        output_dir=str(tmp_path / "run"), objectives=["sft", "dpo", entry], sft=runs.section(), dpo=runs.section(),
        num_rounds=2, ewc=None, optimizer_state="reset", disable_tqdm=True, seed=runs.SEED,
    )  # fmt: skip
    model = cases.tiny_llama()
    rows = {"sft": data["sft"], "dpo": data["dpo"], "code": data["sft_2"]}
    HBATTrainer(model, named, rows, processing_class=cases.tiny_tokenizer()).train()
    assert runs.same(cases.weights(model), expected)
    rows["code"] = rows["code"].map(lambda row: row | {"completion": ""})
    with pytest.raises(ValueError, match=r"train_dataset\['code'\], row 0, field `completion`: the text is empty"):
        HBATTrainer(model, named, rows, processing_class=cases.tiny_tokenizer())


def test_a_named_objective_does_not_resume_with_another_trainer(tmp_path):
    def run(trainer):
        entry = {"name": "more", "trainer": trainer, "args": runs.section()}
        named = HBATConfig(output_dir=str(tmp_path), objectives=[entry], ewc=None, disable_tqdm=True, seed=runs.SEED)
        rows = {"more": cases.preference_rows(8).remove_columns("rejected").rename_column("chosen", "completion")}
        if trainer == "dpo":
            rows = {"more": cases.preference_rows(8)}
        return HBATTrainer(cases.tiny_llama(), named, rows, processing_class=cases.tiny_tokenizer())

    run("sft").train()
    with pytest.raises(RunStateError, match=r"run\.trainers\.more"):
        run("dpo").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ({"trainer": "trl.SFTTrainr"}, ValueError, r"'code' names 'trl\.SFTTrainr', which cannot be imported"),
        ({"trainer": "SFTTrainer"}, ValueError, r"Give a module and a class, such as `trl\.SFTTrainer`"),
        ({"trainer": "trl.SFTConfig"}, TypeError, r"which is no `transformers\.Trainer`"),
        ({"trainer": "transformers.Trainer"}, ValueError, r"needs `config`, the class of the arguments of Trainer"),
        ({"trainer": "sft", "arg": {}}, ValueError, r"unknown key `arg`\. Did you mean `args`\?"),
        ({"trainer": "sft", "args": {"learning_rat": 1}}, ValueError, r"`code\.learning_rat`"),
    ],
)
def test_an_entry_that_names_no_trainer_is_refused(entry, kind, message, tmp_path):
    named = HBATConfig(output_dir=str(tmp_path), objectives=[{"name": "code", **entry}])
    with pytest.raises(kind, match=message):
        HBATTrainer(cases.tiny_llama(), named, {"code": cases.sft_rows(8)}, processing_class=cases.tiny_tokenizer())
