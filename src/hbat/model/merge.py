"""An adapter merged into its base model, as a folder that any library loads without PEFT."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hbat.config.hbat import HBATConfig
from hbat.model.load import (
    align_special_tokens,
    damage_named,
    is_adapter,
    load_pretrained,
    load_tokenizer,
    shared_init_kwargs,
)


class Merged(NamedTuple):
    """Base, dtype and size of a merged model, and distances of logits from the adapter's, relative to their size."""

    base: str
    dtype: str
    parameters: int
    difference: float  # of the merged model
    effect: float  # of the base: what the adapter does


def merge(adapter: Path, folder: Path, dtype: str | None = None, config: HBATConfig | None = None) -> Merged:
    """Merge an adapter into its base in full precision, and save model and tokenizer if the logits stay the same.

    It is done on the CPU, in the memory that the model takes once.

    Args:
        adapter: Folder of the adapter.
        folder: A new or empty folder, which stays empty after an error.
        dtype: Dtype of the weights, such as `float32`; by default that of the base.
        config: The run's configuration, whose `model_init_kwargs` say where the base comes from.

    Returns:
        What was merged.

    Raises:
        ValueError: If there is no adapter, its base cannot be loaded, PEFT cannot merge it, or the merged model
            computes something else.
    """
    if not is_adapter(adapter):
        raise ValueError(
            f"{adapter} holds a full model and no adapter: there is nothing to merge. Use the model as it is."
            if (adapter / "config.json").is_file()
            else f"{adapter} holds no adapter. Give the folder of one, or of a finished run that trained one."
        )
    options = {} if config is None else shared_init_kwargs(config)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".merging-") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about what is untied here and compared below
        model, tokenizer = _load(adapter, config, {**options, "dtype": dtype or "auto"})
        base, kind, prompts = model.config.name_or_path, model.dtype, _prompts(tokenizer)
        expected = _logits(model, prompts)
        if not all(bool(found.isfinite().all()) for found in expected):
            # PEFT (0.18 to 0.21) saves no new embeddings where it cannot ask the Hub for the size of the base's
            # vocabulary, and only one of the two with an adapter on the other.
            raise ValueError(
                f"The adapter in {adapter} computes NaN: its weights are damaged, or it was saved without embeddings "
                "of tokens that its tokenizer adds to the base's. Train these in `modules_to_save`."
            )
        with model.disable_adapter():
            effect = _distance(_logits(model, prompts), expected)
        model = _merged(model, adapter)
        align_special_tokens(model, tokenizer)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        parameters = model.num_parameters()
        del model  # before it is loaded again
        code = {key: value for key, value in options.items() if key == "trust_remote_code"}
        model = load_pretrained(AutoModelForCausalLM, new, dtype=kind, **code)
        # Merging rounds weights once more, which moved logits of models of 2 to 48 layers by 1 to 5 units of the
        # dtype's precision (`eps`) in 16 bits, by 18 in one that amplifies whatever changes, and by 100 in float32.
        # Those of a merge that went wrong are as far away as what was lost had moved them.
        limit = 2 * torch.finfo(kind).eps ** 0.5
        if not (difference := _distance(_logits(model, prompts), expected)) <= limit:  # nor NaN
            raise ValueError(
                f"Merged, the adapter in {adapter} is another model: logits differ by {difference:.2%} of their size, "
                f"and rounding to {kind} explains {limit:.2%}. Nothing was saved."
                f"{'' if kind == torch.float32 else ' Merge with `--dtype float32`.'}"
            )
        for file in list(Path(new).iterdir()):
            file.rename(folder / file.name)
    return Merged(base, str(kind).removeprefix("torch."), parameters, difference, effect)


def _load(adapter: Path, config: HBATConfig | None, options: dict[str, Any]) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel  # noqa: PLC0415 - an optional extra

    described: Any = PeftConfig.from_pretrained(str(adapter))
    name, options = described.base_model_name_or_path, {"revision": described.revision, **options}
    try:
        base = load_pretrained(AutoModelForCausalLM, str(name), called="base model", **options)
    except OSError as error:
        key = f"`base_model_name_or_path` in {adapter / 'adapter_config.json'}"
        raise ValueError(f"{key} is {name!r}, which cannot be loaded: {error}") from error
    if getattr(base, "is_quantized", False):  # on disk already
        base = base.dequantize().to(base.config.dtype)  # transformers 5 leaves some weights in float32
    tokenizer = load_tokenizer(None, base, config, origin=adapter)
    known = base.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            layer.weight.data[known:] = torch.nan  # the adapter has them, or nobody
    with damage_named(adapter, "adapter"):
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
    if not hasattr(model, "merge_and_unload"):  # as prompt tuning
        kind = described.peft_type.value
        raise ValueError(f"The adapter in {adapter} cannot be merged: PEFT keeps {kind} beside the base's weights.")
    return model, tokenizer


def _prompts(tokenizer: Any) -> list[list[int]]:
    added = sorted(tokenizer.get_added_vocab().values())  # those of chat templates, and new ones
    spread = list(range(0, len(tokenizer), len(tokenizer) // 64 + 1))
    texts = tokenizer(["The capital of France is Paris, that of", "def add(a, b):\n    return"]).input_ids
    return [ids for ids in (*texts, spread, added[:64] + added[-64:]) if ids]


@torch.no_grad()
def _logits(model: Any, prompts: Sequence[list[int]]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits.float() for ids in prompts]


def _distance(logits: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(logits, expected, strict=True)
    return float(torch.stack([(found - right).norm() / right.norm() for found, right in pairs]).max())


def _merged(model: Any, adapter: Path) -> Any:
    _untie(model)
    configs = (model.config, model.config.get_text_config())
    tied = [config.tie_word_embeddings for config in configs]
    for config in configs:
        config.tie_word_embeddings = False
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ValueError(f"The adapter in {adapter} cannot be merged: {error}") from error
    if any(tied) and torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight):
        for config, value in zip(configs, tied, strict=True):
            config.tie_word_embeddings = value
        merged.tie_weights()
    return merged


def _untie(model: nn.Module) -> None:
    # Merged into one of two tied weights, an adapter would change the other too, or be lost when it is loaded.
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))
