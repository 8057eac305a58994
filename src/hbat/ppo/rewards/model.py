"""A sequence classification model as reward, with a tokenizer of its own."""

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import find_adapter_config_file

from hbat.model.copies import wrapped_models
from hbat.model.load import damage_named, load_pretrained
from hbat.ppo.rewards.function import RewardWarning
from hbat.ppo.rollouts.prompts import padded

_ADVICE = (
    "Train one with TRL's `RewardTrainer` (with LoRA, `task_type='SEQ_CLS'` saves the head too), or name one with "
    "`num_labels` 1."
)


class RewardModel:
    """A sequence classification model with one label as a reward function; frozen and in evaluation mode from now on.

    It is no submodule of the trained model: no state dict, optimizer or checkpoint contains it.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, max_batch_size: int) -> None:
        self._model, self._tokenizer, self._name, self._max_batch_size = model, tokenizer, name, max_batch_size
        self._warned = False
        config = model.config.get_text_config()
        if model.get_output_embeddings() is not None:
            raise ValueError(
                f"The reward model {name!r}, a {type(model).__name__}, is a language model: it has no head for a "
                f"reward. {_ADVICE}"
            )
        if model.config.num_labels != 1:
            raise ValueError(
                f"The reward model {name!r}, a {type(model).__name__}, has num_labels={model.config.num_labels}; a "
                "reward is one number. Load it with `AutoModelForSequenceClassification.from_pretrained(..., "
                "num_labels=1)`."
            )
        self._pad_id = _pad_id(model, tokenizer, name)
        # RoBERTa's positions begin after its padding token's id, so its tokenizer knows the usable number.
        limits = (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
        self._most_tokens = min((limit for limit in limits if limit is not None and limit > 0), default=None)
        config.pad_token_id = self._pad_id  # or decoders do not find the end of a text in a batch
        config.use_cache = False
        model.requires_grad_(requires_grad=False)
        model.eval()

    def to(self, device: torch.device | str) -> None:
        """Move the model, unless it was loaded across devices (`device_map`)."""
        if getattr(self._model, "hf_device_map", None) is None:
            self._model.to(device)

    @property
    def base(self) -> Any:
        """The model with any adapter inside it: TRL knows no PeftModel as a reward."""
        return [*wrapped_models(self._model)][-1]

    def require_template(self) -> None:
        """Refuse conversations (ValueError) if the tokenizer has no chat template."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                f"The tokenizer of the reward model {self._name!r} has no chat template, but the prompts are "
                "conversations. Set its `chat_template` to the one that the model was trained with."
            )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """Score completions of prompts, texts or lists of messages: float32 on the CPU."""
        rows = self._shortened(self._tokenized(prompts, completions)) if len(completions) else []
        # Sorted by length, batches need little padding; the longest first, so that a lack of memory shows at once.
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        scores = torch.empty(len(rows))
        for start in range(0, len(rows), self._max_batch_size):
            batch = order[start : start + self._max_batch_size]
            scores[batch] = self._scores([rows[row] for row in batch])
        return scores

    def _tokenized(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[list[int]]:
        pairs = zip(prompts, completions, strict=True)
        # As in TRL's `RewardTrainer._prepare_dataset`: conversations are rendered by the chat template, while texts
        # end with EOS and get the special tokens that the tokenizer adds by default.
        if not isinstance(prompts[0], str):
            self.require_template()
            conversations = [[*prompt, *completion] for prompt, completion in pairs]
            rendered = self._tokenizer.apply_chat_template(
                conversations, tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}
            )
            return list(rendered["input_ids"])
        end = self._tokenizer.eos_token or ""  # encoders have none; their tokenizers end texts
        texts = [prompt + completion for prompt, completion in pairs]
        texts = [text if text.endswith(end) else text + end for text in texts]
        return list(self._tokenizer(texts, verbose=False)["input_ids"])

    def _shortened(self, rows: list[list[int]]) -> list[list[int]]:
        most = self._most_tokens
        longer = [len(row) for row in rows if most is not None and len(row) > most]
        if most is None or not longer:
            return rows
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(longer)} of {len(rows)} texts are longer than the {most} tokens that the reward model "
                f"{self._name!r} reads (the longest has {max(longer)}): it sees only their ends. Shorten prompts or "
                "completions if their beginnings matter. This warning is shown once.",
                RewardWarning,
                stacklevel=2,
            )
        return [row if len(row) <= most else self._ending(row, most) for row in rows]

    def _ending(self, row: list[int], most: int) -> list[int]:
        # Encoders read the score from their first token.
        first = row[:1] if row[0] in {self._tokenizer.bos_token_id, self._tokenizer.cls_token_id} else []
        return first + row[len(row) - most + len(first) :]

    @torch.no_grad()
    def _scores(self, rows: list[list[int]]) -> Tensor:
        ids, mask = padded(rows, self._pad_id, next(self._model.parameters()).device, side="right")
        logits: Tensor = self._model(input_ids=ids, attention_mask=mask).logits
        if logits.shape != (len(rows), 1):
            raise ValueError(
                f"The model returned logits of shape {tuple(logits.shape)} for {len(rows)} texts; it is not a "
                "sequence classification model with one label."
            )
        return logits[:, 0].float().cpu()


def load_reward_model(name: str | Path) -> Any:
    """Load a sequence classification model, or an adapter on one, in its saved precision.

    Raises:
        ValueError: If a part of it, such as its head, has no saved weights of the right shape: transformers makes them
            up.
    """
    adapter = find_adapter_config_file(str(name))
    base = name if adapter is None else json.loads(Path(adapter).read_text("utf-8"))["base_model_name_or_path"]
    model, found = load_pretrained(
        AutoModelForSequenceClassification,
        base,
        called="reward_funcs",
        num_labels=1,
        dtype="auto",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    mismatched = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]  # 4.57: names only
    made_up = sorted({*found["missing_keys"], *mismatched})
    if adapter is not None:
        made_up = _still_made_up(model, made_up, name)
    if made_up:
        owner = "it has no" if adapter is None else f"neither the adapter nor its base {str(base)!r} has"
        raise ValueError(
            f"{str(name)!r} is not a reward model: {owner} weights of the right shape for {made_up}. {_ADVICE}"
        )
    return model


def _still_made_up(model: Any, made_up: Sequence[str], adapter: str | Path) -> list[str]:
    # Load the adapter; NaN shows which of the made-up weights it does not bring.
    weights = model.state_dict()
    for key in made_up:
        weights[key].fill_(math.nan)
    with damage_named(adapter, "reward_funcs"):
        model.load_adapter(str(adapter))
    own = model.named_parameters() if made_up else []
    return [key for key, weight in own if weight.isnan().any() and "original_module" not in key.split(".")]


def load_reward_tokenizer(model: Any, name: str | Path) -> Any:
    """Load a reward model's tokenizer from the model's own name or path; ValueError if there is none."""
    advice = "Pass its tokenizer among the processing classes, at the model's position."
    if not str(name):
        raise ValueError(
            f"The reward model, a {type(model).__name__}, has no name or path to load a tokenizer from. {advice}"
        )
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:  # the last one from transformers 4.57
        raise ValueError(f"There is no tokenizer for the reward model {str(name)!r}. {advice}") from error


def is_reward_model(reward: Any) -> bool:
    """Whether a reward is a transformers model, bare, compiled or with an adapter."""
    return isinstance(reward, nn.Module) and hasattr(reward, "config")


def _pad_id(model: Any, tokenizer: Any, name: str) -> int:
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is not None and len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer of the reward model {name!r} has {len(tokenizer)} tokens, but the model only {rows} "
            "embeddings. Pass the tokenizer that the model was trained with among the processing classes."
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise ValueError(
            f"The tokenizer of the reward model {name!r} has neither a padding nor an end token. Set its `pad_token`."
        )
    return int(pad_id)
