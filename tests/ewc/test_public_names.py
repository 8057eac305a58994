import subprocess
import sys

import pytest

import hbat.ewc


@pytest.mark.parametrize("name", hbat.ewc.__all__)
def test_every_public_name_is_there_and_documented(name):
    found = getattr(hbat.ewc, name)
    assert found.__module__ == hbat.ewc._MODULES[name]  # noqa: SLF001 - this test is about the package
    assert found.__doc__


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
