"""Commands and options of the command line, with their help. Imports neither torch nor TRL."""

import argparse
import dataclasses
import textwrap
from pathlib import Path
from typing import Any, NoReturn

import hbat
from hbat.cli.eval_file import EvalFile
from hbat.cli.run_file import SECTIONS, described_keys
from hbat.config.evaluation import JudgeConfig
from hbat.config.ewc import EWCConfig
from hbat.config.section_fields import OBJECTIVES


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise ValueError(f"{message}. See `{self.prog} --help`.")


def make_parser() -> Parser:
    """The parser; the chosen command's name is in `command`."""
    parser = Parser(
        prog="hbat", allow_abbrev=False, description="Hybrid alignment training: alternate SFT and preference stages."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        title="commands",
        required=True,
        dest="command",
        metavar="{init,migrate,validate,train,status,report,compare,front,merge,eval,sweep,clean,env,demo}",
    )
    _add_beginnings(commands)
    train = _run_command(commands, "train", "train a run described by a YAML file")
    train.add_argument("--resume", action="store_true", help="continue the interrupted run in `output_dir`")
    train.add_argument(
        "--allow-changed",
        default="",
        metavar="NAMES",
        help="values that may differ from the run that resumes, comma-separated: `sft.learning_rate,ewc.`",
    )
    _run_command(commands, "validate", "check configuration, data and model without training")
    _add_readers(commands)
    what = "score the models between the start and the end of a finished run's last stage, and save one"
    front = _run_command(commands, "front", what, file="RUN")
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
    merged = _run_command(commands, "merge", what, file="RUN DIR")
    merged.add_argument("folder", metavar="DIR", help="new or empty folder for model and tokenizer")
    merged.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the merged weights (default: the base model's)",
    )
    _add_measuring(commands)
    what = "remove what a finished run keeps beside its model to be continued or averaged"
    _run_command(commands, "clean", what, file="RUN")
    _command(commands, "env", "print versions, devices and settings, for a bug report")
    demo = _command(commands, "demo", "compare HBAT and two-stage training on a small model, on the CPU")
    demo.add_argument(
        "--preference", choices=("dpo", "ppo"), default="dpo", help="preference objective (default: %(default)s)"
    )
    demo.add_argument("--output-dir", type=Path, default="demo-output", help="output folder (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed of data and weights (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="train too little to learn, to check that everything runs")
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    return parser


def _add_beginnings(commands: Any) -> None:
    """The commands that write a run file."""
    init = _command(commands, "init", "write a first run file")
    init.add_argument("--model", required=True, help="model: name on the Hub or local folder")
    for name in OBJECTIVES:
        init.add_argument(f"--{name}", nargs="+", metavar="DATA", help=f"training data of `{name}`: names or files")
    init.add_argument("--lora", action="store_true", help="train a LoRA adapter")
    init.add_argument("--output", type=Path, metavar="FILE", help="a new file to write (default: standard output)")
    what = "make one run file of those for `trl sft`, `trl dpo`, ..., LLaMA-Factory or axolotl"
    migrate = _command(commands, "migrate", what)
    migrate.add_argument(
        "files",
        nargs="+",
        metavar="[OBJECTIVE=]FILE",
        help="YAML files in the order in which they train, with the objective where its name does not say it",
    )


def _add_readers(commands: Any) -> None:
    """The commands that read what runs have left."""
    what = "print how far a run is, also while it trains; RUN may be its folder"
    _run_command(commands, "status", what, file="RUN")
    what = "write `report.html` of a run, also of one that was cut off; RUN may be its folder"
    _run_command(commands, "report", what, file="RUN")
    compare = _command(commands, "compare", "write a page that shows several runs side by side")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run files or folders of runs")
    compare.add_argument(
        "--output", type=Path, default="comparison.html", metavar="FILE", help="the page (default: %(default)s)"
    )


def _add_measuring(commands: Any) -> None:
    """The commands that measure models, and train several to do so."""
    what = "complete prompts with models and measure them: ROUGE, win rate, likelihoods, tasks of lm-eval"
    usage = "hbat eval MODEL [MODEL ...] [--config eval.yaml] [--KEY VALUE ...]"
    evaluate = _command(commands, "eval", what, usage=usage, epilog=_eval_keys_help())
    evaluate.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="name on the Hub, folder of a model, an adapter or a run, or a run file",
    )
    evaluate.add_argument("--config", metavar="FILE", help="YAML file of what is measured")
    what = "train a run with every combination of some values, and show their scores in a table and a heat map"
    sweep = _run_command(commands, "sweep", what, file="RUN --set KEY=VALUE,VALUE ...")
    sweep.add_argument(
        "--set",
        action="append",
        required=True,
        dest="axes",
        metavar="KEY=VALUES",
        help="values of a key, comma-separated: `--set num_rounds=1,2,4 --set ewc.strength=0.3,1`",
    )


def _run_command(commands: Any, name: str, what: str, *, file: str = "--config run.yaml") -> argparse.ArgumentParser:
    usage = f"hbat {name} {file} [options] [--KEY VALUE ...]"
    command = _command(commands, name, what, usage=usage, epilog=_keys_help())
    if file.startswith("--"):
        command.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    else:
        command.add_argument("config", metavar="RUN", help="YAML file of the run")
        # As before other files.
        command.add_argument("--config", action="store_true", dest="_", help=argparse.SUPPRESS)
    return command


def _command(
    commands: Any, name: str, what: str, *, usage: str | None = None, epilog: str | None = None
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        allow_abbrev=False,
        help=what,
        usage=usage,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter,
    )
    return command


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
        *(_entry(field.name, field) for field in described_keys() if field.name not in SECTIONS),
        "\nsections:",
        "  sft.KEY, dpo.KEY, kto.KEY, grpo.KEY, rloo.KEY, distillation.KEY",
        "        Any field of trl.SFTConfig, trl.DPOConfig, trl.KTOConfig, trl.GRPOConfig, trl.RLOOConfig or",
        "        trl.DistillationConfig.",
        "  ppo.KEY\n        Any field of hbat.PPOConfig.",
        "  ewc\n        null: plain alternation without EWC.",
        *(_entry(f"ewc.{field.name}", field) for field in dataclasses.fields(EWCConfig)),
    ])


def _eval_keys_help() -> str:
    return "\n".join([
        "Every key of the file is also an option and takes precedence over the file: `--prompts held-out.jsonl`,",
        "`--temperatures [0,0.75]`, `--judge.reward_model my/reward-model`. Values are YAML.",
        "\nkeys:",
        *(_entry(field.name, field) for field in dataclasses.fields(EvalFile) if field.name != "judge"),
        *(_entry(f"judge.{field.name}", field) for field in dataclasses.fields(JudgeConfig)),
    ])


def _entry(name: str, field: "dataclasses.Field[Any]") -> str:
    default = "" if field.default is dataclasses.MISSING or field.default is None else f" (default: {field.default})"
    text = textwrap.fill(f"{field.metadata['help']}{default}", 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"  {name}\n{text}"
