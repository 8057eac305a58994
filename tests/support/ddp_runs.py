"""Runs for one process or for several with DDP: the same work, whatever the number of processes.

`torchrun --nproc_per_node 2 ddp_runs.py FOLDER` runs them all and leaves weights, logs and tables in FOLDER.
"""

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import ppo_cases
import runs
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from hbat import HBATConfig, HBATTrainer
from hbat.stages.interruption import RunInterrupted

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
#: Rows of an optimizer step, over all processes.
BATCH = 4
#: What `fsdp_runs` sets: options of the sections, more callbacks, functions of a run and its folder with more results.
ENGINE = {}
CALLBACKS = []
MORE_RESULTS = []
#: Step at which each stage that was trained began; not 0 where it went on from a checkpoint.
BEGAN_AT = []


class Odd(torch.nn.Module):
    """A layer with numbers of parameters that two processes cannot share evenly, or not at all."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.factor = torch.nn.Parameter(torch.full((1,), 0.9))
        self.mix = torch.nn.Parameter(torch.linspace(-0.3, 0.3, 13 * 31).view(13, 31))

    def forward(self, hidden):  # (B, T, 32)
        return self.inner(hidden) * self.factor + torch.nn.functional.pad(hidden[..., :13] @ self.mix, (0, 1))


def odd_llama(seed):
    model = cases.tiny_llama(seed)
    model.model.norm = Odd(model.model.norm)
    return model


MODELS = {
    "full": cases.tiny_llama,
    "lora": cases.lora_llama,
    "lora of rank one": lambda seed: cases.lora_llama(seed, rank=1),  # shared by two, one part is empty
    "tied": lambda seed: cases.tiny_llama(seed, tied=True),
    "tied, lora": lambda seed: cases.lora_llama(seed, tied=True),
    "odd": odd_llama,  # shares of tensors end in padding, or are empty
}
#: Adam whose steps are not blown up where gradients are zero but for rounding.
ADAM = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 0.003}


def section(**options):
    """Plain gradient descent: Adam would blow the rounding of a sum of two halves up to a step of its own."""
    return runs.section(
        **{
            "per_device_train_batch_size": BATCH // PROCESSES,
            **({"ddp_backend": "gloo"} if PROCESSES > 1 else {}),
            **ENGINE,
            "per_device_eval_batch_size": 1,  # transformers takes the mean of the batches' means
            "learning_rate": 0.05,
            "max_steps": 3,
        }
        | options
    )


def ppo_section(**options):
    """One mini-batch a pass over greedy rollouts: processes draw and shuffle for themselves."""
    sizes = {"rollout_batch_size": None, "num_ppo_epochs": 2, "max_completion_length": 6, "max_steps": 4}
    return section(**sizes | {"top_k": 1, "learning_rate": 0.02} | options)


def prompts(count=16):
    return ppo_cases.prompts(count)


#: A pull many times the task's blows the rounding of sums up.
WEAK = {"strength": 0.05}
RUNS = {
    "sft and dpo": {"objectives": ["sft", "dpo"]},
    "lora": {"objectives": ["sft", "dpo"], "model": "lora"},
    "tied": {"objectives": ["sft", "dpo"], "model": "tied"},
    "tied, lora": {"objectives": ["sft", "dpo"], "model": "tied, lora"},
    "odd sizes": {"objectives": ["sft", "dpo"], "model": "odd"},
    "accumulation": {"objectives": ["sft", "dpo"], "accumulate": 2},
    "tensor importance, proximal": {
        "objectives": ["sft", "dpo"], "ewc": {"strength": 5.0, "granularity": "tensor", "method": "proximal"},
    },
    "fisher": {"objectives": ["sft", "dpo"], "ewc": {"strength": 5.0, "source": "fisher", "fisher_samples": 8}},
    "fisher of samples": {
        "objectives": ["sft", "dpo"],
        "ewc": {"strength": 5.0, "source": "fisher", "estimator": "empirical", "fisher_samples": 8},
    },
    "adam": {"objectives": ["sft", "dpo"], "section": ADAM},
    "adam and lora of rank one": {"objectives": ["sft", "dpo"], "model": "lora of rank one", "section": ADAM},
    "adam, freeze, end_weight, random importance": {
        "objectives": ["sft", "dpo"], "ewc": {"strength": 5.0, "source": "random", "freeze": 0.3}, "end_weight": 0.5,
        "section": ADAM,
    },
    "checkpointing": {"objectives": ["sft", "dpo"], "section": {runs.CHECKPOINTING: True}},
    "replay": {"objectives": ["sft", "dpo", "ppo"], "replay": {"sft": 0.4}, "ewc": None},  # one has no row
    "kto": {"objectives": ["sft", "kto"], "ewc": WEAK},
    "ppo": {"objectives": ["sft", "ppo"]},
    "adam, ppo and lora": {"objectives": ["sft", "ppo"], "model": "lora", "section": ADAM},
    "ppo with lora and a separate critic": {"objectives": ["sft", "ppo"], "model": "lora", "critic": "separate"},
}  # fmt: skip
#: Where TRL's score in several processes is another one: KTO's loss of a row depends on those beside it.
OTHER_TABLES = {"kto"}


def model_of(name):
    return MODELS[RUNS[name].get("model", "full")](0)


def build(name, folder, *, model=None, callbacks=None, save_steps=None, rounds=2, source=None):
    options = dict(RUNS[name])
    model = model_of(name) if model is None else model
    steps = options.get("accumulate", 1)
    more = options.get("section", {}) | {
        "gradient_accumulation_steps": steps,
        "per_device_train_batch_size": BATCH // PROCESSES // steps,
    }
    saves = {"save_strategy": "steps", "save_steps": save_steps} if save_steps else {}
    critic = {"critic": options.get("critic", "shared")}
    config = HBATConfig(
        output_dir=str(folder),
        continue_from=source and str(source),
        num_rounds=rounds,
        objectives=options["objectives"],
        sft=section(**more | saves),
        dpo=section(**more | saves),
        kto=section(**more | saves),
        ppo=ppo_section(**options.get("section", {}) | critic | saves),
        ewc=options.get("ewc", {"strength": 0.5}),
        end_weight=options.get("end_weight", 1.0),
        replay=options.get("replay"),
        disable_tqdm=True,
        seed=runs.SEED,
    )
    make = {"sft": cases.sft_rows, "dpo": cases.preference_rows, "kto": runs.kto_rows}
    data = {name: rows(24, 3) for name, rows in make.items()} | {"ppo": prompts()}
    held_out = {name: rows(6, 4) for name, rows in make.items()} | {"ppo": prompts(5)}
    return HBATTrainer(
        model,
        config,
        {name: data[name] for name in options["objectives"]},
        {name: held_out[name] for name in options["objectives"]},
        processing_class=cases.tiny_tokenizer(),
        reward_funcs=ppo_cases.letters if "ppo" in options["objectives"] else None,
        callbacks=[Began(), *(make() for make in CALLBACKS), *(callbacks or [])],
    )


def result(run):
    """What is compared between numbers of processes, beside the weights."""
    keep = (
        "/loss", "/ewc/penalty", "/ewc/drift", "/ewc/grad_norm_ratio", "/ewc/predicted", "/ewc/measured", "ppo/kl",
        "ppo/reward",
    )  # fmt: skip
    log = [
        {key: entry[key] for key in entry if key == "step" or key.endswith(keep)} for entry in run.state.log_history
    ]
    # TRL's other metrics are means over batches, weighted otherwise in several processes.
    table = {name: run.matrix.series(name) for name in run.args.objective_names}
    first = [entry for entry in run.state.log_history if "dpo/rewards/chosen" in entry]
    first = {entry["hbat/stage"]: entry for entry in reversed(first)}
    first = {
        str(stage): [tensor["dpo/rewards/chosen"], tensor["dpo/rewards/rejected"]] for stage, tensor in first.items()
    }
    transfer = run.matrix.backward_transfer()
    return {"log": log, "table": table, "transfer": transfer, "first rewards": first}


def train(name, folder, *, resume=None, **options):
    run = build(name, folder, **options)
    run.train(resume_from_checkpoint=resume)
    return run


def train_twice(name, folder):
    """A run of one round, and the run of one round that continues it."""
    train(name, folder / "first", rounds=1)
    return train(name, folder / "run", rounds=1, source=folder / "first")


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Began(TrainerCallback):
    """Notes at which step stages begin."""

    def on_train_begin(self, args, state, control, **kwargs):
        BEGAN_AT.append(state.global_step)


class Gone(TrainerCallback):
    """All processes vanish at one step of one stage."""

    def __init__(self):
        self.stage = -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.stage += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.stage == 3 and state.global_step == 2:
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


class Signalled(Gone):
    """The first process alone gets a signal to end."""

    def on_step_end(self, args, state, control, **kwargs):
        if self.stage == 3 and state.global_step == 1 and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class Told(Gone):
    """The launcher is told to end, as schedulers do it, and hands that on to its processes."""

    def on_step_end(self, args, state, control, **kwargs):
        if self.stage != 3 or state.global_step != 1:
            return
        heard, handler = threading.Event(), logging.Handler()
        handler.emit = lambda record: heard.set()
        logging.getLogger("hbat.stages.interruption").addHandler(handler)
        torch.distributed.barrier()  # neither process is told before it listens
        if args.process_index == 0:
            os.kill(os.getppid(), signal.SIGTERM)
        assert heard.wait(20)  # the launcher kills what is there after 30 seconds


def leave(run, place):
    """Write what is compared with a run in one process."""
    rank = int(os.environ["RANK"])
    assert torch.distributed.get_world_size() == PROCESSES == 2
    weights = {key: whole(tensor).contiguous() for key, tensor in cases.weights(run.model).items()}
    save_file(weights, place / f"weights-{rank}.safetensors")
    found = result(run) | {"began at": BEGAN_AT.copy(), "processes": PROCESSES}
    for more in MORE_RESULTS:
        found |= more(run, place)
    (place / f"result-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def stop(folder, name="sft and dpo"):
    """A run that a signal stops inside a stage and that resumes in the same processes."""
    BEGAN_AT.clear()
    place = folder / "stopped" / name.replace(" ", "-")
    try:
        train(name, place / "run", callbacks=[Signalled()])
    except RunInterrupted:
        leave(train(name, place / "run", resume=True), place)


def main(folder, names, mode):
    torch.set_num_threads(1)
    if mode == "train and stop":
        stop(folder)
    for name in names:
        BEGAN_AT.clear()
        place = folder / name.replace(" ", "-")
        if mode == "kill":
            train(name, place / "run", callbacks=[Gone()], save_steps=1)
        if mode == "end":
            train(name, place / "run", callbacks=[Told()])
        if mode == "continue":
            run = train_twice(name, place)
        else:
            run = train(name, place / "run", resume=mode == "resume", save_steps=1 if mode == "resume" else None)
        leave(run, place)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:] or list(RUNS), sys.argv[2])
