import json
import random

import pytest
from faults import every_damage

from hbat.state.manifest import FORMAT, DamagedStateError, RunState, RunStateError, decode, encode

STATE = RunState(
    fingerprint={"run": {"seed": 1}},
    given={"sft": ["learning_rate"]},
    versions={"trl": "1.2.0"},
    next_stage=3,
    files={"weights": "weights-003.safetensors"},
    checksums={"weights-003.safetensors": {"bytes": 8, "xxh3_128": "ab"}},
    evaluations=[{"stage": -1, "scores": {"sft": {"loss": 0.1}}}],
)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "state.json").write_bytes(encode(STATE))
    return tmp_path / "state.json"


def test_what_was_laid_out_is_read_back_from_readable_json(file):
    assert decode(file) == STATE
    assert json.loads(file.read_text())["format"] == FORMAT
    assert file.read_text().endswith("}\n")
    file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items()))))
    assert decode(file) == STATE


@every_damage
def test_a_damaged_manifest_is_named(damage, file):
    damage(file)
    with pytest.raises(DamagedStateError, match=rf"{file} (is|cannot) "):
        decode(file)


def test_no_bit_of_a_manifest_can_flip_and_change_what_it_says(file):
    content = file.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 300):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            assert decode(file) == STATE  # where a blank has become another
        except RunStateError:
            continue


@pytest.mark.parametrize(
    "text", ["", "{", "null", "3", '"text"', "[1, 2]", "{}", '{"fingerprint": {}}', f'{{"format": {FORMAT}}}', "\x00"]
)
def test_what_is_no_manifest_is_named(text, file):
    file.write_text(text, encoding="utf-8")
    with pytest.raises(
        DamagedStateError, match=rf"{file} (cannot be read \(.+\)|is not what was written: its checksum)"
    ):
        decode(file)


@pytest.mark.parametrize(
    "state",
    [
        RunState(fingerprint={}, files=3), RunState(fingerprint={}, next_stage="1"), RunState(fingerprint=[]),
        RunState(fingerprint={}, next_stage=True), RunState(fingerprint={}, evaluations={}),
        RunState(fingerprint={}, versions=[]),
        RunState(fingerprint={}, files={"weights": "../../elsewhere.safetensors"}),
        RunState(fingerprint={}, files={"weights": "/elsewhere.safetensors"}),
        RunState(fingerprint={}, files={"weights": 3}),
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_with_values_of_other_kinds_or_files_elsewhere_is_refused(state, file):
    file.write_bytes(encode(state))
    with pytest.raises(DamagedStateError, match=rf"{file} cannot be read \(`\w+` "):
        decode(file)


def test_a_manifest_with_an_unknown_value_is_refused(file, monkeypatch):
    monkeypatch.setattr("hbat.state.manifest.asdict", lambda state: {"fingerprint": {}, "epoch": 3})
    file.write_bytes(encode(STATE))
    with pytest.raises(DamagedStateError, match=r"unexpected keyword argument 'epoch'"):
        decode(file)


@pytest.mark.parametrize("found", [0, 2, FORMAT + 1, "1", None])
def test_a_manifest_of_another_format_is_named(found, file, monkeypatch):
    monkeypatch.setattr("hbat.state.manifest.FORMAT", found)
    file.write_bytes(encode(STATE))
    monkeypatch.undo()
    message = rf"{file} has format {found!r}; this version of hbat reads format {FORMAT}\."
    with pytest.raises(RunStateError, match=message) as raised:
        decode(file)
    assert not isinstance(raised.value, DamagedStateError)  # an older state would not be what the user wants
