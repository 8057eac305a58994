"""Reads what a file of TRL's commands, LLaMA-Factory or axolotl trains: keys of TRL, and data as a run names it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hbat.cli.yaml import read_yaml
from hbat.config.fields import shown
from hbat.config.foreign import RENAMED, places
from hbat.config.section_fields import OBJECTIVES, section_fields

#: What a file may train.
KINDS = (*OBJECTIVES, "reward")
_LLAMA_FACTORY = {"stage", "finetuning_type", "template", "cutoff_len"}
#: What a value of another tool means: a key and value of TRL, nothing (it is so anyway), or why it has no meaning.
_MEANINGS: dict[tuple[str, Any], tuple[str, Any] | str | None] = {
    ("finetuning_type", "lora"): ("use_peft", True),
    ("finetuning_type", "full"): ("use_peft", False),
    ("lora_target", "all"): ("lora_target_modules", "all-linear"),
    ("quantization_bit", 4): ("load_in_4bit", True),
    ("quantization_bit", 8): ("load_in_8bit", True),
    ("flash_attn", "fa2"): ("attn_implementation", "flash_attention_2"),
    ("flash_attn", "disabled"): ("attn_implementation", "eager"),
    ("flash_attn", "auto"): None,
    ("disable_gradient_checkpointing", True): ("gradient_checkpointing", False),
    **{("pref_loss", loss): "TRL's DPOTrainer has no such loss." for loss in ("kto_pair", "orpo", "simpo")},
    **{(key, kind): None for key in ("rl", "stage") for kind in (*KINDS, "rm")},
    ("rl", "ipo"): ("loss_type", "ipo"),
    ("adapter", "lora"): ("use_peft", True),
    ("adapter", "qlora"): ("use_peft", True),
    ("lora_target_linear", True): ("lora_target_modules", "all-linear"),
    ("flash_attention", True): ("attn_implementation", "flash_attention_2"),
    ("sdp_attention", True): ("attn_implementation", "sdpa"),
    ("chat_template", "tokenizer_default"): None,
    ("bf16", "auto"): None,
    ("saves_per_epoch", 1): ("save_strategy", "epoch"),
    ("group_by_length", True): ("train_sampling_strategy", "group_by_length"),
}
#: Defaults that differ from those of TRL's trainers, PEFT and bitsandbytes, or between files, for where they apply.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "TRL": {
        "dtype": "float32", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bnb_4bit_quant_type": "nf4",
    },
    "LLaMA-Factory": {
        "lora_rank": 8, "lora_target_modules": "all-linear", "bnb_4bit_quant_type": "nf4", "double_quantization": True,
        "cutoff_len": 2048, "learning_rate": 5e-5, "bf16": False,
    },
    "axolotl": {
        "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True, "micro_batch_size": 1, "num_epochs": 1,
        "lr_scheduler": "cosine",
    },
}  # fmt: skip
#: The key that says whether prompts are learned too.
_PROMPTS = {"LLaMA-Factory": "train_on_prompt", "axolotl": "train_on_inputs"}
#: What LLaMA-Factory's `dataset_info.json` calls columns of its layouts.
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
#: Tags there for keys of messages, with those that are known, and for roles, with TRL's.
_KEY_TAGS = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}
_ROLE_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
    "system_tag": "system",
}  # fmt: skip
_LAYOUTS = ("alpaca", "chat_template", "completion", "sharegpt")


@dataclass
class Training:
    """A training as another tool describes it.

    Attributes:
        file: Its file, as the user named it.
        tool: The tool.
        kind: The objective, or `reward`.
        values: Keys that are still to be placed.
        model: The model that it loads.
        starts: What it continues from: an adapter on it, or the model itself.
        output: Where it leaves its model.
        adapter: Whether it trains an adapter.
        data: Training data, as a run names it; None if there is none.
        eval_data: Evaluation data, likewise.
        notes: Keys that are not carried over, with their values and why.
    """

    file: str
    tool: str
    kind: str
    values: dict[str, Any]
    model: Any = None
    starts: Any = None
    output: str = ""
    adapter: bool = False
    data: Any = None
    eval_data: Any = None
    notes: list[tuple[str, Any, str]] = field(default_factory=list)

    def take(self, *keys: str) -> Any:
        """Remove keys, and return the value of the first one that is there."""
        values = [self.values.pop(key) for key in keys if key in self.values]
        return values[0] if values else None

    def note(self, key: str, value: Any, reason: str) -> None:
        """Say why a key is not carried over, unless it is off."""
        if value not in (None, False):
            self.notes.append((key, value, reason))


def read(given: str) -> Training:
    """Read a file as `path`, or as `objective=path` where it cannot be told what it trains.

    Raises:
        ValueError: If it is no YAML, or trains nothing that a run can.
    """
    kind, _, path = given.partition("=")
    kind, path = (kind, path) if path and kind in KINDS else ("", given)
    values = {str(key): value for key, value in read_yaml(path).items() if value is not None}
    tool = "axolotl" if "base_model" in values else "LLaMA-Factory" if _LLAMA_FACTORY & values.keys() else "TRL"
    if tool == "axolotl" and isinstance(nested := values.get("trl"), dict):
        values = {key: value for key, value in values.items() if key != "trl"} | nested
    kind = kind or (_trl_kind if tool == "TRL" else _other_kind)(path, values)
    training = Training(path, tool, kind, values)
    _reword(training)
    _reword_losses(training)
    training.model = training.take("base_model", "model_name_or_path")
    training.starts = training.take("adapter_name_or_path", "lora_model_dir") or training.model
    training.output = str(training.take("output_dir") or kind).rstrip("/")
    {"axolotl": _axolotl_data, "LLaMA-Factory": _llama_factory_data, "TRL": _trl_data}[tool](training)
    _settle(training)
    return training


def _trl_kind(path: str, values: Mapping[str, Any]) -> str:
    """Tell by the name of a file or its folder, and by keys that not every command has."""
    known = values.keys() & frozenset().union(*map(section_fields, KINDS))
    suited = [kind for kind in KINDS if known <= section_fields(kind)]
    words = [re.split(r"[^a-z]+", text.lower()) for text in (Path(path).stem, Path(path).parent.name)]
    named = [kind for kind in KINDS if kind in words[0]] or [kind for kind in KINDS if kind in words[1]]
    found = [kind for kind in named or suited if kind in suited or not suited]
    if len(found) != 1:
        raise ValueError(
            f"It cannot be told what {path} trains: its keys suit {', '.join(suited) or 'no command'}, its name "
            f"{', '.join(named) or 'none'}. Give the objective with it, as in `dpo={path}`."
        )
    return found[0]


def _other_kind(path: str, values: Mapping[str, Any]) -> str:
    kind = "rm" if values.get("reward_model") is True else str(values.get("stage", values.get("rl", "sft")))
    kind = {"rm": "reward", "ipo": "dpo"}.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(f"{path} trains {kind!r}, which is no objective of a run ({', '.join(OBJECTIVES)}).")
    return kind


def _reword(training: Training) -> None:
    """Say in keys and values of TRL what the file says otherwise."""
    values = training.values
    for key, value in [*values.items()]:
        if isinstance(value, str | int) and (key, value) in _MEANINGS:
            meaning = _MEANINGS[key, training.take(key)]
            if isinstance(meaning, str):
                training.note(key, value, meaning)
            elif meaning:
                values.update([meaning])
        elif key in {"lora_target", "additional_target"}:
            values[RENAMED[key]] = _words(training.take(key))
    if training.tool == "LLaMA-Factory":
        values.setdefault("use_peft", "finetuning_type" not in values)
    if training.tool == "axolotl":
        training.note("chat_template", training.take("chat_template"), "it names a template of axolotl's.")
        values |= {"report_to": "wandb"} if "wandb_project" in values else {}


def _reword_losses(training: Training) -> None:
    values = training.values
    if training.kind == "dpo" and (alpha := training.take("rpo_alpha", "pref_ftx")):
        loss = training.take("loss_type", "pref_loss") or "sigmoid"
        values |= {"loss_type": [*(loss if isinstance(loss, list) else [loss]), "sft"], "loss_weights": [1.0, alpha]}
    if training.kind == "sft" and training.tool in _PROMPTS:
        if training.take(key := _PROMPTS[training.tool]):
            values["completion_only_loss"] = False
        else:
            why = "`messages` are learned with their prompts here, unless `sft.assistant_only_loss` is true."
            training.notes.append((key, False, why))


def _settle(training: Training) -> None:
    """Leave out what only an adapter or a base in 4 or 8 bits needs, and write what the tool does by default."""
    training.adapter, values = bool(training.take("use_peft")), training.values
    bits = [bits for bits in ("4bit", "8bit") if training.adapter and values.get(f"load_in_{bits}")]
    used = [f"{training.kind}.", "model_init_kwargs.", *(["peft."] if training.adapter else [])]
    used += [f"quantization.{part}_{name}" for name in bits for part in ("load_in", "bnb")]
    places_of = {key: "".join(places(key, [training.kind])[0][:1]) for key in {**_DEFAULTS[training.tool], **values}}
    for key, place in places_of.items():
        if key in values and place.startswith(("peft.", "quantization.")) and not place.startswith(tuple(used)):
            training.note(key, training.take(key), "it is for an adapter (`use_peft`), or a base in 4 or 8 bits.")
    if training.tool != "TRL" and training.adapter and values.get("bf16", training.tool == "axolotl"):
        values.setdefault("dtype", "bfloat16")  # of the frozen base; only the adapter is in float32 there
    nested = values.get("model_init_kwargs")
    given = [places_of.get(key) for key in values]
    given += [f"model_init_kwargs.{key}" for key in nested] if isinstance(nested, dict) else []
    for key, value in _DEFAULTS[training.tool].items():
        if places_of[key].startswith(tuple(used)) and places_of[key] not in given:
            values[key] = value
    rank = values.get("lora_rank")
    if training.tool == "LLaMA-Factory" and isinstance(rank, int):
        values.setdefault("lora_alpha", 2 * rank)
    if bits == ["4bit"]:
        values.setdefault("bnb_4bit_compute_dtype", values.get("dtype", values.get("torch_dtype", "float32")))


# --- data ------------------------------------------------------------------------------------------------------------


def _trl_data(training: Training) -> None:
    source = {"path": training.take("dataset_name"), "name": training.take("dataset_config")}
    split, test = training.take("dataset_train_split"), training.take("dataset_test_split") or "test"
    parts = _mappings(training, "datasets")
    training.data = _data(training, parts or [{**source, "split": split}], training.take("test_split_size"))
    if not parts and training.values.get("eval_strategy") not in (None, False, "no"):
        training.eval_data = _data(training, [{**source, "split": test}])


def _llama_factory_data(training: Training) -> None:
    folder = Path(str(training.take("dataset_dir") or "data"))
    index = folder / "dataset_info.json"
    listed = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    rows = training.take("max_samples")

    def parts(key: str) -> list[dict[str, Any]]:
        names = _words(training.take(key))
        for name in names:
            if name not in listed and folder.name != "ONLINE":
                training.note(key, name, f"its file is a guess: {index} does not list it.")
        found = [_listed(training, folder, name, listed.get(name, {})) for name in names]
        return [{**part, "rows": rows or part["rows"]} for part in found]

    training.data = _data(training, parts("dataset"), training.take("val_size"))
    training.eval_data = _data(training, parts("eval_dataset"))


def _listed(training: Training, folder: Path, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A data set as `dataset_info.json` describes it."""
    file = name if folder.name == "ONLINE" else str(folder / entry.get("file_name", f"{name}.json"))
    columns = {_COLUMNS.get(column, column): own for column, own in entry.get("columns", {}).items()}
    tags = entry.get("tags", {})
    keys = {tag: own for tag, own in tags.items() if tag in _KEY_TAGS and own not in _KEY_TAGS[tag]}
    for tag, own in keys.items():
        training.note(f"{name}.tags.{tag}", own, "keys of messages cannot be renamed. Rename them in the file.")
    return {
        "path": entry.get("hf_hub_url", file),
        "name": entry.get("subset"),
        "data_dir": entry.get("folder"),
        "split": entry.get("split"),
        "rows": entry.get("num_samples"),
        "columns": {column: own for column, own in columns.items() if own not in {column, "messages"}},
        "roles": {tags[tag]: role for tag, role in _ROLE_TAGS.items() if tag in tags and tags[tag] != role},
    }


def _axolotl_data(training: Training) -> None:
    train, test = (
        [_axolotl_part(training, part) for part in _mappings(training, key)] for key in ("datasets", "test_datasets")
    )
    training.data, training.eval_data = _data(training, train, training.take("val_set_size")), _data(training, test)


def _axolotl_part(training: Training, part: Mapping[str, Any]) -> dict[str, Any]:
    own = {**part, **(part["type"] if isinstance(part.get("type"), dict) else {})}
    source = {key: own.pop(key, None) for key in ("path", "name", "split", "data_files", "revision")}
    columns = {key.removeprefix("field_"): own.pop(key) for key in part if key.startswith("field_")}
    for key, value in own.items():
        if key != "ds_type" and not str(value).startswith(_LAYOUTS):
            why = "the layout is found by the columns and roles of the rows. `columns` and `roles` map others."
            training.note(f"datasets.{key}", value, why)
    return source | {"columns": {column: name for column, name in columns.items() if column != name}}


def _words(value: Any) -> list[str]:
    given = value if isinstance(value, list) else str(value or "").split(",")
    return [str(word).strip() for word in given if str(word).strip()]


def _mappings(training: Training, key: str) -> list[dict[str, Any]]:
    value = training.take(key) or []
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError(f"`{key}` of {training.file} is {shown(value)}; it must be a list of mappings with `path`.")
    return value


def _data(training: Training, parts: Sequence[Mapping[str, Any]], held_out: Any = None) -> Any:
    """Data as a run names it: a name or file, a mapping, or a mixture. None if there is none."""
    if isinstance(held_out, int | float) and held_out >= 1:
        training.notes.append(("test_split_size", held_out, "`eval_split` is a share of the rows, below 1."))
        held_out = None
    sources = [{**part, "weight": part.get("fraction"), "fraction": None} for part in parts]
    sources = [
        {key: value for key, value in part.items() if value and (key, value) != ("split", "train")} for part in sources
    ]
    if len(sources) == 1:
        sources[0].pop("weight", None)
        sources[0] |= {"eval_split": held_out} if held_out else {}
    mixture = [part["path"] if part.keys() == {"path"} else part for part in sources if part]
    if len(mixture) > 1:
        return {"mixture": mixture, "eval_split": held_out} if held_out else mixture
    return next(iter(mixture), None)
