"""Every refusal of the table is raised, wherever the table says so, with the table's words."""

from pathlib import Path
from types import SimpleNamespace

import cases
import ppo_cases
import pytest
import runs
import torch
import trl
from peft import LoraConfig, PolyConfig, PromptTuningConfig, get_peft_model
from refused import pattern, refused
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel, TrainerControl, TrainerState

from hbat.config.hbat import HBATConfig
from hbat.engines.checks import refuse_arguments, refuse_model, refuse_trainer
from hbat.engines.refusals import EWC, HBAT, PPO, REFUSALS
from hbat.ewc.callback import EWCCallback
from hbat.trainer import HBATTrainer

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
POLY = PolyConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
RANDOM_PART = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa_niter_1")


# --- where things are refused ----------------------------------------------------------------------------------------


def at_hbat(folder, model, options):
    """With ready arguments, whose fields are set afterwards: transformers asks for packages of engines."""
    args = trl.SFTConfig(output_dir=str(folder), **cases.CHEAP_ARGS)
    vars(args).update(options)
    config = HBATConfig(output_dir=str(folder), num_rounds=1, sft=args, dpo=runs.section(), disable_tqdm=True)
    HBATTrainer(model, config, runs.rows(), processing_class=cases.tiny_tokenizer())


def at_ppo(folder, model, options):
    args = ppo_cases.arguments(folder)
    vars(args).update(options)
    ppo_cases.PPOTrainer(
        model, args, ppo_cases.prompts(), processing_class=cases.tiny_tokenizer(), reward_funcs=ppo_cases.letters
    )


def at_bind(folder, model, options):
    args = trl.SFTConfig(output_dir=str(folder), **cases.CHEAP_ARGS)
    vars(args).update(options)
    handler = SimpleNamespace(callbacks=[])
    EWCCallback({}).bind(SimpleNamespace(args=args, model=model, callback_handler=handler))


PLACES = {HBAT: at_hbat, PPO: at_ppo, EWC: at_bind}


# --- what is refused -------------------------------------------------------------------------------------------------


def quantised(method="bitsandbytes"):
    """A model as transformers marks one that it has quantised."""
    model = cases.tiny_llama()
    model.is_quantized, model.is_loaded_in_4bit, model.quantization_method = True, True, method
    return model


def placed(*devices):
    model = cases.tiny_llama()
    model.hf_device_map = dict(zip(("model.embed_tokens", "model.layers"), devices, strict=True))
    return model


@pytest.fixture
def cut():
    """A model whose head is a DTensor, over a mesh of this process alone."""
    from torch import distributed, nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def make(dimension):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        if dimension in LOADED:
            return loaded(**LOADED[dimension])
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=(dimension,))
        model = cases.tiny_llama()
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
        return model

    yield make
    if distributed.is_initialized():
        distributed.destroy_process_group()


#: Models as transformers 5 loads them in shards, by what they are besides.
LOADED = {
    "untied": {},
    "replicas, offload": {"dp_replicate_size": 2, "fsdp_cpu_offload": True},
    "tied": {"tied": True},
}


def loaded(*, tied=False, **options):
    """A model as transformers marks one that it has loaded in shards; all lie on this process."""
    if not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):
        pytest.skip("this transformers loads no model in shards")
    model = cases.tiny_llama(tied=tied)
    fully_shard(model)
    model._is_distributed_loading_by_transformers = True  # noqa: SLF001 - what is public is read-only
    model.config.distributed_config = SimpleNamespace(fsdp_size=2, tp_size=1, pp_size=1, ep_size=1, **options)
    return model


def inside():
    model = cases.tiny_llama()
    try:
        model.add_adapter(LORA)
    except ValueError as error:  # transformers 5.24 wants PEFT 0.22
        pytest.skip(str(error))
    return model


def virtual():
    return get_peft_model(cases.tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


ZERO_2 = {"deepspeed": {"zero_optimization": {"stage": 2}}}
IN_BFLOAT16 = {"bf16": {"enabled": True, "bf16_optimizer_states": True}}
FSDP2 = {"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2}}
#: By refusal: a model, or what makes one; and fields of the trainer's arguments.
REFUSED = {
    "FSDP2": (lambda: get_peft_model(quantised(), LORA), FSDP2),
    "FSDP1": (cases.tiny_llama, {"fsdp": "full_shard", "fsdp_plugin_args": {"fsdp_version": 1}}),
    "FSDP with offload": (cases.tiny_llama, FSDP2 | {"fsdp_plugin_args": {"fsdp_version": 2, "cpu_offload": True}}),
    "DeepSpeed": (cases.tiny_llama, {"deepspeed": {"zero_optimization": {"stage": 0}}}),
    "half precision under DeepSpeed": (cases.tiny_llama, ZERO_2 | {"fp16": True}),
    "bfloat16 options under DeepSpeed": (cases.tiny_llama, {"deepspeed": ZERO_2["deepspeed"] | IN_BFLOAT16}),
    "quantised or grouped shares under DeepSpeed": (
        cases.tiny_llama,
        {"deepspeed": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}},
    ),
    "parallelism": (cases.tiny_llama, {"parallelism_config": "configuration"}),
    "FSDP2 by the model": ("fsdp", {}),
    "FSDP2 twice": ("untied", FSDP2),
    "FSDP2 by the model in other ways": ("replicas, offload", {}),
    "tied weights by the model": ("tied", {}),
    "tensor parallelism by the model": ("tp", {}),
    "several devices": (lambda: placed(0, 1), {}),
    "offload": (lambda: placed(0, "disk"), {}),
    "several GPUs in one process": (cases.tiny_llama, {"_n_gpu": 2}),
    "quantised base": (quantised, {}),
    "quantisation method": (lambda: quantised("gptq"), {}),
    "optimizer": (cases.tiny_llama, {"optim": "adalomo"}),
    "several adapters": (lambda: get_peft_model(cases.tiny_llama(), LORA, adapter_name="mine"), {}),
    "adapter inside": (inside, {}),
    "virtual tokens": (virtual, {}),
    "adapter without a copy": (lambda: get_peft_model(cases.tiny_llama(), POLY), {}),
    "adapter that cannot be loaded": (lambda: get_peft_model(cases.tiny_llama(), RANDOM_PART), {}),
}
WHERE = [(name, place) for name in REFUSED for place in REFUSALS[name].at]


@pytest.mark.parametrize(("name", "place"), WHERE)
def test_what_the_table_refuses_is_refused_at_construction(name, place, cut, tmp_path):
    make, options = REFUSED[name]
    model = cut(make) if isinstance(make, str) else make()
    with refused(name):
        PLACES[place](tmp_path, model, options)
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_the_head_is_refused_by_trl(tmp_path):
    if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
        pytest.skip("this TRL takes an adapter on the head")
    on_the_head = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=pattern("adapter on the head").strip("^$")):
        runs.build_run(cases.tiny_llama(), tmp_path, peft_config=on_the_head)
    assert not list(tmp_path.iterdir())


def test_every_refusal_has_a_test():
    """Which names it as the table does."""
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name in REFUSALS if f'"{name}"' not in tests] == []
    assert [name for name, refusal in REFUSALS.items() if refusal.by_trl] == ["adapter on the head"]


# --- as engines are asked for ----------------------------------------------------------------------------------------

LAUNCHES = {
    "FSDP1": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
    "FSDP2 with offload": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
    "DeepSpeed without ZeRO": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0",
    },
    "DeepSpeed with offload": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    },
    "parallelism_config": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
    "Megatron-LM": {"ACCELERATE_USE_MEGATRON_LM": "true"},
}


def begin(folder, model):
    EWCCallback({}).on_train_begin(SimpleNamespace(), TrainerState(), TrainerControl(), model=model)


CALLS = {
    HBAT: lambda folder, model: runs.build_run(model, folder),
    PPO: lambda folder, model: refuse_trainer(SimpleNamespace(), model),
    EWC: begin,
}


@pytest.mark.parametrize("engine", LAUNCHES)
@pytest.mark.parametrize("place", CALLS)
def test_an_engine_that_only_accelerate_launch_knows_of_is_refused(engine, place, monkeypatch, tmp_path):
    model = cases.tiny_llama()
    for name, value in LAUNCHES[engine].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NotImplementedError, match=rf"(by|with) {engine} \(ACCELERATE_USE_\w+=\w+\).*--multi_gpu"):
        CALLS[place](tmp_path, model)


@pytest.mark.parametrize(
    ("field", "engine"),
    [("deepspeed", "DeepSpeed without ZeRO"), ("parallelism_config", "parallelism_config")],
)
def test_an_engine_in_a_section_is_refused_before_transformers_asks_for_its_packages(field, engine, tmp_path):
    with pytest.raises(NotImplementedError, match=rf"(by|with) {engine} \(`{field}` is set\)"):
        runs.build_run(cases.tiny_llama(), tmp_path, dpo={field: {"a": 1}})


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_that_act_inside_the_backward_pass_are_refused_by_name(optim):
    with pytest.raises(ValueError, match=rf"`optim` is '{optim}'"):
        refuse_arguments(SimpleNamespace(optim=optim))
    refuse_arguments(SimpleNamespace(optim=optim.removesuffix("_layerwise").replace("lomo", "sgd")))


@pytest.mark.parametrize("devices", [("cpu", "cpu"), (0, 0), (0, "0")])
def test_a_model_on_one_device_is_taken(devices):
    refuse_trainer(None, placed(*devices))


def test_a_base_that_gets_an_adapter_may_be_quantised():
    refuse_model(quantised(), gets_adapter=True)
    with pytest.raises(ValueError, match="4 bits and has no adapter"):
        refuse_model(quantised())


def test_ways_to_load_in_shards_are_named(cut):
    with pytest.raises(
        NotImplementedError, match="dp_replicate_size=2, fsdp_cpu_offload=True, which is not supported"
    ):
        refuse_model(cut("replicas, offload"))


def test_tied_weights_in_shards_are_taken_below_an_adapter(cut):
    model = cut("tied")
    refuse_model(model, gets_adapter=True)
    with pytest.raises(NotImplementedError, match=r"lm_head\.weight.*Set `fsdp` for the objectives"):
        refuse_model(model)


def test_a_separate_critic_of_a_policy_in_shards_is_refused(cut, tmp_path):
    with pytest.raises(NotImplementedError, match="Set `critic: shared`"):
        at_ppo(tmp_path, cut("untied"), {"critic": "separate"})


def test_deepspeed_does_not_take_a_model_in_shards(cut):
    with pytest.raises(ValueError, match="`deepspeed` is set, but the model was already sharded"):
        refuse_trainer(SimpleNamespace(deepspeed={"zero_optimization": {"stage": 2}}, optim="sgd"), cut("untied"))


def test_the_policy_beside_a_critic_is_looked_at():
    with pytest.raises(ValueError, match="4 bits and has no adapter"):
        refuse_trainer(None, torch.nn.ModuleDict({"policy": quantised(), "critic": torch.nn.Linear(1, 1)}))
