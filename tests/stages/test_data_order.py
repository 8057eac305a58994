"""A stage that goes on in a later epoch sees the rest of it in the order in which it began."""

import cases
import pytest
import runs
from kills import CutOffError, Kill
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from hbat.stages.callbacks import KeepEpoch


class EpochSampler(RandomSampler):
    def __init__(self, rows):
        super().__init__(rows)
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_the_epoch_of_a_sampler_only_grows():
    sampler = EpochSampler(range(4))
    loader = DataLoader(range(4), batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    KeepEpoch().on_train_begin(None, None, None, train_dataloader=loader)
    for epoch in (0, 2, 0, 1, 3):
        sampler.set_epoch(epoch)
    assert sampler.epochs == [0, 2, 2, 2, 3]
    KeepEpoch().on_train_begin(None, None, None, train_dataloader=None)


@pytest.mark.parametrize(
    ("case", "stage"),
    [
        pytest.param("full", 0, id="sft"),
        pytest.param("lora", 1, id="dpo-lora"),
        pytest.param("lora", 0, id="sft-lora", marks=pytest.mark.slow),
        pytest.param("full", 1, id="dpo", marks=pytest.mark.slow),
    ],
)
def test_a_stage_cut_off_in_its_second_epoch_ends_as_if_it_was_not(case, stage, tmp_path):
    epochs = {"max_steps": -1, "num_train_epochs": 3, "optim": "adamw_torch", "learning_rate": 0.01}
    options = {"sft": dict(epochs), "dpo": dict(epochs), "num_rounds": 1, "data": runs.rows(10)}
    saves = {"save_strategy": "steps", "save_steps": 7}
    saving = options | {name: options[name] | saves for name in ("sft", "dpo")}
    build = cases.MODEL_CASES[case]
    with pytest.raises(CutOffError):
        runs.train(build(0), tmp_path / "run", callbacks=[Kill(stage, "save", 7)], **saving)
    resumed = runs.train(build(0), tmp_path / "run", resume=True, **saving)
    whole = runs.train(build(0), tmp_path / "whole", **options)
    assert runs.same(cases.weights(resumed.model), cases.weights(whole.model))
