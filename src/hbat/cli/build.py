"""From a run file to a trainer: the host's sections, model and tokenizer, data sets, adapter and quantisation."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, TrainingArguments

from hbat.cli.reward_functions import load_reward_functions
from hbat.cli.run_file import RunFile
from hbat.config.fields import build_section, nearest
from hbat.data.load import load
from hbat.engines.refusals import REFUSALS
from hbat.model.load import is_adapter, shared_init_kwargs
from hbat.objectives.built_in import resolve
from hbat.state.folder import RunFolder
from hbat.state.manifest import RunStateError
from hbat.trainer import HBATTrainer

_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".gz")


def build_trainer(run: RunFile) -> HBATTrainer:
    """Load what a run needs and build its trainer, which checks the data and tries every objective.

    Args:
        run: The run.

    Returns:
        The trainer.

    Raises:
        ValueError: If a key, the model or the data cannot be used.
        TypeError: If a value has the wrong type.
        ImportError: If an optional package is missing.
    """
    adapter = peft_config(run)
    if (quantized := quantization_config(run)) is not None:
        run.config.model_init_kwargs = {**(run.config.model_init_kwargs or {}), "quantization_config": quantized}
    check_sections(run)
    rewards = load_reward_functions(run.reward_funcs)
    tokenizer = _load_tokenizer(run)
    return HBATTrainer(
        model=run.model_name_or_path,
        args=run.config,
        train_dataset=_load_datasets("datasets", run.datasets),
        eval_dataset=_load_datasets("eval_datasets", run.eval_datasets or {}),
        processing_class=tokenizer,
        peft_config=adapter,
        reward_funcs=rewards,
    )


def check_sections(run: RunFile) -> dict[str, TrainingArguments]:
    """Build the host's configuration of every objective.

    Args:
        run: The run.

    Returns:
        Configurations by objective.

    Raises:
        ValueError: If a key is unknown or a value refused.
        TypeError: If a value has the wrong type.
    """
    return {each.name: each.base_args(run.config.output_dir) for each in resolve(run.config)}


def peft_config(run: RunFile) -> Any:
    """Build the configuration of the adapter.

    Args:
        run: The run.

    Returns:
        A `peft.LoraConfig`, or None.

    Raises:
        ValueError: If a key is unknown or a value refused.
        TypeError: If a value has the wrong type.
        ImportError: If PEFT is missing.
    """
    if run.peft is None:
        return None
    try:
        from peft import LoraConfig  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ImportError("`peft` needs PEFT. Install it with `pip install 'hbat-trl[peft]'`.") from error
    return build_section("peft", LoraConfig, {"task_type": "CAUSAL_LM"} | run.peft)


def quantization_config(run: RunFile) -> BitsAndBytesConfig | None:
    """Build the configuration of the quantised weights.

    Args:
        run: The run.

    Returns:
        The configuration, or None.

    Raises:
        ValueError: If a key is unknown or a value refused.
        ImportError: If bitsandbytes is missing.
    """
    if run.quantization is None:
        return None
    valid = [
        name for name in inspect.signature(BitsAndBytesConfig.__init__).parameters if name not in {"self", "kwargs"}
    ]
    for key in run.quantization:
        if key not in valid:
            raise ValueError(f"`quantization.{key}` is not an option.{nearest(str(key), valid)}")
    try:
        import bitsandbytes  # noqa: F401, PLC0415 - an optional extra
    except ImportError as error:
        raise ImportError(
            "`quantization` needs bitsandbytes. Install it with `pip install 'hbat-trl[quantization]'`."
        ) from error
    try:
        config = BitsAndBytesConfig(**run.quantization)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"`quantization`: {error}") from error
    if run.peft is None and not is_adapter(run.model_name_or_path):  # said before the model is loaded
        raise REFUSALS["quantised base"].error(bits=4 if config.load_in_4bit else 8)
    return config


def refuse_other_run(run: RunFile) -> None:
    """Refuse to train into a folder that holds a run, before anything is loaded.

    Args:
        run: The run.

    Raises:
        RunStateError: If it does.
    """
    if RunFolder(run.config.output_dir).holds_run():
        raise RunStateError(
            f"`output_dir` {run.config.output_dir!r} holds a run already. Go on with it by `--resume`, or choose "
            "another folder by `--output_dir`."
        )


def _load_tokenizer(run: RunFile) -> Any:
    adapter, shared = is_adapter(run.model_name_or_path), shared_init_kwargs(run.config)
    if not adapter:
        _from_pretrained("model_name_or_path", run.model_name_or_path, AutoConfig, shared)
    if run.tokenizer_name_or_path is not None:
        no_code = {"trust_remote_code": shared["trust_remote_code"]}
        return _from_pretrained("tokenizer_name_or_path", run.tokenizer_name_or_path, AutoTokenizer, no_code)
    if adapter:
        return None  # its own or its base's, which the trainer finds
    return _from_pretrained("model_name_or_path", run.model_name_or_path, AutoTokenizer, shared)


def _from_pretrained(key: str, name: str, kind: Any, kwargs: Mapping[str, Any]) -> Any:
    try:
        return kind.from_pretrained(name, **kwargs)
    except Exception as error:
        what = "configuration" if kind is AutoConfig else "tokenizer"
        folder = Path(name).expanduser().absolute()
        where = f"the folder {folder}" if folder.is_dir() else f"the Hub (there is no folder {folder})"
        raise ValueError(f"`{key}` is {name!r}, but no {what} can be loaded from {where}: {error}") from error


def _load_datasets(section: str, sources: Mapping[str, Any]) -> dict[str, Dataset]:
    return {name: load(_absolute(source), name=f"`{section}.{name}`") for name, source in sources.items()}


def _absolute(source: Any) -> Any:
    # So that the message about a missing file says where it was looked for.
    if isinstance(source, str) and source.lower().endswith(_FILE_ENDINGS):
        return str(Path(source).expanduser().absolute())
    if isinstance(source, Mapping) and "path" in source:
        return {**source, "path": _absolute(source["path"])}
    return [_absolute(each) for each in source] if isinstance(source, list) else source
