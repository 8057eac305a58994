"""docs/bad-data.md holds every kind of fault with the message that it gets."""

import ast
import gzip
import json
from pathlib import Path

import bad_data

import hbat.data


def test_the_table_in_the_docs_is_what_a_run_says():
    written = bad_data.FILE.read_text(encoding="utf-8")
    assert written == bad_data.document(), "run `python tests/support/bad_data.py`"


def test_every_kind_gets_one_line_with_data_set_and_place():
    for kind, objective, rows in bad_data.CASES:
        said = bad_data.message(objective, rows)
        place = "has no column `" if kind == "missing column" else f", row {len(rows) - 1}, field `"
        assert said.startswith(f"train_dataset[{objective!r}]")
        assert place in said
        assert "\n" not in said
        if kind not in {"missing column", "reversed pair"}:  # which the columns, or two rows together show
            assert kind in bad_data.kinds(objective, rows)


def kinds_of_the_source():
    """The kinds that `Fault` and the tuples of `turn_faults` are made with."""
    for file in Path(hbat.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Fault":
                kind = node.args[0]
            elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 4:
                kind = node.value.elts[2]
            else:
                continue
            if isinstance(kind, ast.Constant):
                yield kind.value


def test_no_kind_of_fault_is_missing_from_the_table():
    kinds = {*kinds_of_the_source()}
    assert {"repeated role", "not a label", "template"} <= kinds
    assert kinds - {kind for kind, *_ in bad_data.CASES} == set()


def test_every_kind_met_in_public_data_is_in_the_table(shared_data):
    with gzip.open(shared_data / "malformed" / "real_rows.jsonl.gz", "rt", encoding="utf-8") as lines:
        met = {f"{row['source']}: {row['kind']}" for row in map(json.loads, lines)}
    assert met == set().union(*bad_data.MET.values())
    assert bad_data.MET.keys() <= {kind for kind, *_ in bad_data.CASES}
