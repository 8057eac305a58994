"""Model, tokenizer and adapter of a run: loaded once, checked once."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hbat.config import HBATConfig
from hbat.ewc.parameters import trainable_parameters

_ADAPTER = "default"  # the only adapter name that TRL's trainers handle


class PrecisionWarning(UserWarning):
    """The trained weights are too coarse for what consolidation measures."""


def load_model(model: Any, config: HBATConfig, peft_config: Any) -> Any:
    """Bring the model into the form that all stages train.

    Args:
        model: Name or path, or a model.
        config: The run's configuration.
        peft_config: Configuration of a new adapter.

    Returns:
        The model, with its adapter where there is one.

    Raises:
        ValueError: If arguments contradict each other or the weights cannot be trained.
        TypeError: If the model is none.
    """
    if isinstance(model, str | Path):
        options = dict(config.model_init_kwargs or {})
        if "torch_dtype" not in options:  # the older name
            # float32 weights, as TRL loads them: with `bf16` the host computes in bfloat16 but keeps these.
            options.setdefault("dtype", "float32")
        model = AutoModelForCausalLM.from_pretrained(model, **options)
    elif not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; give a name, a path or a model.")
    elif config.model_init_kwargs:
        raise ValueError("`model_init_kwargs` is set, but the model is loaded already. Leave one of the two out.")
    if peft_config is not None:
        model = _add_adapter(model, peft_config, config.seed)
    _check_adapter(model)
    _check_weights(model)
    return model


def load_tokenizer(processing_class: Any, model: Any) -> Any:
    """Take the given tokenizer, or the model's own.

    Args:
        processing_class: The given one.
        model: The model.

    Returns:
        The tokenizer, with a padding token.

    Raises:
        ValueError: If there is none, or it has no token to pad with.
    """
    if processing_class is None:
        name = model.config._name_or_path  # noqa: SLF001 - the host's own place for it
        if not name:
            raise ValueError("The model does not know where it came from. Pass its tokenizer as `processing_class`.")
        processing_class = AutoTokenizer.from_pretrained(name)
    if getattr(processing_class, "pad_token", "") is None:
        if processing_class.eos_token is None:
            raise ValueError("The tokenizer has neither a padding nor an end token. Set its `pad_token`.")
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def _add_adapter(model: Any, peft_config: Any, seed: int) -> Any:
    try:
        from peft import PeftConfig, get_peft_model  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ImportError("`peft_config` needs PEFT. Install it with `pip install 'hbat-trl[peft]'`.") from error
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` is a {type(peft_config).__name__}; give a PEFT one, such as `LoraConfig(r=16)`."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The model has an adapter already and `peft_config` asks for another. Leave `peft_config` out to train "
            "the one that is there, or merge it first."
        )
    set_seed(seed)
    return get_peft_model(model, peft_config)


def _check_adapter(model: Any) -> None:
    adapters = list(getattr(model, "peft_config", {}))
    if adapters and adapters != [_ADAPTER]:
        raise ValueError(
            f"The PeftModel has the adapters {adapters}; the host's trainers only handle a single one named "
            f"{_ADAPTER!r}. Load it with `PeftModel.from_pretrained(model, path, adapter_name={_ADAPTER!r}, "
            "is_trainable=True)`."
        )
    if not trainable_parameters(model):
        hint = " Load the adapter with `is_trainable=True`." if adapters else " Unfreeze what shall be trained."
        raise ValueError(f"The model has no trainable parameter.{hint}")


def _check_weights(model: Any) -> None:
    coarse = 0
    for name, each in trainable_parameters(model).items():
        if not bool(torch.isfinite(each).all()):
            raise ValueError(f"The weight {name!r} of the model holds NaN or infinity. Load an intact model.")
        coarse += each.dtype in {torch.bfloat16, torch.float16}
    if coarse:
        warnings.warn(
            f"{coarse} trained tensors are in half precision: small updates are rounded away and displacement comes "
            "out too large. Load the model in float32 (`dtype='float32'`) and set `bf16: true` in the sections.",
            PrecisionWarning,
            stacklevel=4,
        )
