"""The reference adapter and the dtype of an adapter, also in the hands of TRL's constructors."""

import cases
import pytest
import qlora_cases
import runs
import torch
import trl

from hbat.model.adapters import (
    add_reference_adapter,
    complete_reference_adapter,
    keep_adapter_dtype,
    reference_tensors,
    using_reference_adapter,
)

peft = pytest.importorskip("peft")

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(r=2, **TARGETS),
    "LoRA on embeddings": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "DoRA": lambda: peft.LoraConfig(r=2, use_dora=True, **TARGETS),
    "PiSSA": lambda: peft.LoraConfig(r=2, init_lora_weights="pissa", **TARGETS),
    "modules to save": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    "token indices": lambda: peft.LoraConfig(r=2, trainable_token_indices=[1, 2], **TARGETS),
    "LoHa": lambda: peft.LoHaConfig(r=2, **TARGETS),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], **TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
}


def adapted(kind):
    """A tiny model with an adapter that is not zero."""
    config = ADAPTERS[kind]()
    config.task_type = "CAUSAL_LM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(cases.tiny_llama(), config)
        with torch.no_grad():
            for parameter in cases.trainable(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# --- the reference adapter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_reference_adapter_computes_what_the_adapter_does_and_changes_nothing_else(kind):
    model = adapted(kind)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits, seed = qlora_cases.logits(model), torch.get_rng_state()
    add_reference_adapter(model)
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.equal(qlora_cases.logits(model), logits)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    found = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: found[name] for name in flags} == flags
    assert not any(found[name] for name in found.keys() - flags)
    with torch.no_grad():
        for parameter in cases.trainable(model).values():
            parameter.add_(0.1)
    assert not torch.equal(qlora_cases.logits(model), logits)
    with using_reference_adapter(model):
        assert torch.equal(qlora_cases.logits(model), logits)


def test_a_reference_adapter_that_is_there_follows_in_values_and_dtype():
    model = adapted("LoRA")
    add_reference_adapter(model)
    for parameter in cases.trainable(model).values():
        parameter.data = 2.0 * parameter.data.bfloat16()
    add_reference_adapter(model)
    copies = reference_tensors(model)
    assert runs.same(copies, cases.weights(model))
    assert {tensor.dtype for tensor in copies.values()} == {torch.bfloat16}


def trainer_of(name, model, folder, **options):
    """One of TRL's trainers, constructed as a stage constructs it."""
    kinds = {
        "sft": (trl.SFTConfig, trl.SFTTrainer, cases.sft_rows(8)),
        "dpo": (trl.DPOConfig, trl.DPOTrainer, cases.preference_rows(8)),
        "kto": (trl.KTOConfig, trl.KTOTrainer, runs.kto_rows(8)),
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer, cases.sft_rows(8).select_columns("prompt")),
        "rloo": (trl.RLOOConfig, trl.RLOOTrainer, cases.sft_rows(8).select_columns("prompt")),
    }
    config_class, trainer_class, rows = kinds[name]
    extra = {"reward_funcs": len} if name in {"grpo", "rloo"} else {}
    options = {"beta": 0.1, "num_generations": 2} | options if extra else options
    args = config_class(output_dir=str(folder), **cases.CHEAP_ARGS | options)
    return trainer_class(model, args=args, train_dataset=rows, processing_class=cases.tiny_tokenizer(), **extra)


# The names of these adapters' parameters end in the adapter's, or some do.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dpo", "LoRA on embeddings"),
        ("dpo", "IA3"),
        ("dpo", "VeRA"),
        pytest.param("kto", "LoHa", marks=runs.needs_kto),
    ],
)
def test_reference_log_probabilities_that_a_constructor_computes_are_the_adapters(name, kind, tmp_path):
    model = adapted(kind)
    with complete_reference_adapter(model):
        trainer = trainer_of(name, model, tmp_path, precompute_ref_log_probs=True, max_steps=1)
    assert "add_adapter" not in vars(model)
    trainer.train()
    entry = trainer.state.log_history[0]
    rewards = [entry[key] for key in ("rewards/chosen", "rewards/rejected") if key in entry]
    assert rewards
    assert rewards == pytest.approx([0.0] * len(rewards), abs=1e-5)


def test_an_adapter_of_another_name_is_added_as_ever_and_a_model_without_adapter_is_left_alone():
    model = adapted("LoRA")
    with complete_reference_adapter(model):
        model.add_adapter("other", peft.LoraConfig(r=3, **TARGETS))
    assert set(model.peft_config) == {"default", "other"}
    full = cases.tiny_llama()
    with complete_reference_adapter(full):
        assert "add_adapter" not in vars(full)


# --- the dtype of an adapter -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    return qlora_cases.save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", ["sft", "dpo", pytest.param("kto", marks=runs.needs_kto), "grpo", "rloo"])
def test_an_adapter_on_a_quantized_base_keeps_dtype_values_and_memory(name, saved, tmp_path):
    model = qlora_cases.qlora(saved, "4-bit")
    before, places = cases.weights(model), [parameter.data_ptr() for parameter in cases.trainable(model).values()]
    with keep_adapter_dtype(model), complete_reference_adapter(model):
        trainer_of(name, model, tmp_path)
        during = {parameter.dtype for parameter in cases.trainable(model).values()}
    assert during == {torch.bfloat16}  # TRL's cast; without it, `keep_adapter_dtype` can go
    assert runs.same(cases.weights(model), before)
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    assert [parameter.data_ptr() for parameter in cases.trainable(model).values()] == places
    if name != "sft":
        assert runs.same(reference_tensors(model), before)


def test_an_error_in_a_constructor_leaves_the_dtype_too():
    model = adapted("LoRA")

    def construct():
        with keep_adapter_dtype(model):
            for parameter in cases.trainable(model).values():
                parameter.data = parameter.data.bfloat16()
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        construct()
    assert {tensor.dtype for tensor in cases.weights(model).values()} == {torch.float32}


def test_at_a_small_learning_rate_every_element_moves_in_float32_and_few_in_bfloat16(saved, tmp_path):
    shares = []
    for keeps in (True, False):
        model = qlora_cases.qlora(saved, "4-bit")
        options = {"optim": "adamw_torch", "learning_rate": 1e-5, "max_steps": 2}
        if keeps:
            with keep_adapter_dtype(model):
                trainer = trainer_of("dpo", model, tmp_path, **options)
        else:
            trainer = trainer_of("dpo", model, tmp_path, **options)
        before = cases.weights(model)
        trainer.train()
        moved = [(tensor != before[name]).flatten() for name, tensor in cases.weights(model).items()]
        shares.append(float(torch.cat(moved).float().mean()))
    assert shares[0] > 0.999
    assert shares[1] < 0.05
