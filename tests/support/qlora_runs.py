"""Runs of an adapter on a quantised base, for one process or for several with DDP.

`torchrun --nproc_per_node 2 qlora_runs.py FOLDER` trains them all and leaves weights and logs in FOLDER, which holds
the base.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import qlora_cases
import torch
from safetensors.torch import save_file

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
BATCH = 4  # rows of an optimizer step, over all processes
RUNS = {"4-bit": ("4-bit", "dpo"), "8-bit": ("8-bit", "dpo"), "4-bit with ppo": ("4-bit", "ppo")}


def train(name, base, folder):
    kind, preference = RUNS[name]
    more = {"per_device_train_batch_size": BATCH // PROCESSES, "max_steps": 3}
    more |= {"ddp_backend": "gloo"} if PROCESSES > 1 else {}
    steps = qlora_cases.PPO | {"rollout_batch_size": None} if preference == "ppo" else {}
    sections = {"sft": more, preference: steps | more}
    return qlora_cases.train(qlora_cases.qlora(base, kind), folder, preference, sections=sections)


def main(folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name in RUNS:
        place = folder / name.replace(" ", "-")
        run = train(name, folder, place / "run")
        assert torch.distributed.get_world_size() == PROCESSES == 2
        save_file(
            {key: tensor.contiguous() for key, tensor in cases.weights(run.model).items()},
            place / f"{rank}.safetensors",
        )
        (place / f"{rank}.json").write_text(json.dumps(run.state.log_history), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
