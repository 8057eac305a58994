"""What runs with what: each combination with the test that shows it, or with the error that refuses it.

`docs/support.md` is written from this table by `python docs/support_page.py`; `tests/test_support.py` compares it with
what `hbat.engines.checks` refuses.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """A combination that works.

    Attributes:
        by: The test that shows it, as pytest names it, below `tests/`.
    """

    by: str


#: What is trained: the columns of the table of engines; the last two have a quantised base.
COLUMNS = ("full", "LoRA", "QLoRA, 4-bit", "QLoRA, 8-bit")


Cell = Shown | str  # a string is a key of REFUSALS


_PLAIN = "trainer/test_trainer.py::test_a_run_without_a_penalty_equals_plain_trainers"


_QLORA = "trainer/test_qlora.py::test_every_stage_starts_at_its_reference_and_trains_the_adapter_alone"


_DDP = "engines/distributed/test_ddp.py::test_two_processes_end_with_the_weights_of_one"


_FSDP = "engines/distributed/test_fsdp2.py::test_two_processes_end_with_the_weights_of_one"


_NATIVE = "engines/distributed/test_loaded_shards.py::test_two_processes_end_with_the_weights_of_one"


_ZERO = "engines/distributed/test_deepspeed.py::test_two_processes_end_with_the_weights_of_one"


_HALF = "engines/distributed/test_deepspeed_bf16.py"


_BFLOAT16 = f"{_HALF}::test_without_a_penalty_weights_are_those_of_plain_trainers_that_hand_over"


_QLORA_DDP = "engines/distributed/test_qlora.py::test_two_processes_train_one_adapter"


#: How a run is launched and where its weights lie, by what is trained.
ENGINES: Mapping[str, tuple[Cell, ...]] = {
    "one process": (
        Shown(f"{_PLAIN}[none-full]"),
        Shown(f"{_PLAIN}[none-lora]"),
        Shown(f"{_QLORA}[dpo-4-bit]"),
        Shown(f"{_QLORA}[dpo-8-bit]"),
    ),
    "DDP": (
        Shown(f"{_DDP}[sft and dpo]"),
        Shown(f"{_DDP}[lora]"),
        Shown(f"{_QLORA_DDP}[4-bit]"),
        Shown(f"{_QLORA_DDP}[8-bit]"),
    ),
    "FSDP2": (Shown(f"{_FSDP}[sft and dpo]"), Shown(f"{_FSDP}[lora]"), "FSDP2", "FSDP2"),
    "FSDP2 by the model (`distributed_config`)": (
        Shown(f"{_NATIVE}[sft and dpo]"),
        Shown(f"{_NATIVE}[lora]"),
        "FSDP2",
        "FSDP2",
    ),
    "FSDP2 by the user's own code (`fully_shard`)": ("FSDP2 by the model",) * 4,
    "FSDP1": ("FSDP1",) * 4,
    "FSDP with offload to the CPU": ("FSDP with offload",) * 4,
    "DeepSpeed ZeRO-1": (Shown(f"{_ZERO}[1-sft and dpo]"), Shown(f"{_ZERO}[1-lora]"), "DeepSpeed", "DeepSpeed"),
    "DeepSpeed ZeRO-2": (Shown(f"{_ZERO}[2-sft and dpo]"), Shown(f"{_ZERO}[2-lora]"), "DeepSpeed", "DeepSpeed"),
    "DeepSpeed ZeRO-3": (Shown(f"{_ZERO}[3-sft and dpo]"), Shown(f"{_ZERO}[3-lora]"), "DeepSpeed", "DeepSpeed"),
    "DeepSpeed without ZeRO": ("DeepSpeed",) * 4,
    "DeepSpeed with offload": ("DeepSpeed",) * 4,
    "tensor, context or sequence parallelism (`parallelism_config`), Megatron-LM": ("parallelism",) * 4,
    "tensor parallelism by the model (`tp_plan`)": ("tensor parallelism by the model",) * 4,
    "`device_map` over several devices": ("several devices",) * 4,
    "`device_map` with offload to CPU or disk": ("offload",) * 4,
    "several GPUs in one process (`DataParallel`)": ("several GPUs in one process",) * 4,
}


#: Everything else, one combination a line.
FEATURES: Mapping[str, Cell] = {
    "PPO in one process, full": Shown("ppo/test_learning.py"),
    "PPO in DDP, full": Shown(f"{_DDP}[ppo]"),
    "PPO in DDP, LoRA": Shown(f"{_DDP}[ppo with lora and a separate critic]"),
    "PPO in FSDP2, full": Shown(f"{_FSDP}[ppo]"),
    "PPO in FSDP2, LoRA": Shown(f"{_FSDP}[adam, ppo and lora]"),
    "PPO with `critic: separate`, FSDP2": "separate critic under FSDP2",
    "KTO, FSDP2": Shown(f"{_FSDP}[kto]"),
    "GRPO, RLOO and TRL's PPO, FSDP2": "untested objective",
    "resuming inside a stage, FSDP2": Shown(
        "engines/distributed/test_fsdp2.py::test_two_processes_that_were_killed_resume_to_the_last_bit"
    ),
    "gradient checkpointing, FSDP2": Shown(f"{_FSDP}[checkpointing]"),
    "FSDP's own activation checkpointing": "FSDP2 with activation checkpointing",
    "`precompute_ref_log_probs`, FSDP2": "precomputed reference",
    "8-bit and paged optimizers, FSDP2": "untested optimizer",
    "plain SGD with `FULL_STATE_DICT`, FSDP2": "FSDP2 with an optimizer without state",
    "`torch_compile`, FSDP2": "compilation",
    "FSDP2 over a mesh of several dimensions (HSDP)": "FSDP2 on a mesh",
    "FSDP2 in one process": "FSDP2 in one process",
    "FSDP2 on a CPU": "FSDP2 left aside",
    "EWCCallback and PPOTrainer alone, FSDP2": Shown(
        "engines/distributed/test_fsdp2.py::test_callback_and_ppo_trainer_alone_train_what_they_train_in_one_process"
    ),
    "KTO, FSDP2 by the model": Shown(f"{_NATIVE}[kto]"),
    "Fisher with `estimator: gnb`, FSDP2 by the model": Shown(f"{_NATIVE}[fisher]"),
    "gradient checkpointing, FSDP2 by the model": Shown(f"{_NATIVE}[checkpointing]"),
    "a stage that was cut off begins again, FSDP2 by the model": Shown(
        "engines/distributed/test_loaded_shards.py::"
        "test_processes_that_were_killed_begin_the_stage_again_and_end_as_if_they_were_not"
    ),
    "EWCCallback and PPOTrainer alone, FSDP2 by the model": Shown(
        "engines/distributed/test_loaded_shards.py::test_callback_and_ppo_trainer_alone_train_what_they_train_in_one_process"
    ),
    "FSDP2 by the model with replicas, offload, mixed precision or other parallelism": (
        "FSDP2 by the model in other ways"
    ),
    "FSDP2 by the model with tied embeddings, full": "tied weights by the model",
    "FSDP2 by the model with tied embeddings, LoRA": Shown(f"{_NATIVE}[tied, lora]"),
    "PPO, FSDP2 by the model, full": Shown(f"{_NATIVE}[ppo]"),
    "PPO, FSDP2 by the model, LoRA": Shown(f"{_NATIVE}[adam, ppo and lora]"),
    "FSDP2 by the model, and `fsdp` or `deepspeed` in the sections": "FSDP2 twice",
    "KTO, ZeRO-2": Shown(f"{_ZERO}[2-kto]"),
    "gradient checkpointing, ZeRO-2": Shown(f"{_ZERO}[2-checkpointing]"),
    "a stage that was cut off begins again, ZeRO-2": Shown(
        "engines/distributed/test_deepspeed.py::"
        "test_processes_that_were_killed_begin_the_stage_again_and_end_as_if_they_were_not[2-sft and dpo]"
    ),
    "EWCCallback bound to a trainer, ZeRO-2": Shown(
        "engines/distributed/test_deepspeed.py::test_a_bound_callback_trains_what_it_trains_in_one_process[2]"
    ),
    "KTO, ZeRO-3": Shown(f"{_ZERO}[3-kto]"),
    "gradient checkpointing, ZeRO-3": Shown(f"{_ZERO}[3-checkpointing]"),
    "a stage that was cut off begins again, ZeRO-3": Shown(
        "engines/distributed/test_deepspeed.py::"
        "test_processes_that_were_killed_begin_the_stage_again_and_end_as_if_they_were_not[3-adam]"
    ),
    "EWCCallback bound to a trainer, ZeRO-3": Shown(
        "engines/distributed/test_deepspeed.py::test_a_bound_callback_trains_what_it_trains_in_one_process[3]"
    ),
    "ZeRO++ and MiCS, ZeRO-3": "quantised or grouped shares under DeepSpeed",
    "EWCCallback in `callbacks` alone, ZeRO": "EWCCallback alone under DeepSpeed",
    "PPO, GRPO and RLOO, ZeRO": "untested objective",
    "PPOTrainer alone, ZeRO": "PPOTrainer under DeepSpeed",
    "bf16, full, ZeRO-1": Shown(f"{_BFLOAT16}[1-full]"),
    "bf16, full, ZeRO-2": Shown(f"{_BFLOAT16}[2-full]"),
    "bf16, LoRA, ZeRO-2": Shown(f"{_BFLOAT16}[2-lora]"),
    "bf16 with a model loaded in bfloat16, ZeRO-2": Shown(f"{_BFLOAT16}[2-coarse]"),
    "the penalty in bf16, ZeRO-2": Shown(f"{_HALF}::test_the_penalty_joins_the_gradients_in_float32[2]"),
    "fp16 or `torch_autocast`, ZeRO": "half precision under DeepSpeed",
    "`bf16_master_weights_and_grads`, `bf16_optimizer_states`, ZeRO": "bfloat16 options under DeepSpeed",
    "`optimizer` or `scheduler` in DeepSpeed's configuration": "optimizer by DeepSpeed",
    "8-bit, paged and other optimizers, ZeRO": "untested optimizer",
    "`precompute_ref_log_probs`, ZeRO": "precomputed reference",
    "`torch_compile`, ZeRO": "compilation",
    "DeepSpeed in some sections alone": "DeepSpeed for some objectives",
    "`ewc.method: proximal`, ZeRO": "proximal steps under DeepSpeed",
    "`ewc.freeze`, ZeRO": "frozen tensors under DeepSpeed",
    "PPO on a 4-bit base": Shown(f"{_QLORA}[ppo-4-bit]"),
    "PPO on an 8-bit base": Shown(f"{_QLORA}[ppo-8-bit]"),
    "PPO on a 4-bit base in DDP": Shown(f"{_QLORA_DDP}[4-bit with ppo]"),
    "4-bit or 8-bit base, full fine-tuning": "quantised base",
    "base quantised by GPTQ, AWQ, ... with an adapter": "quantisation method",
    "the penalty with QLoRA": Shown(
        "trainer/test_qlora.py::test_the_gradient_of_the_penalty_is_the_closed_form_on_the_adapter"
    ),
    "resuming inside a stage with QLoRA": Shown(
        "trainer/test_qlora.py::test_a_run_that_was_cut_off_ends_as_if_it_was_not"
    ),
    "gradient checkpointing with QLoRA": Shown("trainer/test_qlora.py::test_recomputed_activations_change_nothing"),
    "merging a QLoRA adapter": Shown(
        "trainer/test_qlora.py::test_an_adapter_is_merged_into_dequantised_or_full_weights"
    ),
    "8-bit and paged optimizers": Shown("trainer/test_qlora.py::test_moments_in_eight_bits_are_carried_on_disk"),
    "LOMO, AdaLOMO, layer-wise GaLore and APOLLO": "optimizer",
    "Fisher with `estimator: gnb`, DDP": Shown(f"{_DDP}[fisher]"),
    "Fisher with `estimator: empirical` (per sample), DDP": Shown(f"{_DDP}[fisher of samples]"),
    "Fisher with `estimator: gnb`, FSDP2": Shown(f"{_FSDP}[fisher]"),
    "Fisher with `estimator: empirical` (per sample), FSDP2": "Fisher of samples under FSDP2",
    "Fisher with `estimator: gnb`, ZeRO-2": Shown(f"{_ZERO}[2-fisher]"),
    "Fisher with `estimator: empirical` (per sample), ZeRO-2": Shown(f"{_ZERO}[2-fisher of samples]"),
    "Fisher with `estimator: gnb`, ZeRO-3": Shown(f"{_ZERO}[3-fisher]"),
    "Fisher with `estimator: empirical` (per sample), ZeRO-3": Shown(f"{_ZERO}[3-fisher of samples]"),
    "bfloat16 by autocast": Shown("trainer/test_trainer.py::test_every_stage_computes_in_bfloat16_when_asked"),
    "LoRA on `lm_head`, SFT and DPO (TRL 1.16)": "adapter on the head",
    "LoRA on `lm_head`, PPO alone": Shown(
        "ppo/test_token_model.py::test_gradients_are_those_through_the_models_own_logits[lora-head]"
    ),
    "`modules_to_save: [lm_head]`": Shown("test_support.py::test_a_copy_of_the_head_is_trained_beside_the_adapter"),
    "prompt, prefix or p-tuning, SFT alone": Shown("test_support.py::test_sft_alone_takes_virtual_tokens"),
    "prompt, prefix or p-tuning, objectives with a reference policy": "virtual tokens",
    "adapters whose copy is not exact (PVeRA, MonteCLoRA, Lily, KaSA), objectives with a reference policy": (
        "adapter without a copy"
    ),
    "LoRA from PiSSA, OLoRA or LoftQ": Shown(
        "model/test_adapters.py::test_an_adapter_of_any_kind_has_an_exact_copy_or_is_refused_by_name[LORA pissa]"
    ),
    "LoRA from fast PiSSA (`pissa_niter_4`), CorDA or LoRA-GA": "adapter that cannot be loaded",
    "several adapters": "several adapters",
    "`model.add_adapter` instead of a PeftModel": "adapter inside",
    "`torch_compile`": Shown("test_support.py::test_a_compiled_model_trains_as_it_does_otherwise"),
    "`replay`, one process": Shown(
        "stages/test_replay.py::test_a_run_equals_plain_trainers_with_the_replayed_loss_in_theirs"
    ),
    "`replay`, DDP": Shown(f"{_DDP}[replay]"),
    "`replay`, FSDP2 and ZeRO": "replay",
}


def cells() -> list[Cell]:
    """List what the table holds.

    Returns:
        Every cell, in the table's order.
    """
    return [*(cell for row in ENGINES.values() for cell in row), *FEATURES.values()]
