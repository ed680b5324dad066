"""Compiles the tuned kernels of ops.attention to SASS, without a GPU.

A script, because triton reads when it is imported whether to interpret. Prints
a line of JSON for each kernel: what it is, its shared memory, the bytes that it
spills, and how often the assembler says that it serialises products.
"""

import functools
import json
import re
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multihead.ops import triton_compat
from multihead.ops.attention.triton import blocks, calls

TYPES = {"bfloat16": "bf16", "float32": "fp32", "int32": "i32"}
CAPABILITY = 90


def compile_only(
  kernel, *inputs, out, grid, num_warps, num_stages, **constants
):
  """In the place of `triton_compat.call`."""
  del grid
  names, arrays = kernel.arg_names, (*inputs, *out)
  places = {name: (names.index(name),) for name in names}
  signature = {
    name: "*" + TYPES[array.dtype.name]
    for name, array in zip(names, arrays, strict=False)
  }
  source = ASTSource(
    fn=kernel,
    signature={**signature, **dict.fromkeys(constants, "constexpr")},
    constexprs={places[name]: value for name, value in constants.items()},
    attrs={places[name]: [["tt.divisibility", 16]] for name in signature},
  )
  made = triton.compile(
    source,
    target=GPUTarget("cuda", CAPABILITY, 32),
    options=dict(num_warps=num_warps, num_stages=num_stages),
  )
  said = _assemble(made.asm["ptx"])
  o = constants["o"]
  line = dict(
    kernel=kernel.__name__,
    width=o.H,
    dtype=inputs[0].dtype.name,
    shared=made.metadata.shared,
    spilled=int(re.search(r"(\d+) bytes spill stores", said)[1]),
    serialised=len(re.findall(r"C75\d\d", said)),
  )
  print(json.dumps(line), flush=True)
  return tuple(jnp.zeros(s.shape, s.dtype) for s in out)


def _assemble(ptx: str) -> str:
  """What the assembler says about a kernel."""
  with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
    file.write(ptx)
    file.flush()
    return subprocess.run(
      [
        triton.knobs.nvidia.ptxas.path,
        "-v",
        f"-arch=sm_{CAPABILITY}a",
        file.name,
        "-o",
        "/dev/null",
      ],
      check=True,
      capture_output=True,
      text=True,
    ).stderr


def main():
  triton_compat.call = compile_only
  run = functools.partial(
    calls.run,
    mask=None,
    causal=True,
    q_offset=0,
    window=(None, None),
    softcap=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    kv_lengths=None,
    dropout_rate=0.0,
    dropout_words=None,
    return_lse=False,
  )
  for width, itemsize in blocks.TABLES["NVIDIA H100 80GB HBM3"]:
    dtype = {2: "bfloat16", 4: "float32"}[itemsize]
    x = jax.ShapeDtypeStruct((1, 512, 2, width), dtype)
    attend = functools.partial(run, scale=width**-0.5, bias=None)
    jax.eval_shape(lambda *x, f=attend: jax.vjp(f, *x)[1](x[0]), x, x, x)


if __name__ == "__main__":
  main()
