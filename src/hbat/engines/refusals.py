"""What is refused, why, and what to use instead: the errors that the table of `support` names. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass

#: Where a combination can be refused, always at construction.
HBAT, PPO, EWC = "HBATTrainer", "PPOTrainer", "EWCCallback"


EVERYWHERE = (HBAT, PPO, EWC)


@dataclass(frozen=True)
class Refusal:
    """Why something is refused, and what to use instead.

    Attributes:
        says: The message; names in braces are the values seen.
        at: Where it is refused.
        kind: The error's class.
        by_host: Whether it is the host that refuses, when its trainer is built on trial.
    """

    says: str
    at: tuple[str, ...] = EVERYWHERE
    kind: type[Exception] = ValueError
    by_host: bool = False

    def error(self, **seen: object) -> Exception:
        """Make the error.

        Args:
            **seen: The values seen.

        Returns:
            The error, to be raised.
        """
        return self.kind(self.says.format(**seen))


_INSTEAD = (
    "Train in one process, with DDP (`accelerate launch --multi_gpu`) or with FSDP2 (`fsdp_version: 2`), with LoRA or "
    "QLoRA where memory is short."
)


_SHARDED = (
    "Parameters sharded by {engine} ({where}) are not supported: neither the penalty nor the hand-over between "
    f"stages. {_INSTEAD}"
)


_CUT = (
    "The weight {name!r} is a DTensor: {where} has cut the model over devices, and the penalty would see a part of "
    f"each weight. Load the model without it. {_INSTEAD}"
)


def _under_fsdp(says: str) -> Refusal:
    return Refusal(says, at=(HBAT,), kind=NotImplementedError)


def _under_deepspeed(says: str) -> Refusal:
    return Refusal(says, at=(HBAT,), kind=NotImplementedError)


REFUSALS: Mapping[str, Refusal] = {
    "FSDP2": Refusal(
        "A model in 4 or 8 bits is not supported under {engine} ({where}). Train it in one process or with DDP "
        "(`accelerate launch --multi_gpu`), or load it in float32, computing in bfloat16 (`bf16: true`).",
        kind=NotImplementedError,
    ),
    "FSDP2 in one process": _under_fsdp(
        "`fsdp` is set, but there is a single process, and nothing to share a model with. Start several with "
        "`accelerate launch` or `torchrun`, or leave `fsdp` out."
    ),
    "FSDP2 left aside": _under_fsdp(
        "`fsdp` is set, but accelerate trains with {engine} here: on a CPU it leaves FSDP aside without a word. Leave "
        "`fsdp` out."
    ),
    "FSDP2 on a mesh": _under_fsdp(
        "FSDP on a mesh of several dimensions is not supported. Shard over all processes alike, without "
        "`parallelism_config`."
    ),
    "FSDP2 with activation checkpointing": _under_fsdp(
        "FSDP's own activation checkpointing is not supported. Set `gradient_checkpointing: true` in the sections, "
        "which saves as much."
    ),
    "FSDP2 with compilation": _under_fsdp("`torch_compile` is not supported under FSDP. Leave it out."),
    "FSDP2 with an optimizer without state": _under_fsdp(
        "`optim: sgd` is not supported with FSDP's `state_dict_type: FULL_STATE_DICT`: torch cannot load the state of "
        "an optimizer that has none in this way. Set `SHARDED_STATE_DICT`."
    ),
    "8-bit optimizers under FSDP2": _under_fsdp(
        "`{objective}.optim` is {name!r}, whose state does not go with sharded parameters. Take 'adamw_torch', of "
        "which FSDP holds a part on each process."
    ),
    "objective under FSDP2": _under_fsdp(
        "The objective {objective!r} cannot be trained under FSDP. Train it with DDP, or take `ppo` or `dpo`."
    ),
    "precomputed reference under FSDP2": _under_fsdp(
        "`{objective}.precompute_ref_log_probs` is not supported under FSDP: the host cannot take a checksum of a "
        "sharded model. Leave it out."
    ),
    "separate critic under FSDP2": _under_fsdp(
        "`critic: separate` is not supported under FSDP: a model of its own cannot be copied from a sharded policy. "
        "Set `critic: shared`."
    ),
    "Fisher of samples under FSDP2": _under_fsdp(
        "`ewc.estimator: empirical` takes the gradients of samples one by one, and FSDP gives their mean over the "
        "processes. Set `ewc.estimator: gnb`."
    ),
    "FSDP1": Refusal(_SHARDED, kind=NotImplementedError),
    "FSDP with offload": Refusal(_SHARDED, kind=NotImplementedError),
    "DeepSpeed": Refusal(
        "Training by {engine} ({where}) is not supported with this model. Full models and LoRA train with ZeRO-1, "
        "ZeRO-2 and ZeRO-3 without offload (`zero_optimization.stage: 3`), with DDP (`accelerate launch --multi_gpu`) "
        "and, where they do not fit on one device, with FSDP2 (`fsdp_version: 2`); QLoRA in one process and with DDP.",
        kind=NotImplementedError,
    ),
    "half precision under DeepSpeed": Refusal(
        "Half precision by {where} is not supported under DeepSpeed. Take `bf16` with ZeRO-1 or ZeRO-2: `bf16: true` "
        "and `fp16: false` in the sections, `mixed_precision: bf16` for `accelerate launch`, no `torch_autocast`.",
        kind=NotImplementedError,
    ),
    "bfloat16 options under DeepSpeed": Refusal(
        "DeepSpeed's configuration has {owned} beside `bf16`, with which its optimizer does not step float32 weights, "
        "or not in a way that was tested. Leave them out, or take ZeRO-2 for `grad_accum_dtype`.",
        kind=NotImplementedError,
    ),
    "quantised or grouped shares under DeepSpeed": Refusal(
        "`zero_optimization.{name}` is {value!r}, with which processes hold other shares of a weight than an even "
        "split. Leave it out.",
        kind=NotImplementedError,
    ),
    "EWCCallback alone under DeepSpeed": Refusal(
        "`EWCCallback` in `callbacks=[...]` cannot reach the gradients under DeepSpeed. Call `callback.bind(trainer)` "
        "before `trainer.train()`.",
        at=(EWC,),
        kind=NotImplementedError,
    ),
    "PPOTrainer under DeepSpeed": Refusal(
        "PPO is not supported under DeepSpeed. Train it with DDP (`accelerate launch --multi_gpu`) or FSDP2 "
        "(`fsdp_version: 2`).",
        at=(PPO,),
        kind=NotImplementedError,
    ),
    "objective under DeepSpeed": _under_deepspeed(
        "The objective {objective!r} is not supported under DeepSpeed. Train it with DDP, or take `sft`, `dpo` or "
        "`kto`, or an `Objective` of your own with `trains_zero=True`."
    ),
    "optimizer by DeepSpeed": _under_deepspeed(
        "DeepSpeed's configuration has {owned}, which a run sets for each stage anew. Leave it out: `optim`, "
        "`learning_rate` and `lr_scheduler_type` of the sections say the same."
    ),
    "optimizer under DeepSpeed": _under_deepspeed(
        "`{objective}.optim` is {name!r}, whose state was not tested in DeepSpeed's hands. Take 'adamw_torch'."
    ),
    "precomputed reference under DeepSpeed": _under_deepspeed(
        "`{objective}.precompute_ref_log_probs` is not supported under DeepSpeed. Leave it out."
    ),
    "compilation under DeepSpeed": _under_deepspeed(
        "`torch_compile` is not supported under DeepSpeed. Leave it out of `{objective}`."
    ),
    "DeepSpeed for some objectives": _under_deepspeed(
        "`deepspeed` is set for {names} alone. Set it to the same in all sections."
    ),
    "proximal steps under DeepSpeed": Refusal(
        "`method: proximal` is not supported under DeepSpeed, which takes its own weights back after the step. Set "
        "`method: gradient` (in YAML below `ewc:`).",
        at=(HBAT, EWC),
        kind=NotImplementedError,
    ),
    "anchor on the CPU": Refusal(
        "`anchor_device: cpu` is not supported under {engine}, where each process has a part of the anchor alone. "
        "Leave it at `model` (in YAML below `ewc:`), or train with DDP.",
        at=(HBAT, EWC),
        kind=NotImplementedError,
    ),
    "frozen tensors under DeepSpeed": _under_deepspeed(
        "`ewc.freeze` is not supported under DeepSpeed. Set it to 0, or train with DDP."
    ),
    "parallelism": Refusal(
        "Layers cut over devices by {engine} ({where}) are not supported: the penalty would see a part of each "
        f"weight. {_INSTEAD}",
        kind=NotImplementedError,
    ),
    "FSDP2 by the model": Refusal(_CUT, kind=NotImplementedError),
    "FSDP2 by the model in other ways": Refusal(
        "The model was loaded with `distributed_config` of {ways}, which is not supported. Give it `fsdp_size` alone, "
        "the number of processes.",
        kind=NotImplementedError,
    ),
    # Its own groups of FSDP2 hold both, so that after a step they differ (seen in transformers 5.23).
    "tied weights by the model": Refusal(
        "The model was loaded with `distributed_config` and has tied weights ({names}), which transformers shards as "
        "two: trained, they would drift apart. Set `fsdp` in the sections instead (`fsdp_config: {{version: 2}}`), or "
        "train an adapter (`peft_config=LoraConfig(...)`, in YAML `peft: {{}}`).",
        kind=NotImplementedError,
    ),
    "FSDP2 twice": Refusal(
        "`{field}` is set, and `distributed_config` has sharded the model already when it was loaded. Leave `{field}` "
        "out, or load the model without `distributed_config`."
    ),
    "tensor parallelism by the model": Refusal(_CUT, kind=NotImplementedError),
    "several devices": Refusal(
        "`device_map` has spread the model over {devices}, which is not supported. Load it onto one device "
        f"(`device_map={{{{'': 0}}}}`), in 4 or 8 bits if it is too large. {_INSTEAD}",
        kind=NotImplementedError,
    ),
    "offload": Refusal(
        "`device_map` has put a part of the model on {devices}, from where it is fetched layer by layer, which is not "
        "supported. Load it onto one device (`device_map={{'': 0}}`), in 4 or 8 bits if it is too large.",
        kind=NotImplementedError,
    ),
    "several GPUs in one process": Refusal(
        "One process sees {count} GPUs, and the host would copy the model to all of them at every step "
        "(`torch.nn.DataParallel`). Start one process for each with `accelerate launch --multi_gpu`, or show it one "
        "with CUDA_VISIBLE_DEVICES=0."
    ),
    "quantised base": Refusal(
        "The model is quantised to {bits} bits and has no adapter: quantised weights cannot be trained, an adapter on "
        "them can. Pass `peft_config=LoraConfig(...)` (in YAML `peft: {{}}`), or load the model without "
        "`quantization_config` (in YAML `quantization`)."
    ),
    "quantisation method": Refusal(
        "The model is quantised by {method!r}, but adapters are tested on bitsandbytes alone. Load the full model "
        "with `quantization_config=BitsAndBytesConfig(load_in_4bit=True)` (in YAML `quantization`)."
    ),
    "optimizer": Refusal(
        "`optim` is {name!r}, which changes the weights inside the backward pass: neither the penalty, nor the check "
        "for NaN, nor the moments that stages carry see its gradients. Take 'adamw_torch', or 'adamw_bnb_8bit' or "
        "'paged_adamw_8bit' where memory is short."
    ),
    "several adapters": Refusal(
        "The PeftModel has the adapters {adapters}; the trainers only handle a single one named 'default'. Load it "
        "with `PeftModel.from_pretrained(model, path, adapter_name='default', is_trainable=True)`.",
        at=(HBAT, PPO),
    ),
    "adapter inside": Refusal(
        "The model is a {model} with an adapter inside (`model.add_adapter`), which the host's trainers do not see as "
        "one. Pass `get_peft_model(model, config)`, or the bare model and `peft_config=`.",
        at=(HBAT, PPO),
    ),
    "virtual tokens": Refusal(
        "The adapter is a {adapter}, which puts virtual tokens before each text, and cannot be copied as a reference "
        "policy. Objectives with a reference policy take adapters inside the layers, such as LoRA; SFT alone takes "
        "this one.",
        at=(HBAT, PPO),
    ),
    "adapter on the head": Refusal(
        "Applying a PEFT adapter to `lm_head` is not supported",
        at=(HBAT,),
        by_host=True,  # since TRL computes log-probabilities from the head's weight
    ),
}
