import sys

import cases
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from hbat.config.hbat import HBATConfig
from hbat.ewc.parameters import trainable_parameters
from hbat.model import load
from hbat.model.load import (
    PrecisionWarning,
    is_adapter,
    load_tokenizer,
    make_trainable,
    require_adapter_parameters,
    shared_init_kwargs,
)

peft = pytest.importorskip("peft")
PAD, END = cases.SPECIAL_TOKENS[:2]


def config(**options):
    return HBATConfig(output_dir="unused", **options)


def load_model(model, args, peft_config):
    """As a run does, but for its tokenizer."""
    return make_trainable(load.load_model(model, args, gets_adapter=peft_config is not None), args, peft_config)


def lora(**options):
    return peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model in bfloat16 with its tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("model")
    cases.bf16_llama(7).save_pretrained(folder)
    cases.tiny_tokenizer().save_pretrained(folder)
    return folder


# --- model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["text", "path"])
def test_a_model_is_loaded_from_its_folder_in_float32(kind, saved):
    model = load_model(kind(saved), config(), None)
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    expected = cases.weights(cases.bf16_llama(7).float())
    assert cases.largest_difference(cases.weights(model), expected) == 0.0


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_a_precision_that_was_asked_for_is_kept_and_warned_about(key, saved):
    with pytest.warns(PrecisionWarning, match=r"trained tensors are in half precision.*`dtype='float32'`"):
        model = load_model(str(saved), config(model_init_kwargs={key: torch.bfloat16}), None)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


def test_options_of_the_host_reach_the_model(saved):
    model = load_model(str(saved), config(model_init_kwargs={"attn_implementation": "eager"}), None)
    assert model.config._attn_implementation == "eager"  # noqa: SLF001 - the host's own place for it


def test_a_model_in_memory_is_taken_as_it_is():
    model = cases.tiny_llama()
    before = cases.weights(model)
    assert load_model(model, config(), None) is model
    assert cases.largest_difference(cases.weights(model), before) == 0.0


def test_options_for_a_model_that_is_loaded_already_are_refused():
    with pytest.raises(ValueError, match=r"`model_init_kwargs` is set, but the model is loaded already"):
        load_model(cases.tiny_llama(), config(model_init_kwargs={"dtype": "float32"}), None)


@pytest.mark.parametrize("model", [None, 3, {"a": 1}])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match=rf"`model` is a {type(model).__name__}; give a name, a path or a model"):
        load_model(model, config(), None)


def test_a_folder_without_a_model_is_refused_by_the_host(tmp_path):
    with pytest.raises((OSError, ValueError), match="config"):
        load_model(str(tmp_path), config(), None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    model = cases.tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = bad
    with pytest.raises(ValueError, match=r"The weight 'model\.layers\.1\.self_attn\.v_proj\.weight' .* NaN or inf"):
        load_model(model, config(), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weights_in_half_precision_are_warned_about_and_counted(dtype):
    model = cases.tiny_llama(dtype=dtype)
    with pytest.warns(PrecisionWarning, match=rf"^{len(trainable_parameters(model))} trained tensors"):
        load_model(model, config(), None)


def test_frozen_weights_in_half_precision_below_an_adapter_are_no_fault():
    model = load_model(cases.bf16_llama(), config(), lora())  # a warning is an error here
    assert {each.dtype for each in trainable_parameters(model).values()} == {torch.float32}


def test_a_model_of_which_nothing_trains_is_refused():
    with pytest.raises(ValueError, match=r"no trainable parameter\. Unfreeze what is to be trained"):
        load_model(cases.tiny_llama().requires_grad_(False), config(), None)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_a_new_adapter_is_the_same_for_the_same_seed():
    first, again, other = (
        cases.weights(load_model(cases.tiny_llama(), config(seed=seed), lora())) for seed in (5, 5, 6)
    )
    assert all("lora_" in name for name in first)
    assert cases.largest_difference(first, again) == 0.0
    assert cases.largest_difference(first, other) > 0.0


def test_a_new_adapter_keeps_the_revision_of_its_base():
    pinned = make_trainable(cases.tiny_llama(), config(model_init_kwargs={"revision": "abc"}), lora())
    assert pinned.peft_config["default"].revision == "abc"
    assert make_trainable(cases.tiny_llama(), config(), lora()).peft_config["default"].revision is None


def test_a_model_with_its_own_adapter_is_taken_as_it_is():
    model = cases.lora_llama()
    before = cases.weights(model)
    assert load_model(model, config(), None) is model
    assert cases.largest_difference(cases.weights(model), before) == 0.0


def test_a_second_adapter_is_refused():
    with pytest.raises(ValueError, match=r"has an adapter already and `peft_config` asks for another"):
        load_model(cases.lora_llama(), config(), lora())


def test_an_adapter_of_another_name_is_refused_with_how_to_load_it():
    model = peft.get_peft_model(cases.tiny_llama(), lora(), adapter_name="mine")
    with pytest.raises(ValueError, match=r"adapters \['mine'\].*single one, named 'default'.*adapter_name='default'"):
        load_model(model, config(), None)


def test_two_adapters_are_refused():
    model = cases.lora_llama()
    model.add_adapter("other", lora())
    with pytest.raises(ValueError, match=r"adapters \['default', 'other'\]"):
        load_model(model, config(), None)


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_from_disk_must_be_loaded_to_be_trained(trainable, tmp_path):
    cases.lora_llama(3).save_pretrained(tmp_path, save_embedding_layers=False)
    model = peft.PeftModel.from_pretrained(cases.tiny_llama(3), tmp_path, is_trainable=trainable)
    if trainable:
        expected = cases.weights(cases.lora_llama(3))
        assert cases.largest_difference(cases.weights(load_model(model, config(), None)), expected) == 0.0
    else:
        with pytest.raises(ValueError, match=r"no trainable parameter\. Load the adapter with `is_trainable=True`"):
            load_model(model, config(), None)


def test_an_adapter_that_is_not_finite_is_refused():
    model = cases.lora_llama()
    with torch.no_grad():
        next(each for name, each in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"The weight '.*lora_B\.default\.weight' of the model holds NaN"):
        load_model(model, config(), None)


def test_what_is_no_adapter_configuration_is_refused():
    with pytest.raises(TypeError, match=r"`peft_config` is a dict; give a PEFT one"):
        load_model(cases.tiny_llama(), config(), {"r": 8})


def test_without_peft_an_adapter_is_refused_with_how_to_install_it(monkeypatch):
    adapter = lora()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs PEFT\. Install it with `pip install 'hbat-trl\[peft\]'`"):
        load_model(cases.tiny_llama(), config(), adapter)


@pytest.mark.parametrize("adapter", [None, lora()], ids=["", "and another"])
def test_an_adapter_that_the_model_holds_itself_is_refused_with_what_to_pass(adapter):
    model = cases.tiny_llama()
    try:
        model.add_adapter(lora())
    except ValueError as error:  # transformers 5.24 wants PEFT 0.22
        pytest.skip(str(error))
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM with an adapter inside.*`get_peft_model\(.*`peft_config=`"
    ):
        load_model(model, config(), adapter)


# --- adapters on disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter_folder(saved, tmp_path):
    """A trained adapter on the model on disk."""
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(saved, dtype=torch.float32), lora())
    with torch.no_grad():
        for each in trainable_parameters(model).values():
            each.fill_(0.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["text", "path"])
def test_an_adapters_folder_is_loaded_with_its_base_in_float32_to_be_trained(kind, adapter_folder, saved):
    model = load_model(kind(adapter_folder), config(model_init_kwargs={"attn_implementation": "eager"}), None)
    assert isinstance(model, peft.PeftModel)
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    trained = trainable_parameters(model)
    assert all(".lora_" in name and bool((each == 0.5).all()) for name, each in trained.items())
    assert len(trained) == 4
    assert model.config._attn_implementation == "eager"  # noqa: SLF001 - the host's own place for it
    assert load_tokenizer(None, model, config(), adapter_folder).get_vocab() == cases.tiny_tokenizer().get_vocab()


def test_a_tokenizer_beside_the_adapter_goes_before_that_of_the_base(adapter_folder):
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(adapter_folder)
    model = load_model(str(adapter_folder), config(), None)
    assert load_tokenizer(None, model, config(), adapter_folder).chat_template == "mine"
    assert load_tokenizer(None, model, config()).chat_template == cases.CHAT_TEMPLATE


def test_an_adapters_folder_and_another_adapter_are_refused(adapter_folder):
    with pytest.raises(ValueError, match=r"has an adapter already and `peft_config` asks for another"):
        load_model(str(adapter_folder), config(), lora())


def test_without_peft_an_adapters_folder_is_refused_with_how_to_install_it(adapter_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ImportError, match=r"`model` '.*' is an adapter's folder and needs PEFT\. Install it with `pip"
    ):
        load_model(str(adapter_folder), config(), None)


def test_only_a_folder_with_an_adapter_is_one(adapter_folder, saved):
    assert is_adapter(adapter_folder)
    assert is_adapter(str(adapter_folder))
    assert not any(is_adapter(each) for each in (saved, "some/model", cases.tiny_llama(), None))


# --- adapters and the reference policy -------------------------------------------------------------------------------


def with_biases():
    model = cases.tiny_llama()
    model.config.attention_bias = True
    return LlamaForCausalLM(model.config)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["norm", "lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_what_an_adapter_holds_itself_the_reference_can_hold_too(options):
    adapter = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)
    require_adapter_parameters(peft.get_peft_model(with_biases(), adapter))


@pytest.mark.parametrize(
    ("bias", "counts", "first"),
    [("all", r"8 of 12", r"q_proj\.base_layer\.bias"), ("lora_only", r"2 of 6", r"q_proj\.base_layer\.bias")],
)
def test_biases_trained_in_place_are_refused_with_count_and_first(bias, counts, first):
    model = peft.get_peft_model(with_biases(), lora(bias=bias))
    with pytest.raises(ValueError, match=rf"^{counts} trainable .* first '.*{first}'.*Freeze .*`modules_to_save`"):
        require_adapter_parameters(model)


def test_a_weight_unfrozen_beside_the_adapter_is_refused():
    model = cases.lora_llama()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^1 of 9 .* first 'base_model\.model\.model\.norm\.weight'"):
        require_adapter_parameters(model)


def test_a_model_without_adapter_has_its_own_reference():
    require_adapter_parameters(cases.tiny_llama())


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_a_given_tokenizer_is_taken():
    tokenizer = cases.tiny_tokenizer()
    assert load_tokenizer(tokenizer, cases.tiny_llama()) is tokenizer
    assert tokenizer.pad_token == PAD


@pytest.mark.parametrize("adapter", [None, lora()], ids=["full", "lora"])
def test_a_model_from_disk_brings_its_tokenizer(adapter, saved):
    model = load_model(str(saved), config(), adapter)
    assert load_tokenizer(None, model).get_vocab() == cases.tiny_tokenizer().get_vocab()


def test_a_model_in_memory_needs_its_tokenizer():
    with pytest.raises(
        ValueError, match=r"has no name or path to load a tokenizer from\. Pass its tokenizer as `processing_cl"
    ):
        load_tokenizer(None, cases.tiny_llama())


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=cases.tiny_tokenizer().backend_tokenizer, eos_token=END)
    assert load_tokenizer(tokenizer, cases.tiny_llama()).pad_token == END


def test_a_tokenizer_with_no_token_to_pad_with_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=cases.tiny_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match=r"neither a padding nor an end token\. Set its `pad_token`"):
        load_tokenizer(tokenizer, cases.tiny_llama())


def test_the_tokenizer_is_fetched_as_the_model_is(saved, monkeypatch):
    seen = {}
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **kwargs: seen.update(kwargs))
    shared = {
        "cache_dir": "c", "code_revision": "r", "local_files_only": True, "revision": "v2", "subfolder": "s",
        "token": "t", "trust_remote_code": True,
    }  # fmt: skip
    given = config(model_init_kwargs=shared | {"dtype": "float32", "attn_implementation": "eager", "device_map": None})
    load_tokenizer(None, load_model(str(saved), config(), None), given)
    assert seen == shared == shared_init_kwargs(given)


def test_without_options_for_the_model_only_that_no_code_runs_is_shared():
    assert shared_init_kwargs(config()) == {"trust_remote_code": False}
