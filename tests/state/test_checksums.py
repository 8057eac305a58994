import json

import pytest
import xxhash
from faults import every_damage

from hbat.state.files import checksum, digest, fault


@pytest.mark.parametrize("size", [0, 1, 2**18, 2**18 + 1, 2**20])  # it is read in blocks of 2**18 bytes
def test_a_file_is_measured_by_size_and_content_whatever_the_block(size, tmp_path):
    file = tmp_path / "file"
    content = bytes(index % 251 for index in range(size))
    file.write_bytes(content)
    assert checksum(file) == {"bytes": size, "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    assert fault(file, checksum(file)) is None
    assert json.loads(json.dumps(checksum(file))) == checksum(file)


@every_damage
def test_a_damaged_file_is_noticed(damage, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(200)))
    expected = checksum(file)
    damage(file)
    assert fault(file, expected)


def test_what_is_wrong_is_said(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"right")
    expected = checksum(file)
    assert fault(tmp_path / "absent", expected) == "is missing"
    assert fault(file, None) == "has no recorded checksum"
    file.write_bytes(b"wrong")
    assert fault(file, expected) == "is not what was written: its checksum differs"
    file.write_bytes(b"long")
    assert fault(file, expected) == "has 4 bytes instead of 5"
    file.unlink()
    file.mkdir()
    size = file.stat().st_size
    assert fault(file, {"bytes": size, "xxh3_128": "0"}).startswith("cannot be read (")


def test_the_checksum_of_values_is_that_of_what_they_say():
    assert digest({"a": 1, "b": [0.1, None]}) == digest(json.loads(json.dumps({"b": [0.1, None], "a": 1}, indent=4)))
    assert digest({9: 1, 10: 2}) == digest({"9": 1, "10": 2})
    assert len({digest(each) for each in ({"a": 1}, {"a": "1"}, {"a": 2}, {"b": 1}, [1], [])}) == 6
