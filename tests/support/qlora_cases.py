"""Adapters on quantised tiny models: the models on disk, in 4 or 8 bits by bitsandbytes, and runs on them."""

import cases
import ppo_cases
import runs
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hbat.config.hbat import HBATConfig
from hbat.model.load import keep_differentiable
from hbat.trainer import HBATTrainer

#: Wide enough for a matrix of the adapter to have optimizer moments in 8 bits, which bitsandbytes keeps from 4096 on.
WIDTH, RANK = 128, 32
KINDS = {"4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8-bit": {"load_in_8bit": True}}
DATA = {
    "sft": lambda: cases.sft_rows(16, 3),
    "dpo": lambda: cases.preference_rows(16, 3),
    "ppo": lambda: ppo_cases.prompts(16),
}
#: Two optimizer steps a rollout, two rollouts a stage.
PPO = {"rollout_batch_size": 4, "num_ppo_epochs": 1, "max_completion_length": 6, "max_steps": 4}


def save_base(folder):
    cases.tiny_llama(hidden=WIDTH).save_pretrained(folder)
    cases.tiny_tokenizer().save_pretrained(folder)
    return folder


def base(folder, kind, **options):
    """The model in few bits; kind None gives the full one."""
    quantised = {} if kind is None else {"quantization_config": BitsAndBytesConfig(**KINDS[kind] | options)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **quantised)
    keep_differentiable(model)
    return model


def lora():
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def qlora(folder, kind, *, dtype=torch.float32, **options):
    """The same with an adapter that is not zero."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(base(folder, kind, **options), lora())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
    return model


def build(model, folder, preference, *, sections=None, callbacks=None, evaluation=None, **options):
    """A run of SFT and a preference objective with a penalty."""
    sections = {"sft": {}, "dpo": {}, "ppo": PPO} | (sections or {})
    chosen = ["sft", preference]
    settings = {"num_rounds": 2, "ewc": {"strength": 1.0}, "disable_tqdm": True, "seed": runs.SEED} | options
    return HBATTrainer(
        model,
        HBATConfig(
            output_dir=str(folder),
            objectives=chosen,
            **{name: runs.section(**({"learning_rate": 0.05} | sections[name])) for name in chosen},
            **settings,
        ),
        {name: DATA[name]() for name in chosen},
        evaluation,
        processing_class=cases.tiny_tokenizer(),
        reward_funcs=ppo_cases.letters if preference == "ppo" else None,
        callbacks=callbacks,
    )


def train(model, folder, preference, *, resume=None, **options):
    run = build(model, folder, preference, **options)
    run.train(resume_from_checkpoint=resume)
    return run


def logits(model):
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
