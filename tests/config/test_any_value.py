"""Any value of any option is accepted, or refused in one line that names the option."""

import dataclasses

import pytest
import runs
import trl
from hypothesis import given
from hypothesis import strategies as st
from junk import JUNK, fixed, one_line

from hbat.config.ewc import EWCConfig
from hbat.config.hbat import HBATConfig
from hbat.objectives.built_in import build_args, resolve


def names_of(config_class):
    return st.sampled_from([field.name for field in dataclasses.fields(config_class)])


def accepted_or_refused(names, build):
    message = names[0]
    try:
        build()
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        message = one_line(error)
    assert any(name in message for name in names), message


@fixed(max_examples=200)
@given(names_of(HBATConfig), JUNK)
def test_an_option_of_the_run(key, value):
    accepted_or_refused([key], lambda: HBATConfig(**{"output_dir": "unused", key: value}))


@fixed(max_examples=200)
@given(names_of(EWCConfig), JUNK)
def test_an_option_of_ewc(key, value):
    accepted_or_refused([f"ewc.{key}"], lambda: HBATConfig(output_dir="unused", ewc={key: value}))


@pytest.mark.filterwarnings("ignore")  # those of transformers and TRL, about values that they accept
@pytest.mark.parametrize(
    ("objective", "examples"), [("sft", 100), ("dpo", 100), pytest.param("sft", 1000, marks=pytest.mark.slow)]
)
def test_an_argument_of_trl(objective, examples):
    @fixed(max_examples=examples)
    @given(names_of(getattr(trl, f"{objective.upper()}Config")), JUNK)
    def check(key, value):
        config = HBATConfig(output_dir="unused", objectives=[objective], **{objective: runs.section() | {key: value}})
        # Arguments that split a model over devices are refused by their name alone; TRL seldom names its arguments.
        accepted_or_refused([objective, key], lambda: build_args(resolve(config), config))

    check()
