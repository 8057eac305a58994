import json

import cases
import pytest
import runs
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hbat.config.hbat import HBATConfig
from hbat.reports.log import load_log
from hbat.reports.reporter import ForwardLogs, RunReporter, renamed
from hbat.state.plan import plan

LOG = "trainer_state.json"
PLAN = plan(2, ["sft", "dpo"])
MODEL = cases.tiny_llama()


@pytest.fixture
def reporter(tmp_path):
    made = []

    def make(*, state=None, total=40, **options):
        config = HBATConfig(output_dir=str(tmp_path), **{"disable_tqdm": True} | options)
        args = TrainingArguments(output_dir=str(tmp_path), **cases.CHEAP_ARGS)
        made.append(RunReporter(config, MODEL, state or TrainerState(), total, args))
        return made[-1]

    yield make
    for each in made:
        each.close()


def forward(reporter, stage, *, steps=10):
    callback = ForwardLogs(reporter, stage, {})
    state = TrainerState(max_steps=steps)
    callback.on_train_begin(None, state, None)
    return callback, state


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("loss", "dpo/loss"),
        ("grad_norm", "dpo/grad_norm"),
        ("rewards/margins", "dpo/rewards/margins"),
        ("eval_loss", "eval_dpo_stage/loss"),
        ("eval_rewards/margins", "eval_dpo_stage/rewards/margins"),
        ("ewc/penalty", "dpo/ewc/penalty"),
        ("ewc/grad_norm_ratio", "dpo/ewc/grad_norm_ratio"),
        ("epoch", None),
        ("total_flos", None),
        ("train_loss", None),
        ("train_runtime", None),
        ("train_samples_per_second", None),
        ("train_steps_per_second", None),
        ("eval_runtime", None),
        ("eval_samples_per_second", None),
        ("eval_steps_per_second", None),
        ("eval_model_preparation_time", None),
    ],
)
def test_an_entry_is_named_for_its_objective_or_dropped(key, expected):
    assert renamed({key: 1.5}, "dpo") == ({} if expected is None else {expected: 1.5})


def test_no_entry_is_lost_to_another_ones_name():
    logs = {"loss": 1, "eval_loss": 2, "ewc/penalty": 3, "train_loss": 4, "replay/loss": 5}
    expected = {"dpo/loss": 1, "eval_dpo_stage/loss": 2, "dpo/ewc/penalty": 3, "dpo/replay/loss": 5}
    assert renamed(logs, "dpo") == expected


def test_evaluation_inside_a_stage_and_after_it_have_names_of_their_own(reporter):
    run = reporter()
    callback, state = forward(run, PLAN[1])
    state.global_step = 10
    callback.on_log(None, state, None, logs={"eval_loss": 0.7})
    run.log({"eval_dpo/loss": 0.6}, 10)
    inside, after = run.state.log_history
    assert (inside["eval_dpo_stage/loss"], after["eval_dpo/loss"]) == (0.7, 0.6)
    assert "eval_dpo/loss" not in inside


# --- the log ---------------------------------------------------------------------------------------------------------


def test_stages_log_on_one_step_axis_with_their_place(reporter):
    run = reporter()
    for stage in PLAN[:2]:
        callback, state = forward(run, stage)
        for step in (5, 10):
            state.global_step = step
            callback.on_log(None, state, None, logs={"loss": 1.0 / step, "epoch": 0.5})
    assert run.state.log_history == [
        {"sft/loss": 0.2, "hbat/stage": 0, "hbat/round": 1, "step": 5},
        {"sft/loss": 0.1, "hbat/stage": 0, "hbat/round": 1, "step": 10},
        {"dpo/loss": 0.2, "hbat/stage": 1, "hbat/round": 1, "step": 15},
        {"dpo/loss": 0.1, "hbat/stage": 1, "hbat/round": 1, "step": 20},
    ]
    assert run.state.global_step == 20


@pytest.mark.parametrize("logs", [{"train_loss": 1.0, "train_runtime": 2.0}, {}, None])
def test_what_says_nothing_about_the_run_leaves_no_entry(logs, reporter):
    run = reporter()
    callback, state = forward(run, PLAN[0])
    callback.on_log(None, state, None, logs=logs)
    assert run.state.log_history == []


def test_a_stage_that_goes_on_from_its_checkpoint_brings_its_log_along(reporter):
    run = reporter(state=TrainerState(global_step=30))
    callback = ForwardLogs(run, PLAN[3], {})
    past = [{"loss": 2.0, "epoch": 0.1, "step": 2}, {"eval_loss": 3.0, "step": 4}, {"train_loss": 1.0, "step": 4}]
    callback.on_train_begin(None, TrainerState(max_steps=10, global_step=4, log_history=past), None)
    place = {"hbat/stage": 3, "hbat/round": 2}
    assert run.state.log_history == [
        {"dpo/loss": 2.0, "step": 32} | place,
        {"eval_dpo_stage/loss": 3.0, "step": 34} | place,
    ]


def test_a_log_is_saved_and_read_back(reporter, tmp_path):
    run = reporter()
    run.log({"sft/loss": 0.5}, 3)
    again = load_log(tmp_path, 3, run.save())
    assert again.log_history == [{"sft/loss": 0.5, "step": 3}]
    assert again.global_step == 3
    assert (
        TrainerState.load_from_json(str(tmp_path / LOG)).log_history == again.log_history
    )  # as transformers reads it


def test_a_log_that_cannot_be_written_whole_leaves_the_last_one(reporter, tmp_path):
    run = reporter()
    run.log({"sft/loss": 0.5}, 3)
    remembered = run.save()
    run.state.log_history.append({"sft/loss": object()})
    with pytest.raises(TypeError):
        run.save()
    assert len(load_log(tmp_path, 99, remembered).log_history) == 1


def test_a_process_that_is_not_the_first_writes_no_log(reporter, tmp_path):
    run = reporter()
    run.state.is_world_process_zero = False
    run.log({"sft/loss": 0.5}, 3)
    run.save()
    assert run.state.log_history == [{"sft/loss": 0.5, "step": 3}]
    assert not (tmp_path / LOG).exists()


# --- reporters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report_to", ["none", ["none"], []])
def test_a_run_that_reports_to_none_writes_only_its_log(report_to, reporter, tmp_path):
    run = reporter(report_to=report_to)
    run.log({"sft/loss": 0.5}, 1)
    run.save()
    run.close()
    assert [each.name for each in tmp_path.iterdir()] == [LOG]


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_gets_every_entry_on_the_axis_of_the_run(reporter, tmp_path):
    pytest.importorskip("tensorboard")
    for start, stage in ((0, PLAN[0]), (10, PLAN[1])):  # two reporters: the run was cut off in between
        run = reporter(report_to="tensorboard", state=TrainerState(global_step=start))
        callback, state = forward(run, stage)
        for state.global_step in (5, 10):
            callback.on_log(None, state, None, logs={"loss": state.global_step / 4, "eval_loss": 1.0})
        run.close()
    events = _events(tmp_path / "runs")
    assert events["train/sft/loss"] == [(5, 1.25), (10, 2.5)]
    assert events["train/dpo/loss"] == [(15, 1.25), (20, 2.5)]
    assert events["train/hbat/stage"] == [(5, 0.0), (10, 0.0), (15, 1.0), (20, 1.0)]
    assert next(each for each in events if each.endswith("sft_stage/loss") and "eval" in each)


TABLE = [
    {"stage": 0, "prompt": [{"role": "user", "content": "2 | 2?"}], "completion": "4\nor so"},
    {"stage": 0, "prompt": "3?", "completion": "5"},
]


def test_a_table_is_a_text_in_tensorboard(reporter, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = reporter(report_to="tensorboard")
    run.table("completions", TABLE, 7)
    run.table("nothing", [], 7)
    run.close()
    found = EventAccumulator(str(tmp_path / "runs"))
    found.Reload()
    (event,) = found.Tensors("completions/text_summary")
    assert event.step == 7
    text = event.tensor_proto.string_val[0].decode()
    assert text.splitlines() == [
        "| stage | prompt | completion |",
        "| --- | --- | --- |",
        "| 0 | user: 2 \\| 2? | 4<br>or so |",
        "| 0 | 3? | 5 |",
    ]


def test_wandb_gets_every_entry_and_the_table_without_a_network(reporter, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = reporter(report_to="wandb", run_name="mine")
    run.log({"sft/loss": 0.5}, 1)
    run.table("completions", TABLE, 1)
    summary = dict(wandb.run.summary)
    run.close()
    wandb.finish()
    assert summary["train/sft/loss"] == 0.5
    assert summary["completions"]["nrows"] == 2


def test_trackio_gets_every_entry_and_the_table_without_a_network(reporter, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    sent = []
    monkeypatch.setattr(trackio, "log", sent.append)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported, so this is for a first import alone
    run = reporter(report_to="trackio", run_name="mine")
    run.log({"sft/loss": 0.5}, 1)
    run.table("completions", TABLE, 1)
    run.close()
    assert sent[0]["train/sft/loss"] == 0.5
    assert isinstance(sent[1]["completions"], trackio.Table)


def test_an_unknown_reporter_is_refused(reporter):
    with pytest.raises(ValueError, match="tensorbord"):
        reporter(report_to="tensorbord")


@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_closing_twice_does_no_harm(report_to, reporter):
    pytest.importorskip("tensorboard")
    run = reporter(report_to=report_to)
    run.close()
    run.close()


# --- a whole run -----------------------------------------------------------------------------------------------------


class _Cut(TrainerCallback):
    """Ends the run in the middle of its second stage, after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if "stage-001" in args.output_dir and state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.slow  # tests/trainer/test_resume.py compares the logs of such runs as well
@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")  # transformers < 5, of fast checkpoints
def test_the_log_of_a_run_cut_off_inside_a_stage_is_that_of_a_run_that_was_not(tmp_path):
    sections = {name: {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} for name in ("sft", "dpo")}
    options = {"num_rounds": 1, **sections}
    whole = runs.train(cases.tiny_llama(), tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        runs.train(cases.tiny_llama(), tmp_path / "cut", callbacks=[_Cut()], **options)
    again = runs.train(cases.tiny_llama(), tmp_path / "cut", resume=True, **options)
    times = ("_time", "num_tokens")

    def lasting(run):
        return [{k: v for k, v in each.items() if not k.endswith(times)} for each in run.state.log_history]

    assert lasting(again) == lasting(whole)
    assert [each["step"] for each in lasting(again)] == list(range(1, 9))
    written = json.loads((tmp_path / "cut" / LOG).read_text())
    assert written["log_history"] == again.state.log_history
