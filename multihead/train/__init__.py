"""Training: state, step, optimizers, checkpoints, the loop, the report."""

from multihead.train.config import TrainConfig, build_model, read_config
from multihead.train.loop import NonFiniteError, train

__all__ = [
  "NonFiniteError",
  "TrainConfig",
  "build_model",
  "read_config",
  "train",
]
