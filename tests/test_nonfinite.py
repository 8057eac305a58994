"""A stage whose loss is not finite stops, and the run goes on from its start."""

import cases
import pytest
import runs
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback


class Poison(TrainerCallback):
    """Sets a weight to NaN or infinity after the first step of one stage."""

    def __init__(self, stage, value):
        self.stage, self.value, self.current = stage, value, -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.current += 1

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.current == self.stage and state.global_step == 1:
            with torch.no_grad():
                cases.trainable(model)[WEIGHTS[hasattr(model, "peft_config")]].fill_(self.value)


#: One weight, without an adapter and with one, from which no number comes out whole.
WEIGHTS = [
    "model.norm.weight",
    "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight",
]


@pytest.mark.parametrize("case", ["full", "lora"])
@pytest.mark.parametrize(("stage", "name"), [(0, "round 1 of 2, sft"), (3, "round 2 of 2, dpo")])
def test_a_loss_that_is_not_a_number_stops_the_stage_and_the_run_goes_on_from_its_start(case, stage, name, tmp_path):
    build = cases.MODEL_CASES[case]
    with pytest.raises(FloatingPointError, match=rf"not finite in stage {stage} \({name}\) at its step 2"):
        runs.train(build(0), tmp_path / "run", callbacks=[Poison(stage, float("nan"))])
    on_disk = load_file(tmp_path / "run" / "state" / f"weights-{stage:03d}.safetensors")
    assert all(torch.isfinite(each).all() for each in on_disk.values())
    whole = runs.train(build(0), tmp_path / "whole")
    resumed = runs.train(build(0), tmp_path / "run", resume=True)
    assert runs.same(cases.weights(resumed.model), cases.weights(whole.model))


def test_one_bad_micro_batch_of_a_step_is_seen(tmp_path):
    class PoisonOne(TrainerCallback):
        """The weight is bad for the first of two micro-batches only."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.kept = model.model.norm.weight.detach().clone()
            model.model.norm.weight.data.fill_(float("inf"))

        def on_substep_end(self, args, state, control, model=None, **kwargs):
            model.model.norm.weight.data.copy_(self.kept)

    with pytest.raises(FloatingPointError, match=r"stage 0 .* at its step 1"):
        runs.train(cases.tiny_llama(), tmp_path, callbacks=[PoisonOne()], sft={"gradient_accumulation_steps": 2})


@pytest.mark.parametrize("case", ["full", "lora"])
def test_weights_that_are_not_finite_at_the_end_of_a_stage_do_not_become_its_result(case, tmp_path):
    """The gradient of the last step is infinite, its loss was not."""

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == args.max_steps - 1:
                next(iter(cases.trainable(model).values())).grad.fill_(float("inf"))

    build = cases.MODEL_CASES[case]
    with pytest.raises(FloatingPointError, match=r"^The weight '.*' is not finite at the end of stage 0 .*sft"):
        runs.train(build(0), tmp_path / "run", callbacks=[Overflow()])
    whole = runs.train(build(0), tmp_path / "whole")
    resumed = runs.train(build(0), tmp_path / "run", resume=True)
    assert runs.same(cases.weights(resumed.model), cases.weights(whole.model))
