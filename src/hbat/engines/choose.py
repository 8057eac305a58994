"""Which engine trains, as arguments, launcher and model say it."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from hbat.config.ewc import EWCConfig
from hbat.engines.checks import refuse_trainer
from hbat.engines.deepspeed import zero3
from hbat.engines.deepspeed.engine import DeepSpeed
from hbat.engines.deepspeed.request import is_asked
from hbat.engines.engine import Engine, Trained
from hbat.engines.fsdp2 import FSDP2, fsdp_version
from hbat.engines.loaded_shards import LoadedShards, is_loaded_in_shards
from hbat.engines.processes import is_main_process
from hbat.engines.refusals import REFUSALS

logger = logging.getLogger(__name__)


def engine_for(args: Any, model: Any = None) -> Engine:
    """Find the engine of one trainer, of its arguments and model."""
    if is_asked(args):
        return DeepSpeed()
    if model is not None and is_loaded_in_shards(model):
        return LoadedShards()
    return FSDP2() if fsdp_version(args) is not None else Engine()


def choose_engine(tracks: Sequence[Trained], model: Any, ewc: EWCConfig | None, *, replays: bool = False) -> Engine:
    """Find the engine of a run, which knows how it shards, and refuse what was not tested with it.

    Raises:
        NotImplementedError: If an option, an objective or a combination is not supported.
        ValueError: If the objectives ask for different engines, or the model cannot be trained.
    """
    for track in tracks:
        refuse_trainer(track.args, model)
    engines = [engine_for(track.args, model) for track in tracks]
    engine = next((found for found in engines if type(found) is not Engine), engines[0])
    engine.check(tracks, ewc)
    if replays and engine.name != Engine.name:
        raise REFUSALS["replay"].error(engine=engine.name)
    if not engine.resumes_inside_stage and is_main_process():
        logger.warning(
            "With DeepSpeed or `distributed_config` no checkpoints are written inside a stage: a stage that is cut "
            "off begins again. Stages are shorter with more rounds (`num_rounds`)."
        )
    return engine


def make_whole(model: nn.Module) -> None:
    """Gather a model that transformers loaded partitioned, as it does after arguments with ZeRO-3. Collective."""
    zero3.gather(model)
