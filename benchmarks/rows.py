"""Loading, converting and checking preference rows of another layout, against `load_dataset` and one `map`, in turn.

python benchmarks/rows.py [--rows 1000000] [--repeats 3]

Each run is a process of its own with an empty cache. The `map` makes the same messages and checks nothing. Memory is
the peak of what the process allocates beyond its imports, without the pages of memory-mapped files that it reads.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from datasets import load_dataset
from workload import save

from hbat.data.check import check_dataset
from hbat.data.formats import preference_faults
from hbat.data.sources import load_rows

WORDS = ["the", "model", "of", "answers", "to", "questions", "in", "that", "is", "it", "for", "was", "reads", "aloud"]


def write(path: Path, count: int) -> None:
    """Write ShareGPT pairs of some 60 words."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            sides = {side: {"from": "gpt", "value": text(20)} for side in ("chosen", "rejected")}
            row = {"conversations": [{"from": "human", "value": f"{number} {text(20)}"}], **sides}
            file.write(json.dumps(row) + "\n")


def plain(path: str) -> int:
    """What takes the same rows without this library."""
    roles = {"human": "user", "gpt": "assistant"}

    def convert(row: dict) -> dict:
        prompt = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        sides = {
            side: [{"role": roles[row[side]["from"]], "content": row[side]["value"]}]
            for side in ("chosen", "rejected")
        }
        return {"prompt": prompt, **sides}

    rows = load_dataset("json", data_files=path, split="train")
    return len(rows.map(convert, remove_columns=rows.column_names))


def checked(path: str) -> int:
    """Load, convert and check every row."""
    rows, _ = load_rows(path, name="data", check=preference_faults)
    return len(check_dataset(rows.dataset, name="data", faults=preference_faults, origin=rows.origin)[0])


WAYS = {"plain": plain, "checked": checked}


def run(way: str, path: str) -> None:
    """Take one way and print its seconds and its memory."""
    before, peak, done = allocated(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], allocated() - before)

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    count = WAYS[way](path)
    seconds = time.perf_counter() - start
    done.set()
    print(json.dumps({"rows": count, "seconds": seconds, "megabytes": peak[0] / 1024}))


def allocated() -> int:
    """Kilobytes of this process that are of no file (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def main() -> None:
    """Time both ways in turn, at a tenth of the rows and at all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(*given.run)
        return
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (given.rows // 10, given.rows):
            file = Path(folder) / f"{count}.jsonl"
            write(file, count)
            for _ in range(given.repeats):
                for way in WAYS:
                    with tempfile.TemporaryDirectory(dir=folder) as cache:
                        done = subprocess.run(
                            [sys.executable, __file__, "--run", way, str(file)], check=True, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, env={**os.environ, "HF_DATASETS_CACHE": cache},
                        )  # fmt: skip
                    found.setdefault(f"{way} {count}", []).append(json.loads(done.stdout.splitlines()[-1]))
    for name, runs in found.items():
        seconds, megabytes = (min(each[key] for each in runs) for key in ("seconds", "megabytes"))
        print(f"{name:20}{seconds:8.1f} s{megabytes:8.0f} MB")
    ratios = [
        ours["seconds"] / base["seconds"]
        for ours, base in zip(found[f"checked {given.rows}"], found[f"plain {given.rows}"], strict=True)
    ]
    print(f"checked / plain: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    save("rows", found)


if __name__ == "__main__":
    main()
