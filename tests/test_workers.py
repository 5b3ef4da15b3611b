"""Many workers on one study: what they find together, and what is left when some of them die."""

import threading
import time

import jax
import numpy as np
import pytest
from test_study import NAMES, PARAMETERS, TASKS, Evaluate, ledger
from vizier._src.service import resources
from vizier._src.service.vizier_service import operations_pb2

from optimer_jax import cli
from optimer_jax.errors import UsageError, UserError
from optimer_jax.files import read_json
from optimer_jax.search import serve, vizier, workers
from optimer_jax.search.loop import run_study
from optimer_jax.search.objectives import Objective
from optimer_jax.search.samplers import Recommendation
from optimer_jax.search.serve import serving
from optimer_jax.search.study import Study, StudyConfig
from optimer_jax.search.workers import work


def make_study(pool='pool', data='data', **config):
  config = StudyConfig(**{'trials': 7, 'parts': 1, **config})
  return Study(config, PARAMETERS, dict.fromkeys(TASKS, data), pool)


def together(directory, study, evaluates, **arguments):
  """Works as worker-0, worker-1 … at once; what each of them returned or raised."""
  found = [None] * len(evaluates)

  def one(i):
    try:
      arguments_i = {'patience': 10.0, 'beat': 0.1, **arguments}
      found[i] = work(directory, study, evaluates[i], (), f'worker-{i}', **arguments_i)
    except BaseException as error:
      found[i] = error

  threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(evaluates))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
  return found


def without_clock(rows):
  return [{key: value for key, value in row.items() if key != 'seconds'} for row in rows]


def test_one_worker_finds_what_a_search_without_a_server_finds(tmp_path):
  study = make_study(trials=5, parts=4)
  best = run_study(tmp_path / 'alone', study, Evaluate())
  with serving(tmp_path / 'served', study.config):
    (found,) = together(tmp_path / 'served', study, [Evaluate()])
  assert ledger(tmp_path / 'served') == ledger(tmp_path / 'alone')
  assert found['weights'] == best['weights'] and found['evaluations'] == 5
  assert found.keys() == best.keys()


class Slow:
  """An evaluation that takes its time, so that workers overlap."""

  def __init__(self, seconds=0.1):
    self.evaluate, self.seconds = Evaluate(), seconds

  def __call__(self, point, **asked):
    time.sleep(self.seconds)
    return self.evaluate(point, **asked)

  @property
  def points(self):
    return self.evaluate.points


class Dies(Exception):
  """What stands for a SIGKILL here: nothing in the package catches it."""


def die(*_, **__):
  raise Dies


def refuse(point, **_):
  raise AssertionError(f'evaluated again: {point}')


def check_whole(directory, study, trials):
  """The ledger has every trial once, in order, with its seeds first and its optimum last."""
  rows = ledger(directory)
  assert [row['trial'] for row in rows] == list(range(1, trials + 1))
  assert [row['sampler'] for row in rows[:2]] == ['seed'] * 2
  assert [row['weights'] for row in rows[:2]] == study.seeds()[:2]
  assert rows[-1]['sampler'] == 'surrogate' and 'predicted' in rows[-1]
  assert 'surrogate' not in [row['sampler'] for row in rows[:-1]]
  assert len({tuple(row['weights'].values()) for row in rows[:-1]}) == trials - 1
  return rows


def test_three_workers_share_the_trials(tmp_path):
  study, evaluates = make_study(trials=7, parts=4), [Slow() for _ in range(3)]
  with serving(tmp_path, study.config) as address:
    assert read_json(tmp_path / 'server.json') == {'address': address}
    found = together(tmp_path, study, evaluates)
    assert found[0] == found[1] == found[2], found
    rows = check_whole(tmp_path, study, 7)
    points = [point for evaluate in evaluates for point in evaluate.points]
    assert sorted(map(str, points)) == sorted(str(row['weights']) for row in rows)
    assert all(evaluate.points for evaluate in evaluates)
    # Whoever comes late finds the answer, and needs neither server nor evaluation.
    (late,) = together(tmp_path, study, [refuse])
  assert together(tmp_path, study, [refuse]) == [late]
  assert late == found[0] and read_json(tmp_path / 'best.json')['weights'] == late['weights']
  # A search without a server goes on from there, and a server after it.
  more = make_study(trials=8, parts=4)
  assert run_study(tmp_path, more, Evaluate())['evaluations'] == 8
  with serving(tmp_path, make_study(trials=9, parts=4).config):
    (most,) = together(tmp_path, make_study(trials=9, parts=4), [Evaluate()])
  assert most['evaluations'] == 9 and [row['trial'] for row in ledger(tmp_path)][-1] == 9


def test_nobody_is_given_what_another_evaluates():
  space = dict.fromkeys(NAMES, (0.0, 1.0))
  drawn = np.random.default_rng(0).random((6, len(NAMES)))
  points = [dict(zip(NAMES, x, strict=True)) for x in drawn.tolist()]
  value = lambda point: float(((np.array([point[name] for name in NAMES]) - 0.8) ** 2).sum())
  for observed in ([], [(point, value(point)) for point in points]):
    pending = []
    for _ in range(3):
      pending.append(vizier.suggestion(space, 0, observed, pending))
    spread = np.array([[point[name] for name in NAMES] for point in pending])
    gaps = [np.abs(spread[i] - spread[j]).max() for i in range(3) for j in range(i)]
    assert min(gaps) > 0.01
  # Even one that is told to have been observed as the best of all.
  with jax.enable_x64(True):
    (predicted,) = vizier._predicted(vizier.problem_of(space), 0, observed, points[:1])
  assert abs(predicted - observed[0][1]) < 0.2


@pytest.fixture
def quick(monkeypatch):
  """A server whose suggestions are random: for what does not depend on them."""

  def next_point(study, rows, pending):
    rng = np.random.default_rng(len(rows) + len(pending))
    return {name: float(rng.random()) for name in sorted(study.space)}

  def recommended(study, rows):
    return Recommendation(next_point(study, rows, []), 1.0, None, None)

  monkeypatch.setattr(serve, 'next_point', next_point)
  monkeypatch.setattr(serve, 'recommended', recommended)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'seed': 1}, ['seed 0, not 1']),
    ({'trials': 8}, ['trials 7, not 8']),
    ({'upper': 0.5}, ['bounds']),
    ({'pool': 'other'}, ['the vector pool pool, not other']),
    ({'data': 'other'}, ['the tasks']),
    ({'objective': Objective('worst')}, ['objective kind mean, not worst']),
  ],
)
def test_a_study_of_something_else_is_refused(quick, tmp_path, change, words):
  study = make_study()
  with serving(tmp_path, study.config):
    together(tmp_path, study, [die])
    (refused,) = together(tmp_path, make_study(**change), [refuse])
    assert isinstance(refused, UserError) and str(refused).startswith('study default is served')
    assert all(word in str(refused) for word in words), refused
  if change.keys() & {'seed', 'upper', 'objective'}:
    with (
      pytest.raises(UserError, match='was begun with'),
      serving(tmp_path, make_study(**change).config),
    ):
      pass


def test_usage_errors(tmp_path):
  with pytest.raises(UsageError, match='need the sampler vizier, not sobol'):
    work(tmp_path, make_study(sampler='sobol'), refuse, (), 'worker-0')
  with (
    pytest.raises(UsageError, match='need the sampler vizier'),
    serving(tmp_path, make_study(sampler='sobol').config),
  ):
    pass
  with pytest.raises(UsageError, match='letters, digits'):
    work(tmp_path, make_study(), refuse, (), 'worker/0')
  with pytest.raises(UserError, match='is missing: start optimer serve'):
    work(tmp_path, make_study(), refuse, (), 'worker-0')
  with serving(tmp_path, make_study().config) as address:
    with pytest.raises(UserError, match='another process'), serving(tmp_path, make_study().config):
      pass
    port = int(address.rpartition(':')[2])
    with (
      pytest.raises(UserError, match='cannot be listened to'),
      serving(tmp_path / 'other', make_study().config, port=port),
    ):
      pass


def test_a_dead_workers_trial_is_its_own_again_or_after_a_while_anothers(quick, tmp_path):
  study, asked = make_study(), []
  with serving(tmp_path, study.config, lease=1.0):
    for _ in range(2):  # The second time it is given the same.
      (end,) = together(tmp_path, study, [lambda point, **_: asked.append(point) or die()])
      assert isinstance(end, Dies)
    assert asked == [study.seeds()[0]] * 2
    # worker-0 is silent; worker-1 does everything else, waits, and takes over.
    other = Evaluate()
    *_, best = together(tmp_path, study, [die, other])
    assert best['evaluations'] == 7 and len(other.points) == 7
    assert study.seeds()[0] in other.points[1:]
  check_whole(tmp_path, study, 7)


def test_who_was_taken_for_dead_counts_for_nothing(quick, tmp_path):
  study, late = make_study(), Slow(1.5)
  with serving(tmp_path, study.config, lease=0.5):
    found = {}
    # Its signs of life come too late.
    slow = threading.Thread(
      target=lambda: found.update(
        slow=work(tmp_path, study, late, (), 'slow', patience=10.0, beat=60.0)
      )
    )
    slow.start()
    time.sleep(0.5)
    quickly = Evaluate()
    found['quick'] = work(tmp_path, study, quickly, (), 'quick', patience=10.0, beat=0.1)
    slow.join(60)
  rows = check_whole(tmp_path, study, 7)
  assert found['quick'] == found['slow']
  assert len(quickly.points) == 7 and late.points == [rows[0]['weights']]


def test_a_trial_that_has_its_row_is_only_completed(quick, tmp_path, monkeypatch):
  study, other = make_study(), Evaluate()
  with serving(tmp_path, study.config, lease=0.5):
    with monkeypatch.context() as patch:
      patch.setattr(workers._Desk, '_complete', die)
      (end,) = together(tmp_path, study, [Evaluate()])
      assert isinstance(end, Dies)
    (best,) = together(tmp_path, study, [other])
  rows = check_whole(tmp_path, study, 7)
  assert best['evaluations'] == 7 and rows[0]['weights'] not in other.points


def test_a_kill_inside_a_suggestion_hangs_nobody(quick, tmp_path):
  study = make_study()
  with serving(tmp_path, study.config):
    together(tmp_path, study, [die, die])
  store = vizier.open_service((tmp_path / 'study.db').absolute()).datastore
  for worker in ('worker-0', 'worker-1'):
    name = resources.SuggestionOperationResource('optimer', serve.STUDY, worker, 99).name
    store.create_suggestion_operation(operations_pb2.Operation(name=name))
  with serving(tmp_path, study.config):
    found = together(tmp_path, study, [Evaluate(), Evaluate()])
  assert found[0] == found[1], found
  check_whole(tmp_path, study, 7)


@pytest.mark.parametrize('damage', ['missing', 'garbage', 'behind'])
def test_the_ledger_is_the_truth(quick, tmp_path, damage):
  study, asked = make_study(), []

  def four(point, **_):
    asked.append(point)
    return Evaluate()(point) if len(asked) < 5 else die()

  with serving(tmp_path, study.config):
    together(tmp_path, study, [lambda *_, **__: die()])
    early = (tmp_path / 'study.db').read_bytes()
    together(tmp_path, study, [four])
  rows = ledger(tmp_path)
  assert len(rows) == 4
  if damage == 'missing':
    (tmp_path / 'study.db').unlink()
  else:
    new = b'SQLite format 3\0' + b'\xff' * 5000 if damage == 'garbage' else early
    (tmp_path / 'study.db').write_bytes(new)
  with serving(tmp_path, study.config):
    (best,) = together(tmp_path, study, [Evaluate()])
  assert check_whole(tmp_path, study, 7)[:4] == rows and best['evaluations'] == 7


def test_workers_wait_for_a_server_that_comes_back(quick, tmp_path, capsys):
  study, done = make_study(), []
  evaluate = Slow(0.3)
  with serving(tmp_path, study.config) as address:
    thread = threading.Thread(
      target=lambda: done.extend(together(tmp_path, study, [evaluate])), daemon=True
    )
    thread.start()
    while len(evaluate.points) < 3:
      time.sleep(0.05)
  time.sleep(1.0)
  with serving(tmp_path, study.config) as again:
    assert again == address
    thread.join(60)
  assert done[0]['evaluations'] == 7 == len(evaluate.points)
  check_whole(tmp_path, study, 7)
  assert 'does not answer: trying again' in capsys.readouterr().err
  (gone,) = together(tmp_path, make_study(trials=8), [refuse], patience=0.5)
  assert isinstance(gone, UserError) and 'start it again with optimer serve' in str(gone)


def test_what_the_objective_is_measured_by_may_come_late(quick, tmp_path):
  """Suggestions are made while the CPT models are still being evaluated."""
  study = make_study(objective=Objective('worst', scale='best'), trials=9)
  evaluates, anchors = [Slow(1.0), Slow(0.02)], 1 + len(NAMES)
  with serving(tmp_path, study.config):
    found = together(tmp_path, study, evaluates)
  assert found[0] == found[1], found
  rows = ledger(tmp_path)
  assert [row['trial'] for row in rows] == list(range(1, 10))
  # The average is no measure, but the base and each single model are.
  assert [row['objective'] is None for row in rows] == [i < anchors for i in range(9)]


def test_a_pool_that_scores_nothing_finite_stops_every_worker(quick, tmp_path):
  def nan(point, **_):
    result = Evaluate()(point)
    result['scores']['sums']['value'] = float('nan')
    return result

  with serving(tmp_path, make_study().config):
    for found in together(tmp_path, make_study(), [nan, nan]):
      assert isinstance(found, UserError) and 'no candidate has finite scores' in str(found)
  assert len(ledger(tmp_path)) == 2


def test_what_other_studies_measured_is_not_measured_again(quick, tmp_path):
  other = make_study(name='first', trials=6)
  with serving(tmp_path / 'first', other.config):
    together(tmp_path / 'first', other, [Evaluate()])
  study = make_study(trials=3, objective=Objective('worst'))
  evaluate, others = Evaluate(), [tmp_path / 'first' / 'trials.jsonl']
  with serving(tmp_path / 'second', study.config):
    best = work(tmp_path / 'second', study, evaluate, others, 'worker-0')
  assert best['reused'] == 6 and best['evaluations'] == 3 and best['first_answer']
  assert [row['sampler'] for row in ledger(tmp_path / 'second')] == [*['vizier'] * 2, 'surrogate']


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['serve', "--gin.StudyConfig.sampler='composite'"], 'need the sampler vizier, not composite'),
    (['search', '--server=here:1'], '--server goes with --worker NAME'),
  ],
)
def test_the_command_line_says_what_is_wrong(capsys, tmp_path, arguments, sentence):
  verb, *rest = arguments
  with pytest.raises(SystemExit) as stop:
    gin = ['--gin_file=runs/quickstart_tiny.gin', f"--gin.DIRECTORY='{tmp_path}'"]
    cli.main([verb, *gin, *rest])
  assert stop.value.code == 2 and sentence in capsys.readouterr().err
