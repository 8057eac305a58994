from hbat.config.evaluation import EvalConfig as EvalConfig
from hbat.config.ewc import EWCConfig as EWCConfig
from hbat.config.hbat import HBATConfig as HBATConfig
from hbat.data.load import DatasetError as DatasetError
from hbat.evaluation.endpoint import JudgeError as JudgeError
from hbat.ewc.callback import EWCCallback as EWCCallback
from hbat.ewc.log import EWCWarning as EWCWarning
from hbat.model.load import PrecisionWarning as PrecisionWarning
from hbat.objectives.objective import Objective as Objective
from hbat.ppo.config import PPOConfig as PPOConfig
from hbat.ppo.rewards.function import RewardError as RewardError
from hbat.ppo.rewards.function import RewardWarning as RewardWarning
from hbat.ppo.trainer import PPOTrainer as PPOTrainer
from hbat.reports.front import Front as Front
from hbat.reports.matrix import ForgettingMatrix as ForgettingMatrix
from hbat.stages.interruption import RunInterrupted as RunInterrupted
from hbat.stages.moments import MomentsWarning as MomentsWarning
from hbat.state.consolidation import SaturationWarning as SaturationWarning
from hbat.state.files import StorageError as StorageError
from hbat.state.manifest import RunStateError as RunStateError
from hbat.trainer import HBATTrainer as HBATTrainer

__version__: str
