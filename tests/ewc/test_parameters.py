import cases
import pytest
import torch
from torch import nn

from hbat.ewc.parameters import canonical_name, require_counterparts, snapshot, trainable_parameters


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("module.model.norm.weight", "model.norm.weight"),
        ("module.module.model.norm.weight", "model.norm.weight"),
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("module._orig_mod.norm.weight", "norm.weight"),
        ("model._fsdp_wrapped_module.layers.0._orig_mod.weight", "model.layers.0.weight"),
        ("encoder.module.weight", "encoder.module.weight"),  # a layer's own name, not DDP's
        ("base_model.model.q_proj.lora_A.default.weight", "base_model.model.q_proj.lora_A.default.weight"),
    ],
)
def test_canonical_name_drops_wrappers_and_nothing_else(name, expected):
    assert canonical_name(name) == expected


@pytest.mark.parametrize("build", cases.MODEL_CASES.values(), ids=cases.MODEL_CASES)
def test_trainable_parameters_are_the_models_own_in_its_order(build):
    model = build(0)
    found = trainable_parameters(model)
    expected = cases.trainable(model)
    assert list(found) == list(expected)
    assert all(found[name] is each for name, each in expected.items())


def test_tied_tensors_appear_once():
    model = cases.tiny_llama(tied=True)
    assert "lm_head.weight" not in trainable_parameters(model)
    assert len({id(each) for each in trainable_parameters(model).values()}) == len(trainable_parameters(model))


def test_frozen_parameters_and_buffers_are_left_out():
    names = trainable_parameters(cases.frozen_llama())
    assert not [name for name in names if "embed_tokens" in name or "layers.0." in name]
    assert not [name for name in names if "inv_freq" in name]


def test_with_lora_only_the_trained_adapter_counts():
    from peft import LoraConfig

    model = cases.lora_llama()
    before = list(trainable_parameters(model))
    model.add_adapter("ref", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("default")
    assert list(trainable_parameters(model)) == before
    assert all("lora_" in name for name in before)


def test_names_survive_compilation_and_distributed_wrapping():
    model = cases.tiny_llama()
    wrapper = nn.Module()  # what DDP's names look like, without a process group
    wrapper.module = torch.compile(model, backend="eager")
    assert list(trainable_parameters(wrapper)) == list(trainable_parameters(model))


def test_snapshot_is_a_detached_copy_of_the_same_dtype():
    model = cases.bf16_llama()
    parameters = trainable_parameters(model)
    copy = snapshot(parameters)
    before = cases.weights(model)
    with torch.no_grad():
        for each in parameters.values():
            each.add_(1.0)
    assert all(torch.equal(copy[name], before[name]) for name in parameters)
    assert all(each.dtype == torch.bfloat16 and not each.requires_grad for each in copy.values())


def test_missing_names_are_counted_and_the_first_is_named():
    with pytest.raises(KeyError, match=r"2 of 3 parameters have no anchor, first 'b'"):
        require_counterparts(dict.fromkeys("abc"), {"a": 1}, "anchor")


def test_more_names_than_needed_and_numbers_for_tensors_are_no_error():
    require_counterparts({"a": torch.ones(2)}, {"a": 1.0, "b": torch.ones(3)}, "importance")
    require_counterparts({"a": torch.ones(2)}, {"a": torch.ones(())}, "importance")


def test_a_counterpart_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"anchor of 'a' has the shape \(3, 2\), the parameter \(2, 3\)"):
        require_counterparts({"a": torch.ones(2, 3)}, {"a": torch.ones(3, 2)}, "anchor")
