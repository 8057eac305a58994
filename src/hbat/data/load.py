"""Loads a data set as a YAML file names it: from the Hugging Face Hub or from files."""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import Dataset

from hbat.config.fields import nearest

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SOURCE_KEYS = ("path", "name", "split", "data_files", "data_dir", "revision")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


T = TypeVar("T")
R = TypeVar("R")


class DatasetError(ValueError):
    """A data set that cannot be trained on. The message names it, with the row and field if there is one."""


def for_all(items: Iterable[T], function: Callable[[T], R]) -> list[R]:
    """Apply a function to every item, and name the faults of all data sets at once.

    Raises:
        DatasetError: If the function raised one or several.
    """
    results, errors = [], []
    for item in items:
        try:
            results.append(function(item))
        except DatasetError as error:
            errors.append(error)
    if len(errors) > 1:
        raise DatasetError("\n".join(map(str, errors))) from errors[0]
    if errors:
        raise errors[0]
    return results


def load(source: Mapping[str, Any], *, name: str) -> Dataset:
    """Load a data set as a YAML file names it, by `SOURCE_KEYS`. Messages begin with `name`.

    Raises:
        DatasetError: If it cannot be found or read.
    """
    given = {key: value for key, value in source.items() if value is not None}
    path, split = given.pop("path", None), given.pop("split", None)
    path = str(path) if isinstance(path, Path) else path
    if "data_files" in given and path in (None, *_BUILDERS.values()):
        path = given.pop("data_files")
    if not path or isinstance(path, Mapping):
        raise DatasetError(
            f"{name} has no `path`; expected a name on the Hugging Face Hub, a file or a list of files."
        )
    if isinstance(path, str) and _suffix(path) not in _BUILDERS and not Path(path).expanduser().is_file():
        return _load_other(path, split, given, name)
    files = [path] if isinstance(path, str) else list(path)
    if given:
        raise DatasetError(f"{name}: `{next(iter(given))}` does not apply to the file {files[0]}. Remove it.")
    return _load_files(files, split, name)


def _suffix(path: str) -> str:
    return Path(path.lower().removesuffix(".gz")).suffix


def _load_other(path: str, split: str | None, given: Mapping[str, Any], name: str) -> Dataset:
    folder = Path(path).expanduser()
    if not folder.is_dir() and not _HUB_NAME.fullmatch(path):
        raise DatasetError(f"{name}: {path!r} is neither an existing file nor a name on the Hugging Face Hub.")
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        options = {"split": split or "train", **given}
        return datasets.load_dataset(str(folder) if folder.is_dir() else path, options.pop("name", None), **options)
    except ConnectionError as error:
        reason = f"the Hugging Face Hub cannot be reached ({_one_line(error)}), and the cache does not have it"
    except Exception as error:  # noqa: BLE001 - readers raise anything; the user gets one line
        reason = _one_line(error)
    raise DatasetError(f"{name}: cannot load {path!r}: {reason}. To load local data, give its files.")


def _load_files(paths: Sequence[Any], split: str | None, name: str) -> Dataset:
    loaded = [_load_file(str(path), split, name) for path in paths]
    try:
        return datasets.concatenate_datasets(loaded) if len(loaded) > 1 else loaded[0]
    except (ValueError, TypeError) as error:
        reason = _one_line(error)
    raise DatasetError(f"{name}: the files {', '.join(map(str, paths))} do not have the same columns: {reason}.")


def _load_file(path: str, split: str | None, name: str) -> Dataset:
    file = Path(path).expanduser()
    if not file.is_file():
        exists = file.parent.is_dir()
        known = [sibling.name for sibling in file.parent.iterdir()] if exists else []
        where = "" if exists else f" (and no directory {file.parent})"
        raise DatasetError(f"{name}: there is no file {path}{where}.{nearest(file.name, known)}")
    if "::" in path:
        raise DatasetError(f"{name}: {path} has `::` in its name, which its reader takes for a chain. Rename it.")
    builder = _BUILDERS.get(_suffix(path))
    if builder is None:
        raise DatasetError(
            f"{name}: {path} has an unsupported extension; expected {', '.join(_BUILDERS)} (text also as .gz)."
        )
    reason = (
        "the file is empty"
        if not file.stat().st_size
        else _problem_before_reading(file)
        if builder == "json"
        else None
    )
    if reason is None:
        try:
            # Not `load_dataset`, which reports to a server that a file was loaded and waits for its answer.
            # The path is a pattern.
            return getattr(Dataset, f"from_{builder}")({"train": glob.escape(str(file))}, split=split or "train")
        except Exception as error:  # noqa: BLE001 - readers raise anything; the user gets one line
            line = _one_line(error)
            line = "its rows have no columns" if "corresponds to no data" in line else line
            reason = (_json_problem(file) if builder == "json" else None) or line
    raise DatasetError(f"{name}: cannot read {path}: {reason}.")


def _problem_before_reading(file: Path) -> str | None:
    # pyarrow ends the process, without a message, at a block of rows that begins with `null`.
    try:
        with _opened(file) as lines:
            first = next((line.strip() for line in lines if line.strip()), "")
            lines.seek(0)
            if not first:
                return "the file is empty"
            if first.startswith("["):
                return _bad_element(json.loads(lines.read()))
            if first != "null" and not first.endswith("}"):  # one object over several lines
                return None
            found = (number for number, line in enumerate(lines, start=1) if line.strip() == "null")
            number = next(found, None)
            return None if number is None else f"line {number} is `null`, not a JSON object"
    except RecursionError:
        return "it is nested too deeply"
    except (EOFError, OSError, ValueError, zlib.error):
        return None  # found again after reading


def _bad_element(rows: Any) -> str | None:
    if not isinstance(rows, list) or all(isinstance(row, str) for row in rows):  # strings are rows of `text`
        return None
    index = next((at for at, row in enumerate(rows) if not isinstance(row, dict)), None)
    return None if index is None else f"row {index} of its list is not a JSON object"


def _json_problem(file: Path) -> str | None:
    number, is_list = 0, False
    try:
        with _opened(file) as lines:
            is_list = _suffix(file.name) == ".json" and lines.read(1) == "["
            lines.seek(0)
            for number, text in enumerate([lines.read()] if is_list else lines, start=1):
                if text.strip() and not isinstance(json.loads(text.rstrip()), list if is_list else dict):
                    return f"line {number} is not a JSON object"
    except json.JSONDecodeError as error:
        return f"it is not valid JSON: {error.msg} (line {error.lineno if is_list else number} column {error.colno})"
    except RecursionError:
        return "it is nested too deeply" if is_list else f"line {number} is nested too deeply"
    except EOFError:
        return "the compressed file is truncated"
    except (OSError, ValueError, zlib.error) as error:
        return _one_line(error)
    return None


def _opened(file: Path) -> Any:
    return (gzip.open if file.name.lower().endswith(".gz") else open)(file, "rt", encoding="utf-8-sig")


def _one_line(error: BaseException) -> str:
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
