"""Low-rank adapters for any linen model, by the paths of its parameters."""

from multihead.adapters import branches, hydra, overlap
from multihead.adapters.budget import allocate
from multihead.adapters.files import load, save
from multihead.adapters.fingerprint import fingerprint
from multihead.adapters.hydra import Hydra
from multihead.adapters.linear_maps import LinearMap, linear_maps
from multihead.adapters.lora import input_lora, lora, seq_lora
from multihead.adapters.peft_format import load_peft, save_peft
from multihead.adapters.tenants import stack_adapters

__all__ = [
  "Hydra",
  "LinearMap",
  "allocate",
  "branches",
  "fingerprint",
  "hydra",
  "input_lora",
  "linear_maps",
  "load",
  "load_peft",
  "lora",
  "overlap",
  "save",
  "save_peft",
  "seq_lora",
  "stack_adapters",
]
