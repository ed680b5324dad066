"""Meshes, sharding rules and shard_map algorithms over named axes."""

from multihead.parallel import mesh, sharded_ops, sharding
from multihead.parallel.mesh import AXES, initialize_distributed, make_mesh

__all__ = [
  "AXES",
  "initialize_distributed",
  "make_mesh",
  "mesh",
  "sharded_ops",
  "sharding",
]
