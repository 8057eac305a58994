"""Start-up time of `hbat --help` and of `import torch`: minimum of several runs in turn.

python benchmarks/startup.py [--repeats 5]
"""

import argparse
import subprocess
import sys
import time

from workload import save

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "hbat --help": [sys.executable, "-m", "hbat", "--help"],
    "hbat train --help": [sys.executable, "-m", "hbat", "train", "--help"],
}


def main() -> None:
    """Time the commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(given.repeats):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    base = min(times["import torch"])
    for name, seconds in times.items():
        print(f"{name:20}{min(seconds):7.2f} s{min(seconds) - base:+7.2f} s over importing torch")
    save("startup", {"seconds": times})


if __name__ == "__main__":
    main()
