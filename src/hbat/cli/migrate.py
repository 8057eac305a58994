"""Makes one run file of those of TRL's commands, LLaMA-Factory or axolotl; what it cannot carry stands in comments."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hbat.cli.peers import Training, read
from hbat.cli.run_file import from_values
from hbat.cli.yaml import load_yaml
from hbat.config.fields import shown
from hbat.config.foreign import places
from hbat.config.section_fields import OBJECTIVES

_ONLINE = {"ppo", "grpo", "rloo"}
#: Reward functions that `trl grpo` and `trl rloo` know by name.
_TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
_VALUE_HEAD = "its reward models have a value head. `reward_funcs` takes sequence classifiers, as of `trl reward`."
_FIRST = ("model_name_or_path", "tokenizer_name_or_path", "output_dir", "objectives", "report_to", "run_name")
_PLAIN = """
# HBAT's penalty holds back what a later objective does to an earlier one. For the same trainings in turn, without it:
# num_rounds: 1
# ewc: null
"""


def migrate(given: Sequence[str]) -> str:
    """Make one run file, as text, of other tools' (`path` or `objective=path`) in the order in which they train.

    Raises:
        ValueError: If a file cannot be read, or they do not make one run.
    """
    trainings = [read(text) for text in given]
    trained = [training for training in trainings if training.kind != "reward"]
    _require_one_run(trained, given)
    _require_chain(trained)
    run: dict[str, Any] = {
        "model_name_or_path": trained[0].model,
        "output_dir": f"{trained[-1].output}-hbat",  # not where the other tool leaves its model
        "objectives": [training.kind for training in trained],
        "datasets": {training.kind: training.data for training in trained},
        "eval_datasets": {training.kind: training.eval_data for training in trained if training.eval_data},
    }
    for training in trained:
        _place(run, training, is_last=training is trained[-1])
    for training in trainings:
        if training.kind == "reward":
            _add_reward(run, training)
    if _ONLINE & {*run["objectives"]} and not run.get("reward_funcs"):
        trained[-1].notes.append(("reward_funcs", "...", "set it: functions or models that score completions."))
    text = _text(run, trainings)
    from_values(load_yaml(text), "the run file")
    return text


def _require_one_run(trained: Sequence[Training], given: Sequence[str]) -> None:
    kinds = [training.kind for training in trained]
    if not trained or len({*kinds}) < len(kinds):
        raise ValueError(
            f"{' and '.join(given)} train {' and '.join(kinds) or 'only reward models'}; a run has one or more "
            "objectives, each once. Put all data of an objective into one mixture."
        )
    for training in trained:
        for what, value in {"model": training.model, "training data": training.data}.items():
            if value is None:
                raise ValueError(f"{training.file} names no {what}. Add to it what the command line gave.")
        if training.adapter != trained[0].adapter:
            full, adapted = sorted((trained[0], training), key=lambda one: one.adapter)
            raise ValueError(
                f"{full.file} trains all weights and {adapted.file} an adapter (`use_peft`); the objectives of a run "
                "train the same weights. Let both files do the same."
            )


def _require_chain(trained: Sequence[Training]) -> None:
    """Let every training but the first continue where one before it ended, or say that it will."""
    first, ends = trained[0], set[Path]()
    if first.starts != first.model:
        first.note("adapter_name_or_path", first.starts, "to train it further, make it the model and remove `peft`.")
    for before, training in zip((first, *trained), trained, strict=False):
        start = Path(str(training.starts))
        if training is not first and not {start, start.parent} & ends:  # in it: a checkpoint, or merged weights
            if training.model != first.model:
                raise ValueError(
                    f"{training.file} begins with {str(training.starts)!r}, which is neither {str(first.model)!r}, as "
                    f"{first.file} does, nor what {before.file} leaves, {before.output!r}. A run trains one model: "
                    "give the files in the order in which they train, or correct `model_name_or_path`."
                )
            why = f"here it continues from where {before.file} ended."
            training.notes.append(("model_name_or_path", training.starts, why))
        ends |= {Path(training.output), Path(str(training.values.get("hub_model_id", training.output)))}


def _place(run: dict[str, Any], training: Training, *, is_last: bool) -> None:
    """Put the keys of a training where they belong in the run."""
    uploads = is_last and training.values.get("push_to_hub")
    for key, value in training.values.items():
        if key in {"push_to_hub", "hub_model_id", "hub_private_repo"} and not uploads:
            training.note(key, value, "the run is uploaded once, as the last file's `push_to_hub` says.")
            continue
        found, remark = places(key, [training.kind])
        if reason := _why_not(training, key, found, remark):
            training.note(key, value, reason)
        elif found[0] == "reward_funcs":
            run.setdefault("reward_funcs", []).extend(_rewards(training, key, value))
        elif isinstance(value, dict) and found[0] in {"model_init_kwargs", "env"}:
            for name, inner in value.items():
                _put(run, f"{found[0]}.{name}", inner, training)
        else:
            _put(run, found[0], value, training)


def _why_not(training: Training, key: str, found: Sequence[str], remark: str) -> str:
    """Why a key is not carried over; empty if it is."""
    section = "".join(found[:1]).partition(".")[0]
    if key == "overwrite_output_dir":
        return "the run has a new folder, and there this would remove a run that is to be continued."
    if key == "reward_model" and training.tool == "LLaMA-Factory":
        return _VALUE_HEAD
    if section in {"datasets", "eval_datasets"}:  # where another tool has such a key
        return f"set `{found[0]}`."
    if not found or (section in OBJECTIVES and section != training.kind):
        return remark or f"`{training.kind}` has no such option."
    return ""


def _put(run: dict[str, Any], place: str, value: Any, training: Training) -> None:
    *path, last = place.split(".")
    mapping = run
    for name in path:
        mapping = mapping.setdefault(name, {})
        if not isinstance(mapping, dict):
            raise TypeError(f"`{name}` of {training.file} is {shown(mapping)}; it must be a mapping.")
    if mapping.setdefault(last, value) != value:
        shown_value = "another" if re.search(r"(token|key)$", place, re.IGNORECASE) else _line(mapping[last])
        training.notes.append((place, value, f"a run has one value, and a file before has {shown_value}."))


def _rewards(training: Training, key: str, value: Any) -> Iterator[str]:
    """Reward functions and models as a run names them."""
    for name in map(str, value if isinstance(value, list) else [value]):
        module, _, function = name.rpartition(".")
        if key != "reward_funcs" or ":" in name:
            yield name
        elif name == "get_soft_overlong_punishment":
            training.note(key, name, "a call makes it. Put `reward = get_soft_overlong_punishment(...)` into a file.")
        else:
            yield f"trl.rewards:{name}" if name in _TRL_REWARDS else f"{module}:{function}"


def _add_reward(run: dict[str, Any], training: Training) -> None:
    if training.tool == "LLaMA-Factory":
        reason = _VALUE_HEAD
    elif _ONLINE & {*run["objectives"]}:
        reason = "train this model first; it is among `reward_funcs`."
        run.setdefault("reward_funcs", []).append(training.output)
    else:
        reason = f"of {', '.join(run['objectives'])} none learns from a reward model."
    training.notes = [("output_dir", training.output, reason)]


def _text(run: dict[str, Any], trainings: Sequence[Training]) -> str:
    names = " and ".join(_line(training.file) for training in trainings)
    plain = _PLAIN if len(run["objectives"]) > 1 else ""
    lines = [f"# Made by `hbat migrate` from {names}. Check it with `hbat validate --config FILE`.{plain}"]
    rest = [key for key in run if key not in (*_FIRST, *run["objectives"])]
    for key in (*_FIRST, *rest, *run["objectives"]):
        if value := run.get(key):
            style = None if isinstance(value, list) else False
            block = yaml.safe_dump(
                {key: value}, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=style
            )
            lines.append(("" if key in _FIRST else "\n") + block.rstrip())
    for training in trainings:
        reasons: dict[str, list[str]] = {}
        for key, value, reason in training.notes:
            is_secret = re.search(r"(token|key)$", key, re.IGNORECASE)
            reasons.setdefault(reason, []).append(_line(key) if is_secret else f"{_line(key)}: {_line(value)}")
        lines += [f"\n# Not carried over from {_line(training.file)}:"] if reasons else []
        lines += [f"# - {', '.join(keys)}\n#   {reason[0].upper()}{reason[1:]}" for reason, keys in reasons.items()]
    return "\n".join(lines) + "\n"


def _line(value: Any) -> str:
    """A value on one line, as a comment needs it."""
    text = json.dumps(value)
    return text[1:-1] if isinstance(value, str) and text[1:-1] == value else text
