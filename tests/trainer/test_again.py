"""A trainer that is used again, or otherwise than it was built."""

import cases
import pytest
import runs
from transformers import Trainer, TrainerCallback

from hbat.state.manifest import RunStateError
from hbat.state.run import Run


@pytest.mark.parametrize(
    ("name", "value"), [("num_rounds", 3), ("sft", runs.section(learning_rate=1.0)), ("bf16", True)]
)
def test_a_configuration_that_was_changed_after_the_trainer_was_built_is_refused(name, value, tmp_path):
    run = runs.build_run(cases.tiny_llama(), tmp_path)
    setattr(run.args, name, value)
    with pytest.raises(ValueError, match=rf"^`{name}` was changed from .* after the trainer was built"):
        run.train()
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_resumed_to_nothing_or_started_over_when_asked(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    first = runs.train(cases.tiny_llama(), tmp_path)
    with pytest.raises(
        RunStateError, match=r"Pass `resume_from_checkpoint=True` .* `overwrite_output_dir=True` to start"
    ):
        first.train()
    assert first.train(resume_from_checkpoint=True).global_step == 4 * runs.STEPS
    over = runs.build_run(cases.tiny_llama(), tmp_path, overwrite_output_dir=True, num_rounds=1)
    over.train()
    assert over.state.global_step == 2 * runs.STEPS
    assert (tmp_path / "notes.txt").is_file()
    with pytest.raises(ValueError, match=r"^This trainer has trained already"):
        over.train()


@pytest.mark.parametrize("text", ['{"models": {}}', '{"mine": 1}'])
def test_scores_that_are_of_no_run_are_refused_and_left(text, tmp_path):
    (tmp_path / "evaluation.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunStateError, match="holds scores that are of no run"):
        runs.train(cases.tiny_llama(), tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"evaluation.json": text}


def test_a_run_whose_removal_was_cut_off_is_removed_the_next_time(tmp_path, monkeypatch):
    folder = runs.train(cases.tiny_llama(), tmp_path)._folder  # noqa: SLF001 - what is removed of a real run
    monkeypatch.setattr("hbat.state.folder.shutil.rmtree", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.clear()
    monkeypatch.undo()
    over = runs.build_run(cases.tiny_llama(), tmp_path, overwrite_output_dir=True)
    assert isinstance(over._open(resume=False, allow_changed=()), Run)  # noqa: SLF001 - as above


def test_a_callback_may_be_added_and_knows_where_in_the_run_it_is(tmp_path):
    class Seen(TrainerCallback):
        def __init__(self):
            self.places = []

        def on_step_end(self, args, state, control, **kwargs):
            self.places.append((*state.hbat.values(), state.global_step))

    run, seen = runs.build_run(cases.tiny_llama(), tmp_path), Seen()
    run.add_callback(seen)
    run.train()
    assert seen.places[1] == (0, 1, "sft", 0, 2)
    assert seen.places[-2:] == [(3, 2, "dpo", 6, 1), (3, 2, "dpo", 6, 2)]
    log = [entry for entry in run.state.log_history if "dpo/loss" in entry]
    assert (log[-1]["hbat/stage"], log[-1]["hbat/round"], log[-1]["step"]) == (3, 2, 8)


def test_what_a_plain_trainer_has_and_a_run_has_not_is_explained(tmp_path):
    run = runs.build_run(cases.tiny_llama(), tmp_path)
    assert hasattr(Trainer, "get_train_dataloader")
    with pytest.raises(
        AttributeError, match=r"^`HBATTrainer` has no 'get_train_dataloader'\. Every stage builds a trainer"
    ):
        run.get_train_dataloader()
    with pytest.raises(AttributeError, match=r"^`HBATTrainer` has no 'nonsense'\.$"):
        _ = run.nonsense


def test_what_the_run_says_of_device_and_precision_holds_where_a_section_does_not(tmp_path):
    cheap = {key: value for key, value in runs.section().items() if key not in {"use_cpu", "bf16"}}
    config = runs.HBATConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, sft=cheap, dpo={**cheap, "bf16": True}, num_rounds=1
    )
    run = runs.HBATTrainer(cases.tiny_llama(), config, runs.rows(), processing_class=cases.tiny_tokenizer())
    assert [(track.args.use_cpu, track.args.bf16) for track in run.tracks.values()] == [(True, False), (True, True)]
