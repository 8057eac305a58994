"""What runs with what: each combination with the test that shows it, or with the error that refuses it.

The checks raise these errors, and `docs/support.md` is written from this table. Plain data, and one way to print it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

#: Where a combination can be refused, always at construction.
HBAT, PPO, EWC = "HBATTrainer", "PPOTrainer", "EWCCallback.bind"


@dataclass(frozen=True)
class Refusal:
    """Why something is refused, and what to use instead.

    Attributes:
        says: The message; names in braces are the values seen.
        at: Where it is refused.
        kind: The error's class.
    """

    says: str
    at: tuple[str, ...] = (HBAT, PPO, EWC)
    kind: type[Exception] = ValueError

    def error(self, **seen: object) -> Exception:
        """Make the error.

        Args:
            **seen: The values seen.

        Returns:
            The error, to be raised.
        """
        return self.kind(self.says.format(**seen))


@dataclass(frozen=True)
class Tested:
    """A combination that works.

    Attributes:
        by: The test that shows it, as pytest names it, below `tests/`.
    """

    by: str


_INSTEAD = (
    "Train in one process or with DDP (`accelerate launch --multi_gpu`), with LoRA or QLoRA where memory is short."
)

REFUSALS: Mapping[str, Refusal] = {
    "sharding": Refusal(
        "Parameters sharded by {engine} ({where}) are not supported: neither the penalty nor the hand-over between "
        f"stages. {_INSTEAD}",
        kind=NotImplementedError,
    ),
    "parallelism": Refusal(
        "Layers cut over devices by {engine} ({where}) are not supported: the penalty sees a part of each weight. "
        f"{_INSTEAD}",
        kind=NotImplementedError,
    ),
    "sharded weight": Refusal(
        "The weight {name!r} is a DTensor: `tp_plan` or `distributed_config` has cut the model over devices, and the "
        f"penalty sees a part of each weight. Load it without them. {_INSTEAD}",
        kind=NotImplementedError,
    ),
    "several devices": Refusal(
        "`device_map` has spread the model over {devices}. Load it onto one device (`device_map={{'': 0}}`), in 4 or 8 "
        f"bits if it is too large. {_INSTEAD}",
        kind=NotImplementedError,
    ),
    "offload": Refusal(
        "`device_map` has put a part of the model on {devices}, from where it is fetched layer by layer: weights that "
        "are trained must stay on the device. Load it onto one device (`device_map={{'': 0}}`), in 4 or 8 bits if it "
        "is too large.",
        kind=NotImplementedError,
    ),
    "several GPUs in one process": Refusal(
        "One process sees {count} GPUs, and the host would copy the model to all of them at every step "
        "(`torch.nn.DataParallel`). Start one process for each with `accelerate launch --multi_gpu`, or show it one "
        "with CUDA_VISIBLE_DEVICES=0."
    ),
    "quantised base": Refusal(
        "The model is quantised to {bits} bits and has no adapter: quantised weights cannot be trained, an adapter on "
        "them can. Pass `peft_config=LoraConfig(...)` (in YAML `peft:`), or load the model without "
        "`quantization_config`."
    ),
    "quantisation method": Refusal(
        "The model is quantised by {method!r}; adapters are tested on bitsandbytes alone. Load the full model with "
        "`quantization_config=BitsAndBytesConfig(load_in_4bit=True)` (in YAML `quantization:`)."
    ),
    "optimizer": Refusal(
        "`optim` is {name!r}, which changes the weights inside the backward pass: neither the penalty, nor the check "
        "for NaN, nor the moments that stages carry see its gradients. Take 'adamw_torch', or 'adamw_bnb_8bit' or "
        "'paged_adamw_8bit' where memory is short."
    ),
    "best checkpoint": Refusal(
        "`{section}.load_best_model_at_end` cannot be set here: the next stage starts from this one's end. Use "
        "`average` to hold a stage back.",
        at=(HBAT,),
    ),
    "several adapters": Refusal(
        "The PeftModel has the adapters {adapters}; the host's trainers only handle a single one named 'default'. Load "
        "it with `PeftModel.from_pretrained(model, path, adapter_name='default', is_trainable=True)`.",
        at=(HBAT, PPO),
    ),
    "adapter inside": Refusal(
        "The model is a {model} with an adapter inside (`model.add_adapter`), which the host's trainers do not see as "
        "one. Pass `get_peft_model(model, config)`, or the bare model and `peft_config=`.",
        at=(HBAT, PPO),
    ),
    "virtual tokens": Refusal(
        "The adapter is a {adapter}, which puts virtual tokens before each text: its copy as reference policy would be "
        "trained with it. Objectives with a reference policy take adapters inside the layers, such as LoRA; SFT alone "
        "takes this one.",
        at=(HBAT, PPO),
    ),
    "adapter on the head": Refusal(  # TRL's own words, from the version on that computes log-probabilities by itself
        "Applying a PEFT adapter to `lm_head` is not supported",
        at=(HBAT,),
    ),
}

COLUMNS = ("full", "LoRA", "QLoRA, 4-bit", "QLoRA, 8-bit")

Cell = Tested | str  # a string is a key of REFUSALS

_DDP = "distributed/test_ddp.py::test_two_processes_end_with_the_weights_of_one"
_QLORA_DDP = "distributed/test_qlora_ddp.py::test_two_processes_train_one_adapter"

#: How a run is launched and its weights are placed, by what is trained.
ENGINES: Mapping[str, tuple[Cell, ...]] = {
    "one process": (
        Tested("test_trainer.py::test_a_run_without_a_penalty_equals_plain_trainers[full]"),
        Tested("test_trainer.py::test_a_run_without_a_penalty_equals_plain_trainers[lora]"),
        Tested("test_qlora.py::test_every_stage_starts_at_its_reference_and_trains_the_adapter_alone[4-bit, dpo]"),
        Tested("test_qlora.py::test_every_stage_starts_at_its_reference_and_trains_the_adapter_alone[8-bit, ppo]"),
    ),
    "DDP": (
        Tested(f"{_DDP}[sft and dpo]"),
        Tested(f"{_DDP}[lora]"),
        Tested(f"{_QLORA_DDP}[4-bit]"),
        Tested(f"{_QLORA_DDP}[8-bit]"),
    ),
    "several GPUs in one process (DataParallel)": ("several GPUs in one process",) * 4,
    "FSDP2": ("sharding",) * 4,
    "FSDP1": ("sharding",) * 4,
    "DeepSpeed ZeRO-1, -2, -3, also with offload": ("sharding",) * 4,
    "tensor, context or sequence parallelism (`parallelism_config`), Megatron-LM": ("parallelism",) * 4,
    "tensor parallelism by the model (`tp_plan`, `distributed_config`)": ("sharded weight",) * 4,
    "`device_map` over several devices": ("several devices",) * 4,
    "`device_map` with offload to CPU or disk": ("offload",) * 4,
}

#: Everything else, one combination a line.
FEATURES: Mapping[str, Cell] = {
    "4-bit or 8-bit base, full fine-tuning": "quantised base",
    "base quantised by GPTQ, AWQ, ... with an adapter": "quantisation method",
    "QLoRA with SFT, DPO, PPO; EWC; resume inside a stage": Tested(
        "test_qlora.py::test_a_run_that_was_cut_off_ends_as_if_it_was_not"
    ),
    "QLoRA with gradient checkpointing": Tested("test_qlora.py::test_recomputed_activations_change_nothing"),
    "8-bit and paged optimizers": Tested("test_qlora.py::test_moments_in_eight_bits_are_carried_on_disk"),
    "merging a QLoRA adapter": Tested("test_qlora.py::test_an_adapter_is_merged_into_dequantised_or_full_weights"),
    "Fisher with `estimator: gnb`, DDP": Tested(f"{_DDP}[fisher]"),
    "Fisher with `estimator: empirical` (per sample), DDP": Tested(f"{_DDP}[fisher of samples]"),
    "LoRA on `lm_head`, with TRL's trainers": "adapter on the head",
    "LoRA on `lm_head`, PPO alone": Tested("test_support.py::test_ppo_takes_an_adapter_on_the_head"),
    "`modules_to_save: [lm_head]`": Tested("test_support.py::test_a_copy_of_the_head_is_trained_beside_the_adapter"),
    "prompt, prefix or p-tuning, SFT alone": Tested("test_support.py::test_sft_alone_takes_virtual_tokens"),
    "prompt, prefix or p-tuning, objectives with a reference policy": "virtual tokens",
    "several adapters": "several adapters",
    "`model.add_adapter` instead of a PeftModel": "adapter inside",
    "`load_best_model_at_end`": "best checkpoint",
    "LOMO, AdaLOMO, layer-wise GaLore and APOLLO": "optimizer",
    "`torch_compile`": Tested("test_support.py::test_a_compiled_model_trains_as_it_does_otherwise"),
}


def tests() -> list[str]:
    """List the tests that the table names.

    Returns:
        Their names below `tests/`, each once, in the table's order.
    """
    return list(dict.fromkeys(each.by for each in _cells() if isinstance(each, Tested)))


def refused() -> list[str]:
    """List the refusals that the table names.

    Returns:
        Keys of `REFUSALS`, each once, in the table's order.
    """
    return list(dict.fromkeys(each for each in _cells() if isinstance(each, str)))


def _cells() -> list[Cell]:
    return [*(each for row in ENGINES.values() for each in row), *FEATURES.values()]
