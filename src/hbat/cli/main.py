"""The command `hbat`: train or check a run from a YAML file, or show the demo. Nothing heavy is imported for help."""

import argparse
import contextlib
import dataclasses
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hbat
from hbat.cli.run_file import SECTIONS, RunFile, described_keys, parse, parse_overrides
from hbat.config.ewc import EWCConfig

_USER_ERRORS = (ValueError, TypeError, KeyError, OSError, NotImplementedError, ImportError)


_OWN_OPTIONS = ("config", "resume", "allow_changed", "traceback", "help")


class _TrainingError(Exception):
    """Wraps what went wrong in training: there, a ValueError is no longer about what the user wrote."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See `{self.prog} --help`.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Its words; those of the process where left out.

    Returns:
        Exit status: 0, 2 for what the user can correct, 1 for what went wrong in training, 143 after SIGTERM and 130
        after SIGINT.

    Raises:
        SystemExit: After `--help` and `--version`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        options, rest = _parser().parse_known_args(words)
        status: int = options.run(options, rest)
    except KeyboardInterrupt:
        hint = "; `--resume` goes on" if words[0] == "train" else ""
        print(f"hbat: interrupted{hint}", file=sys.stderr)
        return 130
    except SystemExit as ending:
        ended_by = getattr(ending, "signal", None)
        if ended_by is None:  # `--help` and the like
            raise
        print(f"hbat: ended by {ended_by.name}, everything is saved; `--resume` goes on", file=sys.stderr)
        return int(ending.code or 0)
    except Exception as error:  # noqa: BLE001 - the host raises anything; the user gets one line
        cause = (error.__cause__ or error) if isinstance(error, _TrainingError) else error
        by_user = cause is error and isinstance(error, _USER_ERRORS)
        if "--traceback" in words:
            traceback.print_exception(cause)
        print(f"hbat: error: {_one_line(cause, by_user=by_user)}", file=sys.stderr)
        return 2 if by_user else 1
    return status


def _one_line(error: BaseException, *, by_user: bool) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    line = " ".join(str(text).split())
    if line and (by_user or isinstance(error, FloatingPointError)):
        return line
    return f"{type(error).__name__}: {line} (`--traceback` shows where)"


# --- commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, words: Sequence[str]) -> int:
    allowed = [each.strip() for each in options.allow_changed.split(",") if each.strip()]
    if allowed and not options.resume:
        raise ValueError("`--allow-changed` says what may differ from a run that goes on; it needs `--resume`.")
    run = _prepare(options, words)
    with contextlib.redirect_stdout(sys.stderr):  # the standard output is for the result
        from hbat.cli.build import build_trainer, refuse_other_run  # noqa: PLC0415 - heavy
        from hbat.state.files import StorageError  # noqa: PLC0415 - heavy
        from hbat.state.manifest import RunStateError  # noqa: PLC0415 - heavy

        if not options.resume:
            refuse_other_run(run)
        trainer = build_trainer(run)
        try:
            trainer.train(resume_from_checkpoint=options.resume, allow_changed=allowed)
            trainer.save_model()
        except (RunStateError, StorageError):  # of the folder, for the user to mend
            raise
        except Exception as error:
            raise _TrainingError from error
    from hbat.cli.summary import end_processes, print_result  # noqa: PLC0415 - heavy

    print_result(trainer)
    end_processes()
    return 0


def _validate(options: argparse.Namespace, words: Sequence[str]) -> int:
    run = _prepare(options, words)
    with contextlib.redirect_stdout(sys.stderr):
        from hbat.cli.build import build_trainer  # noqa: PLC0415 - heavy

        trainer = build_trainer(run)
    from hbat.cli.summary import end_processes, print_plan  # noqa: PLC0415 - heavy

    print_plan(trainer)
    end_processes()
    return 0


def _demo(options: argparse.Namespace, words: Sequence[str]) -> int:
    if words:
        raise ValueError(f"`{words[0]}` is not an option of `hbat demo`.")
    from hbat.cli.demo.run import run  # noqa: PLC0415 - heavy

    status: int = run(
        output_dir=options.output_dir, seed=options.seed, quick=options.quick, preference=options.preference
    )
    return status


def _prepare(options: argparse.Namespace, words: Sequence[str]) -> RunFile:
    run = parse(options.config, parse_overrides(words, _OWN_OPTIONS))
    run.set_environment()
    return run


# --- options and their help ------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hbat", allow_abbrev=False, description="Hybrid alignment training: alternate SFT and preference stages."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="{train,validate,demo}")
    train = _run_command(commands, "train", _train, "train the run that a YAML file describes")
    train.add_argument("--resume", action="store_true", help="go on where the run in `output_dir` was cut off")
    train.add_argument(
        "--allow-changed",
        default="",
        metavar="NAMES",
        help="values that may differ from the run that goes on, as the refusal names them: `sft.learning_rate,ewc.`",
    )
    _run_command(commands, "validate", _validate, "check configuration, data and model; train and write nothing")
    demo = commands.add_parser("demo", allow_abbrev=False, help="train a small model on the CPU and compare methods")
    demo.add_argument(
        "--preference", choices=("dpo", "ppo"), default="dpo", help="preference objective (default: %(default)s)"
    )
    demo.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="folder (default: ./%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of data and weights (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="smaller and faster, to see that it runs")
    demo.add_argument("--traceback", action="store_true", help="show where an error comes from")
    demo.set_defaults(run=_demo)
    return parser


def _run_command(commands: Any, name: str, run: Any, what: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        allow_abbrev=False,
        help=what,
        usage=f"hbat {name} --config run.yaml [options] [--KEY VALUE ...]",
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=_keys_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    command.add_argument("--traceback", action="store_true", help="show where an error comes from")
    command.set_defaults(run=run)
    return command


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        try:
            version = hbat.__version__
        except ImportError:  # a source tree that is not installed
            version = "(not installed)"
        parser.exit(message=f"hbat {version}\n")


def _keys_help() -> str:
    entries = [_entry(name, each) for name, each in described_keys() if name not in SECTIONS]
    ewc = [_entry(f"ewc.{each.name}", each) for each in dataclasses.fields(EWCConfig)]
    return "\n".join([
        "Every key of the file can be set here as well: `--num_rounds 2`, `--sft.learning_rate=1e-5`, `--ewc null`,",
        "`--objectives [sft,dpo]`, `--datasets.dpo pairs.jsonl.gz`. Values are YAML; without a value a key is true.",
        "\nkeys:",
        *entries,
        "\nsections:",
        "  sft.KEY, dpo.KEY, kto.KEY, grpo.KEY, rloo.KEY",
        "        Any field of trl.SFTConfig, trl.DPOConfig, trl.KTOConfig, trl.GRPOConfig and trl.RLOOConfig.",
        "  ppo.KEY\n        Any field of hbat.PPOConfig.",
        "  ewc\n        null: plain alternation, no penalty.",
        *ewc,
    ])


def _entry(name: str, field: "dataclasses.Field[Any]") -> str:
    default = "" if field.default is dataclasses.MISSING or field.default is None else f" (default: {field.default})"
    text = textwrap.fill(f"{field.metadata['help']}{default}", 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"  {name}\n{text}"
