"""Artifacts: what is stored comes back, what is damaged is named, and a full disk costs nothing."""

import ctypes
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from imported_model import CONFIG, VOCABULARY, assert_same_leaves, bring_in, save_hf

from benchmarks.parity import torch_model
from optimer_jax.checkpoints import base, store
from optimer_jax.checkpoints.base import export, import_base, open_source
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import Gemma3Config, leaf_shapes
from optimer_jax.gemma3.config import to_hf

# Orbax gives up a damaged read while others are under way, and those complain afterwards.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(scope='module')
def hf(tmp_path_factory) -> Path:
  return save_hf(tmp_path_factory.mktemp('hf'), torch_model(CONFIG))


@pytest.fixture(scope='module')
def imported(hf, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('imported') / 'base'
  bring_in(hf, path)
  return path


@pytest.fixture
def copy(imported, tmp_path) -> Path:
  """An artifact to damage."""
  return Path(shutil.copytree(imported, tmp_path / 'copy'))


def test_artifact_round_trip(imported, tmp_path):
  manifest, leaves = store.load(imported)
  half = {k: v.astype('bfloat16') for k, v in leaves.items()}
  facts = {'tokens': 12, 'weights': {'ja': 0.25}, 'note': 'größer'}
  saved = store.save(
    tmp_path / 'cpt', 'cpt', CONFIG, half, parents={'base': manifest.fingerprint}, facts=facts
  )
  loaded, found = store.load(tmp_path / 'cpt', ('cpt', 'merged'))
  assert loaded == saved and loaded.facts == facts
  assert_same_leaves(found, half)
  # A fingerprint is of the values alone: another copy agrees, another value or dtype does not.
  again = store.save(tmp_path / 'again', 'merged', CONFIG, half)
  assert again.fingerprint == saved.fingerprint != manifest.fingerprint
  half['final_norm.scale'] = half['final_norm.scale'] * np.float32(1.01)
  assert store.save(tmp_path / 'again', 'merged', CONFIG, half).fingerprint != saved.fingerprint


def test_wrong_kind_and_leaves(imported, tmp_path, refused):
  refused(lambda: store.load(imported, 'vector'), 'is a base', 'vector')
  refused(lambda: store.load(tmp_path, 'base'), 'manifest.json is missing')
  _, leaves = store.load(imported)
  name = 'layers.1.mlp.up_proj'

  def saved(change):
    other = dict(leaves)
    change(other)
    store.save(tmp_path / 'a', 'cpt', CONFIG, other)
    return lambda: store.load(tmp_path / 'a')

  refused(saved(lambda x: x.pop(name)), f'no leaf {name}')
  refused(saved(lambda x: x.update(extra=np.ones(3))), 'extra')
  refused(saved(lambda x: x.update({name: np.ones((2, 3))})), name, '[2, 3]')


def test_flipped_bits_are_never_silent(copy):
  """A flipped bit is either noticed, or was in a byte that holds no value."""
  _, expected = store.load(copy)
  files = [f for f in (copy / 'leaves').rglob('*') if f.is_file() and f.stat().st_size]
  rng = np.random.default_rng(0)
  noticed = 0
  for trial in range(20):
    # Half of them anywhere in any file, half in the largest, which holds the values.
    file = files[rng.integers(len(files))]
    file = file if trial % 2 else max(files, key=lambda f: f.stat().st_size)
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
    file.write_bytes(damaged)
    try:
      assert_same_leaves(store.load(copy)[1], expected)
    except UserError as error:
      assert str(copy) in str(error) and '\n' not in str(error)
      noticed += 1
    file.write_bytes(whole)
  assert noticed >= 10
  assert_same_leaves(store.load(copy)[1], expected)


def test_damaged_value_is_named(imported, tmp_path, refused):
  manifest, leaves = store.load(imported)
  copy = tmp_path / 'a'
  name = 'layers.0.attn.v_proj'
  store.save(copy, 'cpt', manifest.model, leaves)
  # Orbax itself notices nothing wrong here: the values are merely other ones.
  leaves[name] = leaves[name].copy()
  leaves[name][0, 0, 0] = np.nextafter(leaves[name][0, 0, 0], 1)
  store.save(tmp_path / 'b', 'cpt', manifest.model, leaves)
  shutil.rmtree(copy / 'leaves')
  (tmp_path / 'b' / 'leaves').rename(copy / 'leaves')
  refused(lambda: store.load(copy), str(copy), name)


def test_missing_leaf_files(copy, refused, tmp_path):
  files = [file for file in (copy / 'leaves').rglob('*') if file.is_file()]
  largest = max(files, key=lambda f: f.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)
  refused(lambda: store.load(copy), f'{copy}/leaves')
  largest.unlink()
  refused(lambda: store.load(copy), f'{copy}/leaves')
  shutil.rmtree(copy / 'leaves')
  refused(lambda: store.load(copy), f'{copy}/leaves')


def test_a_damaged_artifact_is_one_line_on_the_terminal(copy):
  file = max((copy / 'leaves').rglob('*'), key=lambda f: f.stat().st_size)
  os.truncate(file, file.stat().st_size // 2)
  code = f"""
from pathlib import Path
from optimer_jax.checkpoints import store
from optimer_jax.parallel.startup import start
start(Path({str(copy.parent)!r}))
try:
  store.load({str(copy)!r})
except store.UserError as error:
  print(error)
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.count('\n') == 1 and str(copy) in done.stdout
  assert done.stderr == ''


@pytest.mark.parametrize(
  'change',
  [
    lambda raw: raw.update(format=2),
    lambda raw: raw.pop('kind'),
    lambda raw: raw.update(more=1),
    lambda raw: raw['model'].update(window=7),
    lambda raw: raw['model'].update(num_experts=8),
    lambda raw: raw['model'].pop('head_dim'),
    lambda raw: raw.update(fingerprint='0' * 32),
    lambda raw: raw['leaves']['final_norm.scale'].update(digest='0' * 32),
    lambda raw: raw['leaves']['final_norm.scale'].pop('digest'),
    lambda raw: raw['leaves'].pop('final_norm.scale'),
    lambda raw: raw.update(leaves=[]),
    lambda raw: raw.update(parents={'base': '1'}),
    lambda raw: raw['facts'].update(prefix='other.'),
  ],
)
def test_wrong_manifest(copy, refused, change):
  raw = json.loads((copy / 'manifest.json').read_text())
  change(raw)
  (copy / 'manifest.json').write_text(json.dumps(raw))
  refused(lambda: store.read_manifest(copy), f'{copy}/manifest.json')


def test_flipped_bits_of_a_manifest(copy):
  whole = (copy / 'manifest.json').read_bytes()
  expected = store.read_manifest(copy)
  rng = np.random.default_rng(1)
  for _ in range(300):
    damaged = bytearray(whole)
    damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
    (copy / 'manifest.json').write_bytes(damaged)
    try:
      assert store.read_manifest(copy) == expected  # a flip in white space
    except UserError as error:
      assert str(copy) in str(error)
  for length in (0, 1, len(whole) // 2, len(whole) - 2):
    (copy / 'manifest.json').write_bytes(whole[:length])
    with pytest.raises(UserError, match=r'manifest\.json'):
      store.read_manifest(copy)


# No room on the disk.


@pytest.fixture
def small_disk(tmp_path):
  """A real file system of 1 MiB; only root may make one."""
  path = tmp_path / 'disk'
  path.mkdir()
  libc = ctypes.CDLL(None)
  if sys.platform != 'linux' or libc.mount(b'tmpfs', str(path).encode(), b'tmpfs', 0, b'size=1m'):
    pytest.skip('mounting a small file system is not allowed here')
  yield path
  libc.umount2(str(path).encode(), 2)


def big_model() -> tuple[Gemma3Config, dict]:
  config = dataclasses.replace(CONFIG, vocab_size=20_000)  # 2.6 MB
  rng = np.random.default_rng(0)
  return config, {k: rng.random(s, np.float32) for k, s in leaf_shapes(config).items()}


@pytest.mark.parametrize('looked_at', [True, False], ids=['seen before', 'seen by the writer'])
def test_full_disk_leaves_the_old_artifact(imported, small_disk, refused, monkeypatch, looked_at):
  manifest, leaves = store.load(imported)
  store.save(small_disk / 'a', 'merged', manifest.model, leaves)
  if not looked_at:
    # Another process filled the disk after we looked.
    free = shutil.disk_usage('/')._replace(free=1 << 40)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: free)
  config, big = big_model()
  refused(lambda: store.save(small_disk / 'a', 'merged', config, big), 'no room', str(small_disk))
  assert [file.name for file in small_disk.iterdir()] == ['a']
  assert_same_leaves(store.load(small_disk / 'a')[1], leaves)


def test_full_disk_leaves_the_old_export(imported, small_disk, tmp_path, refused):
  manifest, leaves = store.load(imported)
  export(imported, imported, small_disk / 'out')
  before = {file.name: file.read_bytes() for file in (small_disk / 'out').iterdir()}
  config, big = big_model()
  source = dataclasses.replace(
    open_source('random:tiny:0', tmp_path),
    config=config,
    config_json=to_hf(config, 'float32'),
    leaves={
      k: base.Tensor(v.shape, 'float32', lambda start=0, stop=None, v=v: v[start:stop])
      for k, v in big.items()
    },
  )
  (tmp_path / 'tokenizer').mkdir()
  import_base(source, tmp_path / 'big', tmp_path / 'tokenizer')
  refused(
    lambda: export(tmp_path / 'big', tmp_path / 'big', small_disk / 'out'),
    *('no room', str(small_disk)),
  )
  assert [file.name for file in small_disk.iterdir()] == ['out']
  after = {file.name: file.read_bytes() for file in (small_disk / 'out').iterdir()}
  assert after == before


def test_no_room_is_seen_before_writing(imported, tmp_path, monkeypatch, refused):
  """Where no small disk can be mounted, this much is still tested."""
  manifest, leaves = store.load(imported)
  store.save(tmp_path / 'a', 'merged', manifest.model, leaves)
  free = shutil.disk_usage('/')._replace(free=10_000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: free)
  refused(lambda: store.save(tmp_path / 'a', 'merged', manifest.model, leaves), 'no room')
  assert_same_leaves(store.load(tmp_path / 'a')[1], leaves)


def test_a_damaged_side_file_is_never_exported(hf, tmp_path, refused):
  """config.json, tokenizer, vocabulary and untouched tensors are digested like the leaves."""
  base = tmp_path / 'trimmed'
  bring_in(hf, base, np.arange(0, VOCABULARY, 2))
  names = set(store.read_manifest(base).files)
  assert names >= {'config.json', 'tokenizer.json', 'vocabulary.npy', 'untouched.safetensors'}
  for name in sorted(names):
    whole = (base / name).read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    (base / name).write_bytes(content)
    refused(lambda: export(base, base, tmp_path / 'out'), f'{name} is damaged')
    (base / name).unlink()
    refused(lambda: export(base, base, tmp_path / 'out'), f'{name} is missing')
    (base / name).write_bytes(whole)
  export(base, base, tmp_path / 'out')
