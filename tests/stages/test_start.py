import cases
import pytest
import runs
import torch
from transformers import TrainerCallback

from hbat.engines.engine import Engine
from hbat.ewc.parameters import snapshot, trainable_parameters
from hbat.stages.start import StageStart


def moved(model):
    with torch.no_grad():
        for each in cases.trainable(model).values():
            each.add_(1.0)


@pytest.mark.parametrize("case", ["full", "tied", "frozen", "lora"])
@pytest.mark.parametrize("needs_reference", [True, False])
def test_the_anchor_is_the_start_until_the_next_is_taken(case, needs_reference):
    model = cases.MODEL_CASES[case](0)
    first = snapshot(trainable_parameters(model))
    start = StageStart(model, needs_reference=needs_reference, engine=Engine())
    start.take()
    moved(model)
    assert runs.same(dict(start.anchor), first)
    start.take()
    assert runs.same(dict(start.anchor), snapshot(trainable_parameters(model)))


def test_the_reference_of_a_full_model_is_the_anchor_itself():
    model = cases.tiny_llama()
    start = StageStart(model, needs_reference=True, engine=Engine())
    start.take()
    own = dict(start.reference.named_parameters())
    assert all(own[name] is each for name, each in start.anchor.items())


def test_the_reference_of_a_tied_model_stays_tied():
    start = StageStart(cases.tiny_llama(tied=True), needs_reference=True, engine=Engine())
    start.take()
    assert start.reference.lm_head.weight is start.reference.model.embed_tokens.weight


@pytest.mark.parametrize(("case", "needs_reference"), [("lora", True), ("full", False)])
def test_no_second_model_is_made_where_none_is_needed(case, needs_reference):
    assert StageStart(cases.MODEL_CASES[case](0), needs_reference=needs_reference, engine=Engine()).reference is None


def with_reference_adapter(weights):
    """A model with adapter, and TRL's copy of it that holds other weights by `weights`."""
    model = cases.lora_llama()
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("default")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, each in parameters.items():
            if ".ref." in name:
                each.copy_(weights(parameters[name.replace(".ref.", ".default.")]))
                each.requires_grad_(False)
    return model


def test_an_equal_reference_adapter_becomes_the_anchor():
    model = with_reference_adapter(lambda own: own)
    start = StageStart(model, needs_reference=True, engine=Engine())
    start.take()
    taken = dict(start.anchor)
    start.share_adapter()
    assert start.anchor.keys() == taken.keys()
    memory = {each.data_ptr() for name, each in model.named_parameters() if ".ref." in name}
    assert {each.data_ptr() for each in start.anchor.values()} == memory
    start.take()  # the guard deletes it after the stage
    assert not memory & {each.data_ptr() for each in start.anchor.values()}


def test_a_reference_adapter_is_no_anchor_of_what_is_trained_beside_the_adapter():
    model = with_reference_adapter(lambda own: own)
    norm = model.base_model.model.model.norm.weight.requires_grad_()
    start = StageStart(model, needs_reference=False, engine=Engine())
    start.take()
    start.share_adapter()
    moved(model)
    (name,) = (name for name, each in model.named_parameters() if each is norm)
    assert not torch.equal(start.anchor[name], norm)


@pytest.mark.parametrize("weights", [lambda own: own + 1e-6, lambda own: own.bfloat16()], ids=["other", "coarser"])
def test_a_reference_adapter_that_differs_does_not_become_the_anchor(weights):
    model = with_reference_adapter(weights)
    start = StageStart(model, needs_reference=True, engine=Engine())
    start.take()
    taken = dict(start.anchor)
    start.share_adapter()
    assert dict(start.anchor) is not taken
    assert all(start.anchor[name] is each for name, each in taken.items())


@pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
@pytest.mark.parametrize("case", ["full", "lora"])
def test_a_preference_stage_with_a_penalty_holds_no_second_copy_of_the_start(case, tmp_path):
    """The reference policy is the anchor: no other tensor of the run equals a weight at the stage's start."""
    found = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if "ref" in getattr(model, "peft_config", {}):
                found.append({each.data_ptr() for name, each in model.named_parameters() if ".ref." in name})
            elif case == "full":
                found.append({each.data_ptr() for each in run._start.reference.parameters()})  # noqa: SLF001
            else:
                return
            anchors = {each.data_ptr() for each in run._start.anchor.values()}  # noqa: SLF001
            assert anchors <= found[-1]

    run = runs.build_run(cases.MODEL_CASES[case](0), tmp_path, callbacks=[Look()], ewc={"strength": 0.1})
    run.train()
    assert found
