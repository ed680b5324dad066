"""The loop: what it leaves, how it stops, how it goes on."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from multihead.errors import UserError
from multihead.train import checkpoints, loop, writers
from multihead.train import run as run_lib


@pytest.fixture(autouse=True)
def _names(request, toy, tmp_path):
  request.instance.toy = toy
  request.instance.tmp = str(tmp_path)


def _saved_state(run, workdir, step):
  saved = checkpoints.Checkpoints(os.path.join(workdir, "checkpoints"))
  state, position = saved.restore(step, run.target)
  saved.close()
  return jax.tree.map(np.array, state), position


def _read(workdir, name):
  with open(os.path.join(workdir, name), "rb") as file:
    return file.read()


def _losses(workdir):
  return {
    record["step"]: record["loss"]
    for record in writers.read_records(workdir)
    if "loss" in record
  }


class LoopTest(parameterized.TestCase):
  def _dir(self, name):
    return os.path.join(self.tmp, name)

  def test_leaves_everything_that_is_promised(self):
    config = self.toy.config()
    run = self.toy.run(config)
    workdir = self._dir("run")
    result = loop.train(config, workdir, run=run)
    assert result.finished
    assert result.step == 12
    assert run.task.iterators[0].closed
    metrics = json.loads(_read(workdir, "metrics.json"))
    assert metrics == result.metrics
    assert metrics["steps"] == 12
    assert metrics["step_compilations"] == 1
    assert metrics["uniform_loss"] == pytest.approx(np.log(16))
    assert metrics["tokens_per_second"] > 0
    assert metrics["validation_loss"] < np.log(16)
    # Read late, but at the steps that were asked for, and at checkpoints.
    assert set(_losses(workdir)) == {3, 5, 6, 9, 10, 12}
    validated = [
      r["step"] for r in writers.read_records(workdir) if "validation_loss" in r
    ]
    assert validated == [6, 12]
    report = _read(workdir, "report.md").decode()
    assert "| **this model**" in report
    assert "| uniform " in report
    assert "````text\n``` 256 made-up words\n````" in report
    assert '"total_steps": 12' in report
    for name in ("loss.png", "learning_rate.png"):
      assert f"({name})" in report
      assert _read(workdir, name).startswith(b"\x89PNG")
    assert os.listdir(f"{workdir}/tensorboard")
    names = os.listdir(f"{workdir}/checkpoints")
    assert {name for name in names if name.isdigit()} == {"10", "12"}

  def test_records_are_means_over_the_steps_since_the_last(self):
    config = self.toy.config(log_every_steps=1, eval={})
    loop.train(config, self._dir("each"), run=self.toy.run(config))
    each = _losses(self._dir("each"))
    assert set(each) == set(range(1, 13))
    config = self.toy.config(log_every_steps=4, eval={})
    loop.train(config, self._dir("four"), run=self.toy.run(config))
    four = _losses(self._dir("four"))
    np.testing.assert_allclose(
      four[4], np.mean([each[i] for i in (1, 2, 3, 4)])
    )
    np.testing.assert_allclose(four[5], each[5])
    np.testing.assert_allclose(four[8], np.mean([each[i] for i in (6, 7, 8)]))

  @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
  def test_signal_saves_and_goes_on_bit_for_bit(self, number):
    settings = dict(ema_decay=0.9, eval=dict(every_steps=0))
    config = self.toy.config(**settings)
    run = self.toy.run(config)
    loop.train(config, self._dir("whole"), run=run)
    want, position = _saved_state(run, self._dir("whole"), 12)

    stopped = self.toy.run(config)
    handler = signal.getsignal(number)
    # While batch 7 is made, that is within step 8.
    stopped.task.before_batch = lambda n: (
      n == 7 and os.kill(os.getpid(), number)
    )
    workdir = self._dir("stopped")
    result = loop.train(config, workdir, run=stopped)
    assert not result.finished
    assert result.step == 8
    assert signal.getsignal(number) is handler
    assert not os.path.exists(f"{workdir}/metrics.json")
    again = self.toy.run(config)
    result = loop.train(config, workdir, run=again)
    assert result.finished
    assert again.task.iterators[0].next == 12
    got, found = _saved_state(again, workdir, 12)
    jax.tree.map(np.testing.assert_array_equal, want, got)
    assert position == found

  def test_finished_run_is_only_read(self):
    config = self.toy.config()
    workdir = self._dir("run")
    first = loop.train(config, workdir, run=self.toy.run(config))
    run = self.toy.run(config)
    again = loop.train(config, workdir, run=run)
    assert again == first
    assert not run.task.iterators
    # Its report gone, it is written again, without another step.
    os.remove(f"{workdir}/report.md")
    run = self.toy.run(config)
    third = loop.train(config, workdir, run=run)
    assert run.task.iterators[0].next == 12
    assert os.path.exists(f"{workdir}/report.md")
    assert third.metrics["validation_loss"] == first.metrics["validation_loss"]
    assert third.metrics["loss"] == first.metrics["loss"]

  def test_finished_run_is_prolonged(self):
    config = self.toy.config(total_steps=6)
    loop.train(config, self._dir("run"), run=self.toy.run(config))
    config = self.toy.config(total_steps=9)
    run = self.toy.run(config)
    result = loop.train(config, self._dir("run"), run=run)
    assert (result.step, run.task.iterators[0].next) == (9, 9)

  def test_later_records_of_a_killed_run_are_dropped(self):
    config = self.toy.config(total_steps=5)
    workdir = self._dir("run")
    loop.train(config, workdir, run=self.toy.run(config))
    with open(f"{workdir}/metrics.jsonl", "a") as file:
      file.write('{"step": 7, "loss": 123.0}\n{"step": 8, "lo')
    config = self.toy.config(total_steps=12)
    loop.train(config, workdir, run=self.toy.run(config))
    assert 123.0 not in _losses(workdir).values()
    steps = [record["step"] for record in writers.read_records(workdir)]
    assert steps == sorted(steps)

  @parameterized.parameters(1, 3, 7, 11)
  def test_non_finite_stops_with_the_step_and_keeps_the_checkpoint(self, bad):
    config = self.toy.config(log_every_steps=4)
    run = self.toy.run(config)
    run.task.poison = bad
    workdir = self._dir("run")
    with pytest.raises(loop.NonFiniteError) as raised:
      loop.train(config, workdir, run=run)
    assert f"step {bad + 1}: loss nan" in str(raised.value)
    kept = (bad // 5) * 5
    good = f"step {kept} in {workdir}" if kept else "none yet"
    assert good in str(raised.value)
    saved = checkpoints.Checkpoints(f"{workdir}/checkpoints")
    assert saved.latest_step() == (kept or None)
    saved.close()
    # With that batch mended, the run goes on from there.
    mended = self.toy.run(config)
    assert loop.train(config, workdir, run=mended).finished

  def test_checkpoint_of_another_model(self):
    config = self.toy.config()
    workdir = self._dir("run")
    loop.train(config, workdir, run=self.toy.run(config))
    other = self.toy.Task(self.toy.Model(width=4), 8, 4)
    for total in (12, 20):
      config = self.toy.config(total_steps=total)
      with pytest.raises(UserError, match="of another model or optimizer"):
        loop.train(config, workdir, run=self.toy.run(config, 1, other))

  @parameterized.parameters(
    (dict(mesh=dict(fsdp=3)), "needs 3"),
    (dict(batch_size=12), "batch_size=12 must be a multiple of"),
    (dict(batch_size=8, grad_accum_steps=2), "= 8 * 2"),
    (
      dict(mesh=dict(data=1, sequence=8)),
      "sequence_length=4 must be a multiple of mesh.sequence=8",
    ),
  )
  def test_what_does_not_divide(self, settings, message):
    config = self.toy.config(**settings)
    with pytest.raises(UserError) as raised:
      self.toy.run(config, 8)
    assert message in str(raised.value)

  def test_data_that_ends(self):
    config = self.toy.config()
    run = self.toy.run(config)

    def end(number):
      if number == 2:
        raise StopIteration

    run.task.before_batch = end
    with pytest.raises(ValueError, match="ended at step 2"):
      loop.train(config, self._dir("run"), run=run)

  def test_evaluation_of_some_batches(self):
    config = self.toy.config()
    run = self.toy.run(config)
    params = run.task.init_params(jax.random.key(0), run.mesh)
    batches = list(run.task.eval_iterator())
    sums = [run.task.eval_fn(params, batch) for batch in batches]
    mean = lambda parts: float(
      sum(p["loss"] for p in parts) / sum(p["weight"] for p in parts)
    )
    assert run_lib.evaluate(run, params)["loss"] == pytest.approx(
      mean(sums), rel=1e-6
    )
    assert run_lib.evaluate(run, params, 2)["loss"] == pytest.approx(
      mean(sums[:2]), rel=1e-6
    )
