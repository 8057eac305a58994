import asyncio
import gc
import signal
import threading

import pytest
import torch
from cases import tiny_tokenizer
from datasets import Dataset
from scorers import FOREIGN_TEMPLATE, foreign_tokenizer, tiny_scorer
from transformers import PreTrainedModel

from hbat.ppo.rewards.function import CallableReward, RewardError, RewardWarning
from hbat.ppo.rewards.rewards import Rewards

PROMPTS = ["1 plus 1?", "1 plus 2?", "2 plus 2?", "3 plus 3?"]
COMPLETIONS = [" 2", " it is 3", " 5", " 6 or so"]
IDS = [[1], [2], [3], [4]]


def length(completions, **kwargs):
    return [float(len(each)) for each in completions]


def ones(completions, **kwargs):
    return [1.0] * len(completions)


def scored(reward_funcs, columns=None, **kwargs):
    return Rewards(reward_funcs, **kwargs)(PROMPTS, COMPLETIONS, completion_ids=IDS, columns=columns or {})


# --- the sum ---------------------------------------------------------------------------------------------------------


def test_one_function_is_a_list_of_one():
    total, values = scored(length)
    assert total.dtype == torch.float32
    assert total.tolist() == values["length"].tolist() == [2, 8, 2, 8]


def test_a_reward_that_gives_everything_the_same_is_named_once():
    """As one that counts the messages of a conversation: each completion has one."""
    answers = [[{"role": "assistant", "content": f" {number}"}] for number in range(8)]
    reward = CallableReward(length, "length")
    with pytest.warns(
        RewardWarning, match=r"^The reward 'length' is 1 for all of 8 different completions, the first ' 0'"
    ):
        reward.values(length(answers), answers)
    reward.values(length(answers), answers)  # a second warning would be an error here
    CallableReward(length, "length").values([1.0] * 7, answers[:7])
    CallableReward(length, "length").values([None] * 8, answers)
    CallableReward(length, "length").values([1.0] * 8, answers[:1] * 8)


def test_rewards_are_weighted_and_summed():
    total, values = scored([length, ones], weights=[0.5, -3.0])
    assert total.tolist() == [-2, 1, -2, 1]
    assert values["length"].tolist() == [2, 8, 2, 8]  # the raw ones
    assert values["ones"].tolist() == [1, 1, 1, 1]


def test_a_reward_that_does_not_apply_to_a_row_adds_nothing_to_it():
    def first_only(completions, **kwargs):
        return [10.0] + [None] * 3

    total, values = scored([length, first_only])
    assert total.tolist() == [12, 8, 2, 8]
    assert values["first_only"].isnan().tolist() == [False, True, True, True]


def test_a_row_to_which_no_reward_applies_is_an_error():
    def never(completions, **kwargs):
        return [1.0, None, 1.0, None]

    with pytest.raises(
        RewardError, match=r"\(never, never_2\) returned None or NaN for 2 of 4 rows, first row 1, .*' it is 3'"
    ):
        scored([never, never])


def test_functions_see_columns_tokens_and_the_trainers_state():
    seen = {}

    def see(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
        seen.update(prompts=prompts, ids=completion_ids, answer=answer, state=trainer_state, rest=kwargs)
        return [0] * 4

    state = object()
    Rewards(see)(
        PROMPTS,
        COMPLETIONS,
        completion_ids=IDS,
        columns={"answer": [2, 3, 4, 6], "level": [1] * 4},
        trainer_state=state,
    )
    assert seen["rest"].pop("log_extra")("column", [1] * 4) is seen["rest"].pop("log_metric")("name", 1.0) is None
    expected = {"prompts": PROMPTS, "ids": IDS, "answer": [2, 3, 4, 6], "state": state, "rest": {"level": [1] * 4}}
    assert seen == expected


def test_data_sets_without_a_column_that_a_function_needs_are_refused():
    def judge(completions, answer, log_metric, level=1):
        raise AssertionError

    good, bad = (
        Dataset.from_dict({"prompt": ["a"], "answer": ["b"]}),
        Dataset.from_dict({"prompt": ["a"], "more": ["b"]}),
    )
    Rewards(judge).require(good, {"first": good}, None, bad.select([]))
    for given in (bad, {"first": good, "second": bad}):
        with pytest.raises(RewardError, match=r"'judge' needs \['answer'\], but the columns .* are \['more'\]"):
            Rewards(judge).require(good, given)


def test_a_column_cannot_take_the_place_of_the_completions():
    assert scored(length, {"completions": [""] * 4})[0].tolist() == [2, 8, 2, 8]


def test_a_missing_column_is_told_before_any_reward_has_run():
    called = []

    def first(completions):
        called.append(1)
        return [0] * 4

    def second(completions, solution):
        return [0] * 4

    with pytest.raises(RewardError, match=r"'second' needs \['solution'\].*\['answer'\]"):
        scored([first, second], {"answer": [1] * 4})
    assert not called


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_are_unique():
    def other(completions):
        return [0] * 4

    other.__name__ = "length_2"
    rewards = Rewards(
        [length, other, length, length, tiny_scorer()], processing_classes=[None] * 4 + [tiny_tokenizer()]
    )
    assert rewards.names == ["length", "length_2", "length_3", "length_4", "LlamaForSequenceClassification"]


def test_a_model_is_named_by_its_folder(tmp_path):
    tiny_scorer().save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    assert Rewards([tmp_path / "judge", str(tmp_path / "judge") + "/"]).names == ["judge", "judge_2"]


# --- models beside functions -----------------------------------------------------------------------------------------


def test_functions_and_models_are_mixed_each_with_its_tokenizer():
    model, other = tiny_scorer(), tiny_scorer(1, vocabulary=len(foreign_tokenizer()))
    tokenizers = [None, tiny_tokenizer(), foreign_tokenizer()]
    total, values = scored([length, model, other], processing_classes=tokenizers, weights=[1, 2, 3])
    alone = [scored(each, processing_classes=it)[0] for each, it in ((model, tokenizers[1]), (other, tokenizers[2]))]
    torch.testing.assert_close(values["LlamaForSequenceClassification"], alone[0])
    torch.testing.assert_close(values["LlamaForSequenceClassification_2"], alone[1])
    torch.testing.assert_close(total, values["length"] + 2 * alone[0] + 3 * alone[1])
    assert not torch.allclose(alone[0], alone[1])


def test_a_model_in_a_folder_scores_as_the_model_itself(tmp_path):
    model = tiny_scorer()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    expected = scored(model, processing_classes=tiny_tokenizer())[0]
    assert torch.equal(scored(str(tmp_path))[0], expected)
    loaded = type(model).from_pretrained(tmp_path)  # knows where it came from
    assert torch.equal(scored([loaded])[0], expected)


def test_models_score_in_batches():
    model, sizes = tiny_scorer(), []
    model.register_forward_pre_hook(lambda *args: sizes.append(len(args[2]["input_ids"])), with_kwargs=True)
    rewards = Rewards(model, processing_classes=tiny_tokenizer())
    rewards(PROMPTS * 10, COMPLETIONS * 10, completion_ids=IDS * 10, columns={})
    assert sizes == [32, 8]


def test_models_move_and_functions_stay():
    model = tiny_scorer()
    Rewards([length, model], processing_classes=[None, tiny_tokenizer()]).to("meta")
    assert {each.device.type for each in model.parameters()} == {"meta"}


def test_conversations_need_a_template_only_where_there_is_a_model():
    bare = foreign_tokenizer()
    bare.chat_template = None
    model = tiny_scorer(vocabulary=len(bare))
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]]})
    Rewards(length).require(chats)
    rewards = Rewards([length, model], processing_classes=[None, bare])
    with pytest.raises(ValueError, match="'LlamaForSequenceClassification' has no chat template"):
        rewards.require(chats)
    bare.chat_template = FOREIGN_TEMPLATE
    rewards.require(chats)


def test_trl_gets_functions_and_models_and_an_adapter_inside_its_model():
    from peft import LoraConfig, get_peft_model

    plain = tiny_scorer()
    adapted = get_peft_model(tiny_scorer(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    first, second, third = Rewards(
        [length, plain, adapted], processing_classes=[None, *[tiny_tokenizer()] * 2]
    ).for_trl
    assert first(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS) == [2, 8, 2, 8]
    assert second is plain
    assert isinstance(third, PreTrainedModel)
    tokens = torch.arange(4)[None]
    assert torch.equal(third(tokens).logits, adapted(tokens).logits)
    assert not torch.equal(third(tokens).logits, plain(tokens).logits)


def test_an_error_in_a_model_names_it():
    model = tiny_scorer()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(RewardError, match="'LlamaForSequenceClassification' returned nan of type float for row 0"):
        scored(model, processing_classes=tiny_tokenizer())


# --- asynchronous functions ------------------------------------------------------------------------------------------


def meeting():
    """Two functions that each wait for the other: alone, neither ends."""
    events = {}

    def event(name):
        return events.setdefault(name, asyncio.Event())

    async def left(completions, **kwargs):
        event("left").set()
        await asyncio.wait_for(event("right").wait(), 10)
        return [1.0] * len(completions)

    class Right:
        async def __call__(self, completions):
            event("right").set()
            await asyncio.wait_for(event("left").wait(), 10)
            return [2.0] * len(completions)

    return [left, Right()]


def test_asynchronous_functions_wait_together():
    total, values = scored([*meeting(), length], weights=[1, 1, 0])
    assert total.tolist() == [3, 3, 3, 3]
    assert list(values) == ["left", "Right", "length"]
    assert values["length"].tolist() == [2, 8, 2, 8]


def test_they_do_so_also_where_a_loop_runs_already():
    async def notebook():
        return scored(meeting())

    assert asyncio.run(notebook())[0].tolist() == [3, 3, 3, 3]


def test_what_a_function_keeps_between_calls_stays_usable():
    kept = {}

    async def f(completions):
        loop = kept.setdefault("loop", asyncio.get_running_loop())
        assert loop is asyncio.get_running_loop()
        return [1.0] * len(completions)

    rewards = Rewards(f)
    for _ in range(2):
        assert rewards(PROMPTS, COMPLETIONS, completion_ids=IDS, columns={})[0].tolist() == [1, 1, 1, 1]


def test_a_plain_function_may_return_something_awaitable():
    async def inner(completions):
        return ones(completions)

    def outer(completions):
        return inner(completions)

    assert scored(outer)[0].tolist() == [1, 1, 1, 1]


def test_a_plain_function_may_run_a_loop_of_its_own():
    async def inner(completions):
        return ones(completions)

    def f(completions):
        return asyncio.run(inner(completions))

    assert scored([f, *meeting()])[0].tolist() == [4, 4, 4, 4]


def test_an_asynchronous_function_that_fails_is_named():
    async def judge(completions, **kwargs):
        raise TimeoutError("no answer")

    with pytest.raises(RewardError, match="'judge' raised TimeoutError: no answer") as caught:
        scored([judge, length])
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_asynchronous_results_are_checked_as_all_others():
    async def judge(completions):
        return [1.0]

    with pytest.raises(RewardError, match="'judge' returned 1 values for 4 completions"):
        scored(judge)


async def forever(completions):
    await asyncio.sleep(60)


def test_the_first_failure_is_raised_at_once_and_cancels_the_others():
    cancelled = threading.Event()

    async def slow(completions):
        try:
            await forever(completions)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def judge(completions):
        raise ValueError("first")

    with pytest.raises(RewardError, match="'judge' raised ValueError: first"):
        scored([slow, judge])
    assert cancelled.wait(5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_inside_a_function_reaches_the_caller_and_leaves_the_event_loop_alive(error):
    errors = [error()]

    async def judge(completions):
        if errors:
            raise errors.pop()
        return ones(completions)

    async def slow(completions):
        return await forever(completions) if errors else ones(completions)

    rewards = Rewards([slow, judge])
    with pytest.raises(error):
        rewards(PROMPTS, COMPLETIONS, completion_ids=IDS, columns={})
    assert rewards(PROMPTS, COMPLETIONS, completion_ids=IDS, columns={})[0].tolist() == [2, 2, 2, 2]


@pytest.fixture
def interruptible():
    """Python raises KeyboardInterrupt at SIGINT, also where the shell that started it ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_of_the_waiting_thread_cancels_the_functions():
    cancelled = threading.Event()

    async def judge(completions):
        threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        try:
            await forever(completions)
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        scored(judge)
    assert cancelled.wait(5)


def test_the_thread_of_the_event_loop_ends_with_the_rewards():
    threads = set(threading.enumerate())

    async def judge(completions):
        threads.add(threading.current_thread())
        return ones(completions)

    others = set(threads)
    rewards = Rewards(judge)
    rewards(PROMPTS, COMPLETIONS, completion_ids=IDS, columns={})
    (thread,) = threads - others
    assert thread.is_alive()
    del rewards
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("error")
def test_no_coroutine_is_left_behind_where_a_later_function_fails():
    async def judge(completions):
        return ones(completions)

    def broken(completions):
        raise ValueError("broken")

    with pytest.raises(RewardError, match="'broken' raised ValueError: broken"):
        scored([judge, broken])
    gc.collect()


# --- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_funcs": []}, "`reward_funcs` is empty"),
        ({"weights": [1.0, 2.0]}, "`weights` has 2 entries for 1 rewards"),
        ({"weights": [float("nan")]}, r"`weights\[0\]` is nan"),
        ({"weights": [float("inf")]}, r"`weights\[0\]` is inf"),
        ({"processing_classes": [None, None]}, "`processing_classes` has 2 entries for 1 rewards"),
        ({"reward_funcs": lambda answer: []}, "neither `prompts` nor `completions`"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rewards(**{"reward_funcs": length} | arguments)


@pytest.mark.parametrize(("reward", "shown"), [(3, "a int"), (None, "a NoneType"), (dict, "the class dict")])
def test_what_cannot_be_called_is_refused(reward, shown):
    with pytest.raises(TypeError, match=f"`reward_funcs` holds {shown}"):
        Rewards([length, reward])


def test_the_callers_list_stays_as_it_is(tmp_path):
    tiny_scorer().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    given = [str(tmp_path), length]
    Rewards(given)
    assert given == [str(tmp_path), length]
