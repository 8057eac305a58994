import functools

import cases
import numpy as np
import oracle
import pytest
import runs
import torch
import trl
from paths import Witness
from transformers import TrainerCallback

from hbat.engines.engine import Engine
from hbat.ewc.callback import EWCCallback
from hbat.stages.path import PathIntegral


def train(build, folder, *, penalty=None, loss_scale=None, **options):
    """(the total, the witness) of a few steps of SFT."""
    witness, model = Witness(), build()

    class Watched(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            witness.see(loss, cases.trainable(self.model))
            return loss

    arguments = cases.CHEAP_ARGS | {"output_dir": str(folder), "learning_rate": 0.01} | options
    trainer = Watched(
        model,
        args=trl.SFTConfig(**arguments),
        train_dataset=cases.sft_rows(24),
        processing_class=cases.tiny_tokenizer(),
        callbacks=[witness],
    )
    if loss_scale:  # which hardly shrinks when it overflows
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, backoff_factor=0.999)
    start = cases.weights(model)
    if penalty:
        anchor = {name: tensor + 0.05 for name, tensor in start.items()}
        EWCCallback(cases.random_like(start, 12), anchor, strength=1.5, method=penalty).bind(trainer)
    path = PathIntegral(trainer, Engine(), start, None)
    trainer.train()
    return path.total, witness.path


CASES = {
    "adam": (cases.tiny_llama, {"optim": "adamw_torch"}),
    "accumulation": (cases.tiny_llama, {"gradient_accumulation_steps": 3}),
    "clipping": (cases.tiny_llama, {"max_grad_norm": 0.1}),
    "weight decay": (cases.tiny_llama, {"optim": "adamw_torch", "weight_decay": 1.0}),
    "lora": (cases.lora_llama, {"optim": "adamw_torch", "learning_rate": 0.1}),
    "tied": (functools.partial(cases.tiny_llama, tied=True), {}),
    "frozen": (cases.frozen_llama, {}),
    "penalty": (cases.tiny_llama, {"penalty": "gradient", "max_grad_norm": 0.1}),
    "pull": (cases.tiny_llama, {"penalty": "proximal"}),
    "loss scale": (cases.tiny_llama, {"loss_scale": 2.0**10}),
}


@pytest.mark.parametrize(("build", "options"), CASES.values(), ids=CASES)
def test_the_total_is_the_path_integral_of_the_task_alone(build, options, tmp_path):
    found, expected = train(build, tmp_path, **options)
    assert found.keys() == expected.keys()
    largest = max(np.abs(path).max() for path in expected.values())
    for name, path in expected.items():
        np.testing.assert_allclose(oracle.array(found[name]), path, rtol=1e-3, atol=1e-5 * largest)


def test_steps_that_a_loss_scale_skips_leave_no_path(tmp_path):
    found, expected = train(cases.tiny_llama, tmp_path, loss_scale=2.0**127)  # every gradient is infinite
    assert not any(np.any(path) for path in expected.values())
    assert not any(bool(each.any()) for each in found.values())


def test_weights_in_bfloat16_are_measured_in_float32(tmp_path):
    found, expected = train(cases.bf16_llama, tmp_path, learning_rate=0.1)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    largest = max(np.abs(path).max() for path in expected.values())
    for name, path in expected.items():
        np.testing.assert_allclose(oracle.array(found[name]), path, rtol=1e-2, atol=1e-4 * largest)


def test_the_sum_of_the_path_is_the_decrease_of_the_loss(tmp_path):
    """Along a path of short steps on the same rows; the sum runs over all elements."""
    losses = []

    class Losses(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.append(logs.get("loss"))

    options = cases.CHEAP_ARGS | {"output_dir": str(tmp_path), "learning_rate": 0.002, "max_steps": 30}
    model, rows = cases.tiny_llama(), cases.sft_rows(2)
    trainer = trl.SFTTrainer(
        model, args=trl.SFTConfig(**options), train_dataset=rows, processing_class=cases.tiny_tokenizer(),
        callbacks=[Losses()],
    )  # fmt: skip
    path = PathIntegral(trainer, Engine(), cases.weights(model), None)
    trainer.train()
    losses = [loss for loss in losses if loss is not None]
    # The last loss is that before the last step.
    decrease = (losses[0] - losses[-1]) * len(losses) / (len(losses) - 1)
    assert sum(float(tensor.sum()) for tensor in path.total.values()) == pytest.approx(decrease, rel=0.1)


def test_training_does_not_notice_it(tmp_path):
    ends = []
    for source in ("path", "relative"):
        # The first stage has no penalty: it differs in the accumulation alone.
        ewc = {"source": source, "strength": 1e-9}
        seen = runs.train(cases.tiny_llama(), tmp_path / source, num_rounds=1, ewc=ewc)
        ends.append(runs.logged(seen, "sft/loss"))
    assert ends[0] == ends[1]
