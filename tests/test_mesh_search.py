"""A search and an evaluation on one device, on eight, and in two processes of four each."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import make_run
from together import finish, start

from optimer_jax import pipeline
from optimer_jax.evaluate import evaluate
from optimer_jax.evaluation.generation import Prompt, Sampling, generate_texts
from optimer_jax.gemma3 import abstract_params, logical_axes
from optimer_jax.merging.candidates import candidates
from optimer_jax.parallel.sharding import MeshConfig, shardings
from optimer_jax.parallel.startup import join
from optimer_jax.run import Run, engine_of, prepare, tasks_of
from optimer_jax.search.study import StudyConfig
from optimer_jax.vectors.pool import load_pool

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
WEIGHTS = {'north': 0.4, 'east': 0.7}
CODE = """
import sys
sys.path.insert(0, 'tests')
from test_mesh_search import Path, main
main(Path(sys.argv[1]))
"""
HOW = {'one': (1, 1), 'eight': (1, 8), 'two': (2, 4)}  # processes, and devices of each


def run_in(directory: Path) -> Run:
  """The run whose base and vectors stand in the directory."""
  mesh = MESH if jax.device_count() > 1 else MeshConfig()
  study = StudyConfig(trials=5, sampler='sobol', parts=2)
  return make_run(directory, mesh=mesh, study=study)


def main(directory: Path) -> None:
  join()
  run = run_in(directory)
  found = {'best': pipeline.search(run)}
  models = [f'cpt/{run.names[0]}', ','.join(f'{n}={w}' for n, w in WEIGHTS.items())]
  found['evaluated'] = [each['scores'] for each in evaluate(run, models).values()]

  engine = engine_of(run)
  pool = load_pool(run.path / 'base', run.vector_paths, engine.model, engine.mesh)
  candidate = candidates(pool)
  params = candidate(WEIGHTS)
  (task, *_) = prepare(tasks_of(run, 'dev'), engine, 'dev').values()
  found['gradient'] = task.gradient(params, pool.vectors)[1].tolist()
  prompts = [Prompt(np.array([2, 5 + i, 9, 7][: 2 + i % 3], np.int32), 12) for i in range(5)]

  def texts(*sampling):
    return [each.tokens.tolist() for each in generate_texts(engine, params, prompts, *sampling)]

  found['greedy'], found['drawn'] = texts(), texts(Sampling(temperature=1.0, top_k=20))
  if engine.mesh:
    wanted = shardings(logical_axes(engine.model), abstract_params(engine.model), engine.mesh)
    same = lambda a, s: a.sharding.is_equivalent_to(s, a.ndim)
    kept = [jax.tree.map(same, tree, wanted) for tree in (params, pool.base, *pool.vectors)]
    found['placed'] = all(jax.tree.leaves(kept))

  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if 'backend_compile' in event else None
  )
  params = candidate({'north': 0.1, 'east': 0.2})
  task.score(params)
  task.gradient(params, pool.vectors)
  texts()
  found['compiled'] = len(compiled)
  (directory / f'found_{jax.process_index()}.json').write_text(json.dumps(found))


def set_up(done: Run, directory: Path) -> Path:
  """A run's directory with the base and vectors of another."""
  (directory / 'run').mkdir(parents=True)
  for name in ('base', 'vectors', 'cpt'):
    (directory / 'run' / name).symlink_to(done.path / name)
  return directory / 'run'


@pytest.fixture(scope='module')
def found(done, tmp_path_factory) -> dict[str, list[dict]]:
  """What each process found, by how many there were."""
  place, running = tmp_path_factory.mktemp('mesh'), {}
  for name, (processes, devices) in HOW.items():
    directory = set_up(done, place / name)
    running[name] = start(['-c', CODE, directory], place / name, processes, devices)
  results = {}
  for name, processes in running.items():
    assert finish(processes, place / name) == [0] * len(processes)
    read = lambda i, name=name: json.loads((place / name / 'run' / f'found_{i}.json').read_text())
    results[name] = [read(i) for i in range(len(processes))]
    path = place / name / 'run' / 'studies' / 'default' / 'trials.jsonl'
    results[f'{name} ledger'] = [json.loads(line) for line in path.read_text().splitlines()]
  return results


def close(found, expected) -> None:
  """Equal to 1e-5 of each number; anything else exactly."""
  if isinstance(expected, dict):
    assert found.keys() == expected.keys()
    for key in expected.keys() - {'time', 'seconds'}:
      close(found[key], expected[key])
  elif isinstance(expected, list):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
      close(a, b)
  elif isinstance(expected, float):
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  else:
    assert found == expected


@pytest.mark.parametrize('how', ['eight', 'two'])
def test_the_ledger_is_that_of_one_device(found, how):
  one, many = found['one ledger'], found[f'{how} ledger']
  assert len(one) == 5 and [row['weights'] for row in many[:4]] == [r['weights'] for r in one[:4]]
  for a, b in zip(many[:4], one[:4], strict=True):
    close(a, b)
  # The optimum of the model of them all is found from the scores before it.
  np.testing.assert_allclose(*([*r[-1]['weights'].values()] for r in (many, one)), atol=1e-3)
