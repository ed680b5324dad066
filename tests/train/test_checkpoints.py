"""Checkpoints: any mesh, bit for bit; torn and foreign ones are refused."""

import glob
import os
import shutil

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from multihead.errors import UserError
from multihead.train import state as state_lib
from multihead.train.checkpoints import Checkpoints, difference


@pytest.fixture(autouse=True)
def _names(request, toy, tmp_path):
  if request.instance is None:
    return
  request.instance.toy = toy
  request.instance.folder = str(tmp_path / "checkpoints")


class CheckpointsTest(parameterized.TestCase):
  def _run(self, devices=1, width=8, **settings):
    config = self.toy.config(**settings)
    task = self.toy.Task(self.toy.Model(width=width), 8, 4)
    return self.toy.run(config, devices, task)

  def _state(self, run):
    """A state whose every number is another one."""
    state = state_lib.init_state(
      run.task.init_params,
      run.optimizer,
      run.shardings,
      seed=3,
      mesh=run.mesh,
      ema=run.config.ema_decay > 0,
    )
    rng = np.random.default_rng(0)
    fill = lambda leaf, where: jax.device_put(
      rng.permutation(leaf.size).reshape(leaf.shape).astype(leaf.dtype) / 7
      if leaf.dtype == np.float32
      else np.full(leaf.shape, 5, leaf.dtype),
      where,
    )
    return jax.tree.map(fill, state, run.shardings)

  def _save(self, run, step=4):
    state = self._state(run)
    saved = Checkpoints(self.folder)
    saved.save(step, state, {"next": step}, run.config.to_dict())
    saved.close()
    return state

  def test_saved_on_eight_devices_restored_on_any(self):
    mesh = dict(data=2, fsdp=2, tensor=2)
    state = self._save(self._run(8, mesh=mesh, ema_decay=0.5))
    for devices, axes in (
      (1, {}),
      (8, dict(data=1, fsdp=2, tensor=4)),
      (8, mesh),
      (2, dict(fsdp=2)),
    ):
      run = self._run(devices, mesh=axes, ema_decay=0.5)
      saved = Checkpoints(self.folder)
      assert saved.latest_step() == 4
      found, position = saved.restore(4, run.target)
      saved.close()
      assert position == {"next": 4}
      assert jax.tree.structure(found) == jax.tree.structure(state)
      for want, got, where in zip(
        *map(jax.tree.leaves, (state, found, run.shardings)), strict=True
      ):
        assert want.dtype == got.dtype
        np.testing.assert_array_equal(want, got)
        assert got.sharding.is_equivalent_to(where, got.ndim)

  def test_parameters_alone(self):
    state = self._save(self._run(8, mesh=dict(fsdp=2)))
    run = self._run()
    saved = Checkpoints(self.folder)
    target = run.target.replace(opt_state=None)
    found, _ = saved.restore(4, target)
    saved.close()
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    assert found.opt_state is None

  def test_state_may_be_donated_while_it_is_written(self):
    run = self._run()
    state = self._state(run)
    want = np.array(state.params["hidden"]["kernel"])
    clear = jax.jit(
      lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0
    )
    saved = Checkpoints(self.folder)
    saved.save(1, state, {}, {})
    clear(state)
    saved.wait()
    found, _ = saved.restore(1, run.target)
    saved.close()
    np.testing.assert_array_equal(found.params["hidden"]["kernel"], want)

  def test_keeps_the_newest(self):
    run = self._run()
    saved = Checkpoints(self.folder, keep=2)
    for step in (1, 2, 3, 3):
      saved.save(step, self._state(run), {}, {})
    saved.close()
    names = {name for name in os.listdir(self.folder) if name.isdigit()}
    assert names == {"2", "3"}

  def test_half_written_one_does_not_count(self):
    self._save(self._run())
    # What a killed writer leaves: its folder under the temporary name.
    half = f"{self.folder}/9.orbax-checkpoint-tmp"
    shutil.copytree(f"{self.folder}/4", half)
    saved = Checkpoints(self.folder)
    assert saved.latest_step() == 4
    saved.close()

  def _torn(self, name):
    folder = f"{self.folder}/4"
    match name:
      case "data cut":
        for file in glob.glob(f"{folder}/state/**/d/*", recursive=True):
          os.truncate(file, os.path.getsize(file) // 2)
      case "index gone":
        os.remove(f"{folder}/state/manifest.ocdbt")
      case "part gone":
        shutil.rmtree(f"{folder}/data")
      case "metadata cut":
        os.truncate(f"{folder}/metadata/metadata", 20)
      case "empty":
        shutil.rmtree(folder)
        os.mkdir(folder)
      case "foreign":
        shutil.rmtree(folder)
        other = Checkpoints(self.folder)
        other._manager.save(4, args=_foreign())
        other.close()

  @parameterized.parameters(
    "data cut", "index gone", "part gone", "metadata cut", "empty", "foreign"
  )
  def test_torn(self, name):
    run = self._run()
    self._save(run)
    self._torn(name)
    saved = Checkpoints(self.folder)
    with pytest.raises(UserError) as raised:
      saved.restore(4, run.target)
    saved.close()
    assert f"cannot restore the checkpoint {self.folder}/4: it " in str(
      raised.value
    )

  @parameterized.parameters(
    (dict(width=12), {}, "params/Embed_0/embedding is float32[16,8] there"),
    ({}, dict(optimizer=dict(name="lion")), "are only in the checkpoint"),
    ({}, dict(ema_decay=0.5), "are only in this config: ema/"),
  )
  def test_of_another_model(self, model, settings, message):
    self._save(self._run())
    saved = Checkpoints(self.folder)
    with pytest.raises(UserError) as raised:
      saved.restore(4, self._run(**model, **settings).target)
    saved.close()
    assert "it is of another model or optimizer" in str(raised.value)
    assert message in str(raised.value)


def _foreign():
  import orbax.checkpoint as ocp

  return ocp.args.Composite(metadata=ocp.args.JsonSave({"author": "other"}))


def test_difference_lists_few_and_counts_all():
  saved = {f"a{i}": "float32[1]" for i in range(5)}
  text = difference(saved, {"a0": "float32[2]"})
  assert "1 arrays differ: a0 is float32[1] there and float32[2] here" in text
  assert "4 arrays are only in the checkpoint: a1, a2, a3 and 1 more" in text
  assert difference(saved, dict(saved)) == ""
