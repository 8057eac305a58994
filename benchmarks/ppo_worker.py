"""One PPO run of `benchmarks/ppo.py`, in the environment of hbat or in one with TRL's PPOTrainer.

    python benchmarks/ppo_worker.py '{"variant": "trl"}'

Prints one line of JSON: seconds, peak memory, and counts that show that all variants do the same work.
"""

import dataclasses
import importlib
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)
from workload import llama, status

PAD, END = 0, 1


@dataclasses.dataclass
class Work:
    """What a run does."""

    variant: str = "trl"  # or hbat's critic: `shared` or `separate`
    hidden: int = 384
    layers: int = 6
    vocabulary: int = 16000
    prompts: int = 16  # per rollout
    mini_batch: int = 4  # samples per optimizer step
    epochs: int = 4  # over a rollout
    rollouts: int = 3  # measured, after one that is not
    completion: int = 48  # max tokens
    lengths: str = "even"  # completions without an end, or `uneven` ones that end at random
    reward: str = "rule"  # on the text, or a `model`

    @property
    def steps(self) -> int:
        """Optimizer steps per rollout."""
        return self.prompts // self.mini_batch * self.epochs


class Meter(TrainerCallback):
    """Time of every rollout of `steps` trainer steps, and peak memory."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.peak = 0

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Reset the peak."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def on_step_end(self, _: object, state: Any, *__: object, **___: object) -> None:
        """Read the clocks at the end of a rollout."""
        if state.global_step % self._steps == 0:
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())

    def on_train_end(self, *_: object, **__: object) -> None:
        """Read the peak."""
        self.peak = status("VmHWM")


class Rule:
    """Rewards the share of distinct words, and counts what it scored."""

    __name__ = "distinct_words"

    def __init__(self) -> None:
        self.samples = 0
        self.words = 0

    def score(self, texts: list[str]) -> list[float]:
        """Score texts of prompt and completion."""
        words = [text.split() for text in texts]
        self.samples += len(texts)
        self.words += sum(map(len, words))
        return [len(set(text)) / max(len(text), 1) for text in words]

    def __call__(self, prompts: list[str], completions: list[str], **_: object) -> list[float]:
        """Score samples with the signature of a TRL reward function."""
        return self.score([f"{prompt}{completion}" for prompt, completion in zip(prompts, completions, strict=True)])


class RuleAsModel(nn.Module):
    """A rule as a reward model of TRL's PPOTrainer: a backbone whose hidden states a head scores."""

    base_model_prefix = "backbone"

    def __init__(self, rule: Rule, tokenizer: Any) -> None:
        super().__init__()
        self._rule = rule
        self._tokenizer = tokenizer

    @staticmethod
    def backbone(input_ids: Tensor, **_: object) -> SimpleNamespace:
        """Return the tokens as the hidden states."""
        return SimpleNamespace(hidden_states=[input_ids])

    def score(self, input_ids: Tensor) -> Tensor:
        """Score each sample, expanded to every position."""
        scores = self._rule.score(self._tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        return torch.tensor(scores)[:, None, None].expand(*input_ids.shape, 1)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A left-padding tokenizer with one token per word."""
    words = ["<pad>", "</s>", *(f"w{index}" for index in range(2, vocabulary))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[2]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=words[PAD], eos_token=words[END], padding_side="left"
    )


def policy_of(work: Work) -> Any:
    """A Llama with random weights; `uneven` completions have half the max length on average."""
    model = llama(work.hidden, work.layers, vocabulary=work.vocabulary)
    if work.lengths == "uneven":
        head = nn.Linear(work.hidden, work.vocabulary)
        head.weight = model.lm_head.weight
        with torch.no_grad():
            head.bias.zero_()[END] = math.log(2 * work.vocabulary / work.completion)
        model.lm_head = head
    return model


def sequence_model(work: Work, hidden: int, layers: int, seed: int) -> LlamaForSequenceClassification:
    """A reward or value model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=work.vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, pad_token_id=PAD, eos_token_id=END,
        bos_token_id=None, num_labels=1,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def prompts_of(work: Work) -> list[str]:
    """Random prompts of 16 to 48 words, one per sample."""
    chance = random.Random(1)
    count = work.prompts * (work.rollouts + 1)
    return [
        " ".join(f"w{chance.randrange(2, work.vocabulary)}" for _ in range(chance.randint(16, 48)))
        for _ in range(count)
    ]


def common(work: Work, folder: str) -> dict[str, Any]:
    """Fields of both trainers' configurations."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)
    return {
        "output_dir": folder, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
        "bf16": False, checkpointing: False, "learning_rate": 1e-6, "num_ppo_epochs": work.epochs,
        "gradient_accumulation_steps": 1, "temperature": 1.0, "kl_coef": 0.05, "kl_estimator": "k1", "cliprange": 0.2,
        "cliprange_value": 0.2, "vf_coef": 0.1, "gamma": 1.0, "lam": 0.95, "whiten_rewards": False,
        "missing_eos_penalty": None,
    }  # fmt: skip


def trl_trainer(work: Work, folder: str, rule: Rule, meter: Meter) -> Any:
    """Build TRL's PPOTrainer."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: PLC0415 - only there in one of the environments

    tokenizer = word_tokenizer(work.vocabulary)
    args = PPOConfig(
        per_device_train_batch_size=work.prompts,  # a rollout, where nothing is accumulated
        num_mini_batches=work.prompts // work.mini_batch,
        total_episodes=work.prompts * (work.rollouts + 1),
        response_length=work.completion,
        stop_token="eos" if work.lengths == "uneven" else None,
        num_sample_generations=0,
        **common(work, folder),
    )
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy_of(work),
        ref_model=None,  # a copy
        reward_model=sequence_model(work, 128, 2, 3) if work.reward == "model" else RuleAsModel(rule, tokenizer),
        value_model=sequence_model(work, work.hidden, work.layers, 2),
        train_dataset=Dataset.from_dict({
            "input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts_of(work)]
        }),
        callbacks=[meter],
    )


def own_trainer(work: Work, folder: str, rule: Rule, meter: Meter) -> Any:
    """Build hbat's PPOTrainer."""
    from hbat import PPOConfig, PPOTrainer  # noqa: PLC0415 - not loaded beside TRL's

    tokenizer = word_tokenizer(work.vocabulary)
    args = PPOConfig(
        per_device_train_batch_size=work.mini_batch,
        rollout_batch_size=work.prompts,
        max_completion_length=work.completion,
        generation_kwargs={"min_new_tokens": work.completion} if work.lengths == "even" else {},
        max_steps=work.steps * (work.rollouts + 1),
        logging_steps=work.steps,
        critic=work.variant,
        **common(work, folder),
    )
    return PPOTrainer(
        policy_of(work),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts_of(work)}),
        processing_class=tokenizer,
        reward_funcs=sequence_model(work, 128, 2, 3) if work.reward == "model" else rule,
        reward_processing_classes=tokenizer if work.reward == "model" else None,
        ref_model=None,
        callbacks=[meter],
    )


def measure(work: Work) -> dict[str, Any]:
    """Run the work and return what was measured."""
    rule, updates = Rule(), []
    trl = work.variant == "trl"
    # Imported first, so that code does not count as memory.
    importlib.import_module("trl.experimental.ppo.ppo_trainer" if trl else "hbat.ppo.trainer")
    meter = Meter(1 if trl else work.steps)
    register_optimizer_step_post_hook(lambda *_: updates.append(1))
    weights = sum(parameter.nbytes for parameter in policy_of(work).parameters())
    before = status("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        trainer = (trl_trainer if trl else own_trainer)(work, folder, rule, meter)
        trainer.train()
    phases: dict[str, float] = {}
    for entry in trainer.state.log_history[1:]:  # without the first rollout
        for key, value in entry.items():
            if key.startswith("seconds/"):
                phases[key.removeprefix("seconds/")] = phases.get(key.removeprefix("seconds/"), 0.0) + value
    return {
        "wall": meter.wall[-1] - meter.wall[1],
        "cpu": meter.cpu[-1] - meter.cpu[1],
        "rollouts": len(meter.wall) - 2,
        "peak": meter.peak - before,
        "weights": weights,
        "updates": len(updates),
        "scored": rule.samples,
        "words": rule.words,
        "phases": phases,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "accelerate")}
        | {"python": platform.python_version()},
    }


def main() -> None:
    """Run the work given on the command line."""
    warnings.simplefilter("ignore")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(1)
    print(json.dumps(measure(Work(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
