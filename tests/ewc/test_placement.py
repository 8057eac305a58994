import pytest
import torch

from hbat.ewc.placement import in_main_memory, on_device, snapshot_in_main_memory

PARAMETERS = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}


@pytest.mark.parametrize("place", [on_device, in_main_memory])
def test_what_is_on_the_device_stays_where_it_is_and_scalars_become_numbers(place):
    given = {"b": torch.ones(2, 2), "a": torch.tensor(2.0), "of no parameter": torch.ones(1)}
    found = place(given, PARAMETERS)
    assert list(found) == ["a", "b"]
    assert found["a"] == 2.0
    assert isinstance(found["a"], float)
    assert found["b"].data_ptr() == given["b"].data_ptr()


@pytest.mark.parametrize("place", [on_device, in_main_memory])
def test_the_anchor_of_a_parameter_of_shape_nothing_stays_a_tensor(place):
    found = place({"a": torch.tensor(2.0)}, {"a": torch.tensor(1.0)})
    assert torch.equal(found["a"], torch.tensor(2.0))
    assert isinstance(found["a"], torch.Tensor)


def test_a_snapshot_is_a_copy():
    parameter = torch.nn.Parameter(torch.ones(3))
    copies = snapshot_in_main_memory({"a": parameter})
    with torch.no_grad():
        parameter.zero_()
    assert copies["a"].tolist() == [1.0] * 3
    assert not copies["a"].requires_grad
