import cases
import pytest
import runs
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hbat.config.ewc import EWCConfig
from hbat.ewc.callback import EWCCallback
from hbat.objectives.objective import Objective
from hbat.state.consolidation import Consolidation
from hbat.state.manifest import STATE_FILE, RunStateError
from hbat.state.plan import plan

EVALUATION = {"sft": cases.sft_rows(4, 9), "dpo": cases.preference_rows(4, 9)}


def embedding_lora(seed=0):
    """LoRA on the embeddings: names like `lora_embedding_A.default`, which TRL's own copy leaves out."""
    torch.manual_seed(seed)
    adapter = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(cases.tiny_llama(seed), adapter)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_" in name and each.requires_grad:
                each.normal_(std=0.1)
    return model


class Seen(TrainerCallback):
    """Calls a function on each event, with the model."""

    def __init__(self, **actions):
        for event, action in actions.items():
            setattr(self, event, lambda args, state, control, action=action, **kwargs: action(state, **kwargs))


@pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
def test_evaluation_leaves_an_adapter_on_the_embeddings_as_it_is(tmp_path):
    evaluated = runs.train(embedding_lora(), tmp_path / "a", evaluation=EVALUATION, ewc={"f_max": 1.0})
    plain = runs.train(embedding_lora(), tmp_path / "b", ewc={"f_max": 1.0})
    assert runs.same(cases.trainable(evaluated.model), cases.trainable(plain.model))


def test_the_reference_of_an_adapter_on_the_embeddings_is_the_stages_start(tmp_path):
    run = runs.train(embedding_lora(), tmp_path)
    logged = [entry["dpo/rewards/chosen"] for entry in run.state.log_history if "dpo/rewards/chosen" in entry]
    assert logged[:: runs.STEPS] == [0.0, 0.0]


@pytest.mark.parametrize("build", [cases.tiny_llama, cases.lora_llama])
def test_precomputed_reference_log_probabilities_change_no_score(tmp_path, build):
    scores = [
        runs.train(build(), tmp_path / str(early), evaluation={"dpo": EVALUATION["dpo"]}, dpo=dpo).matrix.series("dpo")
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
    again = EWCCallback(dict.fromkeys(names, 1.0), f_max=0.5)
    trainer(again, cases.tiny_llama(), bind=True)
    second = trainer(again, cases.tiny_llama())
    fresh = trainer(EWCCallback(dict.fromkeys(names, 1.0), f_max=0.5), cases.tiny_llama())
    assert runs.same(second, fresh)
    assert cases.largest_difference(second, trainer(None, cases.tiny_llama())) > 1e-4


def test_a_stage_that_another_run_left_behind_is_not_gone_on_from(tmp_path):
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
    runs.train(cases.lora_llama(), tmp_path, num_rounds=1, ewc={"f_max": 0.0, "freeze": 0.5}, callbacks=[seen])
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
        found.add(stage.objective, found.control(parameters, stage))
        importance = found.importance(plan(6, ["sft", "dpo"])[stage.index + 1])["a"]
        spread.append(float(importance.std() / importance.mean()))
    assert min(spread) > 0.5


def test_the_training_loss_is_the_mean_of_training_losses(tmp_path):
    run = runs.build_run(cases.tiny_llama(), tmp_path, evaluation=EVALUATION)
    output = run.train()
    own = [value for entry in run.state.log_history for key, value in entry.items() if key in {"sft/loss", "dpo/loss"}]
    assert output.training_loss == pytest.approx(sum(own) / len(own))


def test_a_run_of_one_objective_accumulates_nothing(tmp_path):
    run = runs.train(
        cases.tiny_llama(), tmp_path, objectives=["sft"], ewc={"f_max": 10.0}, data={"sft": cases.sft_rows(8)}
    )
    assert not list((tmp_path / "state").glob("importance-*"))
    assert run.matrix.rows == []


def test_a_sampler_seed_differs_between_stages(tmp_path):
    seeds = []
    seen = Seen()
    seen.on_train_begin = lambda args, state, control, **kwargs: seeds.append(args.data_seed)
    seven = {"data_seed": 7}
    runs.train(cases.tiny_llama(), tmp_path, num_rounds=1, sft=seven, dpo=seven, callbacks=[seen])
    assert seeds == [7, 8]
