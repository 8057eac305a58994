import warnings

import pytest
import torch
from cases import tiny_llama, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from scorers import foreign_tokenizer, tiny_encoder, tiny_scorer
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

from hbat.ppo.rewards.model import (
    RewardModel,
    RewardWarning,
    is_reward_model,
    load_reward_model,
    load_reward_tokenizer,
)

PROMPTS = ["1 plus 1?", "", "2 plus 2 plus 2 plus 2?", "3 plus 3?", "4?"]
COMPLETIONS = [" 2", " it is 3", " 5", " 6 or so it is or so", " 4</s>"]
CHATS = [[{"role": "user", "content": each}] for each in PROMPTS]
ANSWERS = [[{"role": "assistant", "content": each.strip()}] for each in COMPLETIONS]


def rewarder(model, tokenizer, batch=8):
    return RewardModel(model, tokenizer, name="judge", max_batch_size=batch)


@torch.no_grad()
def alone(model, rows):
    """The score of each row of tokens, computed on its own by transformers."""
    model.eval()
    return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])


def ended(tokenizer):
    """The texts as TRL's RewardTrainer prepares them."""
    end = tokenizer.eos_token
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    return [tokenizer(text if text.endswith(end) else text + end)["input_ids"] for text in texts]


def templated(tokenizer):
    return [
        tokenizer(tokenizer.apply_chat_template(chat + answer, tokenize=False), add_special_tokens=False)["input_ids"]
        for chat, answer in zip(CHATS, ANSWERS, strict=True)
    ]


def seen_by(model):
    """Tokens of every text that the model reads from now on, without padding."""
    seen = []

    def look(module, args, kwargs):
        pairs = zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True)
        seen.extend(row[: sum(mask)] for row, mask in pairs)

    model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, foreign_tokenizer])
def test_scores_of_texts_are_those_of_each_text_alone(tokenizer, batch):
    tokenizer = tokenizer()
    model, twin = tiny_scorer(vocabulary=len(tokenizer)), tiny_scorer(vocabulary=len(tokenizer))
    scores = rewarder(model, tokenizer, batch)(PROMPTS, COMPLETIONS)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    torch.testing.assert_close(scores, alone(twin, ended(tokenizer)), rtol=1e-5, atol=1e-6)
    assert scores.std() > 0.01  # the rows can be told apart


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, foreign_tokenizer])
def test_scores_of_conversations_follow_the_models_own_template(tokenizer):
    tokenizer = tokenizer()
    model, twin = tiny_scorer(vocabulary=len(tokenizer)), tiny_scorer(vocabulary=len(tokenizer))
    scores = rewarder(model, tokenizer, 2)(CHATS, ANSWERS)
    torch.testing.assert_close(scores, alone(twin, templated(tokenizer)), rtol=1e-5, atol=1e-6)


def test_an_encoder_without_end_token_scores_texts_as_its_tokenizer_makes_them():
    tokenizer = foreign_tokenizer()
    tokenizer.eos_token = None
    model, twin = tiny_encoder(vocabulary=len(tokenizer)), tiny_encoder(vocabulary=len(tokenizer))
    scores = rewarder(model, tokenizer, 2)(PROMPTS, COMPLETIONS)
    rows = [tokenizer(prompt + answer)["input_ids"] for prompt, answer in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(scores, alone(twin, rows), rtol=1e-5, atol=1e-6)


def test_a_model_that_pads_with_its_end_token_scores_as_alone():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    model, twin = tiny_scorer(), tiny_scorer()
    scores = rewarder(model, tokenizer, 2)(PROMPTS, COMPLETIONS)
    twin.config.pad_token_id = tokenizer.eos_token_id  # as RewardTrainer sets it
    torch.testing.assert_close(scores, alone(twin, ended(tokenizer)), rtol=1e-5, atol=1e-6)
    assert tokenizer.pad_token is None  # the caller's


def test_texts_end_with_one_end_token():
    model, tokenizer = tiny_scorer(), tiny_tokenizer()
    seen = seen_by(model)
    rewarder(model, tokenizer)(["a", "b"], ["x", "y</s>"])
    end = tokenizer.eos_token_id
    assert [row.count(end) for row in seen] == [1, 1]
    assert [row[-1] for row in seen] == [end, end]


def test_scores_follow_the_rows_order():
    model = rewarder(tiny_scorer(), tiny_tokenizer(), 2)
    order = [3, 0, 4, 2, 1]
    shuffled = model([PROMPTS[row] for row in order], [COMPLETIONS[row] for row in order])
    torch.testing.assert_close(shuffled, model(PROMPTS, COMPLETIONS)[order], rtol=1e-5, atol=1e-6)


def test_the_longest_texts_come_first_in_batches_of_at_most_the_given_size():
    model, shapes = tiny_scorer(), []
    model.register_forward_pre_hook(lambda *given: shapes.append(given[2]["input_ids"].shape), with_kwargs=True)
    rewarder(model, tiny_tokenizer(), 2)(["a"] * 5, ["x" * length for length in (1, 9, 3, 8, 2)])
    assert shapes == [(2, 11), (2, 5), (1, 3)]


def test_no_completions_give_no_scores():
    assert rewarder(tiny_scorer(), tiny_tokenizer())([], []).shape == (0,)


def test_scores_of_a_half_precision_model_are_float32():
    assert rewarder(tiny_scorer(dtype=torch.bfloat16), tiny_tokenizer())(["a"], ["b"]).dtype == torch.float32


# --- frozen ----------------------------------------------------------------------------------------------------------


def test_the_model_is_frozen_in_evaluation_mode_and_builds_no_graph():
    model, modes = tiny_scorer(dropout=0.5).train(), []
    model.register_forward_pre_hook(lambda *given: modes.append(torch.is_grad_enabled()))
    judge = rewarder(model, tiny_tokenizer())
    assert not model.training
    assert not any(each.requires_grad for each in model.parameters())
    assert torch.equal(judge(PROMPTS, COMPLETIONS), judge(PROMPTS, COMPLETIONS))
    assert modes == [False, False]


def test_scores_leave_gradient_mode_as_it_was():
    rewarder(tiny_scorer(), tiny_tokenizer())(PROMPTS, COMPLETIONS)
    assert torch.is_grad_enabled()


def test_batches_work_because_padding_and_cache_are_set():
    model = tiny_scorer()
    assert model.config.pad_token_id is None
    rewarder(model, tiny_tokenizer())
    assert (model.config.pad_token_id, model.config.use_cache) == (0, False)


def test_a_model_spread_over_devices_stays_where_it_is():
    model = tiny_scorer()
    model.hf_device_map = {"": "cpu"}
    rewarder(model, tiny_tokenizer()).to("meta")
    assert next(model.parameters()).device.type == "cpu"


# --- long texts ------------------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long_keeps_its_end_and_is_told_once():
    model, tokenizer = tiny_scorer(), tiny_tokenizer()
    tokenizer.model_max_length = 10**30  # as many tokenizers have it: no limit
    seen = seen_by(model)
    judge = rewarder(model, tokenizer)
    with pytest.warns(RewardWarning, match=r"1 of 2 texts are longer than the 128 tokens .*'judge'.* longest has 204"):
        judge(["x" * 200, "x"], ["yes", "no"])
    assert [len(row) for row in seen] == [128, 4]
    assert seen[0] == tokenizer("x" * 124 + "yes</s>")["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(["x" * 200], ["yes"])
        judge([[{"role": "user", "content": "x" * 200}]], [[{"role": "assistant", "content": "yes"}]])
    assert [len(row) for row in seen[2:]] == [128, 128]


def test_a_tokenizer_can_know_of_a_smaller_limit():
    model, tokenizer = tiny_scorer(), tiny_tokenizer()
    tokenizer.model_max_length = 5
    seen = seen_by(model)
    with pytest.warns(RewardWarning, match="the 5 tokens"):
        rewarder(model, tokenizer)(["abc"], ["def"])
    assert seen == [tokenizer("cdef</s>")["input_ids"]]


def test_a_beginning_token_survives_the_cut():
    tokenizer = foreign_tokenizer()
    tokenizer.model_max_length = 5
    model = tiny_encoder(vocabulary=len(tokenizer))
    seen = seen_by(model)
    with pytest.warns(RewardWarning):
        rewarder(model, tokenizer)(["1 plus 2 plus 3 ?"], [" it is 6"])
    assert tokenizer.convert_ids_to_tokens(seen[0]) == ["<s>", "it", "is", "6", "<end>"]


def test_a_text_of_exactly_the_limit_is_left_alone():
    model = tiny_scorer()
    seen = seen_by(model)
    rewarder(model, tiny_tokenizer())(["x" * 126], ["y"])
    assert len(seen[0]) == 128


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_with_several_outputs_is_refused():
    with pytest.raises(ValueError, match="'judge', a LlamaForSequenceClassification, has num_labels=2"):
        rewarder(tiny_scorer(labels=2), tiny_tokenizer())


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused():
    with pytest.raises(ValueError, match="'judge' has 261 tokens, but the model only 22 embeddings"):
        rewarder(tiny_scorer(vocabulary=22), tiny_tokenizer())
    rewarder(tiny_scorer(vocabulary=300), tiny_tokenizer())  # rows to spare do no harm


def test_a_tokenizer_with_nothing_to_pad_with_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="'judge' has neither a padding nor an end token"):
        rewarder(tiny_scorer(), tokenizer)


def test_conversations_without_a_template_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    judge = rewarder(tiny_scorer(), tokenizer)
    for refused in (judge.require_template, lambda: judge(CHATS, ANSWERS)):
        with pytest.raises(ValueError, match="'judge' has no chat template"):
            refused()
    assert judge(PROMPTS, COMPLETIONS).shape == (5,)


def test_a_model_that_scores_tokens_instead_of_texts_is_refused():
    model = LlamaForTokenClassification(tiny_scorer().config)
    with pytest.raises(ValueError, match=r"logits of shape \(5, \d+, 1\) for 5 texts"):
        rewarder(model, tiny_tokenizer())(PROMPTS, COMPLETIONS)


def test_a_language_model_in_place_of_a_reward_model_is_refused_before_it_scores():
    model = tiny_llama()
    model.config.num_labels = 1
    for given in (model, get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))):
        with pytest.raises(
            ValueError, match=r"'judge', a .*, is a language model: it has no head for a reward. Train"
        ):
            rewarder(given, tiny_tokenizer())


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_with_its_weights_and_precision(tmp_path):
    model = tiny_scorer(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.score.weight, model.score.weight)


def test_a_language_model_is_refused_rather_than_given_a_random_head(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a reward model: it has no weights of the right shape for \['score"):
        load_reward_model(tmp_path)


def test_a_classifier_with_several_labels_is_refused(tmp_path):
    tiny_scorer(labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weights of the right shape for \['score.weight'\]"):
        load_reward_model(str(tmp_path))


def test_an_adapter_brings_the_head_that_its_base_lacks(tmp_path):
    tiny_scorer().model.save_pretrained(tmp_path / "base")  # without head
    base = tiny_scorer().from_pretrained(tmp_path / "base", num_labels=1)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_reward_model(tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    assert is_reward_model(adapted)
    expected = rewarder(adapted, tokenizer)(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(rewarder(loaded, tokenizer)(PROMPTS, COMPLETIONS), expected)


def saved_adapter(folder, base, *, labels=1, **options):
    """Folder of a LoRA adapter on a saved `base`, which is read as what the adapter's task is."""
    base.save_pretrained(folder / "base")
    read = type(base) if options.get("task_type") == "CAUSAL_LM" else LlamaForSequenceClassification
    read = read.from_pretrained(folder / "base", num_labels=labels)
    adapted = get_peft_model(read, LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False} | options))
    adapted.save_pretrained(folder / "adapter")
    return adapted, folder / "adapter"


@pytest.mark.parametrize(
    "options",
    [{}, {"task_type": "CAUSAL_LM"}, {"target_modules": ["q_proj", "score"]}],
    ids=["no task", "of a language model", "low rank on the head"],
)
def test_an_adapter_is_refused_where_neither_it_nor_its_base_has_a_head(options, tmp_path):
    _, folder = saved_adapter(tmp_path, tiny_llama(), **options)
    with pytest.raises(ValueError, match=r"'.*adapter' is not .* nor its base '.*base' has weights .* for \['score\."):
        load_reward_model(folder)


def test_an_adapter_without_a_head_takes_that_of_its_base(tmp_path):
    base = tiny_scorer()
    adapted, folder = saved_adapter(tmp_path, base)
    loaded = load_reward_model(str(folder))
    assert torch.equal(loaded.score.weight, base.score.weight)
    expected = rewarder(adapted, tiny_tokenizer())(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(rewarder(loaded, tiny_tokenizer())(PROMPTS, COMPLETIONS), expected)


def test_an_adapter_with_a_head_of_several_labels_is_refused(tmp_path):
    _, folder = saved_adapter(tmp_path, tiny_llama(), labels=3, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"^`reward_funcs` '.*adapter': its weights cannot be loaded"):
        load_reward_model(folder)


def test_a_model_without_tokenizer_is_refused(tmp_path):
    model = tiny_scorer()
    with pytest.raises(
        ValueError, match="LlamaForSequenceClassification, has no name or path to load a tokenizer from"
    ):
        load_reward_tokenizer(model, "")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"There is no tokenizer for the reward model .* Pass its tokenizer"):
        load_reward_tokenizer(model, tmp_path)


def test_only_models_of_transformers_are_reward_models():
    assert is_reward_model(tiny_scorer())
    assert not is_reward_model(torch.nn.Linear(1, 1))
    assert not is_reward_model(len)
    assert not is_reward_model("judge")
