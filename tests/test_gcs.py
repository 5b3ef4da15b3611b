"""Arrays in a bucket or on another disk: what is stored comes back, whoever stops in between."""

import dataclasses
import shutil
import sys
import threading

import gcs
import jax
import numpy as np
import pytest
import test_training
from orbax.checkpoint import v1 as ocp
from small_run import make_run

from optimer_jax.checkpoints import places, store
from optimer_jax.errors import UsageError, UserError
from optimer_jax.gemma3 import Model, init_leaves
from optimer_jax.training import state as states
from optimer_jax.training.train import finish, optimizer

# Orbax gives up a damaged read while others are under way, and those complain afterwards.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(scope='module')
def bucket():
  with gcs.served() as found:
    yield found


@pytest.fixture(params=['bucket', 'folder'])
def arrays(request, tmp_path, bucket) -> str:
  folder = tmp_path / 'arrays of 100%'
  return f'{bucket.url}/{tmp_path.name}/c%23' if request.param == 'bucket' else str(folder)


def same(found, expected) -> bool:
  return found.keys() == expected.keys() and all(
    np.array_equal(found[k], expected[k]) for k in found
  )


def refuse(named: list[str], action) -> None:
  with pytest.raises(UserError) as error:
    action()
  text = str(error.value)
  assert '\n' not in text and all(part in text for part in named), text


def test_saved_loaded_and_replaced(small, tmp_path, arrays):
  path, first, second = tmp_path / 'cpt', init_leaves(small, 0), init_leaves(small, 1)
  old = store.save(path, 'cpt', small, first, arrays=arrays)
  assert old.arrays.startswith(arrays) and places.folders(old.arrays) >= {'state'}
  assert {file.name for file in path.iterdir()} == {'manifest.json'}
  manifest, found = store.load(path)
  assert manifest == old and same(found, first)
  assert manifest.fingerprint == store.save(tmp_path / 'here', 'cpt', small, first).fingerprint
  # Orbax loads the leaves as it loads its own.
  empty = {name: np.empty_like(leaf) for name, leaf in first.items()}
  assert same(ocp.load(old.arrays, empty), first)
  # A copy's leaves are the original's, which what happens to the copy does not touch.
  copy = shutil.copytree(path, tmp_path / 'copy')
  store.save(copy, 'cpt', small, second, arrays=arrays)
  assert same(store.load(path)[1], first) and same(store.load(copy)[1], second)
  # What is replaced goes when the new one is there, also when that is elsewhere.
  _, opened = store.open_leaves(path)
  new = store.save(path, 'cpt', small, (each for each in store.values(opened)), arrays=arrays)
  assert same(store.load(path)[1], first) and not places.folders(old.arrays)
  store.save(path, 'cpt', small, first)
  assert same(store.load(path)[1], first) and not places.folders(new.arrays)


def test_a_writer_that_stops(small, tmp_path, arrays):
  """Between leaves and manifest: the old artifact stays, and nothing of the new one for long."""
  path, leaves = tmp_path / 'cpt', init_leaves(small, 0)
  store.save(path, 'cpt', small, leaves, arrays=arrays)
  stopped, end, failed = threading.Event(), threading.Event(), []

  def stop(new):
    stopped.set()
    end.wait()
    raise KeyError

  def write():
    try:
      store.save(path, 'cpt', small, init_leaves(small, 1), arrays=arrays, add_files=stop)
    except KeyError:
      failed.append(True)

  writer = threading.Thread(target=write)
  writer.start()
  stopped.wait()
  assert len(places.folders(arrays)) == 2 and same(store.load(path)[1], leaves)
  (own,) = tmp_path.glob('.cpt.tmp-*')
  # Another one writes the artifact: what is being written is left alone …
  new = store.save(path, 'cpt', small, init_leaves(small, 2), arrays=arrays)
  assert len(places.folders(arrays)) == 2 and own.exists()
  # … and not what a killed writer left, which looks like it but for being held.
  shutil.copytree(own, tmp_path / '.cpt.tmp-killed')
  new = store.save(path, 'cpt', small, init_leaves(small, 2), arrays=arrays)
  assert places.folders(arrays) == {new.arrays.rpartition('/')[2]}
  end.set()
  writer.join()
  assert failed and same(store.load(path)[1], init_leaves(small, 2))
  # One that fails leaves nothing.
  with pytest.raises(KeyError):
    store.save(path, 'cpt', small, leaves, arrays=arrays, add_files=stop)
  assert places.folders(arrays) == {new.arrays.rpartition('/')[2]}
  assert [file.name for file in tmp_path.glob('.*')] == []


def test_damage_is_named(small, tmp_path, bucket):
  """Each object of values flipped at a bit, and deleted: never silent, and its leaf is named."""
  path, leaves = tmp_path / 'cpt', init_leaves(small, 0)
  manifest = store.save(path, 'cpt', small, leaves, arrays=f'{bucket.url}/{tmp_path.name}')
  prefix = manifest.arrays.removeprefix(f'{bucket.url}/')
  for name, leaf in leaves.items():
    if leaf.nbytes < 1000:  # Such a one is in the index.
      continue
    (holds,) = (x for x in bucket.names(prefix) if leaf.tobytes() in bucket.read(x))
    whole, at = bucket.read(holds), bucket.read(holds).index(leaf.tobytes())
    damaged = bytearray(whole)
    damaged[at + leaf.nbytes // 2] ^= 1
    bucket.write(holds, bytes(damaged))
    refuse([str(path), name, 'damaged'], lambda: store.load(path))
    bucket.delete(holds)
    refuse([manifest.arrays, name, 'cannot be read'], lambda: store.load(path))
    bucket.write(holds, whole)
  assert same(store.load(path)[1], leaves)
  places.delete(manifest.arrays)
  refuse([manifest.arrays, 'embedder', 'cannot be read'], lambda: store.load(path))


def test_a_bucket_that_cannot_be_used(small, tmp_path, monkeypatch):
  save = lambda place: store.save(tmp_path / 'a', 'cpt', small, init_leaves(small, 0), arrays=place)
  train = lambda place: test_training.run(Model(small), tmp_path / 'run', arrays=place)
  for action in (save, train):
    refuse(['gs://none/a', 'does not exist', 'logged in'], lambda do=action: do('gs://none/a'))
    refuse(['gs://private/a', 'reached', 'credentials'], lambda do=action: do('gs://private/a'))
    refuse(['gs://public/a', 'may not write'], lambda do=action: do('gs://public/a'))
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  refuse(["pip install 'optimer_jax[gcs]'"], lambda: save(f'gs://{gcs.BUCKET}/a'))
  assert {file.name for file in tmp_path.iterdir()} == {'run'}


@pytest.mark.parametrize(
  'place', ['arrays', 's3://a/b', 'gs://', 'gs://a b/c', 'gs://abc/d?e', 'gs:/a']
)
def test_no_such_place(place, tmp_path):
  with pytest.raises(UsageError, match=r'Run\.arrays is .*: give gs://BUCKET/FOLDER'):
    make_run(tmp_path / 'run', arrays=place)
  with pytest.raises(UsageError, match='leave it empty'):
    make_run(tmp_path / 'run', arrays=f'{tmp_path}/run/')
  run = make_run(tmp_path / 'run', arrays='gs://mine/runs/')
  assert run.arrays_of(run.path / 'cpt' / 'c#') == 'gs://mine/runs/cpt/c%23'


def test_a_state_in_a_bucket(small, tmp_path, bucket):
  """Comes back bit for bit, but not to another run (tests/long: training with it, and kills)."""
  there, ours = f'{bucket.url}/{tmp_path.name}/training/ja', {'base': 'a'}
  model, config = Model(small), test_training.CONFIG
  mesh, state, _ = test_training.first_step(model)
  abstract = states.abstract_state(optimizer(config), model, mesh)
  with jax.set_mesh(mesh), states.saved(f'{there}/state', 3) as saves:
    for step in (2, 3, 4):
      states.save(saves, ours, step, state)
  assert places.folders(f'{there}/state') == {'3', '4'}
  with jax.set_mesh(mesh), states.saved(f'{there}/state', 3) as saves:
    found, step = states.restore(saves, abstract, ours)
    assert step == 4 and jax.tree.all(jax.tree.map(np.array_equal, found, state))
    refuse(
      [f'{there}/state was begun with base = a, not b'],
      lambda: states.restore(saves, abstract, {'base': 'b'}),
    )
    (holds, *_) = (
      x for x in bucket.names(f'{tmp_path.name}/training/ja/state/4') if len(bucket.read(x)) > 9000
    )
    content = bytearray(bucket.read(holds))
    content[len(content) // 2] ^= 1
    bucket.write(holds, bytes(content))
    refuse(
      [f'{there}/state', 'at step 4', f'delete {there}'],
      lambda: states.restore(saves, abstract, ours),
    )
  finish(tmp_path, dataclasses.replace(config, keep_states_every=3), there)
  assert places.folders(f'{there}/state') == {'3'}
  finish(tmp_path, config, there)
  assert not bucket.names(f'{tmp_path.name}/')
