import atexit
import gc
import os
import pathlib
import random
import shutil
import sys
import tempfile
from importlib import metadata

import pytest

# Before transformers and datasets are imported: they read these once.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "HF_DATASETS_CACHE": tempfile.mkdtemp(prefix="hbat-tests-"),
}
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def pytest_report_header():
    names = ["torch", "transformers", "trl", "accelerate", "peft", "datasets"]
    return "libraries: " + ", ".join(f"{name} {_version(name)}" for name in names)


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


_LAUNCHED = {key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))}


def _forget_launch():
    """Take out of the environment what transformers < 5 writes there: engine and precision."""
    for key in [each for each in os.environ if each.startswith(("ACCELERATE_", "FSDP_")) and each not in _LAUNCHED]:
        del os.environ[key]


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test starts from the same seeds and without an accelerator left by the last one."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the trainers draw from this global state
    torch.manual_seed(0)
    _forget_launch()  # fixtures of a module have trained before
    yield
    _forget_launch()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - accelerate's own way to start anew
        GradientState._reset_state()  # noqa: SLF001


@pytest.fixture(scope="module", autouse=True)
def _short_garbage_collections():
    """Keep what earlier modules left out of garbage collection.

    Every stage collects garbage, and pytest and the libraries keep millions of objects: 0.01 s at the beginning of a
    session becomes seconds at its end.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data():
    """Folder of the shared sample data."""
    default = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("HBAT_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}; set HBAT_SHARED_DATA to its folder")
    return folder
