"""The runs of `deepspeed_runs` in bfloat16, and beside them plain TRL trainers under the same engine.

`torchrun --nproc_per_node 2 bf16_runs.py FOLDER STAGE MODE NAMES` leaves weights, logs and tables in FOLDER.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import ddp_runs
import deepspeed_runs
import runs
import torch
import transformers
import trl
from safetensors.torch import save_file
from transformers import TrainerCallback

from hbat import EWCCallback

STRENGTH = 0.5
#: Stages that take no step of any length.
STILL = {"still": {"objectives": ["sft", "dpo"]}, "still lora": {"objectives": ["sft", "dpo"], "model": "lora"}}


def coarse(seed):
    return cases.tiny_llama(seed).to(torch.bfloat16)


def lora_on_coarse(seed):
    """An adapter in float32, as PEFT makes it, on a base in bfloat16."""
    model = cases.lora_llama(seed)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


#: By name: a model, and whether plain trainers are given the weights of the last one's optimizer.
PLAIN = {
    "full": (cases.tiny_llama, True), "lora": (cases.lora_llama, True), "coarse": (coarse, False),
    "lora on coarse": (lora_on_coarse, True),
}  # fmt: skip


def precise(run, folder):
    """Of which precision a run leaves its model, and whether what it did not train is as it was."""
    before = dict(ddp_runs.model_of(folder.name.replace("-", " ")).named_parameters())
    left = {name: parameter for name, parameter in run.model.named_parameters() if not parameter.requires_grad}
    return {
        "dtypes": sorted({str(parameter.dtype) for parameter in run.model.parameters()}),
        "frozen": all(torch.equal(tensor, before[name]) for name, tensor in left.items()),
        "first drifts": first_drifts(run),
    }


def first_drifts(run):
    found = {}
    for entry in run.state.log_history:
        for name in entry:
            if name.endswith("/ewc/drift"):
                found.setdefault(entry["hbat/stage"], entry[name])
    return list(found.values())


class Rows:
    """The rows that the engine made of trained weights, one a group, of which each process steps its half."""

    def __init__(self, model, optimizer):
        self.zero = optimizer.optimizer
        names = {id(tensor): name for name, tensor in cases.trainable(model).items()}
        self.orders = [
            [(names[id(parameter)], parameter.shape) for parameter in group] for group in self.zero.bit16_groups
        ]
        self.pieces = list(self.zero.single_partition_of_fp32_groups)
        assert {tensor.dtype for tensor in self.pieces} == {torch.float32}

    def cut(self, tensors):
        found = []
        for order, piece in zip(self.orders, self.pieces, strict=True):
            row = torch.cat([tensors[name].detach().float().reshape(-1) for name, _ in order])
            row = torch.nn.functional.pad(row, (0, 2 * len(piece) - len(row)))
            found.append(row.chunk(2)[torch.distributed.get_rank()])
        return found

    def whole(self):
        found = {}
        for order, piece in zip(self.orders, self.pieces, strict=True):
            halves = [torch.empty_like(piece) for _ in range(2)]
            torch.distributed.all_gather(halves, piece.detach())
            row = torch.cat(halves)
            for name, shape in order:
                found[name], row = row[: shape.numel()].view(shape).clone(), row[shape.numel() :]
        return found

    def gradients(self):
        lists = (self.zero.averaged_gradients[number] for number in range(len(self.pieces)))
        rows = [torch.cat([gradient.reshape(-1) for gradient in parts]) for parts in lists]
        return [row[: len(piece)] for row, piece in zip(rows, self.pieces, strict=True)]


class HandOver(TrainerCallback):
    """Gives the engine weights to start from, and takes those that it ends with."""

    def __init__(self, start):
        self.start = self.end = start

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        rows = Rows(model, optimizer)
        for piece, start in zip(rows.pieces, rows.cut(self.start), strict=True):
            piece.data.copy_(start)

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.end = Rows(model, optimizer).whole()


def by_hand(folder, build, *, hands_over):
    """Weights at the end of plain TRL trainers, stage by stage."""
    over = []

    def begin(stage, start):
        over.append(HandOver(start))

    def attach(stage, trainer):
        if hands_over:
            trainer.add_callback(over[-1])

    def end(stage, start, weights):
        return over[-1].end if hands_over else None

    options = dict.fromkeys(("sft", "dpo"), ddp_runs.section(**ddp_runs.ADAM))
    return runs.by_hand(build, folder, sections=options, trainer_class=begin, prepare=attach, after=end)[-1]


def plain(folder):
    for name, (build, hands_over) in PLAIN.items():
        options = ddp_runs.section(**ddp_runs.ADAM)
        run = runs.train(build(0), folder / f"plain-{name}", sft=options, dpo=options, ewc={"strength": 0.0})
        expected = by_hand(folder / "by-hand", build, hands_over=hands_over)
        if torch.distributed.get_rank() == 0:
            save_file(cases.weights(run.model), folder / f"plain-{name}.safetensors")
            save_file(expected, folder / f"by-hand-{name}.safetensors")


class Spy(TrainerCallback):
    """Compares what the penalty adds to the engine's gradients with its closed form, in float64."""

    def __init__(self, importance, anchor):
        self.importance, self.anchor, self.seen = importance, anchor, []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rows = Rows(model, optimizer)
        engine, zero = self.trainer.accelerator.deepspeed_engine_wrapped.engine, self.rows.zero
        take, step = engine.step, zero.step
        engine.step = lambda *args, **kwargs: (self.before(engine), take(*args, **kwargs))[1]
        zero.step = lambda *args, **kwargs: (self.after(), step(*args, **kwargs))[1]

    def before(self, engine):
        if engine.is_gradient_accumulation_boundary():
            self.tasks = [gradient.clone() for gradient in self.rows.gradients()]

    def after(self):
        rows = self.rows
        parts = zip(
            self.tasks, rows.gradients(), rows.pieces, rows.cut(self.anchor), rows.cut(self.importance), strict=True
        )
        for task, found, piece, anchor, importance in parts:
            pull = 2.0 * STRENGTH * importance.double() * (piece.detach().double() - anchor.double())
            error = (found.double() - task.double() - pull).abs() / (task.double().abs() + pull.abs() + 1e-30)
            in_bfloat16 = task + pull.bfloat16()
            self.seen.append({
                "dtypes": [str(task.dtype), str(found.dtype)],
                "error": float(error.max()),
                "lost in bfloat16": float((in_bfloat16 == task)[pull != 0].float().mean()),
            })


def penalty(folder):
    """EWC bound to TRL's trainer, weak enough to be rounded away among gradients in bfloat16."""
    model = cases.tiny_llama(0)
    anchor = cases.weights(cases.tiny_llama(1))
    importance = {name: 1e-3 * tensor for name, tensor in cases.random_like(anchor, 2).items()}
    importance = {name: tensor.abs() for name, tensor in importance.items()}
    args = trl.SFTConfig(output_dir=str(folder / "alone"), report_to="none", disable_tqdm=True, **ddp_runs.section())
    spy = Spy(importance, anchor)
    trainer = trl.SFTTrainer(
        model, args, train_dataset=cases.sft_rows(24, 3), processing_class=cases.tiny_tokenizer(), callbacks=[spy]
    )
    spy.trainer = trainer
    EWCCallback(importance, anchor, strength=STRENGTH).bind(trainer)
    trainer.train()
    (folder / f"penalty-{torch.distributed.get_rank()}.json").write_text(json.dumps(spy.seen))
    trainer.accelerator.free_memory()


def main(folder, stage, mode, names):
    # transformers asks for a GPU; the engine computes in bfloat16 on CPUs too.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    ddp_runs.ENGINE["bf16"] = True
    ddp_runs.RUNS |= {name: options | {"section": {"learning_rate": 0.0}} for name, options in STILL.items()}
    ddp_runs.MORE_RESULTS.append(precise)
    deepspeed_runs.main(folder, stage, mode, names, before=[penalty, plain, deepspeed_runs.poison])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
