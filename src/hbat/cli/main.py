"""The command `hbat`: make, train, check and measure the run of a YAML file, and more. `--help` is quick."""

import argparse
import contextlib
import dataclasses
import math
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hbat
from hbat.cli.init import first_run
from hbat.cli.run_file import SECTIONS, RunFile, described_keys, parse, parse_overrides
from hbat.config.ewc import EWCConfig
from hbat.config.section_fields import OBJECTIVES

_USER_ERRORS = (ValueError, TypeError, KeyError, OSError, NotImplementedError, ImportError)
_OWN_OPTIONS = ("config", "resume", "allow_changed", "points", "save", "dtype", "traceback", "help")


class _TrainingError(Exception):
    """Wraps an error of training, where a ValueError is no longer about what the user wrote."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See `{self.prog} --help`.")


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
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        options, rest = _parser().parse_known_args(words)
        return int(options.run(options, rest))
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


def _one_line(error: BaseException, *, by_user: bool) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    line = " ".join(str(text).split())
    if line and (by_user or isinstance(error, FloatingPointError)):
        return line
    return f"{type(error).__name__}: {line} (use `--traceback` for details)"


# --- commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, words: Sequence[str]) -> int:
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
    return 0


def _validate(options: argparse.Namespace, words: Sequence[str]) -> int:
    run = _prepare(options, words)
    with contextlib.redirect_stdout(sys.stderr):
        from hbat.cli.build import build_trainer  # noqa: PLC0415 - heavy
        from hbat.cli.hub import check_upload  # noqa: PLC0415 - heavy
        from hbat.cli.summary import end_processes, print_plan  # noqa: PLC0415 - heavy

        check_upload(run)
        trainer = build_trainer(run)
    print_plan(trainer)
    end_processes()
    return 0


def _front(options: argparse.Namespace, words: Sequence[str]) -> int:
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
    return 0


def _merge(options: argparse.Namespace, words: Sequence[str]) -> int:
    source, folder = Path(options.config), Path(options.folder)
    _require_empty("DIR", folder)
    if source.is_dir() and words:
        raise ValueError(f"`{words[0]}` is for a run file, and {str(source)!r} is a folder. Remove it.")
    run = None if source.is_dir() else _prepare(options, words)
    with contextlib.redirect_stdout(sys.stderr):
        from hbat.cli.summary import describe_merged  # noqa: PLC0415 - heavy
        from hbat.model.merge import merge  # noqa: PLC0415 - heavy
        from hbat.state.folder import RunFolder  # noqa: PLC0415 - heavy

        adapter = source if run is None else Path(run.config.output_dir)
        quantized = run is not None and run.quantization is not None
        if (state := next(RunFolder(adapter).states(), None)) is not None:  # not after `hbat clean`
            state.require_finished(repr(str(adapter)))
            quantized |= "quantization" in state.fingerprint["parameters"]
        merged = merge(adapter, folder, options.dtype, None if run is None else run.config)
    print(describe_merged(merged, folder, quantized=quantized))
    return 0


def _clean(options: argparse.Namespace, words: Sequence[str]) -> int:
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
    return 0


def _run_folder(options: argparse.Namespace, words: Sequence[str]) -> Path:
    source = Path(options.config)
    return source if source.is_dir() else Path(_prepare(options, words).config.output_dir)


def _status(options: argparse.Namespace, words: Sequence[str]) -> int:
    folder = _run_folder(options, words)
    from hbat.cli.status import print_status  # noqa: PLC0415 - heavy

    print_status(folder)
    return 0


def _report(options: argparse.Namespace, words: Sequence[str]) -> int:
    folder = _run_folder(options, words)
    from hbat.reports.page import write_report  # noqa: PLC0415 - heavy

    print(f"Report: {write_report(folder).absolute()}")
    return 0


def _compare(options: argparse.Namespace, words: Sequence[str]) -> int:
    _refuse("compare", words)
    from hbat.reports.comparison import write_comparison  # noqa: PLC0415 - heavy

    folders = [path if path.is_dir() else Path(parse(path).config.output_dir) for path in options.runs]
    write_comparison(folders, options.output)
    print(f"Comparison: {options.output.absolute()}")
    return 0


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


def _init(options: argparse.Namespace, words: Sequence[str]) -> int:
    _refuse("init", words)
    text = first_run(options.model, {name: getattr(options, name) for name in OBJECTIVES}, lora=options.lora)
    if options.output is None:
        print(text, end="")
        return 0
    try:
        with options.output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(
            f"`--output` names {str(options.output)!r}, which exists. Give the name of a new file."
        ) from None
    print(f"Wrote {options.output}. Next: `hbat validate --config {options.output}`.")
    return 0


def _migrate(options: argparse.Namespace, words: Sequence[str]) -> int:
    _refuse("migrate", words)
    from hbat.cli.migrate import migrate  # noqa: PLC0415 - nothing else needs it

    print(migrate(options.files), end="")
    return 0


def _env(_: argparse.Namespace, words: Sequence[str]) -> int:
    _refuse("env", words)
    from hbat.cli.env import describe_environment  # noqa: PLC0415 - heavy

    print(describe_environment())
    return 0


def _demo(options: argparse.Namespace, words: Sequence[str]) -> int:
    _refuse("demo", words)
    from hbat.cli.demo.run import run  # noqa: PLC0415 - heavy

    return run(options.output_dir, options.seed, options.quick, options.preference)


def _refuse(command: str, words: Sequence[str]) -> None:
    if words:
        raise ValueError(f"`{words[0]}` is not an option. See `hbat {command} --help`.")


def _prepare(options: argparse.Namespace, words: Sequence[str]) -> RunFile:
    run = parse(options.config, parse_overrides(words), _OWN_OPTIONS)
    run.set_environment()
    return run


# --- options and their help ------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hbat", allow_abbrev=False, description="Hybrid alignment training: alternate SFT and preference stages."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        title="commands",
        required=True,
        metavar="{init,migrate,validate,train,status,report,compare,front,merge,clean,env,demo}",
    )
    _add_beginnings(commands)
    train = _run_command(commands, "train", _train, "train a run described by a YAML file")
    train.add_argument("--resume", action="store_true", help="continue the interrupted run in `output_dir`")
    train.add_argument(
        "--allow-changed",
        default="",
        metavar="NAMES",
        help="values that may differ from the run that resumes, comma-separated: `sft.learning_rate,ewc.`",
    )
    _run_command(commands, "validate", _validate, "check configuration, data and model without training")
    _add_readers(commands)
    what = "score the models between the start and the end of a finished run's last stage, and save one"
    front = _run_command(commands, "front", _front, what, file="RUN")
    front.add_argument(
        "--points",
        default="0,0.25,0.5,0.75,1",
        metavar="NUMBERS",
        help="values of `end_weight` to evaluate: 0 is the stage's start, 1 its end (default: %(default)s)",
    )
    front.add_argument(
        "--save", nargs=2, metavar=("POINT", "DIR"), help="save the model or adapter at a point into a new folder"
    )
    what = "merge the adapter of a run into its base model, for vLLM or llama.cpp; RUN may be an adapter's folder"
    merged = _run_command(commands, "merge", _merge, what, file="RUN DIR")
    merged.add_argument("folder", metavar="DIR", help="new or empty folder for model and tokenizer")
    merged.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the merged weights (default: the base model's)",
    )
    what = "remove what a finished run keeps beside its model to be continued or averaged"
    _run_command(commands, "clean", _clean, what, file="RUN")
    what = "print versions, devices and settings, for a bug report"
    env = commands.add_parser("env", allow_abbrev=False, help=what, description=_sentence(what))
    env.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    env.set_defaults(run=_env)
    what = "compare HBAT and two-stage training on a small model, on the CPU"
    demo = commands.add_parser("demo", allow_abbrev=False, help=what, description=_sentence(what))
    demo.add_argument(
        "--preference", choices=("dpo", "ppo"), default="dpo", help="preference objective (default: %(default)s)"
    )
    demo.add_argument("--output-dir", type=Path, default="demo-output", help="output folder (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed of data and weights (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="train too little to learn, to check that everything runs")
    demo.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    demo.set_defaults(run=_demo)
    return parser


def _add_beginnings(commands: Any) -> None:
    """The commands that write a run file."""
    what = "write a first run file"
    init = commands.add_parser("init", allow_abbrev=False, help=what, description=_sentence(what))
    init.add_argument("--model", required=True, help="model: name on the Hub or local folder")
    for name in OBJECTIVES:
        init.add_argument(f"--{name}", nargs="+", metavar="DATA", help=f"training data of `{name}`: names or files")
    init.add_argument("--lora", action="store_true", help="train a LoRA adapter")
    init.add_argument("--output", type=Path, metavar="FILE", help="a new file to write (default: standard output)")
    what = "make one run file of those for `trl sft`, `trl dpo`, ..., LLaMA-Factory or axolotl"
    migrate = commands.add_parser("migrate", allow_abbrev=False, help=what, description=_sentence(what))
    migrate.add_argument(
        "files",
        nargs="+",
        metavar="[OBJECTIVE=]FILE",
        help="YAML files in the order in which they train, with the objective where its name does not say it",
    )
    for command, run in ((init, _init), (migrate, _migrate)):
        command.add_argument("--traceback", action="store_true", help="print the traceback of an error")
        command.set_defaults(run=run)


def _add_readers(commands: Any) -> None:
    """The commands that read what runs have left."""
    what = "print how far a run is, also while it trains; RUN may be its folder"
    _run_command(commands, "status", _status, what, file="RUN")
    what = "write `report.html` of a run, also of one that was cut off; RUN may be its folder"
    _run_command(commands, "report", _report, what, file="RUN")
    what = "write a page that shows several runs side by side"
    compare = commands.add_parser("compare", allow_abbrev=False, help=what, description=_sentence(what))
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run files or folders of runs")
    compare.add_argument(
        "--output", type=Path, default="comparison.html", metavar="FILE", help="the page (default: %(default)s)"
    )
    compare.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    compare.set_defaults(run=_compare)


def _run_command(
    commands: Any, name: str, run: Any, what: str, *, file: str = "--config run.yaml"
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        allow_abbrev=False,
        help=what,
        usage=f"hbat {name} {file} [options] [--KEY VALUE ...]",
        description=_sentence(what),
        epilog=_keys_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if file.startswith("--"):
        command.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    else:
        command.add_argument("config", metavar="RUN", help="YAML file of the run")
        command.add_argument(
            "--config", action="store_true", dest="_", help=argparse.SUPPRESS
        )  # as before other files
    command.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    command.set_defaults(run=run)
    return command


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        try:
            version = hbat.__version__
        except ImportError:  # a source tree that is not installed
            version = "(not installed)"
        parser.exit(message=f"hbat {version}\n")


def _keys_help() -> str:
    return "\n".join([
        "Every key of the file is also an option and takes precedence over the file: `--num_rounds 2`,",
        "`--sft.learning_rate=1e-5`, `--objectives [sft,dpo]`, `--datasets.dpo pairs.jsonl.gz`, `--ewc null`.",
        "Values are YAML; a key without a value is true.",
        "\nkeys:",
        *(_entry(name, field) for name, field in described_keys() if name not in SECTIONS),
        "\nsections:",
        "  sft.KEY, dpo.KEY, kto.KEY, grpo.KEY, rloo.KEY",
        "        Any field of trl.SFTConfig, trl.DPOConfig, trl.KTOConfig, trl.GRPOConfig or trl.RLOOConfig.",
        "  ppo.KEY\n        Any field of hbat.PPOConfig.",
        "  ewc\n        null: plain alternation without EWC.",
        *(_entry(f"ewc.{field.name}", field) for field in dataclasses.fields(EWCConfig)),
    ])


def _entry(name: str, field: "dataclasses.Field[Any]") -> str:
    default = "" if field.default is dataclasses.MISSING or field.default is None else f" (default: {field.default})"
    text = textwrap.fill(f"{field.metadata['help']}{default}", 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"  {name}\n{text}"
