"""Learning rates of all stages against one schedule of transformers over all steps."""

import cases
import pytest
import runs
import torch
from transformers import get_scheduler

from hbat.stages.learning_rate import extend_schedule

ROUNDS, STEPS, WARMUP, PEAK = 3, 4, 3, 0.5
SECTION = {"learning_rate": PEAK, "lr_scheduler_type": "cosine", "max_steps": STEPS, "warmup_steps": WARMUP}


def plain_schedule(total):
    """Learning rate of every step of one schedule of transformers; the log has the rate after the step's update."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def run_with(lr_schedule, folder, **options):
    sections = {"sft": SECTION, "dpo": SECTION} | options
    return runs.train(cases.tiny_llama(), folder, num_rounds=ROUNDS, lr_schedule=lr_schedule, **sections)


def test_each_stage_follows_the_schedule_of_transformers_by_default(tmp_path):
    run = run_with("stage", tmp_path)
    assert runs.logged(run, "sft/learning_rate") == pytest.approx(plain_schedule(STEPS) * ROUNDS)


def test_a_schedule_of_the_run_spans_the_stages_of_an_objective_and_one_that_decays_falls_with_the_round(tmp_path):
    """Each objective has a schedule of its own here."""
    run = run_with({"sft": "decay", "dpo": "run"}, tmp_path)
    decayed = [rate * (1 - number / ROUNDS) for number in range(ROUNDS) for rate in plain_schedule(STEPS)]
    assert runs.logged(run, "sft/learning_rate") == pytest.approx(decayed)
    assert runs.logged(run, "dpo/learning_rate") == pytest.approx(plain_schedule(ROUNDS * STEPS), abs=1e-12)


def test_the_first_step_is_taken_at_the_rate_that_is_logged(tmp_path):
    """Plain SGD moves by the rate times the gradient, so the first stages' ends tell the rate."""
    section = {"learning_rate": PEAK, "lr_scheduler_type": "linear", "max_steps": 1, "max_grad_norm": 0.0}
    moved = []
    for schedule in ("stage", "decay"):
        run = runs.train(
            cases.tiny_llama(),
            tmp_path / schedule,
            num_rounds=2,
            objectives=["sft"],
            data={"sft": cases.sft_rows(2)},
            sft=section,
            lr_schedule=schedule,
        )
        moved.append((cases.weights(run.model), run))
    (plain, _), (decayed, run) = moved
    half = runs.by_hand(
        cases.tiny_llama,
        tmp_path / "by-hand",
        data={"sft": cases.sft_rows(2)},
        sections={"sft": section},
        prepare=lambda stage, trainer: setattr(trainer.args, "learning_rate", PEAK / (1 + stage[1])),
    )[-1]
    assert cases.largest_difference(decayed, half) < 1e-7
    assert cases.largest_difference(plain, half) > 1e-5
    assert runs.logged(run, "sft/learning_rate") == [PEAK, PEAK / 2]


def test_a_schedule_that_is_no_function_of_the_step_is_refused(tmp_path):
    class Trainer:
        def create_scheduler(self, num_training_steps, optimizer=None):
            return torch.optim.lr_scheduler.StepLR(
                torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), step_size=1
            )

    trainer = Trainer()
    extend_schedule(trainer, "run", round_index=0, num_rounds=2, steps_before=0, ahead=2)
    with pytest.raises(TypeError, match=r"`lr_schedule: run` needs a schedule of the step alone.*StepLR"):
        trainer.create_scheduler(4)
