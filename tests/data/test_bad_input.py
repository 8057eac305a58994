"""Whatever a row holds: its fault is named before anything is trained, or it is trained on."""

import tempfile
from pathlib import Path

import bad_rows
import cases
import pytest
import runs
import trl
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from junk import fixed, one_line

from hbat.config.hbat import HBATConfig
from hbat.data.check import check_dataset
from hbat.data.load import DatasetError
from hbat.trainer import HBATTrainer

slow = pytest.mark.slow
#: `make test-all` draws ten times as many rows.
thoroughly = pytest.mark.parametrize("times", [1, pytest.param(10, marks=slow)])
each_format = pytest.mark.parametrize(("objective", "form"), bad_rows.FORMATS)

#: Cheap stages of each objective.
SECTIONS = {
    "ppo": {"rollout_batch_size": 2, "max_completion_length": 2},
    "grpo": {"num_generations": 2, "max_completion_length": 2},
}
OBJECTIVES = ["sft", "dpo", "ppo", "grpo"]
if not any(base.__module__.startswith("trl.experimental") for base in trl.KTOTrainer.__mro__):
    OBJECTIVES.append("kto")
#: The format of each objective that `make test` trains on.
USUAL = {"sft": "messages", "dpo": "pair of texts", "kto": "judged text", "ppo": "messages", "grpo": "text"}


def of_rows(*rows):
    """A data set of these rows, or of the last alone, or None if Arrow cannot hold them."""
    for several in (list(rows), [rows[-1]]):
        try:
            return Dataset.from_list(several)
        except (ValueError, TypeError, OverflowError):
            continue
    return None


# --- rows ------------------------------------------------------------------------------------------------------------


@thoroughly
@each_format
def test_good_rows_have_no_fault(objective, form, times):
    @fixed(max_examples=5 * times)
    @given(bad_rows.GOOD[objective][form])
    def check(row):
        assert list(bad_rows.CHECKS[objective](row)) == []

    check()


@thoroughly
@each_format
def test_a_fault_is_named_with_its_row_field_and_kind(objective, form, times):
    good = bad_rows.GOOD[objective][form]

    @fixed(max_examples=10 * times)
    @given(bad_rows.spoiled(objective, form), good)
    def check(bad, before):
        row, field, kinds = bad
        faults = bad_rows.CHECKS[objective]
        found = list(faults(row))
        assert kinds & {fault.kind for fault in found}, found
        data = of_rows(before, row)
        if data is None:
            return
        with pytest.raises(DatasetError) as caught:
            check_dataset(data, name="train_dataset['it']", faults=faults)
        assert f"field `{field}" in one_line(caught.value, f"train_dataset['it'], row {len(data) - 1}, ")

    check()


@thoroughly
@pytest.mark.parametrize("objective", bad_rows.GOOD)
def test_no_row_confuses_its_check(objective, times):
    @fixed(max_examples=50 * times)
    @given(bad_rows.disturbed(objective))
    def check(row):
        for fault in bad_rows.CHECKS[objective](row):
            assert fault.kind
            assert fault.problem

    check()


# --- runs ------------------------------------------------------------------------------------------------------------


def lengths(completions, **columns):
    return [float(len(str(completion))) for completion in completions]


def trainer(objective, rows, folder):
    section = runs.section(max_steps=1, **SECTIONS.get(objective, {}))
    config = HBATConfig(
        output_dir=str(folder),
        objectives=[objective],
        num_rounds=1,
        ewc=None,
        disable_tqdm=True,
        **{objective: section},
    )
    tokenizer = cases.tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # TRL 1.0 hands all of them to the model
    return HBATTrainer(
        model=cases.tiny_llama(),
        args=config,
        train_dataset={objective: rows},
        processing_class=tokenizer,
        reward_funcs=lengths if objective in SECTIONS else None,
    )


def outcome(objective, rows):
    """Train one step, or get the one line that says why not; then nothing was written."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "out")
        try:
            run = trainer(objective, rows, folder)
        except DatasetError as error:
            one_line(error, f"train_dataset[{objective!r}]")
            assert not folder.exists()
            return "refused"
        run.train()
        assert run.state.global_step == 1
        return "trained"


@pytest.mark.parametrize(
    ("objective", "examples"), [("sft", 8), *(pytest.param(name, 20, marks=slow) for name in OBJECTIVES)]
)
def test_whatever_a_row_holds_it_is_refused_by_name_or_trained_on(objective, examples):
    found = set()

    @fixed(max_examples=examples)
    @given(bad_rows.disturbed(objective), st.one_of(*bad_rows.GOOD[objective].values()), st.booleans())
    def check(row, other, alone):
        rows = of_rows(row if alone else other, row, row, row)
        if rows:
            found.add(outcome(objective, rows))

    check()
    assert "refused" in found


@pytest.mark.parametrize(
    ("objective", "form"),
    [
        pytest.param(objective, form, marks=() if USUAL[objective] == form else slow)
        for objective, form in bad_rows.FORMATS
        if objective in OBJECTIVES
    ],
)
def test_good_rows_of_every_format_are_trained_on(objective, form):
    @fixed(max_examples=1 if USUAL[objective] == form else 2)
    @given(st.lists(bad_rows.GOOD[objective][form], min_size=4, max_size=4))
    def check(rows):
        kto = objective == "kto" and "label" in rows[0]  # TRL needs good and bad ones
        labels = [{"label": at % 2 == 0} if kto else {} for at in range(4)]
        several = [row | label for row, label in zip(rows, labels, strict=True)]
        assert outcome(objective, Dataset.from_list(several)) == "trained"

    check()
