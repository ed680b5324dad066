"""Which branch learns which change of a linear map, from how many examples.

The base is W0 with singular values 1/k. A teacher W* changes it; a student
adapts W0 on n noisy examples y = x W* + noise. With isotropic x the excess risk
is |W' - W*|^2, given here as a share of |W0 - W*|^2: 1 is the base untouched.

  sequential: W* = W0 (I + C D), a recombination of what W0 puts out;
  novel:      W* = W0 + A B;
  both:       W* = W0 (I + C D) + A B, halves of the same size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from multihead import adapters

TEACHERS = ("sequential", "novel", "both")


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of the study.

  Attributes:
    d_in, d_out: of the map.
    samples: numbers of examples.
    seeds: repetitions, each with its own base, teacher and data.
    steps: of Adam, all examples each time.
    lr: its peak rate.
    noise: standard deviation of the noise on each output.
    students: name -> ranks; all but the last have equally many parameters.
  """

  d_in: int = 96
  d_out: int = 32
  samples: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
  seeds: int = 10
  steps: int = 600
  lr: float = 0.02
  noise: float = 0.1
  students: tuple[tuple[str, tuple[int, int]], ...] = (
    ("LoRA", (4, 0)),
    ("SeqLoRA", (0, 8)),
    ("Hydra", (2, 4)),
    ("LoRA of rank r_par + r_seq", (6, 0)),
  )


TINY = Plan(samples=(8, 32), seeds=2, steps=20)


def problem(
  seed: int, kind: str, n: int, plan: Plan
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """A base, a teacher, and n examples in their shortest form.

  Returns:
    W0 and W* [D, F]; and x [D, D], y [D, F] whose squared error differs from
    that of the examples by a constant (the triangle of their QR decomposition),
    divided by sqrt(n).
  """
  rng = np.random.default_rng(seed)
  normal = rng.standard_normal
  left, right = (
    np.linalg.qr(normal((d, plan.d_out)))[0] for d in (plan.d_in, plan.d_out)
  )
  kernel = (left / np.arange(1, plan.d_out + 1)) @ right.T
  novel = normal((plan.d_in, 2)) @ normal((2, plan.d_out))
  sequential = kernel @ normal((plan.d_out, 4)) @ normal((4, plan.d_out))
  novel = novel / np.linalg.norm(novel)
  sequential = sequential / np.linalg.norm(sequential)
  change = {
    "sequential": sequential,
    "novel": novel,
    "both": sequential + novel,
  }[kind]
  target = kernel + change / np.linalg.norm(change)
  x = normal((n, plan.d_in))
  y = x @ target + plan.noise * normal((n, plan.d_out))
  q, triangle = np.linalg.qr(x)
  rows = ((0, plan.d_in - len(triangle)), (0, 0))
  short = (np.pad(part / n**0.5, rows) for part in (triangle, q.T @ y))
  return (kernel, target, *short)


class _Map(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return nn.Dense(self.features, use_bias=False, name="map")(x)


def student(ranks: tuple[int, int]) -> adapters.Hydra:
  """The adapter of a student, by its ranks (parallel, sequential)."""
  return adapters.Hydra(["map"], r_par=ranks[0], r_seq=ranks[1])


def count(plan: Plan, ranks: tuple[int, int]) -> int:
  """Number of a student's parameters."""
  shape = jax.ShapeDtypeStruct((plan.d_in, plan.d_out), jnp.float32)
  params = {"map": {"kernel": shape}}
  return sum(student(ranks).counts(params).values())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _risks(
  plan: Plan, ranks: tuple[int, int], key: Array, problems: Any
) -> tuple[Array, Array]:
  """Excess risk and training error of a student, for each problem."""
  adapter, model = student(ranks), _Map(plan.d_out)
  schedule = optax.cosine_decay_schedule(plan.lr, plan.steps)
  optimizer = optax.adam(schedule)

  def one(key: Array, kernel: Array, target: Array, x: Array, y: Array) -> Any:
    params = {"map": {"kernel": kernel}}
    ours = adapter.init(key, params)

    def loss(ours: Any) -> Array:
      return jnp.sum((adapter.apply(model, params, ours, x) - y) ** 2)

    def step(carry: Any, _: None) -> tuple[Any, None]:
      ours, state = carry
      updates, state = optimizer.update(jax.grad(loss)(ours), state)
      return (optax.apply_updates(ours, updates), state), None

    carry = (ours, optimizer.init(ours))
    (ours, _), _ = jax.lax.scan(step, carry, length=plan.steps)
    merged = adapter.merge(params, ours)["map"]["kernel"]
    return jnp.sum((merged - target) ** 2), loss(ours)

  keys = jax.random.split(key, len(problems[0]))
  return jax.vmap(one)(keys, *problems)


def run(
  plan: Plan, say: Callable[[str], None]
) -> dict[str, dict[str, np.ndarray]]:
  """Excess risks, [samples, seeds], by teacher and student.

  Args:
    plan: the sizes.
    say: called with a line now and then.

  Returns:
    Teacher -> student -> risks; "training error" in place of a teacher has the
    errors on the examples of teacher "both".
  """
  problems = [
    problem(seed, kind, n, plan)
    for kind in TEACHERS
    for n in plan.samples
    for seed in range(plan.seeds)
  ]
  stacked = tuple(
    jnp.asarray(np.stack(part), jnp.float32)
    for part in zip(*problems, strict=True)
  )
  shape = (len(TEACHERS), len(plan.samples), plan.seeds)
  found: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in TEACHERS}
  found["training error"] = {}
  for name, ranks in plan.students:
    risks, errors = _risks(plan, ranks, jax.random.key(0), stacked)
    risks = np.asarray(risks).reshape(shape)
    for kind, risk in zip(TEACHERS, risks, strict=True):
      found[kind][name] = risk
    found["training error"][name] = np.asarray(errors).reshape(shape)[-1]
    means = risks.mean(axis=(1, 2))
    say(
      f"{name} ({count(plan, ranks)} parameters): mean excess risk "
      + ", ".join(
        f"{mean:.3f} ({kind})"
        for kind, mean in zip(TEACHERS, means, strict=True)
      )
    )
  return found
