import subprocess
import sys

import pytest

import hbat.ewc


def test_every_public_name_is_there_and_documented():
    found = {name: getattr(hbat.ewc, name) for name in hbat.ewc.__all__}
    modules = {name: each.__module__ for name, each in found.items()}
    assert modules == hbat.ewc._MODULES  # noqa: SLF001 - this test is about the package
    assert [name for name, each in found.items() if not each.__doc__] == []


def test_the_lists_of_public_names_agree():
    assert sorted(hbat.ewc._MODULES) == hbat.ewc.__all__ == dir(hbat.ewc)  # noqa: SLF001


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'hbat\.ewc' has no attribute 'penalty_of'"):
        _ = hbat.ewc.penalty_of


def test_the_package_loads_torch_on_first_use_and_then_nothing_but_torch():
    program = (
        "import sys, hbat.ewc; assert 'torch' not in sys.modules; hbat.ewc.normalize; hbat.ewc.ewc_penalty; "
        "hbat.ewc.diagonal_fisher; assert not {'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
