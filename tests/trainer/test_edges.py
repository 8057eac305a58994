import math

import cases
import pytest
import runs
import torch
import trl
from peft import IA3Config, LoHaConfig, LoraConfig, VeraConfig
from transformers import TrainerCallback

from hbat.config.ewc import EWCConfig
from hbat.ewc.callback import EWCCallback
from hbat.objectives.objective import Objective
from hbat.state.consolidation import Consolidation
from hbat.state.manifest import STATE_FILE, RunStateError
from hbat.state.plan import plan

EVALUATION = {"sft": cases.sft_rows(4, 9), "dpo": cases.preference_rows(4, 9)}


class Seen(TrainerCallback):
    """Calls a function on each event, with the model."""

    def __init__(self, **actions):
        for event, action in actions.items():
            setattr(self, event, lambda args, state, control, action=action, **kwargs: action(state, **kwargs))


#: Adapters whose parameters' names end in that of the adapter, as `lora_embedding_A.default`; TRL copies other names.
ADAPTERS = {
    "LoRA on embeddings": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "LoHa": LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "IA3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}
#: Slow: `model/test_adapters.py` has the copy of every kind, and what constructors compute with it.
each_adapter = pytest.mark.parametrize(
    "name", ["LoRA on embeddings", *(pytest.param(key, marks=pytest.mark.slow) for key in list(ADAPTERS)[1:])]
)


def check_start(run, preference):
    """The second stage of the preference objective starts where its reference is: at what stages before made."""
    first = next(
        entry for entry in run.state.log_history if f"{preference}/loss" in entry and entry["hbat/stage"] == 3
    )
    if preference == "dpo":
        assert first["dpo/rewards/chosen"] == 0.0
        assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-4)  # transformers 4.57 logs four decimals
    else:
        assert first["kto/kl"] == 0.0
        assert {first[key] for key in ("kto/rewards/chosen", "kto/rewards/rejected") if key in first} == {0.0}


@pytest.mark.parametrize("precompute", [True, pytest.param(False, marks=pytest.mark.slow)])
@each_adapter
def test_the_reference_of_an_adapter_of_any_kind_is_the_stages_start(name, precompute, tmp_path):
    dpo = {"precompute_ref_log_probs": precompute}
    run = runs.train(cases.random_adapter(ADAPTERS[name]), tmp_path, dpo=dpo)
    check_start(run, "dpo")
    assert any(reward != 0.0 for reward in runs.logged(run, "dpo/rewards/chosen"))


@runs.needs_kto
@each_adapter
def test_the_reference_that_kto_computes_beforehand_is_the_stages_start(name, tmp_path):
    kto = runs.section(precompute_ref_log_probs=True)
    run = runs.train(
        cases.random_adapter(ADAPTERS[name]), tmp_path, objectives=["sft", "kto"], kto=kto,
        data={"sft": cases.sft_rows(8), "kto": runs.kto_rows(8)},
    )  # fmt: skip
    check_start(run, "kto")


@pytest.mark.parametrize("build", [cases.tiny_llama, pytest.param(cases.lora_llama, marks=pytest.mark.slow)])
def test_precomputed_reference_log_probabilities_change_no_score(tmp_path, build):
    evaluation = {"dpo": EVALUATION["dpo"]}
    scores = [
        runs.train(build(), tmp_path / str(early), num_rounds=1, evaluation=evaluation, dpo=dpo).matrix.series("dpo")
        for early, dpo in ((False, {}), (True, {"precompute_ref_log_probs": True}))
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)
    assert len({round(each, 4) for each in scores[1]}) > 2


def test_a_callback_that_was_bound_to_one_trainer_acts_in_the_next(tmp_path):
    def trainer(callback, model, *, bind=False):
        args = trl.SFTConfig(output_dir=str(tmp_path), **cases.CHEAP_ARGS)
        callbacks = [] if bind or callback is None else [callback]
        made = trl.SFTTrainer(
            model, args=args, train_dataset=cases.sft_rows(8), processing_class=cases.tiny_tokenizer(),
            callbacks=callbacks,
        )  # fmt: skip
        if bind:
            callback.bind(made)
        made.train()
        return cases.weights(model)

    names = cases.trainable(cases.tiny_llama())
    again = EWCCallback(dict.fromkeys(names, 1.0), strength=0.5)
    trainer(again, cases.tiny_llama(), bind=True)
    second = trainer(again, cases.tiny_llama())
    fresh = trainer(EWCCallback(dict.fromkeys(names, 1.0), strength=0.5), cases.tiny_llama())
    assert runs.same(second, fresh)
    assert cases.largest_difference(second, trainer(None, cases.tiny_llama())) > 1e-4


def test_a_stage_that_another_run_left_behind_is_not_resumed(tmp_path):
    (tmp_path / "stage-000-sft" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(RunStateError, match=r"'stage-000-sft' of another run, but no hbat_state.json"):
        runs.train(cases.tiny_llama(), tmp_path)
    assert not (tmp_path / STATE_FILE).exists()


def test_a_path_to_resume_from_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be True, False or None"):
        runs.train(cases.tiny_llama(), tmp_path, resume="/some/where")


def test_the_fisher_of_an_objective_without_sequences_is_refused_at_construction(tmp_path):
    kto = Objective(name="kto", trainer_class=trl.KTOTrainer, config_class=trl.KTOConfig, config=runs.section())
    with pytest.raises(ValueError, match="needs the sequences of the objective 'kto'"):
        runs.build_run(
            cases.tiny_llama(), tmp_path, objectives=["sft", kto], ewc={"source": "fisher"},
            data={"sft": cases.sft_rows(8), "kto": runs.kto_rows(8)},
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
def test_frozen_adapter_tensors_do_not_count_for_clipping(tmp_path):
    found = []

    def look(state, model, **_):
        found.append([each.grad is None for each in model.parameters() if each.requires_grad])

    seen = Seen(on_pre_optimizer_step=look)
    runs.train(cases.lora_llama(), tmp_path, num_rounds=1, ewc={"strength": 0.0, "freeze": 0.5}, callbacks=[seen])
    dpo = found[runs.STEPS :]
    assert all(sum(each) in {0, 4} for each in dpo)
    assert any(sum(each) == 4 for each in dpo) or all(len(each) == 4 for each in dpo)


def test_hooks_do_not_grow_within_a_preference_stage_of_an_adapter(tmp_path):
    counts = []

    def count(state, model, **_):
        counts.append(len(model.get_input_embeddings()._forward_hooks))  # noqa: SLF001

    options = {runs.CHECKPOINTING: True, "max_steps": 4}
    runs.train(
        cases.lora_llama(), tmp_path, num_rounds=1, sft=options, dpo=options,
        callbacks=[Seen(on_step_begin=count)], data=runs.rows(16),
    )  # fmt: skip
    assert max(counts[5:]) == counts[5]


def test_the_random_control_stays_as_random_in_later_rounds():
    parameters = {"a": torch.zeros(50, 50)}
    found = Consolidation(EWCConfig(source="random"), seed=0)
    spread = []
    for stage in plan(6, ["sft", "dpo"])[:-1]:
        found.add(stage.objective, {"displacement": {"a": torch.ones(50, 50)}})
        importance = found.importance(plan(6, ["sft", "dpo"])[stage.index + 1], parameters)["a"]
        spread.append(float(importance.std() / importance.mean()))
    assert min(spread) > 0.5


def test_a_run_of_one_objective_accumulates_for_a_run_that_continues_it(tmp_path):
    run = runs.train(
        cases.tiny_llama(), tmp_path, objectives=["sft"], ewc={"strength": 10.0}, data={"sft": cases.sft_rows(8)}
    )
    assert runs.state_tensors(tmp_path, "importance-sft").keys() == cases.trainable(run.model).keys()
    assert run.matrix.rows == []


def test_a_sampler_seed_differs_between_stages(tmp_path):
    seeds = []
    seen = Seen()
    seen.on_train_begin = lambda args, state, control, **kwargs: seeds.append(args.data_seed)
    seven = {"data_seed": 7}
    runs.train(cases.tiny_llama(), tmp_path, num_rounds=1, sft=seven, dpo=seven, callbacks=[seen])
    assert seeds == [7, 8]
