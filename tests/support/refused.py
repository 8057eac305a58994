"""Refusals as patterns of their messages, and the tracks of a run as an engine sees them."""

import re
from types import SimpleNamespace

import pytest

from hbat.engines.engine import ALL_ENGINES
from hbat.engines.refusals import REFUSALS


def pattern(name):
    """Pattern of a message: anything for the values, which must be there."""
    parts = re.split(r"(?<!\{)\{\w+(?:!r)?\}(?!\})", REFUSALS[name].says)
    return "^" + ".+".join(re.escape(part.replace("{{", "{").replace("}}", "}")) for part in parts) + "$"


def refused(name):
    """That a block raises a refusal."""
    return pytest.raises(REFUSALS[name].kind, match=pattern(name))


def track(name="sft", engines=ALL_ENGINES, **options):
    """What an engine asks of a track; `options` are fields of its arguments."""
    fields = {"optim": SimpleNamespace(value="adamw_torch"), "torch_compile": False, "deepspeed": None, "fsdp": None}
    return SimpleNamespace(name=name, engines=engines, args=SimpleNamespace(**fields | options))
