"""The evidence: does the penalty help, against what, and where? Hours on two cores; resumable.

    python benchmarks/alignment/run.py [--output FOLDER] [--seeds 8] [--only PATTERN] [--smoke]
    python benchmarks/alignment/report.py [--output FOLDER]

Appends a line of JSON a run to `runs.jsonl` in the folder, and skips the runs that it holds already.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from plan import plan, smoke
from spec import Spec

WORKERS = 2
RESULTS = Path(__file__).parent.parent / "results" / "alignment"
_PACKAGES = ("hbat-trl", "torch", "transformers", "trl", "accelerate", "datasets")
_SMOKE = {"size": 64, "prompts": 16}


def _prepare() -> None:
    import accelerate.utils.imports  # noqa: PLC0415 - heavy, and only the workers need it
    import datasets  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    # TRL asks at every step whether PEFT is installed, and accelerate 1.15 reads the packages' metadata anew.
    accelerate.utils.imports._is_package_available = cache(accelerate.utils.imports._is_package_available)  # noqa: SLF001
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _work(spec: Spec, folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    from training import train  # noqa: PLC0415

    return train(spec, folder, **sizes)


def _base(base: tuple[str, int], folder: Path) -> None:
    from model import load_base  # noqa: PLC0415

    load_base(*base, folder)


def run(specs: Iterable[Spec], folder: Path, sizes: dict[str, int]) -> int:
    """Train what is not in the folder yet, and return how many runs failed."""
    file = folder / "runs.jsonl"
    done = {json.loads(line)["key"] for line in file.read_text().splitlines()} if file.exists() else set()
    left = list({spec.key: spec for spec in specs if spec.key not in done}.values())
    facts = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "command": " ".join(sys.argv),
    }
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_prepare) as pool, file.open("a") as lines:
        list(pool.map(_base, sorted({(spec.base, spec.seed) for spec in left}), [folder] * len(left)))
        waiting: dict[Future[dict[str, Any]], Spec] = {}
        queue = iter(left)
        while True:
            # Two more than the workers, so that an interrupted programme has no long queue to drop.
            waiting |= {
                pool.submit(_work, spec, folder, sizes): spec for spec in islice(queue, WORKERS + 2 - len(waiting))
            }
            if not waiting:
                return failed
            future = next(as_completed(waiting))
            spec = waiting.pop(future)
            try:
                record = future.result() | facts
            except Exception as error:  # noqa: BLE001 - one run that fails must not end the others
                failed += 1
                print(f"{spec.key}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            print(f"{spec.key}: {record['seconds']['all']:.0f} s")


def main() -> int:
    """Run the plan, or a part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--only", default="", help="regular expression that a run's key must match")
    parser.add_argument("--smoke", action="store_true", help="every step, too small to learn anything")
    parser.add_argument("--list", action="store_true", help="print the keys of the runs in order, and train nothing")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    specs = [spec for spec in (smoke() if given.smoke else plan(given.seeds)) if re.search(given.only, spec.key)]
    if given.list:
        print("\n".join(dict.fromkeys(spec.key for spec in specs)))
        return 0
    given.output.mkdir(parents=True, exist_ok=True)
    return run(specs, given.output, _SMOKE if given.smoke else {})


if __name__ == "__main__":
    sys.exit(main())
