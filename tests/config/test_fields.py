import dataclasses
import enum
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union, get_type_hints

import pytest
import trl

from hbat.config.ewc import EWCConfig
from hbat.config.fields import build_section, convert, nearest
from hbat.config.hbat import HBATConfig


def test_paths_of_a_section_may_lie_in_the_home_folder_at_any_depth(monkeypatch, tmp_path):
    @dataclass
    class Section:
        folder: str
        files: dict[str, Any]
        text: str

    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"folder": "~/a", "files": {"sft": ["~/b", {"path": "~/c"}], "rows": 3}, "text": "~ or b/~/c"}
    found = build_section("data", Section, values)
    files = {"sft": [f"{tmp_path}/b", {"path": f"{tmp_path}/c"}], "rows": 3}
    assert found == Section(f"{tmp_path}/a", files, "~ or b/~/c")


class Colour(enum.Enum):
    RED = "red"


@dataclass(kw_only=True)
class Paint:
    """A section: its class refuses negative coats, as TRL refuses combinations of values."""

    colour: Colour = Colour.RED
    coats: int = 1
    gloss: float | None = None
    inner: int = field(default=0, init=False)

    def __post_init__(self):
        if self.coats < 0:
            raise ValueError("coats cannot be negative")
        if self.gloss == 1.0:
            raise NotImplementedError("no mirrors")


FITS = [
    (3, int, 3),
    ("3", int, 3),
    (" 3 ", int, 3),
    (2, float, 2.0),
    (2.5, float, 2.5),
    ("1e-5", float, 1e-5),
    ("inf", float, float("inf")),
    ("3", str, "3"),
    (True, bool, True),
    (None, type(None), None),
    (None, int | None, None),
    (None, Optional[int], None),  # noqa: UP045 - as TRL writes it
    ("7", Optional[int], 7),  # noqa: UP045
    ("0.5", Union[int, float], 0.5),  # noqa: UP007
    ("5", int | float, 5),
    ("5", int | str, "5"),
    (0.1, float | str, 0.1),
    ("steps", Literal["no", "steps"], "steps"),
    (None, Literal["no"] | None, None),
    ("red", Colour, "red"),
    (Colour.RED, Colour, Colour.RED),
    ("anything", Colour | str, "anything"),
    ([1, 2], list[int], [1, 2]),
    ((1, 2), list[int], (1, 2)),
    ([1, "a"], list, [1, "a"]),
    ([], list[str], []),
    (["q", "v"], list[str] | None, ["q", "v"]),
    ("ipo", list[str], ["ipo"]),
    ("all-linear", str | list[str] | None, "all-linear"),
    ([None, 1], list[int | None], [None, 1]),
    ((0.9, 0.95), tuple[float, float], (0.9, 0.95)),
    ({"a": 1}, dict[str, Any], {"a": 1}),
    ({"a": 1}, dict | str | None, {"a": 1}),
    ("text", Any, "text"),
    (3, Any, 3),
    ([object, 1], list[Any], [object, 1]),
    ("text", "a name that nothing resolves", "text"),
    (Paint, object, Paint),
]


@pytest.mark.parametrize(("value", "hint", "expected"), FITS, ids=lambda value: str(value)[:30])
def test_a_value_that_fits_is_taken_and_a_number_may_be_text(value, hint, expected):
    found = convert(value, hint, "field")
    assert found == expected
    assert type(found) is type(expected)


DOES_NOT_FIT = [
    (True, int, "an integer"),
    (False, float, "a number"),
    (True, int | None, "an integer or null"),
    (1, bool, "true or false"),
    ("true", bool, "true or false"),
    (1.5, int, "an integer"),
    ("1.5", int, "an integer"),
    ("1e3", int, "an integer"),
    ("fast", float, "a number"),
    ("", float, "a number"),
    (None, int, "an integer"),
    (3, str, "a string"),
    ("step", Literal["no", "steps"], "one of 'no', 'steps'"),
    (["no"], Literal["no", "steps"], "one of 'no', 'steps'"),
    ("blue", Colour, "one of 'red'"),
    (["a", 1], list[str], "a list"),
    ([True], list[int], "a list"),
    ("a", dict[str, Any], "a mapping"),
    ([], dict, "a mapping"),
    ("red", Paint, "Paint"),
]


@pytest.mark.parametrize(("value", "hint", "kind"), DOES_NOT_FIT, ids=lambda value: str(value)[:30])
def test_a_value_of_another_type_is_refused_with_what_it_must_be(value, hint, kind):
    with pytest.raises(TypeError) as error:
        convert(value, hint, "paint.field")
    assert str(error.value) == f"`paint.field` is {value!r}; it must be {kind}."


# --- sections --------------------------------------------------------------------------------------------------------


def test_an_unknown_name_gets_the_nearest_known_one_or_none():
    assert nearest("learning_rat", ["seed", "learning_rate"]) == " Did you mean `learning_rate`?"
    assert nearest("zzz", ["seed", "learning_rate"]) == ""
    assert nearest("zzz", []) == ""


def test_a_section_is_built_from_plain_values():
    assert build_section("paint", Paint, {"coats": "2", "gloss": 0}) == Paint(coats=2, gloss=0.0)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"coat": 1}, ValueError, "`paint.coat` is not an option. Did you mean `coats`?"),
        ({"zzz": 1}, ValueError, "`paint.zzz` is not an option."),
        ({3: 1}, ValueError, "`paint.3` is not an option."),
        ({"inner": 1}, ValueError, "`paint.inner` is not an option."),
        ({"coats": "two"}, TypeError, "`paint.coats` is 'two'; it must be an integer."),
        ({"coats": -1}, ValueError, "`paint.coats`: coats cannot be negative"),
        ({"gloss": 1}, ValueError, "`paint.gloss`: no mirrors"),
        ({"colour": "red"}, ValueError, "`paint.colour` cannot be set here: Set the house's."),
    ],
)
def test_a_refusal_begins_with_the_section(values, error, message):
    with pytest.raises(error) as found:
        build_section("paint", Paint, values, owned={"colour": "Set the house's."})
    assert str(found.value).startswith(message)


def test_at_the_top_level_names_stand_alone():
    with pytest.raises(ValueError, match=r"^`coat` is not an option\. Did you mean `coats`\?"):
        build_section("", Paint, {"coat": 1})


def test_our_own_refusals_keep_their_one_prefix():
    with pytest.raises(ValueError, match=r"^`ewc\.strength` is -1\.0; it must be"):
        build_section("ewc", EWCConfig, {"strength": -1})


def test_a_run_is_a_section_at_the_top_level():
    config = build_section("", HBATConfig, {"output_dir": "run", "ewc": {"strength": "3"}, "end_weight": "0.5"})
    assert (config.ewc.strength, config.end_weight) == (3.0, 0.5)


def test_a_class_whose_annotations_cannot_be_read_takes_any_value():
    unreadable = dataclasses.make_dataclass("Unreadable", [("size", "NoSuchName", field(default=0))])
    assert build_section("own", unreadable, {"size": "large"}).size == "large"


@pytest.mark.parametrize("hint", [str, str | None, Optional[list[str]]])  # noqa: UP045
def test_fsdp_may_be_true_whatever_its_annotation_says(hint):
    own = dataclasses.make_dataclass("Own", [("fsdp", hint, field(default=""))])
    assert build_section("own", own, {"fsdp": True}).fsdp is True


# --- sections of TRL -------------------------------------------------------------------------------------------------


def built(folder, **values):
    return build_section("dpo", trl.DPOConfig, {"output_dir": str(folder), "use_cpu": True, "bf16": False} | values)


def test_a_configuration_of_trl_is_built_with_numbers_as_text(tmp_path):
    args = built(tmp_path, learning_rate="1e-5", max_steps="7")
    assert (args.learning_rate, args.max_steps) == (1e-5, 7)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"learning_rte": 1e-5},
            ValueError,
            r"^`dpo\.learning_rte` is not an option\. Did you mean `learning_rate`\?",
        ),
        ({"learning_rate": "fast"}, TypeError, r"^`dpo\.learning_rate` is 'fast'; it must be a number"),
        ({"max_steps": 1.5}, TypeError, r"^`dpo\.max_steps` is 1\.5; it must be an integer"),
        ({"bf16": "maybe"}, TypeError, r"^`dpo\.bf16` is 'maybe'; it must be true or false"),
        ({"optim": "adamm"}, ValueError, r"^`dpo\.optim`: .*adamm"),
        ({"lr_scheduler_type": "cosin"}, ValueError, r"^`dpo\.lr_scheduler_type`: .*cosin"),
        ({"save_strategy": "sometimes"}, ValueError, r"^`dpo\.save_strategy`: .*sometimes"),
    ],
    ids=["unknown", "text", "fraction", "boolean", "optimizer", "schedule", "strategy"],
)
def test_what_trl_refuses_begins_with_the_section(values, error, message, tmp_path):
    with pytest.raises(error, match=message):
        built(tmp_path, **values)


@pytest.mark.parametrize(
    "values", [{"max_grad_norm": None}, {"label_names": "labels"}, {"include_for_metrics": "loss"}]
)
def test_what_the_parser_and_the_class_of_trl_take_is_taken(values, tmp_path):
    args = built(tmp_path, **values)
    key, value = next(iter(values.items()))
    assert getattr(args, key) == (None if value is None else [value])


@pytest.mark.parametrize("config_class", [trl.SFTConfig, trl.DPOConfig, EWCConfig, HBATConfig])
def test_every_default_is_of_its_fields_type(config_class):
    hints = get_type_hints(config_class)
    for option in dataclasses.fields(config_class):
        if not option.init or (option.default is option.default_factory is dataclasses.MISSING):
            continue
        default = option.default if option.default is not dataclasses.MISSING else option.default_factory()
        assert convert(default, hints[option.name], option.name) == default
