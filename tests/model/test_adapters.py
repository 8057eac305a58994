"""The reference adapter and the dtype of an adapter, also in the hands of TRL's constructors."""

import dataclasses
import re
import typing

import cases
import pytest
import qlora_cases
import runs
import torch
import trl
from packaging.version import parse

from hbat.model.adapters import (
    add_reference_adapter,
    complete_reference_adapter,
    keep_adapter_dtype,
    reference_parameters,
    refuse_adapters,
    using_reference_adapter,
)
from hbat.model.copies import switch_off_dropout
from hbat.model.load import require_adapter_parameters
from hbat.model.save import save

peft = pytest.importorskip("peft")

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
#: What a kind needs to fit the tiny model, beside a rank and modules; None leaves those out.
FITTING = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 8},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 16},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"oft_block_size": 4, "r": 0},
    "ROAD": {"group_size": 4},
    "SHADOW": {"target_modules": None},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
    "VBLORA": {"num_vectors": 16, "vector_length": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 16},
}
#: Options of LoRA that change what it computes, trains or starts from.
LORA_OPTIONS = {
    "alora_invocation_tokens": [5],
    "kasa_config": {},
    "layer_replication": [[0, 2], [1, 2]],
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "monteclora_config": {},
    "rank_pattern": {"q_proj": 2},
    "target_modules": ["embed_tokens", "q_proj"],
    "target_parameters": ["down_proj.weight"],
    "trainable_token_indices": [5, 6],
    "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "use_rslora": True,
    "velora_config": {"num_groups": 4},
}
#: Kinds that no text alone trains, as they mix saved adapters or ask for a task or a kind of token with each row; and
#: one that needs a GPU.
NOT_HERE = {"CPT", "LORA loftq", "MULTITASK_PROMPT_TUNING", "POLY", "XLORA"}
#: Kinds without an exact copy, and what in the message names them.
WITHOUT_COPY = {
    "ADAPTION_PROMPT": "adaption_prompt",  # no adapter of that kind has a name
    "CARTRIDGE": "CartridgeConfig",
    "LILY": "LilyConfig",  # PEFT shares the layers' tensors of the first adapter alone
    "LORA kasa_config": "kasa_config.*changes",
    "LORA monteclora_config": "monteclora_config.*samples",
    "PREFIX_TUNING": "PrefixTuningConfig",
    "PROMPT_TUNING": "PromptTuningConfig",
    "PVERA": "PveraConfig.*samples",
    "P_TUNING": "PromptEncoderConfig",
}
if parse(peft.__version__) < parse("0.19"):
    WITHOUT_COPY |= {"LORA alora_invocation_tokens": "alora", "LORA target_parameters": "target_parameters"}
#: Initialisations that PEFT cannot repeat when it loads the adapter.
NOT_LOADED = {"LORA corda": "corda", "LORA lora_ga": "lora_ga", "LORA pissa_niter_4": "pissa_niter_4"}


def of_kind(kind):
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    given = {"task_type": "CAUSAL_LM", "r": 4, "num_virtual_tokens": 2} | TARGETS | FITTING.get(kind, {})
    known = {field.name for field in dataclasses.fields(config)}
    return config(**{name: value for name, value in given.items() if name in known and value is not None})


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | TARGETS | options)


def initialisations():
    """All that LoRA's configuration names."""
    annotation = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    named = [name for option in typing.get_args(annotation) for name in typing.get_args(option)]
    return [False, "lora_ga", *(re.sub(r"\[.*\]", "4", name) for name in named)]


ADAPTERS = {
    **{str(kind.value): lambda kind=kind: of_kind(kind) for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING},
    **{f"LORA {name}": lambda name=name: lora(init_lora_weights=name) for name in initialisations()},
    **{
        f"LORA {field.name}": lambda field=field: lora(**{field.name: LORA_OPTIONS[field.name]})
        for field in dataclasses.fields(peft.LoraConfig)
        if field.name in LORA_OPTIONS
    },
}


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """PEFT compiles a kernel for BOFT, where it can."""
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", False)


EACH = pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind not in NOT_HERE])


def adapted(kind):
    """A tiny model with an adapter that is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            config = ADAPTERS[kind]()
            init = getattr(config, "init_lora_weights", None)
            if init == "corda":
                config.init_lora_weights = True  # it needs data, but is refused by its name
            model = peft.get_peft_model(cases.tiny_llama(), config)
            config.init_lora_weights = init
        except (ImportError, ValueError) as error:
            if isinstance(error, ValueError) and "Unknown initialization" not in str(error):
                raise
            pytest.skip(str(error))
        with torch.no_grad():
            for parameter in cases.trainable(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# --- every kind of adapter -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # PEFT's, about configurations that are made to be odd
@EACH
def test_an_adapter_of_any_kind_has_an_exact_copy_or_is_refused_by_name(kind):
    model = adapted(kind)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits, seed = qlora_cases.logits(model), torch.get_rng_state()
    if name := (WITHOUT_COPY | NOT_LOADED).get(kind):
        with pytest.raises(ValueError, match=name):
            refuse_reference(model)
        return
    refuse_reference(model)
    assert runs.same(model.state_dict(), state)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(WITHOUT_COPY.keys() & ADAPTERS.keys()))
def test_an_adapter_without_a_copy_is_refused_also_while_it_does_nothing(kind):
    with torch.random.fork_rng(devices=[]):
        model = peft.get_peft_model(cases.tiny_llama(), ADAPTERS[kind]())
    with pytest.raises(ValueError, match=WITHOUT_COPY[kind]):
        refuse_reference(model)


def refuse_reference(model):
    refuse_adapters(model, takes_reference=True)
    require_adapter_parameters(model)


@pytest.mark.filterwarnings("ignore")
@EACH
def test_a_saved_adapter_of_any_kind_is_loaded_as_the_same_model_or_refused_by_name(kind, tmp_path):
    model = adapted(kind)
    if name := NOT_LOADED.get(kind):
        with pytest.raises(ValueError, match=rf"{name}.*`docs/adapters.md`"):
            refuse_adapters(model, takes_reference=False)
        return
    save(tmp_path, model, cases.tiny_tokenizer())
    loaded = peft.PeftModel.from_pretrained(cases.tiny_llama(), tmp_path)
    assert torch.equal(qlora_cases.logits(loaded), qlora_cases.logits(model))


DROPOUTS = [
    lambda: lora(lora_dropout=0.5),
    lambda: peft.LoHaConfig(r=4, module_dropout=0.5, rank_dropout=0.5, **TARGETS),
    lambda: peft.BOFTConfig(boft_block_size=4, boft_dropout=0.5, **TARGETS),
]


@pytest.mark.parametrize("make", DROPOUTS, ids=["LoRA", "LoHa", "BOFT"])
def test_every_dropout_of_an_adapter_is_known_as_one_and_switched_off(make):
    model = cases.random_adapter(make())
    require_adapter_parameters(model)
    ids = torch.arange(8)[None]
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    switch_off_dropout(model)
    assert torch.equal(model(ids).logits, model.eval()(ids).logits)


# --- the reference adapter -------------------------------------------------------------------------------------------


def test_a_reference_adapter_that_is_there_follows_in_values_and_dtype():
    model = adapted("LORA")
    add_reference_adapter(model)
    for parameter in cases.trainable(model).values():
        parameter.data = 2.0 * parameter.data.bfloat16()
    add_reference_adapter(model)
    copies = reference_parameters(model)
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
        ("dpo", "LORA target_modules"),
        ("dpo", "IA3"),
        ("dpo", "VERA"),
        pytest.param("kto", "LOHA", marks=runs.needs_kto),
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
    model = adapted("LORA")
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
        assert runs.same(reference_parameters(model), before)


def test_an_error_in_a_constructor_leaves_the_dtype_too():
    model = adapted("LORA")

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
