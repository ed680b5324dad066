"""Meshes, sharding rules and shard_map algorithms over named axes."""

from multihead.parallel import (
  context_scan,
  mesh,
  sharded_conv,
  sharded_ops,
  sharding,
)
from multihead.parallel.mesh import AXES, initialize_distributed, make_mesh

__all__ = [
  "AXES",
  "context_scan",
  "initialize_distributed",
  "make_mesh",
  "mesh",
  "sharded_conv",
  "sharded_ops",
  "sharding",
]
