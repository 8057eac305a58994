"""Stages of a run over the same stages as plain TRL trainers, on a model of 7B parameters: tokens/s and memory.

A model with random weights in the shape of Llama 2 7B, in bfloat16 (LoRA) and in 4 bits (QLoRA); two rounds of SFT and
DPO with gradient checkpointing. Variants run in turn, each on a freshly loaded model. Speed is that of the steps after
the first, in tokens of the policy (DPO's reference reads as many again). `whole` is the wall time from the loaded
model to the trained one, with checks, data splitting and the state on disk. Without a GPU: toy size on the CPU.

    python benchmarks/gpu/stages.py [--toy] [--repeats 3] [--precision bf16 qlora]
"""

import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from scale import (
    SCALES,
    Meter,
    Scale,
    device,
    hardware,
    load_with_adapter,
    now,
    parser_of,
    release,
    save_base,
    scale_name,
)
from transformers import AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from workload import rows, save

from hbat import HBATConfig, HBATTrainer
from hbat.state.plan import part_indices

ROUNDS = 2
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain TRL": None,
    "hbat, no EWC": {"ewc": None, "optimizer_state": "reset"},
    "hbat, EWC": {},
}


def sections(scale: Scale) -> dict[str, dict[str, Any]]:
    """Fields of the TRL configurations by objective."""
    shared = {
        "bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-4, "logging_steps": 1,
        "max_length": 2 * scale.letters + 2, "max_steps": scale.steps, "save_strategy": "no",
        "use_cpu": device().type == "cpu",
    }  # fmt: skip
    return {
        "sft": shared | {"per_device_train_batch_size": scale.batch},
        "dpo": shared | {"per_device_train_batch_size": scale.batch // 2},
    }


def data_of(scale: Scale) -> dict[str, Dataset]:
    """As many rows as the steps take."""
    count = ROUNDS * scale.steps * scale.batch
    return {
        "sft": rows(count, scale.letters, preference=False, seed=1),
        "dpo": rows(count // 2, scale.letters, preference=True, seed=2),
    }


def tokens_of_a_step(data: dict[str, Dataset], scale: Scale) -> dict[str, float]:
    """Mean tokens per step: one per letter, and the end of each answer."""
    sft = [len(row["prompt"]) + len(row["completion"]) + 1 for row in data["sft"]]
    dpo = [2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 2 for row in data["dpo"]]
    return {"sft": statistics.mean(sft) * scale.batch, "dpo": statistics.mean(dpo) * (scale.batch // 2)}


def plain(model: Any, tokenizer: Any, data: dict[str, Dataset], scale: Scale, meter: Meter) -> None:
    """Run the stages as plain TRL trainers."""
    kinds = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}
    for stage in range(2 * ROUNDS):
        name = ("sft", "dpo")[stage % 2]
        config_class, trainer_class = kinds[name]
        part = data[name].select(part_indices(len(data[name]), ROUNDS, stage // 2, 42))
        with tempfile.TemporaryDirectory() as folder:
            args = config_class(folder, report_to="none", disable_tqdm=True, seed=42 + stage, **sections(scale)[name])
            trainer = trainer_class(
                model, args=args, train_dataset=part, processing_class=tokenizer, callbacks=[meter]
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        trainer.accelerator.free_memory()
        if "ref" in model.peft_config:  # or the next DPO trainer rejects the model
            model.delete_adapter("ref")
        for key in (
            "forward",
            "_original_forward",
            "_is_accelerate_prepared",
        ):  # or the next trainer runs without mixed precision
            model.__dict__.pop(key, None)


def hybrid(
    model: Any, tokenizer: Any, data: dict[str, Dataset], scale: Scale, meter: Meter, options: dict[str, Any]
) -> None:
    """Run the stages with HBATTrainer."""
    with tempfile.TemporaryDirectory() as folder:
        config = HBATConfig(output_dir=folder, num_rounds=ROUNDS, disable_tqdm=True, **sections(scale), **options)
        HBATTrainer(model, config, data, processing_class=tokenizer, callbacks=[meter]).train()


def measure(folder: Path, scale: Scale, variant: str, *, quantized: bool) -> dict[str, Any]:
    """Seconds of a variant, and tokens per second and peak bytes by objective."""
    release()
    model, tokenizer = load_with_adapter(folder, scale, quantized=quantized), AutoTokenizer.from_pretrained(folder)
    data, meter, options = data_of(scale), Meter(), VARIANTS[variant]
    start = now()
    if options is None:
        plain(model, tokenizer, data, scale, meter)
    else:
        hybrid(model, tokenizer, data, scale, meter, options)
    result: dict[str, Any] = {"whole": now() - start}
    for name, tokens in tokens_of_a_step(data, scale).items():
        stages = [stage for stage in meter.stages if stage["objective"] == name]
        seconds = sum(stage["seconds"] for stage in stages)
        speed = len(stages) * (scale.steps - 1) * tokens / seconds
        result[name] = {"tokens_per_second": speed, "peak": stages[-1]["peak"], "stages": stages}
    return result


def report(precision: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print the table of one precision and return it as a mapping."""
    print(
        f"{precision:14}{'whole s':>9}{'ratio':>7}" + "".join(f"{n:>5} tokens/s  ratio  MiB" for n in ("sft", "dpo"))
    )
    result = {}
    for name, repeats in runs.items():
        pairs = list(zip(repeats, runs["plain TRL"], strict=True))
        ratios = {"whole": statistics.median(own["whole"] / base["whole"] for own, base in pairs)}
        cells = f"{statistics.median(own['whole'] for own in repeats):9.1f}{ratios['whole']:7.3f}"
        for key in ("sft", "dpo"):
            speeds = [own[key]["tokens_per_second"] for own in repeats]
            ratios[key] = statistics.median(
                own[key]["tokens_per_second"] / base[key]["tokens_per_second"] for own, base in pairs
            )
            peak = max(own[key]["peak"] for own in repeats)
            ratios[f"{key}_peak"] = peak / max(base[key]["peak"] for base in runs["plain TRL"])
            cells += f"{statistics.median(speeds):12.0f}{ratios[key]:8.3f}{peak / 2**20:7.0f}"
        print(f"{name:14}{cells}")
        result[name] = {"over_plain": ratios, "runs": repeats}
    return result


def main() -> None:
    """Measure the variants in turn and print a table per precision."""
    parser = parser_of(__doc__)
    parser.add_argument("--precision", nargs="+", choices=("bf16", "qlora"), default=["bf16", "qlora"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bars()
    name = scale_name(toy=given.toy)
    scale, result = SCALES[name], {}
    with tempfile.TemporaryDirectory() as folder:
        save_base(scale, Path(folder))
        for precision in given.precision:
            runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
            for _ in range(given.repeats):
                for variant, measured in runs.items():
                    measured.append(measure(Path(folder), scale, variant, quantized=precision == "qlora"))
            result[precision] = report(precision, runs)
    described = {"scale": name, "rounds": ROUNDS, "steps_per_stage": scale.steps, "hardware": hardware()}
    save("gpu-stages", described | {"precisions": result}, given.results)


if __name__ == "__main__":
    main()
