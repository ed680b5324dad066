r"""Hydra (arXiv 2309.06922): a low-rank adapter and a head over a frozen base.

  python -m experiments.train --config=configs/hydra.py:digits_base \
    --workdir=runs/digits_base
  python -m experiments.train --config=configs/hydra.py:digits \
    --workdir=runs/digits

| variant | hardware | base | data |
|---|---|---|---|
| tiny, digits_base | 1 CPU core | none | digits; digits 0-4 |
| digits | 1 CPU core | runs/digits_base | digits 5-9, 5 of each |
| minilm | 2 CPU cores | all-MiniLM-L6-v2 | docstrings of nine packages |
| text | 2 CPU cores | runs/demo of `make demo` | docstrings of Python |
| vtab_*, elevater, glue_* | 1 GPU | weights/... | as config.data.path |

The last row has the paper's recipes, not run here. VTAB's schedule ends where
the paper's cosine over 500 epochs is after 100. ELEVATER's rate and decay are
to be searched for; it lacks a normalisation before the head, GLUE its STS-B.
"""

from ml_collections import ConfigDict

from configs import bert, common, falcon_h1, vit

# Dataset: classes, learning rate, scale, dropout, batch.
_VTAB = {
  "cifar100": (100, 5e-4, 0.1, 0.2, 16), "dtd": (47, 1e-3, 0.1, 0.2, 32),
  "caltech101": (102, 1e-3, 4.0, 0.1, 32), "svhn": (10, 1e-3, 3.0, 0.0, 16),
  "flowers102": (102, 5e-3, 0.1, 0.0, 64), "pets": (37, 1e-3, 0.1, 0.0, 32),
  "sun397": (397, 1e-3, 0.1, 0.2, 64), "camelyon": (2, 5e-3, 0.1, 0.2, 64),
  "eurosat": (10, 5e-4, 0.1, 0.2, 64), "resisc45": (45, 5e-3, 0.1, 0.2, 64),
  "retinopathy": (5, 5e-4, 4.5, 0.2, 64), "dmlab": (6, 1e-3, 4.5, 0.2, 64),
  "clevr_count": (8, 5e-4, 1.5, 0.2, 64), "kitti": (4, 5e-4, 4.5, 0.2, 64),
  "clevr_dist": (6, 5e-4, 0.1, 0.0, 16), "dspr_loc": (16, 1e-3, 4.5, 0.2, 16),
  "dspr_ori": (16, 1e-3, 2.5, 0.2, 64), "snorb_azi": (18, 5e-3, 3.0, 0.2, 64),
  "snorb_ele": (9, 5e-4, 1.0, 0.2, 64),
}  # fmt: skip
# Task: classes, examples, batch of 4 GPUs, learning rate, epochs, decay, pairs.
_GLUE = {
  "mnli": (3, 392_702, 32, 4e-4, 30, 0.1, True),
  "sst2": (2, 67_349, 64, 6e-4, 60, 0.1, False),
  "mrpc": (2, 3_668, 64, 6e-4, 40, 0.1, True),
  "cola": (2, 8_551, 16, 4e-4, 80, 0.1, False),
  "qnli": (2, 104_743, 32, 8e-4, 25, 0.1, True),
  "qqp": (2, 363_846, 64, 6e-4, 25, 0.1, True),
  "rte": (2, 2_490, 64, 8e-4, 80, 0.2, True),
}
_VIT = dict(r_par=2, r_seq=2, targets="attention/out, mlp/down", bias=True,
            trained="head", init="xavier_uniform")  # fmt: skip
_BERT = dict(r_par=4, r_seq=8, targets="mlp/down", trained="head|pooler")
_FAST = dict(lr=3e-3, weight_decay=1e-4, warmup_steps=10)
# Variant -> the config it starts from, and what differs.
_RUNS = {
  "tiny": (vit, "tiny", dict(adapter=_VIT, optimizer=_FAST)),
  "digits_base": (vit, "digits", dict(
    model=dict(num_classes=5), data=dict(classes="0,1,2,3,4"),
    total_steps=1000)),
  "digits": (vit, "digits", dict(
    model=dict(num_classes=5, drop_path_rate=0.0),
    data=dict(classes="5,6,7,8,9", train_per_class=5), total_steps=200,
    batch_size=8, adapter=dict(base="runs/digits_base", **_VIT),
    optimizer=_FAST)),
  "minilm": (bert, "minilm", dict(adapter=_BERT, optimizer=dict(lr=2e-3))),
  "text": (falcon_h1, "demo", dict(
    data=dict(path="stdlib:docstrings"), total_steps=300, adapter=dict(
      base="runs/demo", targets="attention/out, mlp/down", r_par=8, r_seq=8))),
  "elevater": (vit, "vit_base", dict(
    model=dict(variant="vit_base_patch32_clip_quickgelu_224", num_classes=10,
               drop_path_rate=0.0),
    data=common.image_data(normalise="clip", centre_crop=1.0,
                           train_per_class=5),
    total_steps=50, batch_size=64,
    optimizer=dict(name="sgd", lr=1e-2, schedule="constant", warmup_steps=0,
                   b1=0.9, weight_decay=1e-4),
    adapter={**_VIT, "targets": "mlp/down", "init": "normal",
             "base": "weights/clip_vit_base_patch32"})),
}  # fmt: skip
for _name, (_n, _lr, _s, _drop, _batch) in _VTAB.items():
  _epoch = 1000 // _batch
  _RUNS[f"vtab_{_name}"] = (vit, "vit_base", dict(
    model=dict(num_classes=_n), data=common.image_data(normalise="imagenet"),
    total_steps=100 * _epoch, batch_size=_batch, eval=dict(every_steps=0),
    optimizer=dict(lr=_lr, warmup_steps=10 * _epoch, end_factor=0.905,
                   weight_decay=1e-5 if _name == "snorb_azi" else 1e-4),
    adapter=dict(base="weights/vit_base_in21k", scale=_s, dropout=_drop,
                 **_VIT)))  # fmt: skip
for _name, (_n, _size, _batch, _lr, _epochs, _decay, _pairs) in _GLUE.items():
  _steps = _epochs * (_size // _batch)
  _RUNS[f"glue_{_name}"] = (bert, "base", dict(
    model=dict(variant="roberta-base", num_labels=_n),
    data=common.text_data(tokenizer="weights/roberta-base", bos="<s>",
                          eos="</s>", pair_field="pair" if _pairs else None),
    total_steps=_steps, batch_size=_batch, sequence_length=512,
    optimizer=dict(lr=_lr, schedule="linear", end_factor=0.0,
                   warmup_steps=int(0.06 * _steps), weight_decay=_decay),
    adapter=dict(base="weights/roberta-base", **_BERT)))  # fmt: skip


def get_config(variant: str = "digits") -> ConfigDict:
  """The config of a variant of the table above."""
  if variant not in _RUNS:
    raise common.unknown_variant(variant, tuple(_RUNS))
  family, start, changes = _RUNS[variant]
  config = family.get_config(start)
  for key, value in changes.items():
    if isinstance(value, ConfigDict):
      config[key] = value  # a section as a whole
    else:
      config.update({key: value})
  return config
