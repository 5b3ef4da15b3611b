"""A search and an evaluation on one device, on eight, and in two processes of four each.

`main` is what a process does; what it finds is in found_PROCESS.json.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import make_run
from together import finish, start

from optimer_jax import pipeline
from optimer_jax.checkpoints import store
from optimer_jax.data.datasets import synthetic
from optimer_jax.data.tokenizer import write_tiny_tokenizer
from optimer_jax.errors import UsageError
from optimer_jax.evaluate import evaluate
from optimer_jax.evaluation.generation import Prompt, Sampling, generate_texts
from optimer_jax.files import read_jsonl
from optimer_jax.gemma3 import Gemma3Config, abstract_params, init_leaves, logical_axes
from optimer_jax.merging.candidates import MergeConfig, candidates
from optimer_jax.parallel.sharding import MeshConfig, shardings
from optimer_jax.parallel.startup import join
from optimer_jax.run import EvalConfig, Run, engine_of, prepare, tasks_of
from optimer_jax.search.study import StudyConfig
from optimer_jax.vectors import room
from optimer_jax.vectors.extract import extract
from optimer_jax.vectors.pool import load_pool

# A group of layers, in a stack of stacks and a stack.
SMALL = Gemma3Config(6, 32, 64, 4, 2, 16, window=8, query_scalar=16.0, vocab_size=300)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
NAMES = {'north': 'bfloat16', 'east': 'int8'}
WEIGHTS = {'north': 0.4, 'east': 0.7}
TRIALS = 4


def write_pool(directory: Path) -> None:
  """A random base with a tokenizer, and two vectors, of which one is int8."""
  texts = [document.text for name in NAMES for document in synthetic(name).train.documents()]
  base = {name: 5 * leaf for name, leaf in init_leaves(SMALL, 0).items()}
  tokenizer = lambda new: write_tiny_tokenizer(new, texts[:50], SMALL.vocab_size)
  root = store.save(directory / 'base', 'base', SMALL, base, add_files=tokenizer)
  for i, (name, dtype) in enumerate(NAMES.items(), 1):
    leaves = {n: base[n] + leaf for n, leaf in init_leaves(SMALL, i).items()}
    parents = {'base': root.fingerprint}
    store.save(directory / 'cpt' / name, 'cpt', SMALL, leaves, parents=parents)
    extract(directory / 'base', directory / 'cpt' / name, directory / 'vectors' / name, name, dtype)


def run_in(directory: Path) -> Run:
  return make_run(
    directory,
    length=32,
    mesh=MESH if jax.device_count() > 1 else MeshConfig(),
    evaluation=EvalConfig(dev_rows=8, test_rows=8, batch_tokens=512, generate_rows=8),
    study=StudyConfig(trials=TRIALS, sampler='sobol'),
  )


def searched(run: Run) -> dict:
  best = pipeline.search(run)
  (found,) = evaluate(run, ['north=0.4,east=0.7']).values()
  return {'weights': best['weights'], 'scores': found['scores']}


def pooled(run: Run, with_gradient: tuple[str, ...] = ('device', 'scan')) -> dict:
  """Scores and gradients with the pool in each place; what is compiled for a second candidate."""
  engine, found, compiled = engine_of(run), {}, []
  (task, *_) = prepare(tasks_of(run, 'dev'), engine, 'dev').values()
  listen = lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  for place in room.PLACES:
    pool = load_pool(run.path / 'base', run.vector_paths, engine.model, engine.mesh, place)
    candidate = candidates(pool)
    for weights in ({'north': 0.1, 'east': 0.2}, WEIGHTS):
      compiled.clear()
      params = candidate(weights)
      found[place] = {'bits': task.score(params).values.tolist()}
      if place in with_gradient:
        score, gradient = task.gradient(params, pool.vectors)
        found[place] |= {'backward': score.values.tolist(), 'gradient': gradient.tolist()}
      found[place]['compiled'] = len(compiled)
    memories = {a.sharding.memory_kind for a in jax.tree.leaves(pool.vectors)}
    found[place]['memories'] = sorted(memories)
    if place != 'scan' and engine.mesh:
      wanted = shardings(logical_axes(engine.model), abstract_params(engine.model), engine.mesh)
      same = lambda a, s: a.sharding.is_equivalent_to(s, a.ndim)
      kept = [jax.tree.map(same, tree, wanted) for tree in (params, pool.base)]
      found[place]['kept'] = all(jax.tree.leaves(kept))
  jax.monitoring.unregister_event_duration_listener(listen)
  return found


def answered(
  run: Run, place: str = 'device', drawn: tuple = (Sampling(), Sampling(1.0, top_k=20))
) -> list:
  engine = engine_of(run)
  pool = load_pool(run.path / 'base', run.vector_paths, engine.model, engine.mesh, place)
  params = candidates(pool)(WEIGHTS)
  prompts = [Prompt(np.array([2, 40 + i, 9, 7][: 2 + i % 3], np.int32), 6) for i in range(4)]
  return [
    [each.tokens.tolist() for each in generate_texts(engine, params, prompts, how)] for how in drawn
  ]


def main(directory: str, *parts: str) -> None:
  join()
  run = run_in(Path(directory))
  found = {part: globals()[part](run) for part in parts}
  (run.path.parent / f'found_{jax.process_index()}.json').write_text(json.dumps(found))


@pytest.fixture(scope='module')
def found(tmp_path_factory) -> dict[str, list[dict]]:
  """What each process found on one device (this process), on eight, and in two processes."""
  place = tmp_path_factory.mktemp('mesh')
  write_pool(place / 'pool')
  for name in ('one', 'eight', 'two'):
    (place / name / 'run').mkdir(parents=True)
    for each in ('base', 'vectors'):
      (place / name / 'run' / each).symlink_to(place / 'pool' / each)
  running = {
    name: start([__file__, place / name / 'run', *parts], place / name, *how)
    for name, how, parts in (
      ('eight', (1, 8), ('searched', 'pooled')),
      ('two', (2, 4), ('searched', 'answered')),
    )
  }
  one = run_in(place / 'one' / 'run')
  results = {'place': place}
  results['one'] = [
    {
      'searched': searched(one),
      'pooled': pooled(one, with_gradient=('device',)),
      'answered': answered(one),
    }
  ]
  for name, processes in running.items():
    assert finish(processes, place / name) == [0] * len(processes)
    paths = [place / name / f'found_{i}.json' for i in range(len(processes))]
    results[name] = [json.loads(path.read_text()) for path in paths]
  return results


def ledger(found, name: str) -> list[dict]:
  path = found['place'] / name / 'run' / 'studies' / 'default' / 'trials.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()]


def check_close(found, expected) -> None:
  """Numbers that are measured to 1e-5, all else exactly."""
  if isinstance(expected, dict):
    assert found.keys() == expected.keys()
    for key in expected.keys() - {'time', 'seconds'}:
      check_close(found[key], expected[key])
  elif isinstance(expected, float):
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  else:
    assert found == expected


@pytest.mark.parametrize('name', ['eight', 'two'])
def test_the_ledger_is_that_of_one_device(found, name):
  many, one = ledger(found, name), ledger(found, 'one')
  assert len(many) == len(one) == TRIALS
  for a, b in zip(many[:-1], one[:-1], strict=True):
    assert a['weights'] == b['weights']
    check_close(a, b)
  # Where the model of the trials has its optimum hangs on their last digits.
  np.testing.assert_allclose(*[[*rows[-1]['weights'].values()] for rows in (many, one)], atol=1e-3)
  for each in found[name]:
    check_close(each['searched']['scores'], found['one'][0]['searched']['scores'])
    assert each == found[name][0]
  costs = read_jsonl(found['place'] / name / 'run' / 'costs.jsonl')
  assert [row['stage'] for row in costs] == ['search/default', 'evaluate/north=0.4,east=0.7']


def test_answers_of_two_processes_are_those_of_one(found):
  likeliest, drawn = found['one'][0]['answered']
  assert [each['answered'] for each in found['two']] == [[likeliest, drawn]] * 2
  assert likeliest != drawn and len({*map(tuple, likeliest)}) > 1
  run = run_in(found['place'] / 'one' / 'run')
  assert answered(run, 'scan', (Sampling(),)) == [likeliest]


@pytest.mark.parametrize('name', ['one', 'eight'])
def test_every_place_of_the_pool_scores_the_same(found, name):
  pools, one = found[name][0]['pooled'], found['one'][0]['pooled']['device']
  for place in room.PLACES:
    for key in pools[place].keys() & {'bits', 'backward', 'gradient'}:
      np.testing.assert_allclose(pools[place][key], one[key], rtol=1e-5)
    assert pools[place]['compiled'] == 0 and pools[place].get('kept', True)
    far = {room.FAR} if place == 'host' else set()
    assert set(pools[place]['memories']) == {'device'} | far
  # The sum is the same bit for bit, wherever it is taken.
  assert pools['host']['bits'] == pools['device']['bits']
  np.testing.assert_allclose(pools['scan']['bits'], pools['device']['bits'], rtol=1e-6)


def test_the_place_follows_from_the_memory(found, monkeypatch, capsys):
  run = run_in(found['place'] / 'one' / 'run')
  engine = engine_of(run)

  def chosen(place: str = 'auto', possible=room.PLACES) -> str:
    return room.choose_place(place, possible, manifests, engine.model, engine.mesh)

  pool = load_pool(run.path / 'base', run.vector_paths, engine.model)
  size = lambda *trees: sum(a.nbytes for a in jax.tree.leaves(trees))
  found_size = room.needed(pool.manifests, engine.model, engine.mesh)['device']
  assert found_size == size(pool.base, pool.base, pool.vectors)

  manifests = {f'{name} {i}': pool.manifests[name] for i in range(4) for name in NAMES}
  manifests['base'] = pool.manifests['base']
  sizes = room.needed(manifests, engine.model, engine.mesh)
  assert sizes['device'] > sizes['scan'] > sizes['host']
  assert chosen() == 'device' and not capsys.readouterr().err  # nothing is known of a CPU's memory
  for place in room.PLACES:
    monkeypatch.setattr(room, '_memory', lambda place=place: sizes[place] / room.SHARE + 1)
    assert chosen() == place
    assert f'pool: {place}, the first that fits' in capsys.readouterr().err
  monkeypatch.setattr(room, '_memory', lambda: 1)
  assert chosen() == 'host' and 'none fits' in capsys.readouterr().err
  assert chosen('device') == 'device' and 'as Run.pool says' in capsys.readouterr().err
  assert MergeConfig('ties').places == ('device',) == (chosen(possible=('device',)),)
  for wrong in ('scan', 'hbm'):
    with pytest.raises(UsageError, match=f"Run.pool = '{wrong}'"):
      chosen(wrong, ('device',))


if __name__ == '__main__':
  main(*sys.argv[1:])
