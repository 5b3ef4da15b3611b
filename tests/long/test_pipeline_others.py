"""The whole path with models of others, other methods and compressed vectors."""

import dataclasses
import shutil

import pytest
from small_run import make_run

from optimer_jax import pipeline
from optimer_jax.checkpoints import store
from optimer_jax.errors import UsageError, UserError
from optimer_jax.files import read_json
from optimer_jax.merging.candidates import MergeConfig
from optimer_jax.search.study import StudyConfig


def test_another_method_from_compressed_vectors_and_a_model_of_others(done, tmp_path):
  """TIES, its density searched, over int8 vectors of two data sets and of an exported model."""
  run = make_run(
    tmp_path / 'run',
    cache=done.cache,
    vectors={'other': str(done.path / 'export' / 'optimer')},
    vector_dtype='int8',
    merging=MergeConfig('ties', density=0.5),
    study=StudyConfig(trials=4, density=(0.2, 0.8)),
  )
  for part in ('base', 'cpt'):
    shutil.copytree(done.path / part, run.path / part)
  pipeline.extract_all(run)
  best = pipeline.search(run)
  assert set(best['weights']) == {'north', 'east', 'other'}
  assert 0.2 <= best['numbers']['density'] <= 0.8
  path = pipeline.merge(run)
  facts = store.read_manifest(path).facts
  assert facts['merging']['density'] == best['numbers']['density']
  before = (path / 'manifest.json').read_text()
  assert pipeline.merge(run) == path and (path / 'manifest.json').read_text() == before
  with pytest.raises(UserError, match='was written with merge method'):
    pipeline.search(dataclasses.replace(run, merging=MergeConfig('dare_ties')))


def test_models_of_others_are_taken_again_when_they_change(done, tmp_path):
  run = make_run(tmp_path / 'run', cache=done.cache)
  shutil.copytree(done.path / 'base', run.path / 'base')
  shutil.copytree(done.path / 'cpt', run.path / 'cpt')
  model = tmp_path / 'model'
  shutil.copytree(done.path / 'cpt' / 'north', model)
  run = dataclasses.replace(run, vectors={'other': str(model)})
  pipeline.extract_all(run)
  first = store.read_manifest(run.path / 'vectors' / 'other').fingerprint
  assert first == store.read_manifest(run.path / 'vectors' / 'north').fingerprint
  before = (run.path / 'costs.jsonl').read_text()
  pipeline.extract_all(run)
  assert (run.path / 'costs.jsonl').read_text() == before
  shutil.rmtree(model)
  shutil.copytree(done.path / 'cpt' / 'east', model)
  pipeline.extract_all(run)
  assert store.read_manifest(run.path / 'vectors' / 'other').fingerprint != first
  assert read_json(run.path / 'vectors' / 'geometry.json')['datasets'][-1] == 'other'
  pipeline.extract_all(dataclasses.replace(run, vectors={}))
  assert read_json(run.path / 'vectors' / 'geometry.json')['datasets'] == ['north', 'east']
  for name in ('north', 'base'):
    with pytest.raises(UsageError, match=f"the name '{name}' is taken"):
      dataclasses.replace(run, vectors={name: str(model)})
