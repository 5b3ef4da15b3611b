"""Vectors from every kind of model, stored in every form, and pools of them."""

import dataclasses
import shutil

import ml_dtypes
import numpy as np
import pytest

from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.base import export, import_base, open_source
from optimer_jax.checkpoints.names import Tensor
from optimer_jax.checkpoints.quantized import SCALE, Quantized, channel_axes
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import Model, init_leaves, to_leaves
from optimer_jax.vectors.extract import extract
from optimer_jax.vectors.lora import export_lora
from optimer_jax.vectors.pool import load_pool, open_pool, open_vector

DTYPES = ('float32', 'bfloat16', 'int8')


@pytest.fixture(scope='module')
def run(small, tmp_path_factory):
  """A base and a model near it."""
  path = tmp_path_factory.mktemp('run')
  base, noise = init_leaves(small, 0), init_leaves(small, 1)
  root = store.save(path / 'base', 'base', small, base)
  leaves = {n: leaf + np.float32(0.1) * noise[n] for n, leaf in base.items()}
  # A token that was never seen.
  leaves['embedder.embedding'][7] = base['embedder.embedding'][7]
  parents = {'base': root.fingerprint}
  store.save(path / 'cpt', 'cpt', small, leaves, parents=parents, facts={'tokens': 9})
  for dtype in DTYPES:
    extract(path / 'base', path / 'cpt', path / dtype, 'ja', dtype)
  return path


def exact(run) -> dict[str, np.ndarray]:
  base, model = store.load(run / 'base')[1], store.load(run / 'cpt')[1]
  return {name: model[name] - base[name] for name in base}


def read(leaves: dict[str, Tensor]) -> dict[str, np.ndarray]:
  return {name: tensor.read() for name, tensor in leaves.items()}


def norm(leaves) -> float:
  return float(np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in leaves.values())))


@pytest.mark.parametrize(('dtype', 'least', 'most'), [
  ('float32', 0, 0), ('bfloat16', 1e-4, 2**-8), ('int8', 1e-3, 1e-2)
])  # fmt: skip
def test_the_stored_form_and_its_error(run, dtype, least, most):
  tau, stored = exact(run), read(open_vector(run / dtype))
  manifest = store.read_manifest(run / dtype)
  error = norm({name: stored[name] - tau[name] for name in tau}) / norm(tau)
  assert least <= manifest.facts['rounding_error'] <= most
  assert manifest.facts['rounding_error'] == pytest.approx(error, rel=1e-5, abs=1e-12)
  assert manifest.facts['norm'] == pytest.approx(norm(tau), rel=1e-6)
  assert not stored['embedder.embedding'][7].any()
  assert manifest.facts['tokens'] == 9 and manifest.facts['dtype'] == dtype


def test_the_forms_differ_in_size(run):
  entries = [store.read_manifest(run / dtype).leaves.values() for dtype in DTYPES]
  sizes = [
    sum(np.prod(e['shape']) * np.dtype(e['dtype']).itemsize for e in each) for each in entries
  ]
  assert sizes[0] == 2 * sizes[1] and sizes[2] < 0.31 * sizes[0]


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
def test_a_pool_keeps_the_stored_form(run, small, dtype, scan):
  pool = load_pool(run / 'base', {'ja': run / dtype}, Model(small, scan=scan))
  stored = read(open_vector(run / dtype))
  for name, leaf in to_leaves(small, pool.vectors[0]).items():
    if dtype == 'int8' and channel_axes(name):
      assert isinstance(leaf, Quantized) and leaf.values.dtype == np.int8
      leaf = leaf.dequantize()
    elif dtype == 'bfloat16':
      assert leaf.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(leaf, np.float32), stored[name], err_msg=name)


def test_blocks_of_rows_give_the_same_artifact(run, tmp_path, monkeypatch):
  """Leaves that are larger than a block are read, compressed and written by rows."""
  from optimer_jax.checkpoints import leaves

  monkeypatch.setattr(leaves, 'BLOCK', 100)  # three rows of the embedding
  for dtype in DTYPES:
    again = extract(run / 'base', run / 'cpt', tmp_path / dtype, 'ja', dtype)
    expected = store.read_manifest(run / dtype)
    assert again.leaves == expected.leaves and again.fingerprint == expected.fingerprint
    assert again.facts == pytest.approx(expected.facts)
    stored = read(open_vector(run / dtype))
    for name, leaf in read(open_vector(tmp_path / dtype)).items():
      np.testing.assert_array_equal(leaf, stored[name])


def test_orbax_reads_what_is_written_by_rows(run):
  from orbax.checkpoint import v1 as ocp

  stored = store.load(run / 'int8')[1]
  found = ocp.load(run / 'int8' / 'leaves', {k: np.empty_like(v) for k, v in stored.items()})
  assert found.keys() == stored.keys() and any(name.endswith(SCALE) for name in found)
  for name, leaf in stored.items():
    np.testing.assert_array_equal(found[name], leaf)


# From models of others.


@pytest.fixture(scope='module')
def others(tmp_path_factory):
  """Two checkpoints in Hugging Face's layout, and the first as a base with a trimmed vocabulary."""
  path = tmp_path_factory.mktemp('others')
  for seed in (0, 1):
    source = open_source(f'random:tiny:{seed}', path)
    tokenizer = path / 'tokenizer'
    tokenizer.mkdir(exist_ok=True)
    import_base(source, path / f'all{seed}', tokenizer)
    export(path / f'all{seed}', path / f'all{seed}', path / f'hf{seed}', 'bfloat16')
  kept = np.arange(3, 900, 2, dtype=np.int32)
  import_base(open_source(str(path / 'hf0'), path), path / 'base', tokenizer, kept)
  return path


def test_the_difference_of_two_checkpoints(others, tmp_path):
  manifest = extract(others / 'base', others / 'hf1', tmp_path / 'v', 'tuned')
  assert manifest.facts['source'] == str(others / 'hf1')
  kept = np.load(others / 'base' / 'vocabulary.npy')
  ours, theirs = (open_source(str(others / f'hf{i}'), tmp_path).leaves for i in (0, 1))
  for name, leaf in read(open_vector(tmp_path / 'v')).items():
    a, b = (x[name].read().astype(np.float32) for x in (ours, theirs))
    delta = (b - a)[kept] if name == 'embedder.embedding' else b - a
    np.testing.assert_array_equal(leaf, delta, err_msg=name)
  pool = open_pool(others / 'base', {'tuned': tmp_path / 'v'})
  assert pool.manifests['tuned'].parents == {'base': pool.manifests['base'].fingerprint}


def test_an_adapter_becomes_a_vector(others, tmp_path):
  _, root = store.open_leaves(others / 'base')
  rng = np.random.default_rng(0)

  def thin(tensor):  # of rank 2
    rows = int(np.prod(tensor.shape[: 2 if len(tensor.shape) == 3 else 1]))
    columns = int(np.prod(tensor.shape)) // rows
    value = rng.standard_normal((rows, 2)) @ rng.standard_normal((2, columns))
    value = value.astype(np.float32).reshape(tensor.shape)
    return Tensor(tensor.shape, 'float32', lambda start=0, stop=None: value[start:stop])

  zero = lambda tensor: Tensor(
    tensor.shape,
    'float32',
    lambda start=0, stop=None: np.zeros(tensor.shape, np.float32)[start:stop],
  )
  delta = {
    name: thin(tensor) if name.endswith('mlp.up_proj') else zero(tensor)
    for name, tensor in root.items()
  }
  export_lora(delta, tmp_path / 'adapter', 2, 'base', 'model.')
  extract(others / 'base', tmp_path / 'adapter', tmp_path / 'v', 'adapter', 'float32')
  for name, leaf in read(open_vector(tmp_path / 'v')).items():
    np.testing.assert_allclose(leaf, delta[name].read(), rtol=0, atol=2e-5, err_msg=name)


def test_an_adapter_of_the_whole_vocabulary_on_a_trimmed_base(others, tmp_path):
  _, full = store.open_leaves(others / 'all0')
  rng = np.random.default_rng(0)
  embedding = rng.standard_normal((1024, 2)) @ rng.standard_normal((2, 96))
  embedding = embedding.astype(np.float32)
  zero = lambda shape: Tensor(
    shape, 'float32', lambda start=0, stop=None: np.zeros(shape, np.float32)[start:stop]
  )
  delta = {name: zero(tensor.shape) for name, tensor in full.items()}
  delta['embedder.embedding'] = Tensor(
    (1024, 96), 'float32', lambda start=0, stop=None: embedding[start:stop]
  )
  export_lora(delta, tmp_path / 'adapter', 2, 'base', 'model.', include_embedding=True)
  extract(others / 'base', tmp_path / 'adapter', tmp_path / 'v', 'adapter')
  kept = np.load(others / 'base' / 'vocabulary.npy')
  found = open_vector(tmp_path / 'v')['embedder.embedding'].read()
  np.testing.assert_allclose(found, embedding[kept], rtol=0, atol=2e-5)


def test_a_vocabulary_of_all_tokens_is_not_trimmed(others, tmp_path):
  every = np.arange(1024, dtype=np.int32)
  source = open_source(str(others / 'hf0'), tmp_path)
  import_base(source, tmp_path / 'base', others / 'tokenizer', every)
  export(tmp_path / 'base', tmp_path / 'base', tmp_path / 'out')
  again = open_source(str(tmp_path / 'out'), tmp_path).leaves['embedder.embedding'].read()
  np.testing.assert_array_equal(again, source.leaves['embedder.embedding'].read())


# Refusals.


def test_foreign_and_damaged_vectors_are_refused(run, others, small, tmp_path):
  store.save(tmp_path / 'other', 'base', small, init_leaves(small, 7))
  for read_pool in (lambda *a: load_pool(*a, Model(small)), open_pool):
    with pytest.raises(UserError, match=r'float32 was made from the base .* but .*other is'):
      read_pool(tmp_path / 'other', {'ja': run / 'float32'})
    with pytest.raises(UserError, match='is a cpt, but a vector is needed'):
      read_pool(run / 'base', {'ja': run / 'cpt'})
  with pytest.raises(UserError, match='has another architecture'):
    wider = dataclasses.replace(small, vocab_size=400)
    load_pool(run / 'base', {'ja': run / 'float32'}, Model(wider))
  with pytest.raises(UserError, match="float32, bfloat16, int8, not 'int3'"):
    extract(run / 'base', run / 'cpt', tmp_path / 'v', 'ja', 'int3')
  with pytest.raises(UserError, match='was made from the base'):
    extract(tmp_path / 'other', run / 'cpt', tmp_path / 'v', 'ja')
  with pytest.raises(UserError, match='hf1 has another architecture than'):
    extract(run / 'base', others / 'hf1', tmp_path / 'v', 'ja')
  assert not (tmp_path / 'v').exists()


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(run, small, tmp_path, value):
  leaves = init_leaves(small, 3)
  leaves['layers.1.mlp.up_proj'][3, 4] = value
  parents = {'base': store.read_manifest(run / 'base').fingerprint}
  store.save(tmp_path / 'bad', 'cpt', small, leaves, parents=parents)
  for dtype in DTYPES:
    with pytest.raises(UserError, match=r'layers\.1\.mlp\.up_proj has values that are not finite'):
      extract(run / 'base', tmp_path / 'bad', tmp_path / 'v', 'bad', dtype)
  assert [path.name for path in tmp_path.iterdir()] == ['bad']
  store.save(tmp_path / 'v', 'vector', small, leaves, parents=parents)
  with pytest.raises(UserError, match=r'layers\.1\.mlp\.up_proj has values that are not finite'):
    load_pool(run / 'base', {'bad': tmp_path / 'v'}, Model(small))
  pool = open_pool(run / 'base', {'bad': tmp_path / 'v'})
  with pytest.raises(UserError, match=r'layers\.1\.mlp\.up_proj has values that are not finite'):
    read(pool.vectors['bad'])


def test_a_damaged_leaf_is_named_when_it_is_read(run, small, tmp_path):
  path = tmp_path / 'v'
  shutil.copytree(run / 'float32', path)
  leaves = store.load(path)[1]
  leaves['layers.0.attn.k_proj'] = leaves['layers.0.attn.k_proj'] * np.float32(1 + 1e-6)
  store.save(tmp_path / 'near', 'vector', small, leaves)
  shutil.rmtree(path / 'leaves')
  shutil.copytree(tmp_path / 'near' / 'leaves', path / 'leaves')
  tensor = open_pool(run / 'base', {'ja': path}).vectors['ja']['layers.0.attn.k_proj']
  tensor.read(1, 3)  # rows out of turn say nothing of the whole
  tensor.read(0, 5)
  with pytest.raises(UserError, match=r'the values of layers\.0\.attn\.k_proj are damaged'):
    tensor.read(5, 32)
  with pytest.raises(UserError, match=r'the values of layers\.0\.attn\.k_proj are damaged'):
    load_pool(run / 'base', {'ja': path}, Model(small))
