"""docs/bad-data.md holds every kind of fault with the message that it gets."""

import ast
import gzip
import json

import bad_data
import pytest
import test_house


def test_the_table_in_the_docs_is_what_a_run_says():
    written = bad_data.FILE.read_text(encoding="utf-8")
    assert written == bad_data.document(), "run `python tests/support/bad_data.py`"


@pytest.mark.parametrize(("kind", "objective", "rows"), bad_data.CASES)
def test_every_kind_gets_one_line_with_data_set_and_place(kind, objective, rows):
    said = bad_data.message(objective, rows)
    place = "has no column `" if kind == "missing column" else f", row {len(rows) - 1}, field `"
    assert said.startswith(f"train_dataset[{objective!r}]")
    assert place in said
    assert "\n" not in said
    if kind != "reversed pair":  # which two rows show together
        assert kind in bad_data.kinds(objective, rows) | ({kind} if kind == "missing column" else set())


def kinds_of_the_source():
    for name in ("rows.py", "row_parts.py", "prompt_rows.py", "host_columns.py", "row_search.py", "row_fit.py"):
        for node in ast.walk(test_house.TREES[name]):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "Fault"
                and isinstance(node.args[0], ast.Constant)
            ):
                yield node.args[0].value
    for node in ast.walk(test_house.TREES["data/turns.py"]):
        if isinstance(node, ast.Yield) and len(node.value.elts) == 4 and isinstance(node.value.elts[2], ast.Constant):
            yield node.value.elts[2].value


def test_no_kind_of_fault_is_missing_from_the_table():
    assert {*kinds_of_the_source()} - {kind for kind, *_ in bad_data.CASES} == set()


def test_every_kind_met_in_public_data_is_in_the_table(shared_data):
    with gzip.open(shared_data / "malformed" / "real_rows.jsonl.gz", "rt", encoding="utf-8") as lines:
        met = {f"{row['source']}: {row['kind']}" for row in map(json.loads, lines)}
    assert met == set().union(*bad_data.MET.values())
    assert bad_data.MET.keys() <= {kind for kind, *_ in bad_data.CASES}
