"""Runs of HBATTrainer on tiny models, and the same runs by hand with nothing but TRL's own trainers."""

import inspect
import json

import cases
import oracle
import pytest
import torch
import trl
from safetensors.torch import load_file

from hbat.config.hbat import HBATConfig
from hbat.state.plan import part_indices
from hbat.trainer import HBATTrainer

ROWS = {"sft": cases.sft_rows, "dpo": cases.preference_rows}
#: Field of a section that switches gradient checkpointing; transformers 5.23 renamed it.
CHECKPOINTING = next(key for key in cases.CHEAP_ARGS if key.endswith("checkpointing"))
drops_rows = pytest.mark.skipif(
    "label != -100" not in inspect.getsource(trl.SFTTrainer), reason="this TRL trains on rows with nothing to learn"
)
#: Steps of a stage.
STEPS = 2
SEED = 5


def section(**options):
    """Fields of an objective's section: cheap, and nothing that belongs to the run."""
    cheap = {key: value for key, value in cases.CHEAP_ARGS.items() if key not in {"report_to", "disable_tqdm"}}
    return cheap | {"max_steps": STEPS} | options


def rows(count=8, **seeds):
    return {name: make(count, seeds.get(name, 3)) for name, make in ROWS.items()}


def config(folder, *, sft=None, dpo=None, **options):
    """Configuration of a run; without EWC and without carried moments unless asked for."""
    options = {"num_rounds": 2, "ewc": None, "optimizer_state": "reset", "disable_tqdm": True, "seed": SEED} | options
    return HBATConfig(output_dir=str(folder), sft=section(**(sft or {})), dpo=section(**(dpo or {})), **options)


def build_run(model, folder, *, data=None, evaluation=None, callbacks=None, peft_config=None, **options):
    return HBATTrainer(
        model=model,
        args=config(folder, **options),
        train_dataset=data or rows(),
        eval_dataset=evaluation,
        processing_class=cases.tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def train(model, folder, *, resume=None, **options):
    """Train a run to its end."""
    run = build_run(model, folder, **options)
    run.train(resume_from_checkpoint=resume)
    return run


def trainer_of(objective):
    return getattr(trl, f"{objective.upper()}Trainer")


EXPERIMENTAL = any(each.__module__.startswith("trl.experimental") for each in trl.KTOTrainer.__mro__)


needs_kto = pytest.mark.skipif(EXPERIMENTAL, reason="this TRL's KTOTrainer is experimental")


def kto_rows(count, seed=0):
    """Rows of `prompt`, `completion` and `label`, for an objective that is not built in."""
    return cases.sft_rows(count, seed).add_column("label", [index % 2 == 0 for index in range(count)])


def loaded(build, weights):
    """A fresh model of a case with the given trainable weights: no trainer has ever touched it."""
    model = build(0)
    with torch.no_grad():
        for name, each in cases.trainable(model).items():
            each.copy_(weights[name])
    return model


def by_hand(
    build, folder, *, num_rounds=2, data=None, sections=None, trainer_class=None, prepare=None, after=None, parts=None
):
    """The stages as plain TRL trainers, each on a fresh model that holds the weights of the last one's end.

    `trainer_class(stage, start)` may give another class, `prepare(stage, trainer)` may change the trainer before it
    trains, `after(stage, start, end)` may return other weights to go on with; a stage is (index, round, objective).
    `parts` has the rows of each stage by (round, objective), for others than N equal parts.
    Returns the weights at every boundary, the start first.
    """
    data = data or rows()
    weights = cases.weights(build(0))
    boundaries = [weights]
    stages = oracle.stages(num_rounds, list(data))
    for stage in stages if parts is None else [(index, *stage) for index, stage in enumerate(parts)]:
        index, number, objective = stage
        kind = objective.partition("_")[0]
        options = section(**(sections or {}).get(objective, {})) | {"output_dir": str(folder), "report_to": "none"}
        options["seed"] += index
        if parts is None:
            part = data[objective].select(part_indices(len(data[objective]), num_rounds, number, SEED))
        else:
            part = parts[number, objective]
        chosen = trainer_class(stage, weights) if trainer_class else None
        model = loaded(build, weights)
        arguments = {"train_dataset": part, "processing_class": cases.tiny_tokenizer()}
        if kind != "sft":
            reference = loaded(build, weights).requires_grad_(False)
            if hasattr(reference, "peft_config"):  # TRL looks for the backbone right below the reference
                reference = reference.get_base_model()
            arguments["ref_model"] = reference
        args = getattr(trl, f"{kind.upper()}Config")(**options)
        trainer = (chosen or trainer_of(kind))(model=model, args=args, **arguments)
        if prepare:
            prepare(stage, trainer)
        trainer.train()
        start, weights = weights, cases.weights(model)
        weights = (after(stage, start, weights) if after else None) or weights
        boundaries.append(weights)
    return boundaries


def same(first, second):
    """Whether two mappings of tensors are equal to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(run, key):
    """Values of one entry of a run's log, of all objectives where it names none, in order."""
    entries = (item for entry in run.state.log_history for item in entry.items())
    return [value for name, value in entries if f"/{name}".endswith(f"/{key}")]


def state_tensors(folder, kind):
    """Tensors of one kind in the state of a run on disk."""
    manifest = json.loads((folder / "hbat_state.json").read_text(encoding="utf-8"))
    return load_file(folder / "state" / manifest["files"][kind])
