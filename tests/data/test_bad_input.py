"""Whatever a row or a configuration holds: its fault is named before anything is trained, or it is trained on."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import bad_rows
import cases
import pytest
import runs
import trl
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbat.cli.run_file import parse
from hbat.cli.yaml import PlainYAMLError, load_yaml
from hbat.config.ewc import EWCConfig
from hbat.config.hbat import HBATConfig
from hbat.data.check import check_dataset
from hbat.data.load import DatasetError
from hbat.objectives.built_in import build_sections, resolve
from hbat.trainer import HBATTrainer

#: The same examples in every run.
fixed = functools.partial(
    settings, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
each_format = pytest.mark.parametrize(("objective", "form"), bad_rows.FORMATS)

#: The least that a stage of each objective takes.
SECTIONS = {
    "ppo": {"rollout_batch_size": 2, "max_completion_length": 2},
    "grpo": {"num_generations": 2, "max_completion_length": 2},
}
OBJECTIVES = ["sft", "dpo", "ppo", "grpo"]
if not any(each.__module__.startswith("trl.experimental") for each in trl.KTOTrainer.__mro__):
    OBJECTIVES.append("kto")


def of_rows(*rows):
    """A data set of these rows, or of the last alone, or None, where Arrow cannot hold them in one."""
    for several in (list(rows), [rows[-1]]):
        try:
            return Dataset.from_list(several)
        except (ValueError, TypeError, OverflowError):
            continue
    return None


def one_line(error, start):
    message = str(error)
    assert message.startswith(start)
    assert "\n" not in message
    assert len(message) < 2000
    return message


# --- rows ------------------------------------------------------------------------------------------------------------


@each_format
def test_good_rows_have_no_fault(objective, form):
    @fixed(max_examples=40)
    @given(bad_rows.GOOD[objective][form])
    def check(row):
        assert list(bad_rows.CHECKS[objective](row)) == []

    check()


@each_format
def test_a_fault_is_named_with_its_row_field_and_kind(objective, form):
    good = bad_rows.GOOD[objective][form]

    @fixed(max_examples=40)
    @given(bad_rows.spoiled(objective, form), good)
    def check(bad, before):
        row, field, kinds = bad
        faults = bad_rows.CHECKS[objective]
        found = list(faults(row))
        assert kinds & {each.kind for each in found}, found
        data = of_rows(before, row)
        if data is None:
            return
        with pytest.raises(DatasetError) as caught:
            check_dataset(data, name="train_dataset['it']", faults=faults)
        assert f"field `{field}" in one_line(caught.value, f"train_dataset['it'], row {len(data) - 1}, ")

    check()


@pytest.mark.parametrize("objective", bad_rows.GOOD)
def test_no_row_confuses_its_check(objective):
    @fixed(max_examples=200)
    @given(bad_rows.disturbed(objective))
    def check(row):
        for each in bad_rows.CHECKS[objective](row):
            assert each.kind
            assert each.problem

    check()


def lengths(completions, **columns):
    return [float(len(str(each))) for each in completions]


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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_whatever_a_row_holds_it_is_refused_by_name_or_trained_on(objective):
    found = set()

    @fixed(max_examples=20)
    @given(bad_rows.disturbed(objective), st.one_of(*bad_rows.GOOD[objective].values()), st.booleans())
    def check(row, other, alone):
        rows = of_rows(row if alone else other, row, row, row)
        if rows:
            found.add(outcome(objective, rows))

    check()
    assert "refused" in found


@pytest.mark.parametrize(("objective", "form"), [each for each in bad_rows.FORMATS if each[0] in OBJECTIVES])
def test_good_rows_of_every_format_are_trained_on(objective, form):
    @fixed(max_examples=2)
    @given(st.lists(bad_rows.GOOD[objective][form], min_size=4, max_size=4))
    def check(rows):
        kto = objective == "kto" and "label" in rows[0]  # TRL needs good and bad ones
        labels = [{"label": at % 2 == 0} if kto else {} for at in range(4)]
        several = [row | label for row, label in zip(rows, labels, strict=True)]
        assert outcome(objective, Dataset.from_list(several)) == "trained"

    check()


# --- configurations --------------------------------------------------------------------------------------------------

JUNK = st.sampled_from([
    None,
    "",
    "x",
    True,
    -1,
    0,
    10**400,
    float("nan"),
    float("inf"),
    -0.5,
    [],
    {},
    ["x"],
    {"x": 1},
    b"x",
    "1e-3",
    "no",
])


def fields(config_class, but=()):
    return st.sampled_from([each.name for each in dataclasses.fields(config_class) if each.name not in but])


def refused_or_taken(names, build):
    message = names[0]
    try:
        build()
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        message = one_line(error, "")
    assert any(each in message for each in names), message


@fixed(max_examples=300)
@given(fields(HBATConfig), JUNK)
def test_any_value_of_the_runs_fields_is_taken_or_refused_by_name(key, value):
    refused_or_taken([key], lambda: HBATConfig(**{"output_dir": "unused", key: value}))


@fixed(max_examples=300)
@given(fields(EWCConfig), JUNK)
def test_any_value_of_a_field_of_ewc_is_taken_or_refused_by_name(key, value):
    refused_or_taken([f"ewc.{key}"], lambda: HBATConfig(output_dir="unused", ewc={key: value}))


@pytest.mark.filterwarnings("ignore")  # the host's, about values that it takes
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_any_value_of_a_field_of_the_host_is_taken_or_refused_by_name(objective):
    @fixed(max_examples=300)
    @given(fields(getattr(trl, f"{objective.upper()}Config")), JUNK)
    def check(key, value):
        config = HBATConfig(output_dir="unused", objectives=[objective], **{objective: runs.section() | {key: value}})
        # What cuts a model over devices is named by its key alone; a host seldom names the key itself.
        refused_or_taken([objective, key], lambda: build_sections(resolve(config), config))

    check()


@fixed(max_examples=300)
@given(st.one_of(st.text(max_size=30), st.text("ab:{}[]&*!-,'\"\n #?|>%@`", max_size=30)))
def test_any_text_is_plain_yaml_or_refused_in_one_line(text):
    try:
        load_yaml(text)
    except PlainYAMLError as error:
        one_line(error, "")


@fixed(max_examples=150)
@given(st.dictionaries(st.sampled_from(["datasets", "sft", "ewc", "peft", "env", "objectives", "num_round"]), JUNK))
def test_any_run_file_is_taken_or_refused_in_one_line(values):
    import yaml

    required = {"model_name_or_path": "m", "output_dir": "o", "datasets": {"sft": "a.jsonl", "dpo": "b.jsonl"}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.yaml")
        plain = {key: None if isinstance(value, bytes) else value for key, value in values.items()}
        try:
            file.write_text(yaml.safe_dump(required | plain), encoding="utf-8")
        except ValueError:  # Python writes no number of 400 digits
            return
        try:
            parse(file)
        except (ValueError, TypeError) as error:
            one_line(error, "")
