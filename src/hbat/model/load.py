"""Model, tokenizer and adapter of a run: loaded once, checked once."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hbat.config.fields import at_home
from hbat.config.hbat import HBATConfig
from hbat.engines.checks import refuse_model
from hbat.engines.choose import make_whole
from hbat.engines.environment import without_deprecations
from hbat.engines.processes import weights_come_later
from hbat.ewc.parameters import trainable_parameters
from hbat.model.adapters import ADAPTER, refuse_adapters, refuse_inexact_copy

_ADAPTER_FILE = "adapter_config.json"
_TOKENIZER_FILE = "tokenizer_config.json"
#: Arguments of the model's `from_pretrained` that its configuration and tokenizer need as well.
_SHARED_INIT_KWARGS = (
    "cache_dir", "code_revision", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code",
)  # fmt: skip
#: Without it, transformers asks at the terminal whether code beside the weights may run.
_NO_REMOTE_CODE = {"trust_remote_code": False}
#: Errors of transformers that are clear by themselves, or not about the weights.
_CLEAR = (OSError, ValueError, ImportError, MemoryError, torch.OutOfMemoryError)
_TWO_ADAPTERS = (
    "The model has an adapter already and `peft_config` asks for another. Omit `peft_config` to train the existing "
    "adapter, or merge it first (`hbat merge`)."
)


class PrecisionWarning(UserWarning):
    """Trained weights are in half precision, which is too coarse for small updates and for displacement."""


def load_model(model: Any, config: HBATConfig, *, gets_adapter: bool = False, takes_reference: bool = False) -> Any:
    """Load the model that all stages train, or check a loaded one, before an adapter is added to it.

    It is a name or path, also of an adapter's folder, or a model, and comes with its adapter if it has one.

    Raises:
        ValueError: If arguments contradict each other, or the weights are damaged.
        NotImplementedError: If the model is sharded, spread over devices or offloaded in an unsupported way.
        TypeError: If `model` is of another type.
        ImportError: If PEFT is needed and missing.
    """
    if isinstance(model, str | Path):
        if gets_adapter and is_adapter(model):
            raise ValueError(_TWO_ADAPTERS)
        model = load_language_model(model, config.model_init_kwargs)
    elif not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; give a name, a path or a model.")
    elif config.model_init_kwargs:
        raise ValueError("`model_init_kwargs` is set, but the model is loaded already. Omit one of the two.")
    make_whole(model)  # it may have been loaded partitioned
    refuse_adapters(model, takes_reference=takes_reference)
    refuse_model(model, gets_adapter=gets_adapter)
    return model


def make_trainable(model: Any, config: HBATConfig, peft_config: Any, *, takes_reference: bool = False) -> Any:
    """Add the adapter, if there is a `peft_config`, to a loaded model, and check what is trained.

    Raises:
        ValueError: If the weights cannot be trained.
        TypeError: If `peft_config` is of another type.
        ImportError: If PEFT is needed and missing.
        NotImplementedError: If the adapter is unsupported.
    """
    if peft_config is not None:
        model = add_adapter(model, peft_config, config.seed, (config.model_init_kwargs or {}).get("revision"))
    refuse_adapters(model, takes_reference=takes_reference)
    require_trainable(model)
    if not weights_come_later():
        _check_weights(model)
    keep_differentiable(model)
    return model


def keep_differentiable(model: Any) -> None:
    """Keep 4-bit layers on a CPU differentiable.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks their weights at the first forward in evaluation mode, for a
    kernel that has no backward pass. Can go when it unpacks them for training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_adapter(name: Any) -> bool:
    """Whether `name` is a folder with a PEFT adapter."""
    return isinstance(name, str | Path) and (Path(name) / _ADAPTER_FILE).is_file()


class _Loads(Protocol):
    model_init_kwargs: dict[str, Any] | None


def shared_init_kwargs(config: _Loads) -> dict[str, Any]:
    """Part of `model_init_kwargs` that the model's configuration and tokenizer need as well."""
    given = {**_NO_REMOTE_CODE, **(config.model_init_kwargs or {})}
    return {key: given[key] for key in _SHARED_INIT_KWARGS if key in given}


def load_pretrained(auto_class: Any, name: str | Path, *, called: str = "model", **options: Any) -> Any:
    """Load weights from a folder or the Hub. Code beside them does not run unless the options ask for it.

    Messages name the user's option as `called`.

    Raises:
        ValueError: If the weights are damaged, or pickled objects that are not tensors.
    """
    with damage_named(name, called):
        return auto_class.from_pretrained(str(at_home(name)), **{**_NO_REMOTE_CODE, **options})


@contextmanager
def damage_named(name: str | Path, called: str) -> Iterator[None]:
    """Turn errors about damaged weights inside the block into a ValueError with their name and the user's option."""
    try:
        yield
    except Exception as error:
        # transformers 4.57 turns any error into an `OSError` about TensorFlow files.
        if isinstance(error, _CLEAR) and "Unable to load weights" not in str(error):
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(
            f"`{called}` {str(name)!r}: its weights cannot be loaded ({type(error).__name__}: {reason})."
        ) from error


def load_tokenizer(processing_class: Any, model: Any, config: _Loads | None = None, origin: Any = None) -> Any:
    """Return the given tokenizer, or load the model's own, with a padding token.

    The `model_init_kwargs` of `config` apply to it too. `origin` is what the user gave as model: a tokenizer in an
    adapter's folder takes precedence over the base's.

    Raises:
        ValueError: If there is none, or it has neither a padding nor an end token.
    """
    if processing_class is None:
        options = dict(_NO_REMOTE_CODE) if config is None else shared_init_kwargs(config)
        name = model.config._name_or_path  # noqa: SLF001 - transformers has no public name
        if is_adapter(origin) and (Path(origin) / _TOKENIZER_FILE).is_file():
            name = str(origin)
        if not name:
            raise ValueError(
                "The model has no name or path to load a tokenizer from. Pass its tokenizer as `processing_class`."
            )
        processing_class = AutoTokenizer.from_pretrained(name, **options)
    if getattr(processing_class, "pad_token", "") is None:
        if processing_class.eos_token is None:
            raise ValueError("The tokenizer has neither a padding nor an end token. Set its `pad_token`.")
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def align_special_tokens(model: Any, tokenizer: Any) -> None:
    """Give the model's configurations the tokenizer's special tokens, as transformers does when it trains.

    A stage gives the model back as it was, so this is done once for the run: what is saved stops where the tokenizer
    says, also if nothing was left to train. End tokens that the generation configuration has are kept beside it.
    """
    generation = getattr(model, "generation_config", None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name, None)
        for config in filter(None, (model.config.get_text_config(), generation)):
            known = getattr(config, name, None)
            ids: list[Any] = known if isinstance(known, list) else [] if known is None else [known]
            if token is None or token in ids:
                continue
            keeps = known is ids or (ids and config is generation and name == "eos_token_id")
            setattr(config, name, [token, *ids] if keeps else token)


def described(model: Any) -> str:
    """Say in a few words which model this is, and which adapter is trained on it."""
    name = str(getattr(model.config, "_name_or_path", "")) or "a model given in memory"
    adapter = getattr(model, "peft_config", {}).get(ADAPTER)
    if adapter is None:
        return name
    rank = getattr(adapter, "r", None)
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    return f"{name} with {'LoRA' if kind == 'LORA' else kind}" + (f" of rank {rank}" if rank else "")


def require_adapter_parameters(model: nn.Module) -> None:
    """Refuse a PeftModel whose reference policy would not be a copy of all that is trained, and of nothing else.

    The reference policy is a copy of the adapter, of all parameters with the component `default` in their name. PEFT
    trains others in place: with `bias="all"` every bias, with `bias="lora_only"` those of the adapted layers
    (`q_proj.base_layer.bias`). Users may also have unfrozen some. A model without adapter has a model as reference.

    Raises:
        ValueError: If policy and reference would share trainable parameters, or the adapter has no exact copy.
    """
    if not hasattr(model, "peft_config"):
        return
    names = trainable_parameters(model)
    shared = [name for name in names if ADAPTER not in name.split(".")]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(names)} trainable parameters are not the adapter's own, first {shared[0]!r}: the "
            "reference policy would change with them. Freeze such a parameter (`bias='none'` for a bias), or list its "
            "module in `modules_to_save`."
        )
    refuse_inexact_copy(model)


def load_language_model(name: str | Path, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Load a causal language model by name or path, also from an adapter's folder; in float32 by default."""
    options = dict(init_kwargs or {})
    if "torch_dtype" not in options:  # the older name
        # As TRL loads them: with `bf16`, the trainer computes in bfloat16 on float32 weights.
        options.setdefault("dtype", "float32")
    if not is_adapter(name):
        return load_pretrained(AutoModelForCausalLM, name, **options)
    try:
        from peft import AutoPeftModelForCausalLM  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ImportError(
            f"`model` {str(name)!r} is an adapter's folder and needs PEFT. Install it with "
            "`pip install 'hbat-trl[peft]'`."
        ) from error
    return load_pretrained(AutoPeftModelForCausalLM, name, is_trainable=True, **options)


def add_adapter(model: Any, peft_config: Any, seed: int, revision: str | None = None) -> Any:
    """Add a new adapter, whose random weights follow from the seed, and which keeps the revision of its base."""
    try:
        from peft import PeftConfig, get_peft_model  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ImportError("`peft_config` needs PEFT. Install it with `pip install 'hbat-trl[peft]'`.") from error
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` is a {type(peft_config).__name__}; give a PEFT one, such as `LoraConfig(r=16)`."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(_TWO_ADAPTERS)
    set_seed(seed)
    with without_deprecations():
        return get_peft_model(model, peft_config, revision=revision)


def require_trainable(model: Any) -> None:
    """Refuse a model of which nothing is trained (ValueError)."""
    if not trainable_parameters(model):
        hint = " Load the adapter with `is_trainable=True`." if hasattr(model, "peft_config") else ""
        raise ValueError(f"The model has no trainable parameter.{hint or ' Unfreeze what is to be trained.'}")


def _check_weights(model: Any) -> None:
    coarse = 0
    for name, parameter in trainable_parameters(model).items():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"The weight {name!r} of the model holds NaN or infinity. Load an intact model.")
        coarse += parameter.dtype in {torch.bfloat16, torch.float16}
    if coarse:
        warnings.warn(
            f"{coarse} trained tensors are in half precision: small updates are rounded away and displacement comes "
            "out too large. Load the model in float32 (`dtype='float32'`) and set `bf16: true` in the sections.",
            PrecisionWarning,
            stacklevel=4,
        )
