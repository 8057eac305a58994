"""What building a trainer's arguments leaves in the process is undone."""

import os

from transformers.integrations import deepspeed

from hbat.engines.environment import forget_deepspeed, kept_environment


def test_variables_of_engines_are_as_they_were_after_the_block(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OTHER", "before")
    with kept_environment():
        os.environ |= {"ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_VERSION": "2", "OTHER": "after"}
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "FSDP_VERSION" not in os.environ
    assert os.environ["OTHER"] == "after"


class Configuration:
    """What transformers asks of a configuration of DeepSpeed's."""

    def is_zero3(self):
        return True


def test_transformers_forgets_a_configuration_of_deepspeed():
    config = Configuration()  # of which transformers keeps a weak reference
    deepspeed.set_hf_deepspeed_config(config)
    assert deepspeed.is_deepspeed_zero3_enabled()
    forget_deepspeed()
    assert not deepspeed.is_deepspeed_zero3_enabled()
    with kept_environment():
        deepspeed.set_hf_deepspeed_config(config)
    assert not deepspeed.is_deepspeed_zero3_enabled()
