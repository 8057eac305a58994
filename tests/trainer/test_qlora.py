"""Adapters on a base in 4 or 8 bits: what TRL makes of their precision, and that a run holds all the same."""

import functools
import math

import cases
import oracle
import pytest
import qlora_cases
import runs
import torch
import yaml
from kills import CutOffError, Kill
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hbat.cli.main import main
from hbat.engines.engine import Engine
from hbat.ewc.callback import EWCCallback
from hbat.ewc.parameters import trainable_parameters
from hbat.model.adapters import keep_adapter_dtype
from hbat.stages.start import StageStart
from hbat.state.manifest import RunStateError

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")

#: The kinds take turns; the other one is slow.
in_4_bits = pytest.mark.parametrize("kind", ["4-bit", pytest.param("8-bit", marks=pytest.mark.slow)])
in_8_bits = pytest.mark.parametrize("kind", [pytest.param("4-bit", marks=pytest.mark.slow), "8-bit"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return qlora_cases.save_base(tmp_path_factory.mktemp("base"))


def frozen(model):
    """Bits of everything that is not trained, quantised weights and their scales too."""
    trained = cases.trainable(model)
    state = {name: each for name, each in model.state_dict().items() if name not in trained}
    return {name: each.clone() for name, each in state.items() if isinstance(each, torch.Tensor)}


class Starts(TrainerCallback):
    """What anchor, adapter and reference adapter are when a stage starts."""

    def __init__(self):
        self.run, self.seen = None, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        anchor = {name: each.clone() for name, each in self.run._start.anchor.items()}  # noqa: SLF001
        copies = {
            name.replace(".ref.", ".default."): each.detach().clone()
            for name, each in self.run.model.named_parameters()
            if ".ref." in name
        }
        self.seen.append((anchor, cases.weights(self.run.model), copies))


@pytest.mark.parametrize(
    ("kind", "preference"),
    [
        pytest.param("4-bit", "dpo", id="dpo-4-bit"),
        pytest.param("8-bit", "ppo", id="ppo-8-bit"),
        pytest.param("8-bit", "dpo", id="dpo-8-bit", marks=pytest.mark.slow),
        pytest.param("4-bit", "ppo", id="ppo-4-bit", marks=pytest.mark.slow),
    ],
)
def test_every_stage_starts_at_its_reference_and_trains_the_adapter_alone(kind, preference, saved, tmp_path):
    starts = Starts()
    run = qlora_cases.build(qlora_cases.qlora(saved, kind), tmp_path, preference, callbacks=[starts])
    starts.run, before, adapter = run, frozen(run.model), cases.weights(run.model)
    run.train()
    assert runs.same(frozen(run.model), before)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}  # without TRL's cast
    assert all(not torch.equal(each, adapter[name]) for name, each in cases.weights(run.model).items())
    for stage, (anchor, weights, copies) in enumerate(starts.seen):
        assert runs.same(anchor, weights)
        assert {tensor.dtype for tensor in (*anchor.values(), *copies.values())} == {torch.float32}
        assert runs.same(copies, weights if stage % 2 else {})
    key = {"dpo": "dpo/rewards/chosen", "ppo": "ppo/kl"}[preference]
    scores = {stage: [] for stage in (1, 3)}
    for entry in run.state.log_history:
        if key in entry:
            scores[entry["hbat/stage"]].append(entry[key])
    assert [each[0] for each in scores.values()] == [0.0, 0.0]
    assert scores[1][1] != 0.0
    penalties = runs.logged(run, "ewc/penalty")
    assert all(map(math.isfinite, penalties))
    assert max(penalties) > 0.0


# In 8 bits the second model that is the plain trainers' reference rounds otherwise, being in evaluation mode.
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("4-bit", 0.0), pytest.param("8-bit", 1.5e-3, marks=pytest.mark.slow)]
)
def test_a_run_without_a_penalty_equals_plain_trainers(kind, tolerance, saved, tmp_path):
    """The plain ones keep the adapter in float32 too, which TRL casts to bfloat16."""
    build = functools.partial(qlora_cases.qlora, saved, kind)

    def keeping(stage, _):
        def construct(model, **options):
            with keep_adapter_dtype(model):
                return runs.trainer_of(stage[2])(model=model, **options)

        return construct

    expected = runs.by_hand(lambda _: build(), tmp_path / "by-hand", trainer_class=keeping)
    run = runs.train(build(), tmp_path / "run")
    assert cases.largest_difference(cases.weights(run.model), expected[-1]) <= tolerance
    assert cases.largest_difference(expected[0], expected[-1]) > 10 * tolerance


@in_4_bits
def test_the_gradient_of_the_penalty_is_the_closed_form_on_the_adapter(kind, saved, tmp_path):
    found = {}
    for strength in (0.0, 3.0):
        model = qlora_cases.qlora(saved, kind)
        args = SFTConfig(output_dir=str(tmp_path), **cases.CHEAP_ARGS | {"max_steps": 1, "max_grad_norm": 0.0})
        trainer = SFTTrainer(model, args, train_dataset=cases.sft_rows(4), processing_class=cases.tiny_tokenizer())
        parameters = trainable_parameters(model)
        noise = cases.random_like(parameters, 3, std=0.05)
        anchor = {name: (each + noise[name]).to(each.dtype).detach() for name, each in parameters.items()}
        importance = cases.random_like(parameters, 4)
        EWCCallback(importance, anchor, strength=strength).bind(trainer)
        before = {name: each.detach().clone() for name, each in parameters.items()}

        class Gradients(TrainerCallback):
            def on_pre_optimizer_step(self, *_, parameters=parameters, strength=strength, **kwargs):
                found[strength] = {name: each.grad.clone() for name, each in parameters.items()}

        trainer.add_callback(Gradients())
        trainer.train()
    expected = oracle.penalty_gradient(before, anchor, importance, 3.0)
    assert before
    for name, each in expected.items():
        pull = found[3.0][name].double() - found[0.0][name].double()
        # The sum is rounded to the eight bits of bfloat16.
        tolerance = 2.0**-8 * found[3.0][name].double().abs() + 2.0**-8 * torch.as_tensor(each).abs()
        assert ((pull - torch.as_tensor(each)).abs() <= tolerance + 1e-12).all(), name


@in_8_bits
def test_before_training_the_policy_is_its_own_reference(kind, saved, tmp_path):
    rows = {"dpo": cases.preference_rows(4)}
    scores = qlora_cases.build(qlora_cases.qlora(saved, kind), tmp_path, "dpo", evaluation=rows).evaluate()
    assert scores["dpo"]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert scores["dpo"]["rewards/chosen"] == scores["dpo"]["rewards/rejected"] == 0.0


def test_an_anchor_follows_the_cast_of_the_host(saved):
    """Taken before TRL's cast it is of another precision: the next stage takes it anew."""
    model = qlora_cases.qlora(saved, "4-bit")
    start = StageStart(model, needs_reference=True, engine=Engine())
    start.take()
    for each in cases.trainable(model).values():
        each.data = each.data.bfloat16()
    start.take()
    assert runs.same(dict(start.anchor), cases.weights(model))
    assert {each.dtype for each in start.anchor.values()} == {torch.bfloat16}


# --- resume ----------------------------------------------------------------------------------------------------------

ADAM = {"optim": "adamw_torch", "lr_scheduler_type": "cosine"}
SAVES = {"save_strategy": "steps", "save_steps": 1}


def options(preference, optim="adamw_torch", *, saves=False):
    more = ADAM | {"optim": optim} | (SAVES if saves else {})
    steps = qlora_cases.PPO if preference == "ppo" else {"max_steps": 3}
    return {
        "sections": {"sft": more | {"max_steps": 3}, preference: steps | more},
        "optimizer_state": "carry",
    }


@pytest.fixture(scope="module")
def whole(saved, tmp_path_factory):
    @functools.cache
    def train(kind, preference, optim="adamw_torch"):
        folder = tmp_path_factory.mktemp("whole")
        return qlora_cases.train(qlora_cases.qlora(saved, kind), folder, preference, **options(preference, optim))

    return train


def assert_resumes(kind, preference, cut, expected, saved, folder, optim="adamw_torch"):
    settings = options(preference, optim, saves=True)
    with pytest.raises(CutOffError):
        qlora_cases.train(qlora_cases.qlora(saved, kind), folder, preference, callbacks=[cut], **settings)
    assert list(folder.glob("stage-*/checkpoint-*"))
    resumed = qlora_cases.train(qlora_cases.qlora(saved, kind), folder, preference, resume=True, **settings)
    assert runs.same(cases.weights(resumed.model), cases.weights(expected.model))
    key = f"{preference}/loss"
    assert runs.logged(resumed, key) == runs.logged(expected, key)


@pytest.mark.parametrize(
    ("kind", "preference", "stage"),
    [
        ("8-bit", "ppo", 3),
        # With moments in 8 bits it is below.
        pytest.param("4-bit", "dpo", 3, marks=pytest.mark.slow),
        pytest.param("4-bit", "dpo", 2, marks=pytest.mark.slow),
        pytest.param("8-bit", "dpo", 3, marks=pytest.mark.slow),
        pytest.param("4-bit", "ppo", 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_cut_off_ends_as_if_it_was_not(kind, preference, stage, whole, saved, tmp_path):
    assert_resumes(kind, preference, Kill(stage, "step", 2), whole(kind, preference), saved, tmp_path)


@pytest.mark.parametrize(
    ("kind", "more", "named"),
    [
        ("8-bit", {}, r"parameters\.frozen"),
        pytest.param(
            "4-bit", {"bnb_4bit_compute_dtype": "bfloat16"}, r"parameters\.quantization", marks=pytest.mark.slow
        ),
    ],
    ids=["other bits", "other precision"],
)
def test_a_run_is_not_resumed_with_another_quantisation(kind, more, named, saved, tmp_path):
    settings = options("dpo", saves=True)
    with pytest.raises(CutOffError):
        qlora_cases.train(
            qlora_cases.qlora(saved, "4-bit"), tmp_path, "dpo", callbacks=[Kill(0, "step", 1)], **settings
        )
    with pytest.raises(RunStateError, match=named):
        qlora_cases.train(qlora_cases.qlora(saved, kind, **more), tmp_path, "dpo", resume=True, **settings)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "preference"), [("4-bit", "dpo"), pytest.param("8-bit", "ppo", marks=pytest.mark.slow)]
)
def test_recomputed_activations_change_nothing(kind, preference, saved, tmp_path):
    ends = []
    for recompute in (False, True):
        more = {runs.CHECKPOINTING: recompute}
        steps = qlora_cases.PPO if preference == "ppo" else {}
        run = qlora_cases.train(
            qlora_cases.qlora(saved, kind),
            tmp_path / str(recompute),
            preference,
            sections={"sft": more, preference: steps | more},
            num_rounds=1,
        )
        ends.append(cases.weights(run.model))
    assert runs.same(*ends)


each_optimizer = pytest.mark.parametrize(
    "optim", ["adamw_bnb_8bit", pytest.param("paged_adamw_8bit", marks=pytest.mark.slow)]
)
on_the_cpu = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


@each_optimizer
@on_the_cpu
def test_moments_in_eight_bits_are_carried_on_disk(optim, whole, saved, tmp_path):
    carried = whole("4-bit", "dpo", optim)
    reset = qlora_cases.train(
        qlora_cases.qlora(saved, "4-bit"), tmp_path, "dpo", **options("dpo", optim) | {"optimizer_state": "reset"}
    )
    assert not runs.same(cases.weights(carried.model), cases.weights(reset.model))
    assert not list((tmp_path / "state").glob("optimizer-*"))
    moments = runs.state_tensors(carried._folder.path, "optimizer-dpo")  # noqa: SLF001
    kinds = {name.rsplit("::", 1)[1]: each.dtype for name, each in moments.items()}
    assert kinds["state1"] == kinds["state2"] == torch.uint8
    steps = {int(each) for name, each in moments.items() if name.endswith("::step")}
    assert steps == {6}  # of two stages


@each_optimizer
@on_the_cpu
def test_a_run_with_moments_in_eight_bits_resumes_to_the_last_bit(optim, whole, saved, tmp_path):
    assert_resumes("4-bit", "dpo", Kill(3, "step", 2), whole("4-bit", "dpo", optim), saved, tmp_path, optim)


# --- from the command line to a merged model -------------------------------------------------------------------------


@pytest.fixture
def trained(saved, tmp_path):
    """Train by YAML; gives the folder with the adapter."""

    def train(kind, name="run", model=saved, **more):
        cases.sft_rows(8).to_json(tmp_path / "sft.jsonl")
        cases.preference_rows(8).to_json(tmp_path / "dpo.jsonl")
        section = runs.section(learning_rate=0.1)
        values = {
            "model_name_or_path": str(model),
            "output_dir": str(tmp_path / name),
            "num_rounds": 1,
            "disable_tqdm": True,
            "datasets": {name: str(tmp_path / f"{name}.jsonl") for name in ("sft", "dpo")},
            "quantization": qlora_cases.KINDS[kind],
            "sft": section,
            "dpo": section,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values | more), encoding="utf-8")
        assert main(["train", "--config", str(file)]) == 0
        return tmp_path / name

    return functools.partial(train, peft={"r": 8, "target_modules": ["q_proj", "v_proj"]})


@in_4_bits
def test_an_adapter_is_merged_into_dequantised_or_full_weights(kind, trained, saved):
    folder = trained(kind)
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    held = qlora_cases.logits(PeftModel.from_pretrained(qlora_cases.base(saved, kind), folder))
    assert not torch.allclose(held, qlora_cases.logits(qlora_cases.base(saved, kind)))
    # Dequantised, a base in 4 bits is what was trained on; in 8 bits activations are rounded too.
    for name, tolerance in (("as trained", 1e-4 if kind == "4-bit" else 0.05), ("full", 0.5)):
        model = qlora_cases.base(saved, kind).dequantize() if name == "as trained" else qlora_cases.base(saved, None)
        model = PeftModel.from_pretrained(model, folder)
        beside = qlora_cases.logits(model)
        merged = qlora_cases.logits(model.merge_and_unload())
        torch.testing.assert_close(merged, beside, rtol=0, atol=1e-4)
        assert (merged - held).norm() / held.norm() < tolerance, name


@in_8_bits
def test_an_adapter_that_was_saved_is_trained_on_by_its_folder(kind, trained):
    first = trained(kind)
    second = trained(kind, name="more", model=first, peft=None)
    weights = [load_file(each / "adapter_model.safetensors") for each in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(not torch.equal(weights[0][name], each) for name, each in weights[1].items())
