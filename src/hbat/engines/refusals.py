"""What is refused, why, and what to use instead: every message that `docs/support.md` lists."""

from collections.abc import Mapping
from dataclasses import dataclass

#: Where something can be refused, always at construction.
HBAT, PPO, EWC = "HBATTrainer", "PPOTrainer", "EWCCallback"
EVERYWHERE = (HBAT, PPO, EWC)


@dataclass(frozen=True)
class Refusal:
    """Why something is refused, and what to use instead.

    Attributes:
        says: The message; values stand in braces.
        at: What refuses it.
        kind: Class of the error.
        by_trl: Whether TRL refuses it, when its trainer is built.
    """

    says: str
    at: tuple[str, ...] = EVERYWHERE
    kind: type[Exception] = ValueError
    by_trl: bool = False

    def error(self, **values: object) -> Exception:
        """Make the error from the message's values."""
        return self.kind(self.says.format(**values))


def _untested(says: str, *at: str) -> Refusal:
    return Refusal(says, at=at or EVERYWHERE, kind=NotImplementedError)


_INSTEAD = (
    "Train in one process, with DDP (`accelerate launch --multi_gpu`) or with FSDP2 (`fsdp_version: 2`); use LoRA or "
    "QLoRA if memory is short."
)
_SHARDED = (
    "Parameters sharded by {engine} ({where}) are not supported, neither by the penalty nor between stages. "
    f"{_INSTEAD}"
)
_CUT = (
    "The weight {name!r} is a DTensor: {where} has sharded the model, and the penalty would see only a part of each "
    f"weight. Load the model without it. {_INSTEAD}"
)

REFUSALS: Mapping[str, Refusal] = {
    "FSDP2": _untested(
        "A model in 4 or 8 bits is not supported under {engine} ({where}). Train it in one process or with DDP "
        "(`accelerate launch --multi_gpu`), or load it in float32 and compute in bfloat16 (`bf16: true`)."
    ),
    "FSDP2 in one process": _untested(
        "`fsdp` is set, but there is only one process, so there is nothing to shard over. Start several with "
        "`accelerate launch` or `torchrun`, or remove `fsdp`.",
        HBAT,
    ),
    "FSDP2 left aside": _untested(
        "`fsdp` is set, but accelerate uses {engine}: on a CPU it silently ignores FSDP. Remove `fsdp`.", HBAT
    ),
    "FSDP2 on a mesh": _untested(
        "FSDP over a mesh of several dimensions is not supported. Shard over all processes, without "
        "`parallelism_config`.",
        HBAT,
    ),
    "FSDP2 with activation checkpointing": _untested(
        "FSDP's own activation checkpointing is not supported. Set `gradient_checkpointing: true` for the objectives "
        "instead; it saves as much memory.",
        HBAT,
    ),
    "FSDP2 with an optimizer without state": _untested(
        "`optim: sgd` is not supported with FSDP's `state_dict_type: FULL_STATE_DICT`: torch cannot load a full state "
        "dict for an optimizer without state. Set `SHARDED_STATE_DICT`.",
        HBAT,
    ),
    "untested objective": _untested(
        "The objective {objective!r} was not tested under {engine}. Train it with DDP, or, if it is an `Objective` of "
        "your own that you have tested, name {engine!r} among its `engines`.",
        HBAT,
    ),
    "untested optimizer": _untested(
        "`{objective}.optim` is {optimizer!r}, whose state was not tested under {engine}. Use 'adamw_torch'.", HBAT
    ),
    "precomputed reference": _untested(
        "`{objective}.precompute_ref_log_probs` is not supported under {engine}. Remove it.", HBAT
    ),
    "compilation": _untested("`torch_compile` is not supported under {engine}. Remove it.", HBAT),
    "replay": _untested(
        "`replay` is not supported under {engine}. Remove it, or train in one process or with DDP "
        "(`accelerate launch --multi_gpu`).",
        HBAT,
    ),
    "separate critic under FSDP2": _untested(
        "`critic: separate` is not supported under FSDP: a separate model cannot be copied from a sharded policy. Set "
        "`critic: shared`.",
        HBAT,
    ),
    "Fisher of samples under FSDP2": _untested(
        "`ewc.estimator: empirical` needs the gradient of each sample, and FSDP averages gradients over processes. "
        "Set `ewc.estimator: gnb`.",
        HBAT,
    ),
    "FSDP1": _untested(_SHARDED),
    "FSDP with offload": _untested(_SHARDED),
    "DeepSpeed": _untested(
        "Training with {engine} ({where}) is not supported for this model. Full models and LoRA can be trained with "
        "ZeRO-1, ZeRO-2 and ZeRO-3 without offload (`zero_optimization.stage: 3`), with DDP "
        "(`accelerate launch --multi_gpu`) and, if they do not fit on one device, with FSDP2 (`fsdp_version: 2`); "
        "QLoRA in one process and with DDP."
    ),
    "half precision under DeepSpeed": _untested(
        "Half precision by {where} is not supported under DeepSpeed. Use `bf16` with ZeRO-1 or ZeRO-2: `bf16: true` "
        "and `fp16: false` for the objectives, `mixed_precision: bf16` for `accelerate launch`, no `torch_autocast`."
    ),
    "bfloat16 options under DeepSpeed": _untested(
        "DeepSpeed's configuration has {owned} beside `bf16`: with it the optimizer does not step float32 weights, or "
        "not in a way that was tested. Remove it, or use ZeRO-2 for `grad_accum_dtype`."
    ),
    "quantised or grouped shares under DeepSpeed": _untested(
        "`zero_optimization.{name}` is {value!r}, which does not split weights evenly over all processes. Remove it."
    ),
    "EWCCallback alone under DeepSpeed": _untested(
        "`EWCCallback` in `callbacks=[...]` cannot reach the gradients under DeepSpeed. Call `callback.bind(trainer)` "
        "before `trainer.train()`.",
        EWC,
    ),
    "PPOTrainer under DeepSpeed": _untested(
        "PPO is not supported under DeepSpeed. Train it with DDP (`accelerate launch --multi_gpu`) or FSDP2 "
        "(`fsdp_version: 2`).",
        PPO,
    ),
    "optimizer by DeepSpeed": _untested(
        "DeepSpeed's configuration has {owned}, which a run sets anew for each stage. Remove it, and set `optim`, "
        "`learning_rate` and `lr_scheduler_type` for the objectives.",
        HBAT,
    ),
    "DeepSpeed for some objectives": _untested(
        "`deepspeed` is set for {names} only. Set it to the same value for all objectives.", HBAT
    ),
    "proximal steps under DeepSpeed": _untested(
        "`method: proximal` is not supported under DeepSpeed, which overwrites the model's weights after each step. "
        "Set `method: gradient` (in YAML below `ewc:`).",
        HBAT,
        EWC,
    ),
    "frozen tensors under DeepSpeed": _untested(
        "`ewc.freeze` is not supported under DeepSpeed. Set it to 0, or train with DDP.", HBAT
    ),
    "parallelism": _untested(
        "Layers split over devices by {engine} ({where}) are not supported: the penalty would see only a part of each "
        f"weight. {_INSTEAD}"
    ),
    "FSDP2 by the model": _untested(_CUT),
    "FSDP2 by the model in other ways": _untested(
        "The model was loaded with `distributed_config` of {ways}, which is not supported. Set only `fsdp_size`, to "
        "the number of processes."
    ),
    # transformers 5.23 puts both in FSDP2 groups of their own, so that they differ after a step.
    "tied weights by the model": _untested(
        "The model was loaded with `distributed_config` and has tied weights ({names}), which transformers shards "
        "separately: trained, they would drift apart. Set `fsdp` for the objectives instead (`fsdp_config: {{version: "
        "2}}`), or train an adapter (`peft_config=LoraConfig(...)`, in YAML `peft: {{}}`)."
    ),
    "FSDP2 twice": Refusal(
        "`{field}` is set, but the model was already sharded when it was loaded (`distributed_config`). Remove "
        "`{field}`, or load the model without `distributed_config`."
    ),
    "tensor parallelism by the model": _untested(_CUT),
    "several devices": _untested(
        "`device_map` has spread the model over {devices}, which is not supported. Load it onto one device "
        f"(`device_map={{{{'': 0}}}}`), in 4 or 8 bits if it is too large. {_INSTEAD}"
    ),
    "offload": _untested(
        "`device_map` has put a part of the model on {devices} and fetches it layer by layer, which is not supported. "
        "Load it onto one device (`device_map={{'': 0}}`), in 4 or 8 bits if it is too large."
    ),
    "several GPUs in one process": Refusal(
        "One process sees {count} GPUs, and transformers would copy the model to all of them at every step "
        "(`torch.nn.DataParallel`). Start one process per GPU with `accelerate launch --multi_gpu`, or make only one "
        "visible with CUDA_VISIBLE_DEVICES=0."
    ),
    "quantised base": Refusal(
        "The model is quantised to {bits} bits and has no adapter: quantised weights cannot be trained, an adapter on "
        "them can. Pass `peft_config=LoraConfig(...)` (in YAML `peft: {{}}`), or load the model without "
        "`quantization_config` (in YAML `quantization`)."
    ),
    "quantisation method": Refusal(
        "The model is quantised by {method!r}, but adapters were tested on bitsandbytes only. Load the full model "
        "with `quantization_config=BitsAndBytesConfig(load_in_4bit=True)` (in YAML `quantization`)."
    ),
    "optimizer": Refusal(
        "`optim` is {name!r}, which changes the weights inside the backward pass: the penalty, the check for NaN and "
        "the moments that stages carry never see its gradients. Use 'adamw_torch', or 'adamw_bnb_8bit' or "
        "'paged_adamw_8bit' if memory is short."
    ),
    "several adapters": Refusal(
        "The PeftModel has the adapters {adapters}; the trainers support a single one, named 'default'. Load it with "
        "`PeftModel.from_pretrained(model, path, adapter_name='default', is_trainable=True)`.",
        at=(HBAT, PPO),
    ),
    "adapter inside": Refusal(
        "The model is a {model} with an adapter inside (`model.add_adapter`), which TRL's trainers do not recognise. "
        "Pass `get_peft_model(model, config)`, or the bare model and `peft_config=`.",
        at=(HBAT, PPO),
    ),
    "virtual tokens": Refusal(
        "The adapter is a {adapter}, which puts virtual tokens before each text and cannot be copied as a reference "
        "policy. Objectives with a reference policy support adapters inside the layers, such as LoRA; SFT alone "
        "supports this one.",
        at=(HBAT, PPO),
    ),
    "adapter without a copy": Refusal(
        "The adapter {adapter} has no exact copy that could be the reference policy ({fault}). Objectives with a "
        "reference policy support adapters such as LoRA; SFT alone supports this one.",
        at=(HBAT, PPO),
    ),
    "adapter that cannot be loaded": Refusal(
        "`init_lora_weights` is {init!r}, which takes a part out of the base that PEFT does not find again when it "
        "loads the adapter: what is saved would be another model. Use 'pissa' or 'olora', or save the base without "
        "that part and train the adapter on it, as `docs/adapters.md` shows.",
        at=(HBAT, PPO),
    ),
    "adapter on the head": Refusal(
        "Applying a PEFT adapter to `lm_head` is not supported",
        at=(HBAT,),
        by_trl=True,  # since TRL computes log-probabilities from the head's weight
    ),
}
