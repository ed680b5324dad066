"""The parameters of a task's model, made and placed on a mesh."""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from multihead.parallel import sharding


class ModelParameters:
  """What a task says of its parameters if they are those of its `model`."""

  model: nn.Module

  def init_params(self, rng: jax.Array, mesh: Mesh | None = None) -> Any:
    """Initial parameters, each made on its shard of the mesh."""
    return sharding.init_params(self.model, rng, mesh)

  def abstract_params(self) -> Any:
    """Shapes and dtypes of the parameters."""
    return sharding.abstract_params(self.model)

  def param_shardings(self, mesh: Mesh) -> Any:
    """Where each parameter lives."""
    return sharding.param_shardings(self.model, mesh)
