"""The runs of `ddp_runs`, with a model that transformers has sharded by FSDP2 when it loaded it.

`torchrun --nproc_per_node 2 loaded_shards_runs.py FOLDER MODE NAMES` leaves weights, logs and tables in FOLDER.
"""

import functools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import ddp_runs
import fsdp_runs
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hbat.ewc.parameters import trainable_parameters


def sharded(model):
    """The same model, read from disk by each process in its part."""
    from transformers.distributed import DistributedConfig

    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        torch.distributed.broadcast_object_list(folder)  # for transformers writes on the first process alone
        model.save_pretrained(folder[0])
        torch.distributed.barrier()
        config = DistributedConfig(fsdp_size=torch.distributed.get_world_size())
        result = AutoModelForCausalLM.from_pretrained(folder[0], distributed_config=config)
        torch.distributed.barrier()
        return result


def loaded(make, seed):
    """A case's model, its base in shards; an adapter is whole on every process, as transformers keeps it."""
    plain = make(seed)
    if not hasattr(plain, "peft_config"):
        return sharded(plain)
    from peft import get_peft_model

    adapter = plain.peft_config["default"]
    trained = cases.weights(plain)
    model = get_peft_model(sharded(plain.unload()), adapter)
    with torch.no_grad():
        for name, tensor in cases.trainable(model).items():
            tensor.copy_(trained[name])
    return model


def has_adapter(model):
    return any("lora_" in name for name, _ in model.named_parameters())


class Sharded(fsdp_runs.Sharded):
    """Sees at every step that the model is shared between the processes, adapters and what lies beside them aside."""

    def look(self, model, *, gradients):
        for name, parameter in model.named_parameters():
            if "lora_" in name or (name.startswith("critic.") and has_adapter(model)):
                continue
            assert isinstance(parameter, DTensor), (name, type(parameter))
            assert parameter.device_mesh.size() == 2
            assert not gradients or not parameter.requires_grad or isinstance(parameter.grad, DTensor), (
                name,
                type(parameter.grad),
            )


def shares(run, folder):
    """What this process holds of all that is as large as the model."""
    if has_adapter(run.model):
        base = [parameter for name, parameter in run.model.named_parameters() if "lora_" not in name]
        return {"shares": {"model": fsdp_runs.share_here(base)}}
    return fsdp_runs.shares(run, folder)


def held(run, folder):
    """Hooks by which an adapter would hold the trainer of a stage that is over."""
    return {"hooks": sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in run.model.parameters())}  # noqa: SLF001


def alone(folder):
    fsdp_runs.alone(folder, functools.partial(loaded, cases.tiny_llama))
    trainer = fsdp_runs.ppo_alone(folder, {}, functools.partial(loaded, cases.lora_llama))
    trainer.save_model(folder / "ppo")
    if torch.distributed.get_rank() == 0:
        save_file(
            {name: tensor.detach() for name, tensor in trainable_parameters(trainer.model).items()}, folder / "lora"
        )


def main(folder, mode, names):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if mode == "command line":
        fsdp_runs.command_line(folder, model_init_kwargs={"distributed_config": {"fsdp_size": 2}})
        return
    if mode == "alone":
        alone(folder)
        return
    ddp_runs.MODELS |= {name: functools.partial(loaded, make) for name, make in ddp_runs.MODELS.items()}
    ddp_runs.CALLBACKS.append(Sharded)
    ddp_runs.MORE_RESULTS.extend([shares, held, fsdp_runs.saved])
    ddp_runs.main(folder, names, mode)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
