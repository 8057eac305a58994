"""The contract: from an objective to the configuration and the trainer of a stage."""

import cases
import pytest
import runs
import trl
from transformers import PrinterCallback, TrainerCallback

from hbat.objectives.objective import Objective


def objective(config=None, **options):
    return Objective(name="mine", trainer_class=trl.SFTTrainer, config_class=trl.SFTConfig, config=config, **options)


def test_fields_become_the_arguments_of_the_trainer(tmp_path):
    args = objective(runs.section(learning_rate="3e-4", max_length=20)).base_args(str(tmp_path))
    assert isinstance(args, trl.SFTConfig)
    assert (args.learning_rate, args.max_length, args.report_to) == (3e-4, 20, [])


@pytest.mark.parametrize("none", ["none", ["none"]])
def test_a_section_may_say_that_its_stages_report_to_none(none, tmp_path):
    args = objective(runs.section(report_to=none)).base_args(str(tmp_path))
    assert args.report_to == []


@pytest.mark.parametrize("reporter", ["wandb", "all", ["none", "wandb"], None])
def test_a_section_may_not_name_reporters_of_its_own(reporter, tmp_path):
    with pytest.raises(ValueError, match=r"`mine\.report_to` cannot be set here: .*Set the run's `report_to`"):
        objective({"report_to": reporter}).base_args(str(tmp_path))


def test_a_ready_configuration_is_taken_as_it_is(tmp_path):
    ready = trl.SFTConfig(output_dir=str(tmp_path), report_to="none", **runs.section())
    assert objective(ready).base_args("elsewhere") is ready


def test_a_stage_gets_its_folder_and_a_seed_of_its_own_and_nothing_else_changes(tmp_path):
    base = objective(runs.section(seed=11, warmup_steps=3, data_seed=5)).base_args(str(tmp_path))
    args = objective().stage_args(base, str(tmp_path / "stage"), 4)
    before, after = base.to_dict(), args.to_dict()
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {
        "data_seed", "disable_tqdm", "logging_dir", "logging_nan_inf_filter", "output_dir", "save_total_limit", "seed"
    }  # fmt: skip
    assert (args.seed, args.data_seed, args.output_dir, args.disable_tqdm, args.save_total_limit) == (
        15,
        9,
        str(tmp_path / "stage"),
        True,
        1,
    )
    assert base.seed == 11


def test_what_a_trainer_takes_out_of_a_stages_nested_options_stays_in_the_users(tmp_path):
    base = objective(runs.section(lr_scheduler_kwargs={"own": 1})).base_args(str(tmp_path))
    objective().stage_args(base, str(tmp_path), 0).lr_scheduler_kwargs.pop("own")
    assert base.lr_scheduler_kwargs == {"own": 1}


def test_a_stage_keeps_as_many_checkpoints_as_the_user_asks_for(tmp_path):
    base = objective(runs.section(save_total_limit=3)).base_args(str(tmp_path))
    assert objective().stage_args(base, str(tmp_path), 0).save_total_limit == 3


def built(wanted, folder, **options):
    args = wanted.base_args(str(folder))
    arguments = {"model": cases.tiny_llama(), "eval_dataset": None, "processing_class": cases.tiny_tokenizer()}
    return wanted.build_trainer(args=args, **arguments | options)


def test_a_trainer_prints_nothing_and_has_the_users_callbacks(tmp_path):
    class Own(TrainerCallback):
        pass

    own = Own()
    trainer = built(objective(runs.section()), tmp_path, train_dataset=cases.sft_rows(2), callbacks=[own])
    assert own in trainer.callback_handler.callbacks
    assert not any(isinstance(each, PrinterCallback) for each in trainer.callback_handler.callbacks)


def test_only_a_trainer_that_uses_a_reference_gets_one(tmp_path):
    reference = cases.tiny_llama(seed=1)
    without = built(objective(runs.section()), tmp_path, train_dataset=cases.sft_rows(2), reference=reference)
    assert getattr(without, "ref_model", None) is None
    wanted = Objective(
        name="mine",
        trainer_class=trl.DPOTrainer,
        config_class=trl.DPOConfig,
        config=runs.section(),
        uses_reference=True,
    )
    trainer = built(wanted, tmp_path, train_dataset=cases.preference_rows(2), reference=reference)
    assert trainer.ref_model is reference


def test_more_arguments_reach_the_constructor(tmp_path):
    together = {"formatting_func": lambda row: row["prompt"] + row["completion"]}
    wanted = objective(runs.section(completion_only_loss=False), trainer_kwargs=together)
    trainer = built(wanted, tmp_path, train_dataset=cases.sft_rows(1))
    row = cases.sft_rows(1)[0]
    text = cases.tiny_tokenizer().decode(trainer.train_dataset[0]["input_ids"], skip_special_tokens=True)
    assert text == row["prompt"] + row["completion"]


@pytest.mark.parametrize(
    "key", ["output_dir", "run_name", "push_to_hub", "resume_from_checkpoint", "model_init_kwargs"]
)
def test_what_belongs_to_the_run_cannot_stand_in_a_section(key, tmp_path):
    with pytest.raises(ValueError, match=rf"`mine\.{key}` cannot be set here: .*\."):
        objective({key: "x"}).base_args(str(tmp_path))
