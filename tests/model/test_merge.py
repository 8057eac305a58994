"""An adapter merged into its base: the same model in a folder of its own, or an error and no folder."""

import functools
import json

import cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hbat.model.merge import merge

peft = pytest.importorskip("peft")

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
lora = functools.partial(peft.LoraConfig, r=4, lora_alpha=8, **TARGETS)


@pytest.fixture
def adapter(tmp_path):
    """Save an adapter, moved by random numbers, and its base, whose tokenizer knows `new` more tokens."""

    def save(config, *, new=0, dtype=torch.float32, by=0.1, **model):
        tokenizer = cases.tiny_tokenizer()
        cases.tiny_llama(dtype=dtype, **model).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
        if new:
            tokenizer.add_tokens([f"<new-{number}>" for number in range(new)])
            base.resize_token_embeddings(len(tokenizer))
        trained = peft.get_peft_model(base, config)
        with torch.no_grad():
            for parameter in cases.trainable(trained).values():
                parameter.add_(by * torch.randn_like(parameter))
        trained.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        return trained.eval()

    return save


def logits(model):
    """Of every token that the model knows, each after another one."""
    ids = torch.arange(model.get_input_embeddings().weight.shape[0]).flip(0).view(-1, 1)
    ids = torch.cat([ids, ids.roll(7, 0)], dim=1)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def refusal(tmp_path, **options):
    with pytest.raises(ValueError, match=r".") as caught:
        merge(tmp_path / "adapter", tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists() or not list((tmp_path / "merged").iterdir())
    return str(caught.value)


ALL = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about tied embeddings and new tokens
KINDS = {
    "lora": lora(),
    "lora of all linear layers": lora(target_modules="all-linear"),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "biases": lora(bias="all"),
    "repeated layers": lora(layer_replication=[[0, 2], [1, 2]]),
    "lora of embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "lora of the head": lora(target_modules=["q_proj", "lm_head"]),
    "trained embeddings": lora(modules_to_save=["embed_tokens"]),
    "trained embeddings and head": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "trained tokens": lora(trainable_token_indices=[3, 4]),
    "ia3": peft.IA3Config(feedforward_modules=[], **TARGETS),
    "loha": peft.LoHaConfig(r=4, **TARGETS),
}


@ALL
@pytest.mark.parametrize(
    ("kind", "tied"), [*((kind, True) for kind in KINDS), ("lora", False), ("trained embeddings and head", False)]
)
def test_the_merged_model_computes_what_the_adapter_did(kind, tied, adapter, tmp_path):
    trained = adapter(KINDS[kind], tied=tied)
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-4)
    assert merged.difference < 1e-5 < merged.effect
    assert (merged.base, merged.dtype) == (str(tmp_path / "base"), "float32")
    assert merged.parameters == model.num_parameters()
    assert not [name for name in model.state_dict() if "lora" in name or "base_layer" in name]
    stays = tied and not {"head", "embeddings"} & set(kind.split())
    assert model.config.tie_word_embeddings == stays
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == stays


NEW = {
    "untrained": lora(),
    "modules": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lora(trainable_token_indices=[261, 262]),
}


@ALL
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", NEW)
def test_new_tokens_keep_their_embeddings(kind, tied, adapter, tmp_path):
    trained = adapter(NEW[kind], tied=tied, new=3)
    merge(tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.vocab_size == 264
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-4)


@ALL
def test_an_adapter_without_the_embeddings_of_its_new_tokens_is_refused(adapter, tmp_path):
    trained = adapter(lora(), new=3)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)  # as PEFT does without the Hub
    message = refusal(tmp_path)
    assert "saved without embeddings of tokens that its tokenizer adds" in message
    assert "Train these in `modules_to_save`" in message


def test_tokenizer_template_and_generation_config_lie_beside_the_weights(adapter, tmp_path):
    adapter(lora())
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = "{{ 1 }}", "<|assistant|>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.generation_config.update(do_sample=True, temperature=0.6)
    base.save_pretrained(tmp_path / "base")
    merge(tmp_path / "adapter", tmp_path / "merged")
    found = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (found.chat_template, found.eos_token) == ("{{ 1 }}", "<|assistant|>")
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
    assert generation.temperature == 0.6
    assert generation.eos_token_id == [3, 1]  # it ends where the tokenizer ends, and where the base did


@pytest.mark.parametrize(("asked", "found"), [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_the_dtype_is_that_of_the_base_or_the_one_that_is_asked_for(asked, found, adapter, tmp_path):
    adapter(lora(modules_to_save=["lm_head"]), dtype=torch.bfloat16)
    assert merge(tmp_path / "adapter", tmp_path / "merged", asked).dtype == found
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, found)}


@pytest.mark.parametrize("bits", ["4-bit", "8-bit"])
@pytest.mark.parametrize("where", ["loaded", "on disk"])
def test_a_base_in_few_bits_is_merged_in_full_precision(bits, where, tmp_path):
    pytest.importorskip("bitsandbytes")
    import qlora_cases

    qlora_cases.save_base(tmp_path / "base")
    model = qlora_cases.qlora(tmp_path / "base", bits)
    model.save_pretrained(tmp_path / "adapter")
    if where == "on disk":
        qlora_cases.base(tmp_path / "base", bits).save_pretrained(tmp_path / "few")
        cases.tiny_tokenizer().save_pretrained(tmp_path / "adapter")
        _edit(tmp_path, base_model_name_or_path=str(tmp_path / "few"))
    merge(tmp_path / "adapter", tmp_path / "merged", "bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert getattr(merged.config, "quantization_config", None) is None
    expected = qlora_cases.logits(model)
    apart = float((qlora_cases.logits(merged) - expected).norm() / expected.norm())
    assert apart < (0.5 if where == "loaded" else 0.05)  # of the weights that were quantised, and of these in full


def _edit(tmp_path, **values):
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_another_adapter_in_the_folder_is_left_aside(adapter, tmp_path):
    trained = adapter(lora())
    trained.add_adapter("ref", lora())
    trained.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "ref").is_dir()
    merge(tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-4)


# --- what cannot be merged -------------------------------------------------------------------------------------------


def test_a_full_model_is_said_to_be_one(tmp_path):
    cases.tiny_llama().save_pretrained(tmp_path / "adapter")
    assert "adapter holds a full model and no adapter: there is nothing to merge" in refusal(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    assert "holds no adapter. Give the folder of one, or of a finished run" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            "PEFT keeps PROMPT_TUNING beside the base",
        ),
        (lora(lora_bias=True), "cannot be merged: Impossible to merge LoRA with `lora_bias=True`"),
    ],
)
@ALL
def test_what_peft_cannot_merge_is_refused_with_its_reason(config, says, adapter, tmp_path):
    adapter(config)
    assert says in refusal(tmp_path)


def test_weights_that_are_not_finite_are_refused(adapter, tmp_path):
    adapter(lora())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, file)
    assert "computes NaN: its weights are damaged" in refusal(tmp_path)


@pytest.mark.parametrize(("dtype", "hint"), [("float32", ""), ("bfloat16", " Merge with `--dtype float32`.")])
def test_a_merge_that_loses_a_layer_is_found_out(dtype, hint, adapter, tmp_path, monkeypatch):
    adapter(lora(), by=0.3)
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda *args, **options: None)
    assert refusal(tmp_path, dtype=dtype).endswith(f" Nothing was saved.{hint}")


@pytest.mark.parametrize(
    ("base", "says"),
    [
        (None, "adapter_config.json is None, which cannot be loaded: "),
        ("nobody/nothing", "adapter_config.json is 'nobody/nothing', which cannot be loaded: "),
    ],
)
def test_a_base_that_is_not_there_is_named_with_the_file_that_names_it(base, says, adapter, tmp_path):
    adapter(lora())
    _edit(tmp_path, base_model_name_or_path=base)
    assert says in refusal(tmp_path)
