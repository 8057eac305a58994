"""From a run file to its trainer: sections, tokenizer, data sets, adapter and quantization."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, TrainingArguments

from hbat.cli.reward_functions import load_reward_functions
from hbat.cli.run_file import RunFile
from hbat.config.fields import build_section, not_an_option
from hbat.data.load import load
from hbat.engines.refusals import REFUSALS
from hbat.model.load import is_adapter, shared_init_kwargs
from hbat.objectives.built_in import resolve
from hbat.state.folder import RunFolder
from hbat.state.manifest import RunStateError
from hbat.trainer import HBATTrainer

_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".gz")


def build_trainer(run: RunFile) -> HBATTrainer:
    """Load what a run needs and build its trainer, which checks the data and rehearses every objective."""
    adapter = peft_config(run)
    if (quantized := quantization_config(run)) is not None:
        run.config.model_init_kwargs = {**(run.config.model_init_kwargs or {}), "quantization_config": quantized}
    check_sections(run)
    rewards = load_reward_functions(run.reward_funcs)  # before anything slow: paths may be wrong
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
    """Build the TRL configuration of every objective."""
    config = run.config
    return {
        objective.name: objective.base_args(config.output_dir, config.shared_fields) for objective in resolve(config)
    }


def peft_config(run: RunFile) -> Any:
    """Build the `peft.LoraConfig` of the run, if any."""
    if run.peft is None:
        return None
    try:
        from peft import LoraConfig  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ImportError("`peft` requires PEFT. Install it with `pip install 'hbat-trl[peft]'`.") from error
    return build_section("peft", LoraConfig, {"task_type": "CAUSAL_LM"} | run.peft)


def quantization_config(run: RunFile) -> BitsAndBytesConfig | None:
    """Build the `BitsAndBytesConfig` of the run, if any."""
    if run.quantization is None:
        return None
    valid = inspect.signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}
    wrong = [
        not_an_option(str(key), valid, shown_as=f"quantization.{key}") for key in run.quantization if key not in valid
    ]
    if wrong:
        raise ValueError(" ".join(wrong))
    try:
        import bitsandbytes  # noqa: F401, PLC0415 - an optional extra
    except ImportError as error:
        raise ImportError(
            "`quantization` requires bitsandbytes. Install it with `pip install 'hbat-trl[quantization]'`."
        ) from error
    try:
        config = BitsAndBytesConfig(**run.quantization)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"`quantization`: {error}") from error
    if run.peft is None and not is_adapter(run.model_name_or_path):  # before the model is loaded
        raise REFUSALS["quantised base"].error(bits=4 if config.load_in_4bit else 8)
    return config


def refuse_other_run(run: RunFile) -> None:
    """Raise RunStateError if the output folder already holds a run, before anything is loaded."""
    if not run.config.overwrite_output_dir and RunFolder(run.config.output_dir).holds_run():
        raise RunStateError(
            f"`output_dir` {run.config.output_dir!r} already holds a run. Continue it with `--resume`, or set another "
            "folder with `--output_dir`."
        )


def _load_tokenizer(run: RunFile) -> Any:
    adapter, shared = is_adapter(run.model_name_or_path), shared_init_kwargs(run.config)
    if not adapter:
        _from_pretrained("model_name_or_path", run.model_name_or_path, AutoConfig, shared)
    if run.tokenizer_name_or_path is not None:
        no_code = {"trust_remote_code": shared["trust_remote_code"]}
        return _from_pretrained("tokenizer_name_or_path", run.tokenizer_name_or_path, AutoTokenizer, no_code)
    if adapter:
        return None  # the trainer finds the adapter's or its base model's
    return _from_pretrained("model_name_or_path", run.model_name_or_path, AutoTokenizer, shared)


def _from_pretrained(key: str, name: str, kind: Any, kwargs: Mapping[str, Any]) -> Any:
    try:
        return kind.from_pretrained(name, **kwargs)
    except Exception as error:
        what = "configuration" if kind is AutoConfig else "tokenizer"
        folder = Path(name).absolute()
        where = f"the folder {folder}" if folder.is_dir() else f"the Hub (there is no folder {folder})"
        raise ValueError(f"`{key}` is {name!r}, but no {what} could be loaded from {where}: {error}") from error


def _load_datasets(section: str, sources: Mapping[str, Any]) -> dict[str, Dataset]:
    return {name: load(_absolute(source), name=f"`{section}.{name}`") for name, source in sources.items()}


def _absolute(source: Any) -> Any:
    # So that the error for a missing file says where it was looked for.
    if isinstance(source, str) and source.lower().endswith(_FILE_ENDINGS):
        return str(Path(source).absolute())
    if isinstance(source, Mapping) and "path" in source:
        return {**source, "path": _absolute(source["path"])}
    return [_absolute(file) for file in source] if isinstance(source, list) else source
