"""The runs of `ddp_runs` under DeepSpeed's ZeRO-1, -2 or -3, on CPUs.

`torchrun --nproc_per_node 2 deepspeed_runs.py FOLDER STAGE MODE NAMES` leaves weights, logs and tables in FOLDER.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import ddp_runs
import launched
import torch
import trl
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from hbat import EWCCallback

#: Small buckets, so that even tiny models fill several.
BUCKETS = {"reduce_bucket_size": 4096, "allgather_bucket_size": 4096}
#: Under ZeRO-3 the same of weights; only the norms stay whole between the passes, as they do in large models.
PIECES = {
    "sub_group_size": 4096, "stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 4096,
    "stage3_max_live_parameters": 4096, "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip


def launch(worker, folder, stage, mode, *names):
    """Start this or another worker. DeepSpeed compiles its communication on CPUs once, which takes minutes."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja, which compiles
    return launched.launch(worker, folder, stage, mode, *names, environment={"PATH": tools}, timeout=1200)


def engine(stage):
    return {
        "zero_optimization": {"stage": stage} | BUCKETS | (PIECES if stage == 3 else {}),
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # which would compile one of its own
    }


class Engaged(TrainerCallback):
    """Sees that the optimizer has a piece of the weights: it could be plain DDP."""

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        zero = optimizer.optimizer
        if args.deepspeed_plugin.zero_stage == 3:
            self.see_pieces(model, zero)
            return
        assert type(zero).__name__ == "DeepSpeedZeroOptimizer", zero
        assert zero.partition_gradients == (args.deepspeed_plugin.zero_stage == 2)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        piece = sum(parameter.numel() for parameter in zero.single_partition_of_fp32_groups)
        assert 0.4 < piece / trained < 0.7, (piece, trained)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """The padding of ZeRO-3 is memory as it was found: it can hold anything."""
        if args.deepspeed_plugin.zero_stage == 3:
            for parameter in model.parameters():
                own = parameter.ds_numel - torch.distributed.get_rank() * parameter.ds_tensor.numel()
                parameter.ds_tensor[max(own, 0) :] = torch.nan

    @staticmethod
    def see_pieces(model, zero):
        assert type(zero).__name__ == "DeepSpeedZeroOptimizer_Stage3", zero
        assert all(parameter.numel() == 0 for parameter in model.parameters() if parameter.ds_numel > 100)
        trained = sum(parameter.ds_numel for parameter in model.parameters() if parameter.requires_grad)
        piece = sum(parameter.numel() for parameter in zero.fp32_partitioned_groups_flat)
        assert 0.4 < piece / trained < 0.7, (piece, trained)


class Poison(TrainerCallback):
    """Puts NaN into a weight of the second process at the second step of the second stage."""

    def __init__(self):
        self.stage = -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.stage += 1

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if (self.stage, state.global_step) == (1, 1) and torch.distributed.get_rank() == 1:
            weight = next(model.parameters())
            getattr(weight, "ds_tensor", weight.data).fill_(torch.nan)


def clean(run, folder):
    """That no stage left the engine's marks on the model, nor its memory."""
    parameters = list(run.model.parameters())
    own = {
        key
        for parameter in ddp_runs.model_of(folder.name.replace("-", " ")).parameters()
        for key in parameter.__dict__
    }
    marks = {key for parameter in parameters for key in parameter.__dict__} - own
    views = [
        parameter
        for parameter in parameters
        if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size()
    ]
    return {"marks": sorted(marks), "views": len(views)}


def saved(run, folder):
    run.save_model(folder / "model")
    return {}


def poison(folder):
    run = ddp_runs.build("sft and dpo", folder / "poison", callbacks=[Poison()])
    try:
        run.train()
    except FloatingPointError as error:
        (folder / f"poison-{torch.distributed.get_rank()}.txt").write_text(str(error))


def callback_alone(folder, *, bind=True):
    """EWC in TRL's trainer, bound to it or only in its `callbacks`."""
    model = cases.tiny_llama(0)
    anchor = cases.weights(cases.tiny_llama(1))
    callback = EWCCallback(cases.random_like(anchor, 2), anchor, strength=0.5)
    args = trl.SFTConfig(output_dir=str(folder / "alone"), report_to="none", disable_tqdm=True, **ddp_runs.section())
    rows, tokenizer = cases.sft_rows(24, 3), cases.tiny_tokenizer()
    callbacks = [] if bind else [callback]
    trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
    if bind:
        callback.bind(trainer)
    trainer.train()
    return trainer


def alone(folder):
    import deepspeed  # which looks into the environment that is set below

    trainer = callback_alone(folder)
    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):  # does nothing but with ZeRO-3
        weights = {name: tensor.clone() for name, tensor in cases.weights(trainer.model).items()}
    if torch.distributed.get_rank() == 0:
        save_file(weights, folder / "callback.safetensors")
        (folder / "callback.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.free_memory()
    try:
        callback_alone(folder, bind=False)
    except NotImplementedError as error:
        (folder / f"unbound-{torch.distributed.get_rank()}.txt").write_text(str(error))


def loaded(folder):
    """A run with a model that transformers loads while it knows of the engine: under ZeRO-3, piece by piece."""
    if torch.distributed.get_rank() == 0:
        cases.tiny_llama(5).save_pretrained(folder / "loaded")
    torch.distributed.barrier()
    args = trl.SFTConfig(output_dir=str(folder / "unused"), report_to="none", **ddp_runs.section())
    model = AutoModelForCausalLM.from_pretrained(folder / "loaded", dtype="float32")
    if args.deepspeed_plugin.zero_stage == 3:
        assert all(hasattr(parameter, "ds_tensor") for parameter in model.parameters())
    for given in (model, str(folder / "loaded")):
        run = ddp_runs.build("sft and dpo", folder / "loaded-run", model=given)
        assert cases.largest_difference(cases.weights(run.model), cases.weights(cases.tiny_llama(5))) == 0


def main(folder, stage, mode, names, *, before):
    config = folder / f"deepspeed-{os.environ['RANK']}.json"
    config.write_text(json.dumps(engine(stage)))
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config),
    }  # fmt: skip
    # With `use_cpu` transformers ignores DeepSpeed.
    ddp_runs.ENGINE |= {"use_cpu": False, "ddp_backend": "gloo"}
    ddp_runs.CALLBACKS.append(Engaged)
    ddp_runs.MORE_RESULTS.extend([clean, saved])
    if mode == "train and check":
        for check in before:
            check(folder)
    ddp_runs.main(folder, names, mode)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:], before=[poison, alone, loaded])
