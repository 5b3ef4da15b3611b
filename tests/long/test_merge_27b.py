"""Extract, merge and export at 27B's tensor shapes, in less than 8 GB of memory.

One layer instead of 62, but every leaf has its own size. Memory does not grow with the number of
leaves: beside the interpreter, what is held is blocks of rows (64 MB in float32 each: base, K
vectors and result), and of an export one transposed projection at a time (231 MB in bfloat16, and
as much again while it is turned), whatever the number of layers. The embedding of 1.4 billion
elements, 5.6 GB in float32, is never whole in memory. Needs 34 GB of disk and about ten minutes.
Prints a line for each step: `pytest -s tests/long/test_merge_27b.py`.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.leaves import row_blocks
from optimer_jax.files import write_json
from optimer_jax.gemma3 import SIZES, leaf_shapes
from optimer_jax.gemma3.config import to_hf

K = 5
CONFIG = dataclasses.replace(SIZES['27b'], num_layers=1)
LIMIT_GB = 8.0


def rows(seed: int, scale: float):
  """Cheap noise in bfloat16: one random stretch, begun elsewhere for every block."""
  rng = np.random.default_rng(seed)
  noise = (rng.standard_normal(2**24 + 4096, np.float32) * scale).astype(ml_dtypes.bfloat16)
  for name, shape in leaf_shapes(CONFIG).items():
    for start, stop in row_blocks(shape):
      size = (stop - start) * int(np.prod(shape[1:]))
      yield name, np.resize(noise[rng.integers(4096) :], size).reshape(stop - start, *shape[1:])


@pytest.fixture(scope='module')
def pool(tmp_path_factory):
  path = tmp_path_factory.mktemp('27b')
  if shutil.disk_usage(path).free < 36e9:
    pytest.fail('this test needs 36 GB of free disk')
  base = store.save(
    path / 'base',
    'base',
    CONFIG,
    rows(0, 0.02),
    facts={'source': 'noise', 'prefix': 'model.', 'head': None, 'notes': []},
    add_files=lambda new: write_json(new / 'config.json', to_hf(CONFIG, 'bfloat16')),
  )
  parents = {'base': base.fingerprint}
  for i in range(1, K + 1):
    store.save(path / f'vector{i}', 'vector', CONFIG, rows(i, 1e-3), parents=parents)
  yield path
  shutil.rmtree(path)


def peak(path, what: str, code: str) -> float:
  """Runs a step in a process of its own; its peak memory in GB."""
  head = """
    import json, resource, sys
    from pathlib import Path
    from optimer_jax.checkpoints import base as bases
    from optimer_jax.checkpoints import store
    from optimer_jax.checkpoints.names import contracted_axes
    from optimer_jax.merging.candidates import MergeConfig
    from optimer_jax.merging.streamed import merge_streamed
    from optimer_jax.vectors.extract import extract
    from optimer_jax.vectors.pool import open_pool
    path = Path(sys.argv[1])
  """
  tail = """
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))
  """
  program = '\n'.join(map(textwrap.dedent, (head, code, tail)))
  # A process counts its parent's memory at its start as its own: a small one stands between.
  command = [sys.executable, '-c', program, str(path)]
  small = f'import subprocess; raise SystemExit(subprocess.call({command!r}))'
  done = subprocess.run([sys.executable, '-c', small], stdout=subprocess.PIPE, check=True)
  found = json.loads(done.stdout.splitlines()[-1])
  print(f'{what:16} {found:5.2f} GB at its peak', flush=True)
  return found


MERGE = """
  opened = open_pool(path / 'base', {{f'v{{i}}': path / f'vector{{i}}' for i in range(1, 6)}})
  config = MergeConfig('{method}', density=0.3)
  plan = config.kind, config.numbers([0.1, 0.2, 0.3, 0.2, 0.1])
  merged = merge_streamed(
    lambda leaf: plan,
    opened.base,
    [*opened.vectors.values()],
    dtypes=dict.fromkeys(opened.base, 'bfloat16'),
    splits={{leaf: contracted_axes(leaf) for leaf in opened.base}},
    seed=0,
  )
  base = opened.manifests['base']
  parents = {{'base': base.fingerprint}}
  store.save(path / 'merged', 'merged', base.model, merged, parents=parents)
"""


def test_extract_merge_and_export_in_bounded_memory(pool):
  sizes = [int(np.prod(shape)) for shape in leaf_shapes(CONFIG).values()]
  print(f'\n{sum(sizes) / 1e9:.2f} billion parameters, {max(sizes) / 1e9:.2f} in one leaf, K = {K}')
  assert peak(pool, 'weighted sum', MERGE.format(method='task_arithmetic')) < LIMIT_GB
  expected = check_rows(pool)
  assert peak(pool, 'ties', MERGE.format(method='ties')) < LIMIT_GB
  assert expected != store.read_manifest(pool / 'merged').fingerprint
  for dtype in ('bfloat16', 'int8'):
    code = f"extract(path / 'base', path / 'merged', path / 'tau', 'tau', '{dtype}')"
    assert peak(pool, f'extract {dtype}', code) < LIMIT_GB
    shutil.rmtree(pool / 'tau')
  code = "bases.export(path / 'merged', path / 'base', path / 'exported')"
  assert peak(pool, 'export', code) < LIMIT_GB


def check_rows(path) -> str:
  """The merged rows of a few blocks against plain sums; the merged model's fingerprint."""
  opened = [store.open_leaves(path / name)[1] for name in ('base', 'merged')]
  vectors = [store.open_leaves(path / f'vector{i}')[1] for i in range(1, K + 1)]
  for name in ('embedder.embedding', 'layers.0.mlp.down_proj'):
    shape = opened[0][name].shape
    for start in (0, shape[0] // 2, shape[0] - 3):
      base, merged = (leaves[name].read(start, start + 3) for leaves in opened)
      change = sum(
        np.float32(w) * v[name].read(start, start + 3).astype(np.float32)
        for w, v in zip((0.1, 0.2, 0.3, 0.2, 0.1), vectors, strict=True)
      )
      expected = (base.astype(np.float32) + change).astype(merged.dtype)
      np.testing.assert_array_equal(merged, expected)
  return store.read_manifest(path / 'merged').fingerprint
