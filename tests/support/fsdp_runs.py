"""The runs of `ddp_runs`, with the model sharded by FSDP2.

`torchrun --nproc_per_node 2 fsdp_runs.py FOLDER MODE NAMES` leaves weights, logs and tables in FOLDER.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import ddp_runs
import ppo_cases
import shard_checks
import torch
import trl
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hbat import EWCCallback
from hbat.cli import main as cli
from hbat.engines.sharded import give_back, is_sharded, part_of
from hbat.ewc.parameters import trainable_parameters

#: How transformers writes its checkpoints within a stage: in shards, or put together.
STATE_DICT_TYPE = os.environ.get("STATE_DICT_TYPE", "SHARDED_STATE_DICT")
ENGINE = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": STATE_DICT_TYPE}}
#: What `accelerate launch` sets for the same from its own configuration: the only way before transformers 5.
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": STATE_DICT_TYPE,
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def shard_on_cpu():
    """Let accelerate run its FSDP on a CPU, where it silently ignores it.

    It asks for the kind of device alone: several processes on CPUs pass for several GPUs.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    prepare = PartialState._prepare_backend  # noqa: SLF001 - there is no public way

    def prepare_backend(self, *args, **kwargs):
        backend, kind = prepare(self, *args, **kwargs)
        return (backend, DistributedType.MULTI_GPU) if kind == DistributedType.MULTI_CPU else (backend, kind)

    PartialState._prepare_backend = prepare_backend  # noqa: SLF001


class Sharded(TrainerCallback):
    """Sees that what is trained is shared between the processes at every step: it could be plain DDP."""

    def look(self, model, *, gradients):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert trained
        for parameter in trained:
            assert isinstance(parameter, DTensor), type(parameter)
            assert parameter.device_mesh.size() == 2
            assert not gradients or isinstance(parameter.grad, DTensor), type(parameter.grad)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.look(model, gradients=False)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.look(model, gradients=True)


class Poison(TrainerCallback):
    """Puts NaN into the second process's part of a weight, after the last step of the second stage."""

    def __init__(self):
        self.stage = -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.stage += 1

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.stage == 1 and torch.distributed.get_rank() == 1:
            part_of(list(trainable_parameters(model).values())[2])[0] = torch.nan


def share_here(tensors):
    """Part of the elements that lies on this process; 1 where they are whole."""
    tensors = list(tensors)
    assert all(isinstance(tensor, DTensor) for tensor in tensors)
    return sum(part_of(tensor).numel() for tensor in tensors) / max(sum(tensor.numel() for tensor in tensors), 1)


def shares(run, folder):
    """What this process holds of all that is as large as the model."""
    start, accumulated = run._start, run._run.consolidation.accumulated  # noqa: SLF001
    found = {"anchor": share_here(start.anchor.values()), "model": share_here(run.model.parameters())}
    if start.reference is not None:
        give_back(start.reference)
        found["reference"] = share_here(start.reference.parameters())
    for name, record in accumulated.items():
        for kind, tensors in record.items():
            if any(tensor.dim() > 0 for tensor in tensors.values()):
                found[f"{kind} of {name}"] = share_here(tensors.values())
    return {"shares": found}


def saved(run, folder):
    run.save_model(folder / "model")
    return {}


def front(run, folder):
    """The scores at the start and the end of the last stage, and the model half way."""
    rows = run.front([0, 1]).rows
    run.move_to(0.5)
    run.save_model(folder / "half")
    return {"front": [row["scores"] for row in rows]}


def poison(folder):
    run = ddp_runs.build("sft and dpo", folder / "poison", callbacks=[Poison()])
    try:
        run.train()
    except FloatingPointError as error:
        (folder / f"poison-{torch.distributed.get_rank()}.txt").write_text(str(error))


def callback_alone(folder, engine, make=cases.tiny_llama):
    """EWC in TRL's trainer, by a callback that is given whole tensors and knows no trainer."""
    model = make(0)
    anchor = cases.weights(cases.tiny_llama(1))
    callback = EWCCallback(cases.random_like(anchor, 2), anchor, strength=0.5)
    options = {key: value for key, value in ddp_runs.section().items() if key != "ddp_backend"} | engine
    args = trl.SFTConfig(output_dir=str(folder / "alone"), report_to="none", disable_tqdm=True, **options)
    rows, tokenizer = cases.sft_rows(24, 3), cases.tiny_tokenizer()
    trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    return trainer


def ppo_alone(folder, engine, make=cases.tiny_llama):
    """PPOTrainer without a run, which shards a model by itself; and an evaluation of five rows by two processes."""
    options = ddp_runs.ppo_section() | engine
    options.pop("ddp_backend", None)
    trainer = ppo_cases.build(make(0), folder / "ppo alone", eval_dataset=ddp_runs.prompts(5), **options)
    trainer.train()
    trainer.evaluate()
    return trainer


ALONE = {"callback": callback_alone, "ppo": ppo_alone}


def alone(folder, make=cases.tiny_llama):
    for name, train in ALONE.items():
        trainer = train(folder, ddp_runs.ENGINE, make)
        assert is_sharded(trainer.model)
        weights = {
            key: ddp_runs.whole(tensor).contiguous() for key, tensor in trainable_parameters(trainer.model).items()
        }
        if torch.distributed.get_rank() == 0:
            save_file({key: tensor.detach() for key, tensor in weights.items()}, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(trainer.state.log_history))


def checks(folder):
    rank = torch.distributed.get_rank()
    (folder / f"checks-{rank}.json").write_text(json.dumps(shard_checks.check()))
    poison(folder)
    alone(folder)


def command_line(folder, **more):
    """Train with the command, from a model on disk that the main process alone reads."""
    if torch.distributed.get_rank() == 0:
        cases.tiny_llama(0).save_pretrained(folder / "base")
        cases.tiny_tokenizer().save_pretrained(folder / "base")
        rows = {"sft": cases.sft_rows(24, 3), "dpo": cases.preference_rows(24, 3)}
        for name, tensor in rows.items():
            tensor.to_json(folder / f"{name}.jsonl")
        sections = {name: ddp_runs.section() for name in rows}
        config = {
            "model_name_or_path": str(folder / "base"), "output_dir": str(folder / "run"), "num_rounds": 2,
            "objectives": ["sft", "dpo"], "seed": 5, "disable_tqdm": True, "ewc": {"strength": 5.0},
            "datasets": {name: str(folder / f"{name}.jsonl") for name in rows}, **sections, **more,
        }  # fmt: skip
        (folder / "run.yaml").write_text(json.dumps(config))  # which is YAML
    torch.distributed.barrier()
    status = cli.main(["train", "--config", str(folder / "run.yaml")])
    assert not status, status


def main(folder, mode, names):
    torch.set_num_threads(1)
    if mode != "without fsdp":
        shard_on_cpu()
    if "ACCELERATE_USE_FSDP" not in os.environ:
        ddp_runs.ENGINE |= ENGINE
    ddp_runs.CALLBACKS.append(Sharded)
    ddp_runs.MORE_RESULTS.extend([shares, saved, front])
    if mode == "command line":
        command_line(folder)
        return
    if mode == "train and check":
        checks(folder)
        ddp_runs.stop(folder, "lora")
    ddp_runs.main(folder, names, mode)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
