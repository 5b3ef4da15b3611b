"""Checkpoints of others merged to a checkpoint, as mergekit files describe it."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from optimer_jax import cli
from optimer_jax.checkpoints import leaves as leaves_on_disk
from optimer_jax.checkpoints.huggingface import open_huggingface, write_huggingface
from optimer_jax.checkpoints.leaves import digest
from optimer_jax.checkpoints.names import external_name, to_torch
from optimer_jax.errors import UsageError, UserError
from optimer_jax.files import read_json
from optimer_jax.gemma3 import Gemma3Config, init_leaves, leaf_shapes
from optimer_jax.gemma3.config import to_hf
from optimer_jax.merging import huggingface as merging_files
from optimer_jax.merging import methods
from optimer_jax.merging.huggingface import merge_checkpoints
from optimer_jax.merging.mergekit_yaml import read_mergekit

# Sizes that many leaves share, and blocks of them: every shape is a program of each method.
CONFIG = Gemma3Config(3, 32, 64, 2, 1, 32, window=6, query_scalar=16.0, vocab_size=90)
PREFIX = 'language_model.model.'
VISION = 'vision_tower.vision_model.encoder.weight'
HEAD = 'language_model.lm_head.weight'


def write(path, seed: int, config: Gemma3Config = CONFIG, dtype: str = 'bfloat16') -> None:
  """A multimodal checkpoint in two files that spells out its tied head."""
  path.mkdir()
  base, noise = init_leaves(config, 0), init_leaves(config, seed)
  tensors = {}
  for leaf in leaf_shapes(config):
    value = base[leaf] + np.float32(0.1 if seed else 0) * (noise[leaf] + np.float32(0.01))
    tensors[PREFIX + external_name(leaf, 0)] = to_torch(leaf, value).astype(dtype)
  tensors[HEAD] = tensors[PREFIX + 'embed_tokens.weight']
  tensors[VISION] = np.full((4, 5), seed, np.float32)
  tensors['multi_modal_projector.weight'] = np.full((7,), seed, np.float32)
  shapes = {name: (tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()}
  write_huggingface(path, to_hf(config, dtype), shapes, tensors.items())
  (path / 'tokenizer.json').write_text(f'{{"of": {seed}}}')


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  path = tmp_path_factory.mktemp('models')
  for seed in range(4):
    write(path / f'm{seed}', seed)
  return path


def describe(models, method: str, out_dtype: str = 'bfloat16', base: bool = True, **numbers):
  """A file that merges m1, m2 and m3 (slerp: m1) on m0, as JSON, which is YAML."""
  count = 1 if method == 'slerp' else 3
  own = {'weight': [0.2, 0.3, 0.6]} if method not in ('slerp', 'sce', 'model_stock') else {}
  shared = {key: numbers.pop(key) for key in ('t', 'select_topk', 'lambda') if key in numbers}
  entries = [
    {
      'model': str(models / f'm{i + 1}'),
      'parameters': {key: value[i] for key, value in own.items()} | numbers,
    }
    for i in range(count)
  ]
  content = {
    'merge_method': method,
    'models': entries,
    'parameters': shared,
    'dtype': 'float32',
    'out_dtype': out_dtype,
  }
  if base:
    content['base_model'] = str(models / 'm0')
  file = models / f'{method}.yml'
  file.write_text(json.dumps(content))
  return file


def tensors_in(path) -> dict[str, np.ndarray]:
  return {
    name: tensor
    for file in path.glob('*.safetensors')
    for name, tensor in safetensors.numpy.load_file(file).items()
  }


CASES = [
  ('linear', {}, {}),
  ('ties', {'density': 0.3}, {'density': 0.3}),
  ('dare_ties', {'density': 0.5}, {'density': 0.5}),
  ('breadcrumbs', {'density': 0.7, 'lambda': 0.8}, {'density': 0.7, 'scale': 0.8}),
  ('sce', {'select_topk': 0.4}, {'density': 0.4}),
  ('slerp', {'t': 0.3}, {'t': 0.3}),
]


@pytest.mark.parametrize(('method', 'given', 'numbers'), CASES)
def test_files_are_merged_as_tensors_in_memory_are(
  models, tmp_path, monkeypatch, method, given, numbers
):
  monkeypatch.setattr(leaves_on_disk, 'BLOCK', 1024)  # several for the embedding and the MLP
  base = method != 'linear'
  merge = read_mergekit(describe(models, method, base=base, **given))
  digests = merge_checkpoints(merge, tmp_path / 'out', tmp_path)

  opened = [open_huggingface(models / f'm{i}') for i in range(4)]
  weights = [0.2, 0.3, 0.6] if method not in ('slerp', 'sce', 'model_stock') else [1.0] * 3
  count = 1 if method == 'slerp' else 3
  numbers = methods.numbers(weights[:count], **numbers)
  kind = methods.Kind(method)
  found = tensors_in(tmp_path / 'out')
  for leaf in leaf_shapes(CONFIG):
    root, *others = (model.stored[leaf].read().astype(np.float32) for model in opened)
    vectors = [other - root for other in others[:count]] if base else others
    start = root if base else np.zeros_like(root)
    out = np.zeros(root.shape, 'bfloat16')
    key = methods.leaf_key(0, leaf)
    expected = np.asarray(methods.merge_leaf(kind, out, start, vectors, numbers, key))
    name = PREFIX + external_name(leaf, 0)
    np.testing.assert_array_equal(found[name].view(np.uint16), expected.view(np.uint16))
    assert digests[name] == digest(found[name])
  np.testing.assert_array_equal(found[HEAD], found[PREFIX + 'embed_tokens.weight'])
  assert read_json(tmp_path / 'out' / 'digests.json') == digests
  assert digests.keys() == found.keys() == tensors_in(models / 'm0').keys()


def test_what_is_not_text_is_the_bases(models, tmp_path):
  merge_checkpoints(read_mergekit(describe(models, 'task_arithmetic')), tmp_path / 'o', tmp_path)
  found, base = tensors_in(tmp_path / 'o'), tensors_in(models / 'm0')
  for name in (VISION, 'multi_modal_projector.weight'):
    np.testing.assert_array_equal(found[name], base[name], strict=True)
  assert (tmp_path / 'o' / 'tokenizer.json').read_text() == '{"of": 0}'
  assert (tmp_path / 'o' / 'mergekit_config.yml').exists()
  config = read_json(tmp_path / 'o' / 'config.json')
  assert config == read_json(models / 'm0' / 'config.json') | {'torch_dtype': 'bfloat16'}
  card = (tmp_path / 'o' / 'README.md').read_text()
  assert 'task_arithmetic' in card and str(models / 'm2') in card


def test_rows_beyond_the_text_vocabulary_are_the_bases(models, tmp_path, monkeypatch):
  monkeypatch.setattr(merging_files, 'TEXT_VOCABULARY', 80)
  monkeypatch.setattr(leaves_on_disk, 'BLOCK', 500)
  merge_checkpoints(read_mergekit(describe(models, 'task_arithmetic')), tmp_path / 'o', tmp_path)
  found, base = tensors_in(tmp_path / 'o'), tensors_in(models / 'm0')
  for name in (HEAD, PREFIX + 'embed_tokens.weight'):
    np.testing.assert_array_equal(found[name][80:], base[name][80:])
    assert (found[name][:80] != base[name][:80]).any(axis=1).all()


def test_nothing_of_others_is_replaced(models, tmp_path):
  merge = read_mergekit(describe(models, 'task_arithmetic'))
  (tmp_path / 'mine').mkdir()
  with pytest.raises(UserError, match='mine exists and is no earlier merge'):
    merge_checkpoints(merge, tmp_path / 'mine', tmp_path)
  (models / 'mergekit_config.yml').write_text('')
  with pytest.raises(UserError, match=r'would replace .*m1, which is merged'):
    merge_checkpoints(merge, models, tmp_path)
  (models / 'mergekit_config.yml').unlink()
  assert (models / 'm1').exists()
  for _ in range(2):
    merge_checkpoints(merge, tmp_path / 'out', tmp_path)


def test_a_gradient_over_layers_and_filters(models, tmp_path):
  """Every layer by its own weights; float32 out of bfloat16."""
  weight = [{'filter': 'mlp', 'value': [0.0, 1.0]}, {'value': 0.25}]
  content = {
    'merge_method': 'task_arithmetic',
    'base_model': str(models / 'm0'),
    'models': [{'model': str(models / 'm1'), 'parameters': {'weight': weight}}],
    'dtype': 'float32',
  }
  (models / 'gradient.yml').write_text(json.dumps(content))
  merge_checkpoints(read_mergekit(models / 'gradient.yml'), tmp_path / 'o', tmp_path)
  found, base, model = (tensors_in(path) for path in (tmp_path / 'o', models / 'm0', models / 'm1'))
  for name in found:
    if not name.startswith(PREFIX):
      continue
    layer = re.search(r'layers\.(\d)\.mlp', name)
    w = np.float32(int(layer[1]) / 2 if layer else 0.25)
    a, b = base[name].astype(np.float32), model[name].astype(np.float32)
    np.testing.assert_array_equal(found[name], a + w * (b - a), strict=True, err_msg=name)


def test_refusals(models, tmp_path):
  write(tmp_path / 'm1', 1, CONFIG.__class__(**{**vars(CONFIG), 'num_layers': 2}))
  for name in ('m0', 'm2', 'm3'):
    (tmp_path / name).symlink_to(models / name)
  out = tmp_path / 'out'
  merge = read_mergekit(describe(tmp_path, 'task_arithmetic'))
  with pytest.raises(UserError, match=r'm1 has another architecture than .*m0'):
    merge_checkpoints(merge, out, tmp_path)
  merge = read_mergekit(describe(models, 'della', density=0.95))
  with pytest.raises(UserError, match=r'della: density 0\.95.* epsilon 0\.15'):
    merge_checkpoints(merge, out, tmp_path)
  with pytest.raises(UsageError, match='merge_method'):
    read_mergekit(describe(models, 'passthrough'))
  (models / 'gone.yml').write_text(
    json.dumps({
      'merge_method': 'linear',
      'models': [{'model': str(models / x), 'parameters': {'weight': 1}} for x in ('m0', 'm9')],
    })
  )  # fmt: skip
  with pytest.raises(UserError, match='m9 is missing'):
    merge_checkpoints(read_mergekit(models / 'gone.yml'), out, tmp_path)
  assert not out.exists()


def test_the_command(models, tmp_path, capsys):
  file = describe(models, 'task_arithmetic')
  cli.main(['merge', '--mergekit', str(file), '--out', str(tmp_path / 'out')])
  assert capsys.readouterr().out == f'{tmp_path}/out\n'
  assert tensors_in(tmp_path / 'out').keys() == tensors_in(models / 'm0').keys()
  given = ['--mergekit', str(file)]
  for wrong in (given, ['--out', 'x'], [], [*given, '--out', 'x', '--gin.A.b=1']):
    with pytest.raises(SystemExit) as stop:
      cli.main(['merge', *wrong])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count('\n') == 1
