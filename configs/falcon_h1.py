r"""Falcon-H1 (arXiv 2507.22448): attention and state-space heads in parallel.

  python -m experiments.train --config=configs/falcon_h1.py:demo \
    --workdir=/tmp/falcon_h1

| variant | hardware | time | expect |
|---|---|---|---|
| tiny | 1 CPU core | seconds | nothing: for tests |
| demo | 2 CPU cores | 2 minutes | 1.77 bits per byte (order-2 Markov 2.73, |
| | | | order-5 1.86) on the text of Python 3.11 |
| small | 1 GPU | not measured | give it your text: config.data.path |
| tiny-90m ... 34b | 1 to 16 GPUs | not measured | the published shapes |

The published variants take the multipliers of the released models and the
schedule of the paper's section 3 (rate and decay ~ t^-1/4). The paper gives
neither peak rate nor batch size; those below are ours, untested at scale.
"""

from ml_collections import ConfigDict

from configs import common

# Shape of ours -> fields of the model.
_SHAPES = {
  "tiny": dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16,
  ),
  "demo": dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    mamba_n_heads=4, mamba_d_head=64, mamba_d_state=32, mamba_chunk_size=64,
  ),
  "small": dict(
    hidden_size=512, intermediate_size=1280, num_hidden_layers=12,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    mamba_n_heads=16, mamba_d_head=64, mamba_d_state=128,
  ),
}  # fmt: skip

# Shape of ours -> the rest of its config.
_RUNS = {
  "tiny": dict(total_steps=20, batch_size=8, sequence_length=32),
  "demo": dict(
    total_steps=600, batch_size=8, sequence_length=256, log_every_steps=20,
    optimizer=dict(lr=4e-3, warmup_steps=30), data=dict(overlap=128),
    eval=dict(every_steps=100, max_batches=8, sample_tokens=400),
  ),
  "small": dict(
    total_steps=5000, batch_size=32, sequence_length=1024, dtype="bfloat16",
    optimizer=dict(lr=1e-3, warmup_steps=200), data=dict(overlap=512),
    eval=dict(every_steps=500, max_batches=32),
  ),
}  # fmt: skip

# Published variant -> GPUs of 80 GB that hold 16 bytes a parameter together.
_MESHES = {
  "tiny-90m": {}, "0.5b": {}, "1.5b": {}, "1.5b-deep": {},
  "3b": dict(fsdp=2), "7b": dict(fsdp=4), "34b": dict(fsdp=8, tensor=2),
}  # fmt: skip


def get_config(variant: str = "demo") -> ConfigDict:
  """The config of a variant of the table above."""
  if variant not in (*_SHAPES, *_MESHES):
    raise common.unknown_variant(variant, (*_SHAPES, *_MESHES))
  config = common.training()
  config.model = common.model(
    "falcon_h1",
    **dict.fromkeys(_SHAPES["tiny"], int),
    **dict(vocab_size=int, max_position_embeddings=int, scan_layers=bool),
    **dict(mamba_rms_norm=bool, tie_word_embeddings=bool, initializer=str),
    **dict(attention_implementation=str, ssd_implementation=str),
  )
  if variant in _MESHES:
    config.model.variant = variant
    config.mesh.update(_MESHES[variant])
    config.update(dtype="bfloat16", remat="full", total_steps=100_000)
    config.update(batch_size=16, sequence_length=4096)
    config.optimizer.update(lr=5e-4, schedule="power", warmup_steps=1000)
  else:
    # 256 bytes, begin and end of a document, and 6 ids that are never used
    # but let the vocabulary be split over devices.
    config.model.update(vocab_size=264, **_SHAPES[variant])
    config.update(_RUNS[variant])
  return config
