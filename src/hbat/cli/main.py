"""The command `hbat`: make, train, check and measure the run of a YAML file, and more. `--help` is quick."""

import argparse
import contextlib
import logging
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import hbat
from hbat.cli.eval_file import parse_eval
from hbat.cli.init import first_run
from hbat.cli.options import make_parser
from hbat.cli.run_file import RunFile, parse, parse_overrides
from hbat.config.section_fields import OBJECTIVES

_USER_ERRORS = (ValueError, TypeError, KeyError, OSError, NotImplementedError, ImportError)
_OWN_OPTIONS = ("config", "resume", "allow_changed", "points", "save", "dtype", "set", "traceback", "help")


class _TrainingError(Exception):
    """Wraps an error of training, where a ValueError is no longer about what the user wrote."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default `sys.argv[1:]`.

    Returns:
        Exit status: 0, or 2 if the user can correct the error, 1 if training failed, 143 after SIGTERM, 130 after
        SIGINT.

    Raises:
        SystemExit: After `--help` and `--version`.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # 0.49 warns of kernels for CPUs wherever it is imported
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        options, rest = make_parser().parse_known_args(words)
        options.argv = words
        _COMMANDS[options.command](options, rest)
    except KeyboardInterrupt:
        hint = "; continue with `--resume`" if words[0] == "train" else ""
        print(f"hbat: interrupted{hint}", file=sys.stderr)
        return 130
    except SystemExit as end:
        received = getattr(end, "signal", None)  # of RunInterrupted, without importing it
        if received is None:  # `--help` and the like
            raise
        print(f"hbat: stopped by {received.name}; the run is saved, continue with `--resume`", file=sys.stderr)
        return int(end.code or 0)
    except Exception as error:  # noqa: BLE001 - the libraries raise anything; the user gets one line
        cause = (error.__cause__ or error) if isinstance(error, _TrainingError) else error
        by_user = isinstance(error, _USER_ERRORS)
        if "--traceback" in words:
            traceback.print_exception(cause)
        print(f"hbat: error: {_one_line(cause, by_user=by_user)}", file=sys.stderr)
        return 2 if by_user else 1
    return 0


def _one_line(error: BaseException, *, by_user: bool) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    line = " ".join(str(text).split())
    if line and (by_user or isinstance(error, FloatingPointError)):
        return line
    return f"{type(error).__name__}: {line} (use `--traceback` for details)"


# --- commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, words: Sequence[str]) -> None:
    allowed = [name.strip() for name in options.allow_changed.split(",") if name.strip()]
    if allowed and not options.resume:
        raise ValueError("`--allow-changed` names values that may differ when a run resumes; it requires `--resume`.")
    run = _prepare(options, words)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
        import transformers  # noqa: PLC0415 - heavy

        from hbat.cli.build import KeepRunFile, build_trainer, refuse_other_run  # noqa: PLC0415 - heavy
        from hbat.cli.hub import check_upload, upload_run  # noqa: PLC0415 - heavy
        from hbat.cli.summary import end_processes, print_result  # noqa: PLC0415 - heavy

        if not options.resume:
            refuse_other_run(run)
        check_upload(run)
        trainer = build_trainer(run)
        transformers.logging.disable_progress_bar()  # of every file of every checkpoint
        trainer.add_callback(KeepRunFile(options.config, words))
        try:
            trainer.train(resume_from_checkpoint=options.resume, allow_changed=allowed)
            trainer.save_model()
        except (hbat.RunStateError, hbat.StorageError):  # about the folder, which the user can fix
            raise
        except Exception as error:
            raise _TrainingError from error
    print_result(trainer)
    if address := upload_run(run):
        print(f"Hub:    {address}")
    end_processes()


def _validate(options: argparse.Namespace, words: Sequence[str]) -> None:
    run = _prepare(options, words)
    with contextlib.redirect_stdout(sys.stderr):
        from hbat.cli.build import build_trainer  # noqa: PLC0415 - heavy
        from hbat.cli.hub import check_upload  # noqa: PLC0415 - heavy
        from hbat.cli.summary import end_processes, print_plan  # noqa: PLC0415 - heavy

        check_upload(run)
        trainer = build_trainer(run)
    print_plan(trainer)
    end_processes()


def _front(options: argparse.Namespace, words: Sequence[str]) -> None:
    points = [_point("points", text) for text in options.points.split(",")]
    saved, folder = None, None
    if options.save:
        saved, folder = _point("save", options.save[0]), Path(options.save[1])
        points.append(saved)
        _require_empty("--save", folder)
    run = _prepare(options, words)
    with contextlib.redirect_stdout(sys.stderr):
        from hbat.cli.build import build_trainer  # noqa: PLC0415 - heavy
        from hbat.cli.summary import end_processes, print_front  # noqa: PLC0415 - heavy

        trainer = build_trainer(run)
        front = trainer.front(points)
        if saved is not None:
            trainer.move_to(saved)
            trainer.save_model(str(folder))
    print_front(trainer, front, folder)
    end_processes()


def _merge(options: argparse.Namespace, words: Sequence[str]) -> None:
    source, folder = Path(options.config), Path(options.folder)
    _require_empty("DIR", folder)
    if source.is_dir() and words:
        raise ValueError(f"`{words[0]}` is for a run file, and {str(source)!r} is a folder. Remove it.")
    run = None if source.is_dir() else _prepare(options, words)
    with contextlib.redirect_stdout(sys.stderr):
        from hbat.cli.build import set_output  # noqa: PLC0415 - heavy
        from hbat.cli.summary import describe_merged  # noqa: PLC0415 - heavy
        from hbat.model.merge import merge  # noqa: PLC0415 - heavy
        from hbat.state.folder import RunFolder  # noqa: PLC0415 - heavy

        set_output()
        adapter = source if run is None else Path(run.config.output_dir)
        quantized = run is not None and run.quantization is not None
        if (state := next(RunFolder(adapter).states(), None)) is not None:  # not after `hbat clean`
            state.require_finished(repr(str(adapter)))
            quantized |= "quantization" in state.fingerprint["parameters"]
        merged = merge(adapter, folder, options.dtype, None if run is None else run.config)
    print(describe_merged(merged, folder, quantized=quantized))


def _clean(options: argparse.Namespace, words: Sequence[str]) -> None:
    run = _prepare(options, words)
    from hbat.state.folder import RunFolder  # noqa: PLC0415 - heavy

    folder = RunFolder(run.config.output_dir)
    if not folder.holds_run():
        raise ValueError(f"`output_dir` {run.config.output_dir!r} holds no run: there is nothing to remove.")
    with folder.locked():
        state = folder.read()
        if state is not None:
            state.require_finished(repr(run.config.output_dir))
        size = folder.size()
        folder.clear()
    print(f"Removed {size / 1e6:.1f} MB: the run can no longer be continued, nor its front be measured.")


def _run_folder(options: argparse.Namespace, words: Sequence[str]) -> Path:
    source = Path(options.config)
    return source if source.is_dir() else Path(_prepare(options, words).config.output_dir)


def _status(options: argparse.Namespace, words: Sequence[str]) -> None:
    folder = _run_folder(options, words)
    from hbat.cli.status import print_status  # noqa: PLC0415 - heavy

    print_status(folder)


def _report(options: argparse.Namespace, words: Sequence[str]) -> None:
    folder = _run_folder(options, words)
    from hbat.reports.page import write_report  # noqa: PLC0415 - heavy

    print(f"Report: {write_report(folder).absolute()}")


def _compare(options: argparse.Namespace, words: Sequence[str]) -> None:
    _refuse("compare", words)
    from hbat.reports.comparison import write_comparison  # noqa: PLC0415 - heavy

    folders = [path if path.is_dir() else Path(parse(path).config.output_dir) for path in options.runs]
    write_comparison(folders, options.output)
    print(f"Comparison: {options.output.absolute()}")


def _require_empty(option: str, folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`{option}` names {str(folder)!r}, which is not an empty folder. Name a new one.")


def _point(option: str, text: str) -> float:
    try:
        point = float(text)
    except ValueError:
        point = math.nan
    if not 0 <= point <= 1:
        raise ValueError(f"`--{option}` has {text!r} for a point; give a number between 0 and 1.")
    return point


def _init(options: argparse.Namespace, words: Sequence[str]) -> None:
    _refuse("init", words)
    text = first_run(options.model, {name: getattr(options, name) for name in OBJECTIVES}, lora=options.lora)
    if options.output is None:
        print(text, end="")
        return
    try:
        with options.output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(
            f"`--output` names {str(options.output)!r}, which exists. Give the name of a new file."
        ) from None
    print(f"Wrote {options.output}. Next: `hbat validate --config {options.output}`.")


def _migrate(options: argparse.Namespace, words: Sequence[str]) -> None:
    _refuse("migrate", words)
    from hbat.cli.migrate import migrate  # noqa: PLC0415 - nothing else needs it

    print(migrate(options.files), end="")


def _env(_: argparse.Namespace, words: Sequence[str]) -> None:
    _refuse("env", words)
    from hbat.cli.env import describe_environment  # noqa: PLC0415 - heavy

    print(describe_environment())


def _demo(options: argparse.Namespace, words: Sequence[str]) -> None:
    _refuse("demo", words)
    from hbat.cli.demo.run import run  # noqa: PLC0415 - heavy

    run(options.output_dir, options.seed, options.quick, options.preference)


def _eval(options: argparse.Namespace, words: Sequence[str]) -> None:
    if options.argv[1].startswith("-"):
        raise ValueError("`hbat eval` takes the models first: `hbat eval MODEL --config eval.yaml`.")
    config = parse_eval(options.config, parse_overrides(words))
    with contextlib.redirect_stdout(sys.stderr):
        from hbat.cli.build import set_output  # noqa: PLC0415 - heavy
        from hbat.cli.evaluate import evaluate  # noqa: PLC0415 - heavy

        set_output()
        print_scores = evaluate(options.models, config)
    print_scores()


def _sweep(options: argparse.Namespace, words: Sequence[str]) -> None:
    from hbat.cli.sweep import print_sweep, sweep  # noqa: PLC0415 - heavy

    run = _prepare(options, words)
    print_sweep(sweep(options.config, run, options.axes, words), Path(run.config.output_dir))


def _refuse(command: str, words: Sequence[str]) -> None:
    if words:
        raise ValueError(f"`{words[0]}` is not an option. See `hbat {command} --help`.")


def _prepare(options: argparse.Namespace, words: Sequence[str]) -> RunFile:
    run = parse(options.config, parse_overrides(words), _OWN_OPTIONS)
    run.set_environment()
    return run


_COMMANDS: dict[str, Callable[[argparse.Namespace, Sequence[str]], None]] = {
    "init": _init, "migrate": _migrate, "validate": _validate, "train": _train, "status": _status, "report": _report,
    "compare": _compare, "front": _front, "merge": _merge, "eval": _eval, "sweep": _sweep, "clean": _clean,
    "env": _env, "demo": _demo,
}  # fmt: skip
