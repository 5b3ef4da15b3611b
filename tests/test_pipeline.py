"""The whole path on two invented languages: what it leaves behind, and that it goes on."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from small_run import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_jax import pipeline
from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.base import kept_vocabulary
from optimer_jax.data.datasets import Dataset, from_jsonl, synthetic
from optimer_jax.data.tokenizer import Tokenizer
from optimer_jax.errors import UserError
from optimer_jax.files import read_json, read_jsonl
from optimer_jax.run import tokenizer_of
from optimer_jax.search.study import StudyConfig


def test_every_artifact_is_there_and_knows_its_parents(done):
  base = store.read_manifest(done.path / 'base', 'base')
  for name in done.names:
    model = store.read_manifest(done.path / 'cpt' / name, 'cpt')
    vector = store.read_manifest(done.path / 'vectors' / name, 'vector')
    assert model.parents == {'base': base.fingerprint}
    assert vector.parents == {'base': base.fingerprint, 'model': model.fingerprint}
    assert model.facts['gin'] == '# as bound' and model.facts['tokens'] == 6 * 4 * 64
    assert 0 < vector.facts['rounding_error'] < 2**-8
    assert not (done.path / 'training' / name / 'state').exists()
  merged = store.read_manifest(done.path / 'merged' / 'optimer', 'merged')
  best = read_json(done.path / 'studies' / 'default' / 'best.json')
  assert merged.facts['weights'] == best['weights']
  assert best['evaluations'] == len(read_jsonl(done.path / 'studies/default/trials.jsonl')) == 4
  assert 'OptiMer' in (done.path / 'report' / 'index.html').read_text()


def test_training_helps_its_own_language(done):
  scores = {
    path.stem: read_json(path)['scores']
    for path in (done.path / 'evaluations').glob('*.json')
    if path.stem != 'comparisons'
  }
  for name in done.names:
    assert scores[f'cpt-{name}'][name]['value'] < scores['base'][name]['value']
  trials = read_jsonl(done.path / 'studies' / 'default' / 'trials.jsonl')
  assert trials[0]['weights'] == {'north': 0.5, 'east': 0.5}
  assert trials[1]['weights'] == {'north': 0.0, 'east': 0.0}


def test_export_is_what_was_scored(done):
  """transformers reads it, with the full vocabulary and the tokenizer, and agrees on the text."""
  import torch

  out = done.path / 'export' / 'optimer'
  model = AutoModelForCausalLM.from_pretrained(out, dtype='auto')
  assert model.dtype == torch.bfloat16
  assert model.config.vocab_size == 1024
  text = next(done.datasets[0].test.documents()).text
  ids = AutoTokenizer.from_pretrained(out)(text)['input_ids']
  tokenizer = Tokenizer.load(done.path / 'base')
  assert ids == [tokenizer.bos, *tokenizer.encode([text])[0]]
  kept = kept_vocabulary(done.path / 'base')
  _, leaves = store.load(done.path / 'merged' / 'optimer')
  rows = model.get_input_embeddings().weight.detach().float().numpy()
  expected = leaves['embedder.embedding'].astype(model_dtype())
  assert np.array_equal(rows[kept], expected.astype(np.float32))
  exported = read_json(done.path / 'evaluations' / 'exported.json')['mean']
  assert exported == pytest.approx(read_json(done.path / 'evaluations/optimer.json')['mean'], 2e-3)


def model_dtype():
  import ml_dtypes

  return ml_dtypes.bfloat16


def test_done_again_nothing_is_computed(done):
  before = (done.path / 'costs.jsonl').read_text()
  pipeline.pipeline(done)
  added = (done.path / 'costs.jsonl').read_text()[len(before) :]
  assert {json.loads(line)['stage'] for line in added.splitlines()} <= {'search/default'}


def test_rebuilt_stages_are_bitwise_the_same(done, tmp_path):
  """Vectors, study and merge thrown away: the same come back."""
  run = make_run(tmp_path / 'run', cache=done.cache)
  for part in ('base', 'cpt', 'training'):
    shutil.copytree(done.path / part, run.path / part)
  pipeline.extract_all(run)
  best = pipeline.search(run)
  pipeline.merge(run)
  old = read_json(done.path / 'studies' / 'default' / 'best.json')
  assert best['weights'] == old['weights']
  for place in ('vectors/north', 'vectors/east', 'merged/optimer'):
    one, two = (store.read_manifest(r.path / place) for r in (done, run))
    assert one.fingerprint == two.fingerprint


def test_a_trimmed_vocabulary_spells_none_of_the_text_in_bytes(done):
  own, full = tokenizer_of(done), Tokenizer.load(done.path / 'base')
  assert own.size < full.size
  for data, split in itertools.product(done.datasets, ('train', 'dev', 'test')):
    texts = [each.text for each in getattr(data, split).documents()]
    assert [*map(len, own.encode(texts))] == [*map(len, full.encode(texts))]


def test_other_settings_in_the_same_directory_are_refused(done):
  with pytest.raises(UserError, match=r'base was made with trim_vocabulary = True, not False'):
    pipeline.import_base(dataclasses.replace(done, trim_vocabulary=False))
  with pytest.raises(UserError, match=r'cpt/north was made with seed = 0, not 1'):
    training = dataclasses.replace(done.training, seed=1)
    pipeline.train_one(dataclasses.replace(done, training=training), 'north')
  with pytest.raises(
    UserError, match='development data of east, north are not those of trial 1 in'
  ):
    fewer = dataclasses.replace(done.evaluation, dev_rows=5)
    pipeline.search(dataclasses.replace(done, evaluation=fewer))
  with pytest.raises(UserError, match='was written with seed 0, not 5'):
    pipeline.search(dataclasses.replace(done, study=StudyConfig(trials=4, seed=5)))


def test_more_trials_go_on_from_the_ledger(done, tmp_path):
  run = make_run(tmp_path / 'run', cache=done.cache, study=StudyConfig(trials=6))
  for part in ('base', 'vectors', 'studies', 'cpt'):
    shutil.copytree(done.path / part, run.path / part)
  before = read_jsonl(run.path / 'studies' / 'default' / 'trials.jsonl')
  pipeline.search(run)
  after = read_jsonl(run.path / 'studies' / 'default' / 'trials.jsonl')
  assert after[:4] == before and len(after) == 6


def test_merge_by_hand(done):
  path = pipeline.merge(done, {'north': 1.0, 'east': 0.0}, 'north')
  _, merged = store.load(path, 'merged')
  _, trained = store.load(done.path / 'cpt' / 'north')
  _, base = store.load(done.path / 'base')
  for leaf, value in trained.items():
    # The vector was rounded to bfloat16: eight bits of what training changed.
    bound = 2**-8 * np.abs(value - base[leaf]) + np.spacing(np.abs(value))
    assert (np.abs(merged[leaf] - value) <= bound).all(), leaf
  with pytest.raises(UserError, match='one weight for each of north, east'):
    pipeline.merge(done, {'north': 1.0}, 'half')


def test_what_inspect_leaves(done):
  """The kept checkpoints lie on the way from base to model, and there is something to look at."""
  vectors = done.path / 'vectors'
  ways = read_json(vectors / 'trajectory.json')
  assert sorted(ways) == ['east', 'north']
  for name, way in ways.items():
    assert way['steps'] == [2, 4, 6]
    assert 0 < way['projection'][0] < way['projection'][1] < way['projection'][2] == 1
    assert 0.3 < way['straightness'] < 1
    tau = read_json(vectors / 'geometry.json')['norm'][name]
    assert way['norm'][-1] == pytest.approx(tau, rel=1e-2)  # the vector is rounded to bfloat16
  assert {'cosine.png', 'trajectory.png'} <= {file.name for file in vectors.glob('*.png')}
  assert 'trajectory' in (done.path / 'report' / 'index.html').read_text()


def test_checkpoints_of_an_earlier_run_are_no_part_of_the_way(done, tmp_path):
  run = make_run(tmp_path / 'run', cache=done.cache)
  for part in ('base', 'cpt', 'vectors'):
    shutil.copytree(done.path / part, run.path / part)
  old = store.read_manifest(done.path / 'snapshots' / 'north' / '2')
  _, leaves = store.load(done.path / 'snapshots' / 'north' / '2')
  facts = {**old.facts, 'settings': {**old.facts['settings'], 'seed': 9}}
  store.save(run.path / 'snapshots' / 'north' / '3', 'cpt', old.model, leaves, facts=facts)
  pipeline.inspect(run)
  assert not (run.path / 'vectors' / 'trajectory.json').exists()


def test_a_merge_as_a_lora(done):
  found = pipeline.export_lora(done, 4)
  out = done.path / 'export' / 'optimer-lora-4'
  assert read_json(out / 'reconstruction.json') == found
  assert 0 < found['error_of_adapted'] < found['error'] < 1
  more = pipeline.export_lora(done, 64, vector='north')  # as wide as k_proj
  assert more['error_of_adapted'] < found['error_of_adapted']
  with pytest.raises(UserError, match="no vector 'nort': there are north, east"):
    pipeline.export_lora(done, 4, vector='nort')


def test_damage_is_found_before_it_is_used(done, tmp_path):
  run = make_run(tmp_path / 'run', cache=done.cache)
  for part in ('base', 'vectors', 'cpt'):
    shutil.copytree(done.path / part, run.path / part)
  leaves = run.path / 'vectors' / 'east' / 'leaves'
  largest = max(leaves.rglob('d/*'), key=lambda file: file.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 4
  largest.write_bytes(content)
  with pytest.raises(UserError, match=r'vectors/east.*(damaged|cannot be read)'):
    pipeline.search(run)
  assert not (run.path / 'studies' / 'default' / 'trials.jsonl').exists()


@pytest.mark.parametrize(
  ('content', 'sentence'),
  [
    (b'', 'holds no text|empty'),
    (b'{"text": "caf\xe9"}\n', 'UTF-8'),
    (b'{"text": "two words"}\n', r'rows, less than one batch of 4'),
  ],
)
def test_bad_text_stops_training_before_it_starts(done, tmp_path, content, sentence):
  file = tmp_path / 'train.jsonl'
  file.write_bytes(content)
  good, bad = synthetic('north'), from_jsonl('bad', str(file), str(file))
  datasets = (Dataset('north', bad.train, good.dev, good.test), synthetic('east'))
  run = make_run(tmp_path / 'run', datasets=datasets, cache=done.cache)
  shutil.copytree(done.path / 'base', run.path / 'base')
  with pytest.raises(UserError, match=sentence):
    pipeline.train_one(run, 'north')
  assert not (run.path / 'cpt').exists()
