import json
import re
from pathlib import Path

import mergekit_parameters
import pytest

from optimer_jax.errors import UsageError, UserError
from optimer_jax.merging.mergekit_yaml import METHODS, numbers_for, read_mergekit

# What mergekit 0.1.5 makes of the merges in mergekit_parameters.py, which computes it.
KEPT = json.loads(mergekit_parameters.KEPT.read_text())


@pytest.fixture
def read(tmp_path):
  def read(text: str):
    path = tmp_path / 'm.yaml'
    path.write_text(text)
    return read_mergekit(path)

  return read


@pytest.mark.parametrize('case', KEPT)
def test_the_numbers_are_those_of_mergekit(case, read):
  text, kept = mergekit_parameters.CASES[case], KEPT[case]
  if kept is None:
    with pytest.raises(UsageError, match=r'm\.yaml'):
      numbers_for(read(text), 'model.norm.weight', 5)
    return
  merge = read(text)
  skipped = () if merge.method == 'linear' else ('base',)
  assert merge.models == tuple(model for model in kept['models'] if model not in skipped)
  idle = {'int8_mask', 'filter_wise'}  # what changes nothing in the merge is no number of ours
  if merge.method == 'task_arithmetic':
    idle |= {'density', 'rescale'}
  for name, theirs in kept['tensors'].items():
    expected = {key: value for key, value in theirs.items() if key not in idle}
    for key, value in expected.items():
      if isinstance(value, dict):
        assert value.keys() == set(merge.models)
        expected[key] = tuple(value[model] for model in merge.models)
    numbers = numbers_for(merge, name, kept['layers'])
    assert numbers == expected, name
    assert all(type(numbers[key]) is type(expected[key]) for key in expected), name


def test_mergekit_gives_the_kept_numbers():
  pytest.importorskip('mergekit')
  assert json.loads(json.dumps(mergekit_parameters.compute())) == KEPT


def test_every_method_is_among_them():
  methods = {
    re.search(r'merge_method: (\w+)', text)[1] for text in mergekit_parameters.CASES.values()
  }
  assert methods == set(METHODS)


# What is read besides the numbers.

TIES = 'merge_method: ties\nbase_model: base\nmodels: [{model: org/a}, {model: ./b}]\n'
WEIGHT = 'parameters: {weight: 1}\n'


def test_the_rest(read):
  merge = read(TIES + WEIGHT)
  assert (merge.method, merge.base, merge.models) == ('ties', 'base', ('org/a', './b'))
  assert (merge.dtype, merge.out_dtype, merge.layers) == (None, None, None)
  merge = read(TIES + WEIGHT + 'dtype: float32\nout_dtype: bfloat16\n')
  assert (merge.dtype, merge.out_dtype) == ('float32', 'bfloat16')
  merge = read(TIES + WEIGHT + 'dtype: torch.float16\n')
  assert (merge.dtype, merge.out_dtype) == ('float16', 'float16')


@pytest.mark.parametrize(
  'line',
  [
    'tokenizer_source: base',
    'tokenizer: {source: base}',
    'tokenizer_source: ',
    'tokenizer: {source: base}\nchat_template: null',
    'slices: null',
  ],
)
def test_the_tokenizer_of_the_base(line, read):
  assert read(TIES + WEIGHT + line).models == ('org/a', './b')


def test_a_filter_is_a_part_of_the_name(read):
  merge = read(
    TIES + 'parameters: {weight: [{filter: layers.1, value: 2}, {filter: "*", value: 3}]}'
  )
  weights = [
    numbers_for(merge, f'model.layers.{i}.mlp.up_proj.weight', 26)['weight'] for i in (1, 2, 10)
  ]
  assert weights == [(2.0, 2.0), (3.0, 3.0), (2.0, 2.0)]


def test_the_prefixes_of_larger_models(read):
  merge = read(TIES + 'parameters: {weight: [0, 1]}')
  for prefix in ('model.', 'language_model.model.', 'model.language_model.'):
    numbers = numbers_for(merge, f'{prefix}layers.1.mlp.up_proj.weight', 5)
    assert numbers['weight'] == (0.25, 0.25)
    assert numbers_for(merge, f'{prefix}embed_tokens.weight', 5)['weight'] == (0, 0)


SLICES = """
merge_method: slerp
base_model: base
parameters: {t: .5}
slices:
  - sources:
      - {model: base, layer_range: [0, 26]}
      - {model: a, layer_range: [0, 26]}
"""


def test_slices(read):
  merge = read(SLICES)
  assert (merge.models, merge.layers) == (('a',), 26)
  assert numbers_for(merge, 'model.norm.weight', 26) == {'t': 0.5}
  with pytest.raises(UsageError, match='ends at 26, but the models have 34 layers'):
    numbers_for(merge, 'model.norm.weight', 34)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    # Keys.
    (TIES + WEIGHT + 'parametres: {}', r'the key parametres is not supported; did you mean param'),
    (TIES + WEIGHT + 'modules: {}', 'the key modules is not supported; did you mean models'),
    (TIES + WEIGHT + 'name: x', 'the key name is not supported; supported are merge_method'),
    (TIES.replace('{model: ./b}', '{modle: ./b}'), r'models\[1\]: the key modle is'),
    (TIES.replace('{model: ./b}', 'b'), r'models\[1\] must hold keys and values, but is b'),
    (TIES + 'parameters: 3', 'parameters must hold keys'),
    ('merge_method: ties\nmodels: {a: b}', 'models must be a list'),
    # Methods.
    (TIES.replace('ties', 'tiess'), 'merge_method tiess is not supported; did you mean ties'),
    (TIES.replace('ties', 'nuslerp'), 'nuslerp is not supported; did you mean slerp'),
    (TIES.replace('ties', '[ties]'), r'merge_method \[.ties.\] is not supported'),
    (TIES.replace('ties', 'karcher'), 'karcher is not supported; supported are linear, task'),
    (TIES.replace('ties', 'passthrough'), r'passthrough .*frankenmerging'),
    ('models: [{model: a}]', 'merge_method None is not supported'),
    # Parameters.
    (TIES + 'parameters: {wieght: 1}', 'the ties parameter wieght is .* did you mean weight'),
    (TIES + 'parameters: {weight: 1, gamma: .1}', 'parameters: the ties parameter gamma is not'),
    (TIES + 'parameters: {weight: 1, t: .1}', 'the ties parameter t is not supported'),
    (
      TIES.replace('{model: ./b}', '{model: ./b, parameters: {lambda: 2}}') + WEIGHT,
      r'models\[1\]\.parameters\.lambda is one for all models: give it in',
    ),
    (TIES, 'ties needs the parameter weight for org/a'),
    (TIES + 'parameters: {weight: x}', r'parameters\.weight must be a number, but is x'),
    (TIES + 'parameters: {weight: .nan}', 'weight must be a number, but is nan'),
    (TIES + 'parameters: {weight: [.1, [.2]]}', r'must be a number, but is \[0\.2\]'),
    (TIES + 'parameters: {weight: null}', 'must be a number, but is None'),
    (TIES + 'parameters: {weight: {filter: mlp}}', 'must be a number, but is None'),
    (TIES + 'parameters: {weight: {filter: 3, value: 1}}', 'the filter 3: put it in quotes'),
    (TIES + 'parameters: {weight: {fliter: a, value: 1}}', 'key fliter is .* did you mean filter'),
    (TIES + 'parameters: {weight: [{value: 1}, 2]}', 'weight must hold keys and values, but is 2'),
    (TIES + 'parameters: {weight: 1, density: [.5, 53]}', 'density must be from 0 to 1'),
    (TIES + 'parameters: {weight: 1, normalize: 2}', 'normalize must be true or false, but is 2'),
    (TIES + 'parameters: {weight: 1, int8_mask: maybe}', 'int8_mask must be true or false'),
    (
      TIES.replace('ties', 'model_stock') + 'parameters: {filter_wise: true}',
      'filter_wise is not supported: only false is',
    ),
    # Models and base.
    (TIES.replace('base_model: base\n', ''), 'ties needs base_model'),
    (TIES.replace('org/a', 'a+lora'), r'models\[0\]\.model a\+lora adds a LoRA'),
    (TIES.replace('org/a', 'a@main'), 'a@main names a revision'),
    (TIES.replace('org/a', '{model: {path: a}}'), r'models\[0\]\.model must be a path or a name'),
    (TIES.replace('base_model: base', 'base_model: 3'), 'base_model must be a path'),
    (TIES.replace('./b', 'org/a'), r'models\[1\]\.model is org/a again'),
    (TIES.replace('ties', 'slerp') + 'parameters: {t: 0}', 'slerp merges 1 besides .* has 2'),
    (SLICES.replace('a, layer', 'base, layer'), 'model is base again'),
    (TIES.replace('[{model: org/a}, {model: ./b}]', '[{model: base}]'), 'at least 1 .* has 0'),
    (TIES.replace('[{model: org/a}, {model: ./b}]', '[]'), 'under `models`, or else'),
    # Slices.
    (SLICES + '  - sources: []', 'slices .*frankenmerging'),
    (SLICES.replace('26', '13', 1), r'sources\[1\]\.layer_range is \[0, 26\]'),
    (SLICES.replace('[0, 26]', '[4, 26]'), r'sources\[0\]\.layer_range is \[4, 26\]'),
    (SLICES.replace('[0, 26]', '26'), r'sources\[0\]\.layer_range is 26'),
    (SLICES + '    residual_weight: 1', 'the key residual_weight is not supported'),
    (SLICES + '    base_model: a', r'slices\[0\]\.base_model is not the base_model'),
    # dtype and tokenizer.
    (TIES + 'dtype: bf16', 'dtype bf16 is not supported'),
    (TIES + WEIGHT + 'out_dtype: float8', 'out_dtype float8 is not supported; did you mean float'),
    (TIES + WEIGHT + 'tokenizer_source: union', 'tokenizer_source union is not supported'),
    (TIES + WEIGHT + 'tokenizer_source: org/a', 'tokenizer_source org/a is not supported'),
    (TIES + WEIGHT + 'tokenizer: {}', r'tokenizer\.source union is not supported'),
    (TIES + WEIGHT + 'tokenizer: {source: base, tokens: {}}', 'tokenizer: the key tokens is not'),
    (TIES + WEIGHT + 'chat_template: auto', 'chat_template is not supported'),
    # The file.
    (TIES + '---\n' + TIES, r'2 documents \(mergekit-multi\)'),
    ('', 'is not a mergekit file'),
    ('- a', 'is not a mergekit file'),
  ],
)
def test_refused_by_name(text, message, read, tmp_path):
  with pytest.raises(UsageError, match=message) as error:
    read(text)
  _check_sentence(error.value, tmp_path / 'm.yaml')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'm.yaml is missing'),
    (b'\xff\xfe', 'm.yaml is not UTF-8'),
    (b'models:\n  - a: [\n', r'm\.yaml:3 is not YAML \('),
    (b'models: 2020-13-77', r'm\.yaml is not YAML \(month'),
    (b'models: !!python/object:os.system x', 'm.yaml:1 is not YAML'),
  ],
)
def test_a_file_that_is_none(content, message, tmp_path):
  path = tmp_path / 'm.yaml'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    read_mergekit(path)
  _check_sentence(error.value, path)
  with pytest.raises(UserError, match='cannot be read'):
    read_mergekit(tmp_path)


def test_a_tensor_that_no_filter_matches(read):
  merge = read(TIES + 'parameters: {weight: {filter: mlp, value: 1}}')
  assert numbers_for(merge, 'model.layers.0.mlp.up_proj.weight', 5)['weight'] == (1, 1)
  with pytest.raises(UsageError, match=r'weight of org/a has no value for model\.norm\.weight'):
    numbers_for(merge, 'model.norm.weight', 5)


def _check_sentence(error: UserError, path: Path) -> None:
  assert str(error).startswith(str(path))
  assert '\n' not in str(error) and len(str(error)) - len(str(path)) < 240
