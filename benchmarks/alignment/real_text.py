r"""A real language model on real text: HBAT's penalty against two-stage training with its averaging line.

    python benchmarks/alignment/smollm2.py --output smollm2
    python benchmarks/alignment/real_text.py --model smollm2
    python benchmarks/alignment/real_text.py --report

LoRA on SmolLM2-135M-Instruct: SFT on questions with a rationale, then DPO on dialogues and other instructions. Every
stage is trained by `HBATTrainer`; the DPO stages of a seed go on from one SFT stage, which they resume with their own
learning rate and strength. Runs that are in the results are not repeated, so the same command goes on after an
interruption.
"""

import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Before torch is imported: a worker has one thread, and the workers share the cores.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch
from datasets import Dataset
from metrics import interval
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from hbat import HBATConfig, HBATTrainer
from hbat.ewc import relative_importance

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("HBAT_SHARED_DATA", ROOT.parent / "shared" / "data"))
RESULTS = ROOT / "benchmarks" / "results" / "real_text"
INSTRUCTIONS = ("sft/flan_cot",)
PAIRS = ("preference/hh_helpful", "preference/instruct_human")
TEXT = "text/train.txt.gz"
PARAGRAPH_TOKENS = 48
BETA = 0.1
#: The model's own format without its system message, which would be a fourth of the tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SEEDS = (0, 1, 2)
RATES = (1e-3, 3e-4, 1e-4)
#: Strength 0 is two-stage training.
STRENGTHS = (0.0, 0.5)
SHARES = (0.25, 0.5, 0.75, 1.0)
COLUMNS = {
    "sft_loss": "SFT loss", "text_loss": "text loss", "preference_loss": "preference loss", "accuracy": "accuracy",
    "margin": "margin",
}  # fmt: skip

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """How many rows a run trains on and measures; those of more than `max_tokens` are left out."""

    instructions: int = 256
    pairs: int = 128
    held_out_instructions: int = 32
    held_out_pairs: int = 60
    paragraphs: int = 16
    max_tokens: int = 96


SMOKE = Size(instructions=8, pairs=8, held_out_instructions=4, held_out_pairs=4, paragraphs=2)


@dataclass(frozen=True)
class Job:
    """A DPO stage after the SFT stage of the same seed; without a rate it is that SFT stage."""

    seed: int
    strength: float = 0.0
    rate: float | None = None

    @property
    def method(self) -> str:
        """Penalty and learning rate of DPO."""
        if self.rate is None:
            return "SFT"
        return f"{f'path, strength {self.strength:g}' if self.strength else 'two-stage'}, DPO at {self.rate:g}"


# --- data ------------------------------------------------------------------------------------------------------------


class Rows:
    """Rows of the sample data.

    Args:
        tokenizer: The model's.
        size: How many, and how long they may be.
        seed: Draws the rows to train on. Those held out are always the same.
    """

    def __init__(self, tokenizer: Any, size: Size, seed: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = size.max_tokens
        self.train = {
            "sft": self._read(INSTRUCTIONS, "train", size.instructions, seed),
            "dpo": self._read(PAIRS, "train", size.pairs, seed),
        }
        self.held_out = {
            "sft": self._read(INSTRUCTIONS, "test", size.held_out_instructions),
            "dpo": self._read(PAIRS, "test", size.held_out_pairs),
        }
        self.instructions = [self._encode(row, "completion") for row in self.held_out["sft"]]
        self.chosen = [self._encode(row, "chosen") for row in self.held_out["dpo"]]
        self.rejected = [self._encode(row, "rejected") for row in self.held_out["dpo"]]
        with gzip.open(DATA / TEXT, "rt", encoding="utf-8") as lines:
            long = [line.strip() for line in lines if len(line) > 8 * PARAGRAPH_TOKENS]
        paragraphs = random.Random(0).sample(long, size.paragraphs)
        self.text = [(tokenizer(each).input_ids[:PARAGRAPH_TOKENS], 1) for each in paragraphs]

    def _read(self, names: Sequence[str], part: str, count: int, seed: int = 0) -> Dataset:
        rows = []
        for name in names:
            with gzip.open(DATA / f"{name}_{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
                rows += [json.loads(line) for line in lines]
        random.Random(seed).shuffle(rows)
        found: list[Row] = []
        for row in rows:
            sides = [key for key in row if key != "prompt"]
            if all(len(self._encode(row, side)[0]) <= self.max_tokens for side in sides):
                found.append(row)
            if len(found) == count:
                return Dataset.from_list(found)
        raise ValueError(
            f"{names} have {len(found)} rows of at most {self.max_tokens} tokens for {part}; {count} are asked for."
        )

    def _encode(self, row: Row, side: str) -> tuple[list[int], int]:
        """Tokens of a prompt with a completion, and the number of those of the prompt."""
        template = self.tokenizer.apply_chat_template
        prompt = template(row["prompt"], add_generation_prompt=True, return_dict=False)
        return template(row["prompt"] + row[side], return_dict=False), len(prompt)


# --- scores ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihoods(model: Any, sequences: Sequence[tuple[list[int], int]], batch_size: int = 8) -> list[float]:
    """Log-likelihood of the tokens of each sequence after its first n, for pairs of a sequence and n."""
    model.eval()
    found = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(sequences[batch[-1]][0])
        first = min(sequences[index][1] for index in batch) - 1  # logits before it are not needed
        ids = torch.tensor([sequences[index][0] + [0] * (longest - len(sequences[index][0])) for index in batch])
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=longest - first).logits
        for index, row, scores in zip(batch, ids, logits, strict=True):
            prompt, end = sequences[index][1], len(sequences[index][0])  # padding comes last: no token sees it
            targets, predicted = row[prompt:end], scores[prompt - 1 - first : end - 1 - first]
            found[index] = -float(torch.nn.functional.cross_entropy(predicted, targets, reduction="sum"))
    return found


def mean_loss(model: Any, sequences: Sequence[tuple[list[int], int]]) -> float:
    """Mean cross-entropy of a token."""
    return -sum(log_likelihoods(model, sequences)) / sum(len(ids) - prompt for ids, prompt in sequences)


def preferences(model: Any, rows: Rows) -> list[float]:
    """Log-likelihood of the chosen minus that of the rejected answer, for each held-out pair."""
    chosen, rejected = log_likelihoods(model, rows.chosen), log_likelihoods(model, rows.rejected)
    return [a - b for a, b in zip(chosen, rejected, strict=True)]


def scores(model: Any, rows: Rows, reference: Sequence[float]) -> dict[str, float]:
    """Losses on held-out instructions and plain text, and DPO's metrics against `preferences` before training."""
    margins = BETA * (torch.tensor(preferences(model, rows)) - torch.tensor(reference))
    return {
        "sft_loss": mean_loss(model, rows.instructions),
        "text_loss": mean_loss(model, rows.text),
        "preference_loss": -float(torch.nn.functional.logsigmoid(margins).mean()),
        "accuracy": float((margins > 0).float().mean()),
        "margin": float(margins.mean()),
    }


# --- runs ------------------------------------------------------------------------------------------------------------


class SFTDoneError(Exception):
    """Ends a run at the start of its DPO stage."""


class UntilDPO(TrainerCallback):
    """Ends a run there; its folder is left as a run that can be resumed."""

    def __init__(self) -> None:
        self._stages = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the stages."""
        self._stages += 1
        if self._stages > 1:
            raise SFTDoneError


def build(job: Job, rows: Rows, model: Path, folder: Path, callbacks: list[TrainerCallback]) -> HBATTrainer:
    """Build a run of SFT and DPO."""
    section = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "max_length": rows.max_tokens,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "num_train_epochs": 1,
        "logging_steps": 8,
        "save_strategy": "no",
        "seed": job.seed,
    }
    return HBATTrainer(
        model=str(model),
        args=HBATConfig(
            output_dir=str(folder),
            num_rounds=1,
            objectives=["sft", "dpo"],
            sft=section,
            dpo=section | {"beta": BETA} | ({"learning_rate": job.rate} if job.rate else {}),
            # Nothing holds the first stage back, but at strength 0 it would record no importance for those after it.
            ewc={"strength": 1.0 if job.rate is None else job.strength},
            on_bad_rows="drop",
            disable_tqdm=True,
            seed=job.seed,
        ),
        train_dataset=rows.train,
        processing_class=rows.tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def run(job: Job, size: Size, model: Path, results: Path) -> dict[str, Any]:
    """Train and score one job; returns its record."""
    torch.set_num_threads(1)
    begun, cpu = time.perf_counter(), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = Rows(tokenizer, size, job.seed)
    found = run_sft(job, rows, model, results) if job.rate is None else run_dpo(job, rows, model, results)
    packages = ("hbat-trl", "torch", "transformers", "trl", "peft")
    return {
        "method": job.method, **asdict(job), **found, "size": asdict(size),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "command": " ".join(sys.argv),
        "seconds": round(time.perf_counter() - begun), "cpu_seconds": round(time.process_time() - cpu),
    }  # fmt: skip


def sft_folder(results: Path, seed: int) -> Path:
    """Folder of the run that ends after SFT."""
    return results / f"sft-{seed}"


def run_sft(job: Job, rows: Rows, model: Path, results: Path) -> dict[str, Any]:
    """Train the SFT stage, which all methods of a seed share."""
    folder = sft_folder(results, job.seed)
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted one
    trainer = build(job, rows, model, folder, [UntilDPO()])
    reference = preferences(trainer.model, rows)
    points = {"start": scores(trainer.model, rows, reference)}
    with contextlib.suppress(SFTDoneError):
        trainer.train()
    points["end"] = scores(trainer.model, rows, reference)
    return {
        "points": points, "reference": reference, "log": trainer.state.log_history, "lora_A": lora_a_shares(folder),
    }  # fmt: skip


def lora_a_shares(folder: Path) -> dict[str, float]:
    """How much of the penalty each source spends on the factors A, and how much of the change of B A they bring.

    The penalty is that of a stage which moves every weight as far as SFT did, the change that of squared norms,
    of which the rest is of the factors B and of both.
    """
    kinds = ("displacement-sft-000", "importance-sft-000", "weights-000", "weights-001")
    moved, path, start, end = (load_file(folder / "state" / f"{kind}.safetensors") for kind in kinds)
    sources = {
        "path": relative_importance(moved, path),
        "relative": relative_importance(moved),
        "uniform": dict.fromkeys(moved, torch.ones(())),
        "displacement": moved,
    }
    found = {}
    for source, importance in sources.items():
        paid = {name: float((importance[name].double() * each.double()).sum()) for name, each in moved.items()}
        found[source] = sum(each for name, each in paid.items() if "lora_A" in name) / sum(paid.values())
    own = whole = 0.0
    for name in start:
        if "lora_A" in name:
            a, b = ([each[key].double() for each in (start, end)] for key in (name, name.replace("lora_A", "lora_B")))
            own += float((b[1] @ (a[1] - a[0])).square().sum())
            whole += float((b[1] @ a[1] - b[0] @ a[0]).square().sum())
    return {name: round(share, 4) for name, share in {**found, "change": own / whole}.items()}


def run_dpo(job: Job, rows: Rows, model: Path, results: Path) -> dict[str, Any]:
    """Train the DPO stage from there, and score the line between the weights of both ends."""
    (sft,) = [each for each in read(results) if each["rate"] is None and each["seed"] == job.seed]
    with TemporaryDirectory(dir=results) as temporary:
        folder = Path(shutil.copytree(sft_folder(results, job.seed), Path(temporary) / "run"))
        start = Start()
        trainer = build(job, rows, model, folder, [start])
        trainer.train(resume_from_checkpoint=True, allow_changed=["ewc.strength", "dpo.learning_rate"])
    weights = {name: each for name, each in trainer.model.named_parameters() if each.requires_grad}
    end, points = {name: each.detach().clone() for name, each in weights.items()}, {}
    for share in SHARES:
        with torch.no_grad():
            for name, each in weights.items():
                each.copy_(torch.lerp(start.weights[name], end[name], share))
        points[f"{share:g}"] = scores(trainer.model, rows, sft["reference"])
    return {"points": points, "log": trainer.state.log_history}


class Start(TrainerCallback):
    """Keeps the trained weights at the start of the stage."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy them."""
        parameters = kwargs["model"].named_parameters()
        self.weights = {name: each.detach().clone() for name, each in parameters if each.requires_grad}


def read(results: Path) -> list[dict[str, Any]]:
    """Read the records of finished jobs."""
    file = results / "runs.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def work(jobs: Sequence[Job], size: Size, model: Path, results: Path, workers: int) -> None:
    """Run the jobs that are not in the results yet: every SFT stage, then what builds on it."""
    results.mkdir(parents=True, exist_ok=True)
    done = {(each["seed"], each["method"]) for each in read(results)}
    left = [each for each in jobs if (each.seed, each.method) not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for stage in (True, False):
            started = [pool.submit(run, each, size, model, results) for each in left if (each.rate is None) == stage]
            for finished in as_completed(started):
                record = finished.result()
                with (results / "runs.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"seed {record['seed']}: {record['method']}, {record['seconds']} s", flush=True)


# --- report ----------------------------------------------------------------------------------------------------------


def summary(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """Means and intervals over the seeds, by method and point, then by score."""
    found: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for record in sorted(records, key=lambda each: (each["rate"] is not None, each["strength"], each["rate"] or 0)):
        for point, scores_there in record["points"].items():
            found.setdefault((record["method"], point), []).append(scores_there)
    return {
        key: {column: interval([each[column] for each in scores_there]) for column in COLUMNS}
        for key, scores_there in found.items()
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Write the Markdown table."""
    lines = [f"| method | share | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for (method, point), row in summary(records).items():
        cells = " | ".join(f"{mean:.3f} ± {half:.3f}" for mean, half in row.values())
        lines.append(f"| {method} | {point} | {cells} |")
    return "\n".join([*lines, *_differences(records)]) + "\n"


def _differences(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of the penalty minus two-stage training at the same rate and share, paired by seed."""
    plain = {(record["rate"], record["seed"]): record["points"] for record in records if record["strength"] == 0}
    paired: dict[tuple[str, str], list[tuple[Mapping[str, float], Mapping[str, float]]]] = {}
    for record in records:
        other = plain.get((record["rate"], record["seed"]))
        if record["strength"] and other:
            for share, own in record["points"].items():
                paired.setdefault((record["method"], share), []).append((own, other[share]))
    for (method, share), pairs in paired.items():
        found = (interval([own[column] - other[column] for own, other in pairs]) for column in COLUMNS)
        cells = " | ".join(f"{mean:+.3f} ± {half:.3f}" for mean, half in found)
        yield f"| {method}, minus two-stage | {share} | {cells} |"


def draw(records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw what is kept against what is learned, one line of averaging for each method."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    means = summary(records)
    after_sft = means["SFT", "end"]
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, kept in zip(axes, ("sft_loss", "text_loss"), strict=True):
        for method in dict.fromkeys(method for method, _ in means if method != "SFT"):
            points = [after_sft, *(means[method, f"{share:g}"] for share in SHARES)]
            style = "o-" if "path" in method else "x--"
            axis.plot([p["preference_loss"][0] for p in points], [p[kept][0] for p in points], style, label=method)
        axis.plot(after_sft["preference_loss"][0], after_sft[kept][0], "k*", markersize=12, label="after SFT")
        axis.set_xlabel("preference loss, held out (better to the right)")
        axis.invert_xaxis()
        axis.set_ylabel(f"{COLUMNS[kept]}, held out (lower is better)")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def report(results: Path) -> None:
    """Print the table, and save it and the plot beside the records."""
    records = read(results)
    text = table(records)
    (results / "table.md").write_text(text, encoding="utf-8")
    draw(records, results / "front.png")
    print(text)


def main() -> None:
    """Run what is left to run, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("smollm2"), help="model folder (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time, a thread each (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few rows of one seed and rate, to see that it works")
    parser.add_argument("--report", action="store_true", help="only make table and plot of the records so far")
    options = parser.parse_args()
    if not options.report:
        if not (options.model / "config.json").is_file():
            sys.exit(
                f"There is no model in {options.model}. Make it with `smollm2.py`, or name its folder with `--model`."
            )
        if not DATA.is_dir():
            sys.exit(f"There is no sample data in {DATA}. Set HBAT_SHARED_DATA to its folder.")
        seeds, rates = ((0,), RATES[:1]) if options.smoke else (SEEDS, RATES)
        jobs = [Job(seed) for seed in seeds]
        # Every seed of a rate before the next rate: a programme that is cut off leaves whole lines of the table.
        jobs += [Job(seed, strength, rate) for rate in rates for seed in seeds for strength in STRENGTHS]
        work(jobs, SMOKE if options.smoke else Size(), options.model, options.results, options.workers)
    report(options.results)


if __name__ == "__main__":
    main()
