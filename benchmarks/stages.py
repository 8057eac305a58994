"""Cost of alternation: a run of 8 stages over the same 8 stages as plain TRL trainers, timed in turn.

Both build a trainer per stage, train the same rows with the same seeds on one model, and give DPO a reference model
with the weights at the start of the stage. The run also splits the data, guards the model and writes its state.

    python benchmarks/stages.py [--repeats 3] [--steps 12]
    torchrun --standalone --nproc_per_node 2 benchmarks/stages.py [--repeats 3] [--steps 12]

With several processes, each with its own batches, the times are those of the slowest.
"""

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import disable_progress_bars
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from workload import byte_tokenizer, in_turn, llama, ratio, rows, save

from hbat import HBATConfig, HBATTrainer
from hbat.model.copies import unpatched_copy
from hbat.state.plan import part_indices

ROUNDS = 4
BATCH = 8


@contextmanager
def shared_folder() -> Iterator[str]:
    """A temporary folder, the same in all processes."""
    with tempfile.TemporaryDirectory() as own:
        yield broadcast_object_list([own])[0]
        PartialState().wait_for_everyone()


def slowest(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Times of the slowest process, by variant, clock and repeat."""
    everyone = gather_object([times])
    return {
        name: {
            clock: [max(repeat) for repeat in zip(*(process[name][clock] for process in everyone), strict=True)]
            for clock in clocks
        }
        for name, clocks in times.items()
    }


def section(steps: int) -> dict[str, object]:
    """Fields of both configurations."""
    return {
        "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-4, "logging_steps": 5, "max_length": 256,
        "max_steps": steps, "per_device_train_batch_size": BATCH, "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip


def plain(data: dict, tokenizer: object, steps: int) -> None:
    """Run the stages as plain TRL trainers."""
    model = llama(192, 4)
    reference = unpatched_copy(model)
    for stage in range(2 * ROUNDS):
        name = ("sft", "dpo")[stage % 2]
        part = data[name].select(part_indices(len(data[name]), ROUNDS, stage // 2, 42))
        common = section(steps) | {"report_to": "none", "disable_tqdm": True, "seed": 42 + stage}
        with tempfile.TemporaryDirectory() as folder:
            if name == "sft":
                args = SFTConfig(output_dir=folder, **common)
                trainer = SFTTrainer(model, args=args, train_dataset=part, processing_class=tokenizer)
            else:
                reference.load_state_dict(model.state_dict())
                args = DPOConfig(output_dir=folder, **common)
                trainer = DPOTrainer(
                    model, ref_model=reference, args=args, train_dataset=part, processing_class=tokenizer
                )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        for trained in (model, reference):  # or accelerate's wrappers of forward pile up
            for key in ("forward", "_original_forward", "_is_accelerate_prepared"):
                trained.__dict__.pop(key, None)


def hybrid(data: dict, tokenizer: object, steps: int, **options: object) -> None:
    """Run the stages with HBATTrainer."""
    with shared_folder() as folder:
        config = HBATConfig(
            output_dir=folder, num_rounds=ROUNDS, sft=section(steps), dpo=section(steps), disable_tqdm=True, **options
        )
        HBATTrainer(llama(192, 4), config, data, processing_class=tokenizer).train()


def main() -> None:
    """Time the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    disable_progress_bars()
    processes = PartialState(cpu=True)
    tokenizer = byte_tokenizer()
    count = BATCH * given.steps * ROUNDS * processes.num_processes
    data = {
        "sft": rows(count, 60, preference=False, seed=1),
        "dpo": rows(count, 60, preference=True, seed=2),
    }
    bare = {"ewc": None, "optimizer_state": "reset"}
    times = in_turn(
        {
            "plain TRL": lambda: plain(data, tokenizer, given.steps),
            "hbat, no EWC": lambda: hybrid(data, tokenizer, given.steps, **bare),
            "hbat, default": lambda: hybrid(data, tokenizer, given.steps),
        },
        given.repeats,
    )
    times = slowest(times)
    if not processes.is_main_process:
        return
    print(f"{'8 stages':16}{'wall s (min)':>14}{'wall ratio':>12}{'cpu ratio':>12}")
    result = {}
    for name, clocks in times.items():
        ratios = {clock: ratio(times, name, "plain TRL", clock) for clock in ("wall", "cpu")}
        result[name] = {"wall_s": clocks["wall"], "cpu_s": clocks["cpu"], "ratio": ratios}
        print(f"{name:16}{min(clocks['wall']):14.2f}{ratios['wall']:12.3f}{ratios['cpu']:12.3f}")
    name = "stages" if processes.num_processes == 1 else f"stages-{processes.num_processes}-processes"
    save(name, {"steps_per_stage": given.steps, "variants": result})


if __name__ == "__main__":
    main()
