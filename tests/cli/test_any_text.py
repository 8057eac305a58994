"""Any text is read as plain YAML or refused in one line, and so is any run file."""

import tempfile
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st
from junk import JUNK, fixed, one_line

from hbat.cli.run_file import parse
from hbat.cli.yaml import PlainYAMLError, load_yaml


@fixed(max_examples=100)
@given(st.one_of(st.text(max_size=30), st.text("ab:{}[]&*!-,'\"\n #?|>%@`", max_size=30)))
def test_any_text_is_plain_yaml_or_refused_in_one_line(text):
    try:
        load_yaml(text)
    except PlainYAMLError as error:
        one_line(error)


@fixed(max_examples=100)
@given(st.dictionaries(st.sampled_from(["datasets", "sft", "ewc", "peft", "env", "objectives", "num_round"]), JUNK))
def test_any_run_file_is_accepted_or_refused_in_one_line(values):
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
            one_line(error)
