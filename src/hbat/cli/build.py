"""From a run file to its trainer: sections, tokenizer, data sets, adapter and quantization."""

import inspect
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from huggingface_hub.utils import validate_repo_id
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, TrainingArguments

from hbat.cli.reward_functions import load_object, load_reward_functions
from hbat.cli.run_file import RunFile, as_it_runs, parse_overrides
from hbat.config.fields import build_section, nearest, not_an_option
from hbat.data.load import for_all
from hbat.data.sources import Rows, load_splits
from hbat.engines.processes import is_main_process
from hbat.engines.refusals import REFUSALS
from hbat.model.load import is_adapter, shared_init_kwargs
from hbat.objectives.built_in import resolve
from hbat.objectives.objective import Objective
from hbat.reports.files import RUN_FILE
from hbat.reports.progress import redraws
from hbat.state.files import write_bytes
from hbat.state.folder import RunFolder
from hbat.state.manifest import RunStateError
from hbat.trainer import HBATTrainer

_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".gz")


def build_trainer(run: RunFile) -> HBATTrainer:
    """Load what a run needs and build its trainer, which checks the data and rehearses every objective."""
    set_output()
    adapter = peft_config(run)
    if (quantized := quantization_config(run)) is not None:
        run.config.model_init_kwargs = {**(run.config.model_init_kwargs or {}), "quantization_config": quantized}
    callbacks = load_of_entries(run)
    check_sections(run)
    rewards = load_reward_functions(run.reward_funcs)  # before anything slow: paths may be wrong
    tokenizer = _load_tokenizer(run)
    train, evaluation = _load_datasets(run)
    return HBATTrainer(
        model=run.model_name_or_path,
        args=run.config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=callbacks,
        reward_funcs=rewards,
    )


def set_output() -> None:
    """Show what the library logs at level info, such as the layouts that it recognises, on the main process.

    Other libraries draw bars on a terminal alone.
    """
    if not redraws():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    warnings.showwarning = _show_warning
    # Whoever runs a file cannot change that TRL (1.16) asks transformers (5.24) for them.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
    log = logging.getLogger("hbat")
    if is_main_process() and not log.handlers:
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler())


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Show a warning above the bar, in a line; where it comes from only if it is not of this library."""
    is_own = category.__module__.partition(".")[0] == "hbat"
    tqdm.write(f"{category.__name__}: {message}{'' if is_own else f' ({filename}:{lineno})'}", file=sys.stderr)


def load_of_entries(run: RunFile) -> dict[str, list[Any]]:
    """Import the `reward_funcs` and `callbacks` that entries of `objectives` name, and return the callbacks."""
    callbacks, entries = {}, []
    for entry in run.config.objectives:
        if isinstance(entry, Mapping):
            own, where = dict(entry), f"`callbacks` of {entry['name']!r}"
            made = [load_object(path, where) for path in own.pop("callbacks", None) or ()]
            callbacks[own["name"]] = [callback() if isinstance(callback, type) else callback for callback in made]
            if (rewards := load_reward_functions(own.pop("reward_funcs", None))) is not None:
                own["trainer_kwargs"] = {**(own.get("trainer_kwargs") or {}), "reward_funcs": rewards}
            entries.append(own)
        else:
            entries.append(entry)
    run.config.objectives = entries
    return callbacks


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


class KeepRunFile(TrainerCallback):
    """Writes the run file as it runs into the run's folder, once a stage trains: a run that is refused leaves no file.

    Args:
        path: The run file.
        words: What replaces its values, as on the command line.
    """

    def __init__(self, path: str, words: Sequence[str]) -> None:
        self._path = Path(path).resolve()
        self._text = as_it_runs(path, parse_overrides(words))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write it, unless it lies there itself."""
        file = Path(str(args.output_dir)).parent / RUN_FILE  # beside the stage's folder
        if is_main_process() and file.resolve() != self._path:
            write_bytes(file, self._text.encode())


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
        if folder.is_dir():
            raise ValueError(
                f"`{key}` is {name!r}, but no {what} could be loaded from the folder {folder}: {error}"
            ) from error
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        hint = nearest(folder.name, [path.name for path in beside if path.is_dir()])
        try:
            validate_repo_id(name)
        except ValueError:
            raise ValueError(f"`{key}`: there is no folder {folder}.{hint}") from error
        raise ValueError(
            f"`{key}` is {name!r}, but no {what} could be loaded from the Hub (there is no folder {folder}.{hint}): "
            f"{error}"
        ) from error


def _load_datasets(run: RunFile) -> tuple[dict[str, Rows], dict[str, Rows]]:
    def loaded(objective: Objective) -> list[Rows]:
        name = objective.name
        return load_splits(
            _absolute(run.datasets[name]),
            _absolute((run.eval_datasets or {}).get(name)),
            names=(f"`datasets.{name}`", f"`eval_datasets.{name}`"),
            check=objective.row_check(),
        )

    objectives = resolve(run.config)
    rows = {each.name: given for each, given in zip(objectives, for_all(objectives, loaded), strict=True)}
    return (
        {name: given[0] for name, given in rows.items()},
        {name: given[1] for name, given in rows.items() if len(given) > 1},
    )


def _absolute(source: Any) -> Any:
    # So that the error for a missing file says where it was looked for.
    if isinstance(source, str) and source.lower().endswith(_FILE_ENDINGS):
        return str(Path(source).absolute())
    if isinstance(source, Mapping):
        return {key: _absolute(value) if key in ("path", "mixture") else value for key, value in source.items()}
    return [_absolute(file) for file in source] if isinstance(source, list) else source
