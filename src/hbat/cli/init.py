"""Writes a first run file, with a comment where a choice is to be made."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_BATCHES = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
#: By objective the learning rate for all weights and for an adapter, and what else is worth to be seen.
_SECTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("1e-5", "2e-4", {"max_length": 1024}),
    "dpo": ("5e-7", "2e-5", {"beta": 0.1, "max_length": 1024}),
    "kto": ("5e-7", "2e-5", {"beta": 0.1, "max_length": 1024}),
    "ppo": ("3e-6", "1e-5", {"max_completion_length": 128, "kl_coef": 0.05}),
    "grpo": ("1e-6", "1e-5", {"max_completion_length": 256, "num_generations": 8}),
    "rloo": ("1e-6", "1e-5", {"max_completion_length": 256, "num_generations": 2}),
    "distillation": ("1e-5", "2e-4", {"max_completion_length": 256, "teacher_model_name_or_path": "TEACHER"}),
}


def first_run(model: str, data: Mapping[str, Sequence[str]], *, lora: bool = False) -> str:
    """Write a run file to begin with.

    Args:
        model: Name or folder of the model.
        data: Names or files of each objective's training data.
        lora: Whether to train an adapter.

    Returns:
        The run file, as text.

    Raises:
        ValueError: If there is no data.
    """
    names = [name for name in _SECTIONS if data.get(name)]
    if not names:
        raise ValueError(f"There is no data. Give one or more of {', '.join(f'`--{name}`' for name in _SECTIONS)}.")
    folder = f"{model.rstrip('/').rpartition('/')[2]}-hbat"
    lines = [
        "# `hbat validate --config FILE` checks it, `hbat train --config FILE` trains. All keys: `hbat train --help`.",
        *(f"model_name_or_path: {_flow(model)}", f"output_dir: {_flow(folder)}"),
        _noted(f"objectives: {_flow(names)}", "the stages of a round, in this order"),
        _noted("num_rounds: 1", "more: every round trains each objective on a part of its rows"),
        "",
        _noted("datasets:", "a name on the Hub, a file, or a list of files"),
        *(f"  {name}: {_flow(data[name][0] if len(data[name]) == 1 else [*data[name]])}" for name in names),
        _noted("# eval_datasets:", "likewise; scored after every stage"),
        _noted("on_bad_rows: raise", "drop: trains without the rows that it cannot train on, and counts them"),
    ]
    if {"ppo", "grpo", "rloo"} & {*names}:
        lines.append(_noted("reward_funcs: rewards.py:reward", "your function in a file, or a reward model"))
    if lora:
        lines += ["", _noted("peft:", "a LoRA adapter; any field of peft.LoraConfig")]
        lines += ["  r: 16", "  lora_alpha: 32", "  target_modules: all-linear"]
    if len(names) > 1:
        lines += ["", _noted("ewc:", "holds back what an objective does to the others; `ewc: null` without it")]
        lines += ["  strength: 0.5"]
    for name in names:
        library = "hbat" if name == "ppo" else "trl"
        full, adapter, more = _SECTIONS[name]
        fields = {"learning_rate": adapter if lora else full, **_BATCHES, **more}
        lines += [
            "",
            _noted(
                f"{name}:", f"any field of {library}.{name.title() if name == 'distillation' else name.upper()}Config"
            ),
        ]
        lines += [f"  {key}: {value}" for key, value in fields.items()]
    return "\n".join(lines) + "\n"


def _noted(text: str, comment: str) -> str:
    return f"{text:<40}# {comment}"


def _flow(value: Any) -> str:
    """A value in YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()
