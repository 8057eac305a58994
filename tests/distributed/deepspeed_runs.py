"""The runs of `ddp_runs` under DeepSpeed's ZeRO, on CPUs.

`torchrun --nproc_per_node 2 deepspeed_runs.py FOLDER STAGE NAMES` leaves weights, logs and tables in FOLDER.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed import ddp_runs
from transformers import TrainerCallback


def engine(stage, clip="auto"):
    return {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 4096, "allgather_bucket_size": 4096},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def main(folder, stage, names):
    config = folder / f"deepspeed-{os.environ['RANK']}.json"
    config.write_text(json.dumps(engine(stage)))
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config),
    }
    ddp_runs.ENGINE |= {"use_cpu": False, "ddp_backend": "gloo"}
    ddp_runs.main(folder, names, "train")

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
