"""Scores, their standard errors, paired tests of two models, and the scores of parts."""

import itertools
import json
import math
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from optimer_jax.data.sources import Jsonl
from optimer_jax.data.tokenizer import Tokenizer, write_tiny_tokenizer
from optimer_jax.evaluation import tasks
from optimer_jax.evaluation.answers import CodeGeneration, Generation
from optimer_jax.evaluation.engine import Engine
from optimer_jax.evaluation.examples import Examples
from optimer_jax.evaluation.generation import Sampling
from optimer_jax.evaluation.scores import (
  Score,
  compare,
  difference,
  estimate,
  from_summary,
  joined,
  loss,
  places,
  seen,
  shown,
)
from optimer_jax.evaluation.splits import Splits
from optimer_jax.evaluation.tasks import BitsPerByte, MultipleChoice
from optimer_jax.gemma3 import Model, from_leaves, init_leaves


def solved(values) -> Score:
  return Score(np.asarray(values, np.float64), np.ones(len(values)), 'accuracy')


@pytest.fixture(scope='module')
def two() -> tuple[Score, Score]:
  """Bits of the same 60 texts by two models, one a little better."""
  rng = np.random.default_rng(0)
  sizes = rng.integers(50, 200, 60).astype(np.float64)
  bits = sizes * (1 + 0.3 * rng.standard_normal(60))
  return Score(bits, sizes), Score(bits - sizes * (0.02 + 0.05 * rng.standard_normal(60)), sizes)


def test_standard_errors_are_those_of_resampling(two):
  one, other = two
  draws = np.random.default_rng(1).integers(0, 60, (4000, 60))
  sizes = one.sizes[draws].sum(1)
  assert one.stderr == pytest.approx((one.values[draws].sum(1) / sizes).std(), rel=0.1)
  paired = (one.values - other.values)[draws].sum(1) / sizes
  found = compare({'x': one}, {'x': other})
  assert found['stderr'] == pytest.approx(paired.std(), rel=0.1)
  assert found['difference'] == pytest.approx(one.value - other.value)
  # Pairing is what makes small differences visible.
  assert found['stderr'] < one.stderr / 2


def test_p_values_are_those_of_all_sign_flips():
  """Of 12 examples there are 4,096 ways to flip; 10,000 draws come near their share."""
  rng = np.random.default_rng(2)
  for shift in (0.0, 0.4, 0.9):
    one, other = (Score(rng.normal(m, 1.0, 12), np.full(12, 2.0)) for m in (3.0 + shift, 3.0))
    difference = one.values - other.values
    flips = np.array([*itertools.product((-1, 1), repeat=12)]) @ difference
    exact = np.mean(np.abs(flips) >= abs(difference.sum()) * (1 - 1e-9))
    found = compare({'x': one}, {'x': other})['per_task']['x']['p']
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000) + 1e-4)


def test_a_real_difference_is_found_and_none_is_not_invented(two):
  one, other = two
  assert compare({'x': one}, {'x': other})['p'] < 0.05
  same = compare({'x': one}, {'x': one})
  assert (same['difference'], same['stderr'], same['p']) == (0.0, 0.0, 1.0)
  # With no difference at work, p below 0.05 comes up once in twenty times.
  rng = np.random.default_rng(3)
  draws = [
    compare({'x': solved(rng.integers(0, 2, 40))}, {'x': solved(rng.integers(0, 2, 40))})['p']
    for _ in range(200)
  ]
  assert 0 < np.mean(np.array(draws) < 0.05) < 0.1


def test_the_better_model_is_below_in_every_unit(two):
  right, wrong = solved([1, 1, 1, 0]), solved([0, 1, 0, 0])
  found = compare({'x': right, 'y': two[1]}, {'x': wrong, 'y': two[0]})
  assert found['per_task']['x']['difference'] == -0.5
  assert found['per_task']['y']['difference'] < 0
  each = [task['difference'] for task in found['per_task'].values()]
  assert found['difference'] == pytest.approx(sum(each) / 2)
  errors = [task['stderr'] for task in found['per_task'].values()]
  assert found['stderr'] == pytest.approx(math.hypot(*errors) / 2)
  assert loss(right.summary()) == right.loss == 0.25 and two[0].loss == two[0].value


def test_other_examples_are_refused(two):
  with pytest.raises(ValueError, match='x: the two scores are of other examples'):
    compare({'x': two[0]}, {'x': Score(two[1].values[:-1], two[1].sizes[:-1])})


def test_many_examples_take_little_memory():
  rng = np.random.default_rng(4)
  one, other = (solved(rng.random(15_000) < share) for share in (0.5, 0.52))
  assert compare({'x': one}, {'x': other})['p'] < 0.01


def test_what_is_written_is_read_again(two):
  broken = Score(np.array([1.0, np.nan]), np.ones(2), 'accuracy', truncated=1, tokens=9)
  for score in (*two, solved([1, 0, 1]), broken):
    text = json.dumps([score.summary(), score.per_example()], allow_nan=False)
    again = from_summary(*json.loads(text))
    np.testing.assert_array_equal(again.values, score.values)
    np.testing.assert_array_equal(again.sizes, score.sizes)
    assert again.summary() == score.summary()
  assert broken.summary()['value'] is None and math.isnan(broken.loss)
  assert solved([1]).summary()['stderr'] is None


def test_scores_for_people(two):
  assert shown(solved([1, 1, 0, 0]).summary()) == '50.0% ± 28.9'
  assert (
    shown(Score(np.array([4.0, 6.0]), np.full(2, 4.0)).summary()) == '1.2500 ± 0.2500 bits/byte'
  )
  assert shown(solved([1]).summary()) == '100.0%'
  assert shown(solved([math.nan, 1]).summary()) == 'not finite'


# Parts.


def test_every_example_is_in_one_part():
  for count, n in ((1, 1), (7, 1), (7, 3), (7, 7), (8, 4)):
    parts = [places(count, (i, n)) for i in range(n)]
    assert sorted(np.concatenate(parts)) == [*range(count)] and all(map(len, parts))
    for m in range(n + 1):
      first = np.concatenate([np.zeros(0, int), *parts[:m]])
      np.testing.assert_array_equal(np.flatnonzero(seen(count, m, n)), np.sort(first))
  for part in ((0, 8), (3, 3), (-1, 3), (0, 0)):
    with pytest.raises(ValueError, match='there is no part'):
      places(7, part)


@pytest.mark.parametrize('unit', ['bits/byte', 'accuracy'])
def test_estimates_cover_the_value_of_all_examples(unit):
  rng, count, m, n = np.random.default_rng(5), 240, 2, 8
  errors, within = [], []
  for _ in range(1000):
    if unit == 'accuracy':
      ability = rng.normal(0, 2, count)
      rival, whole = (solved(ability + rng.normal(shift, 1, count) > 0) for shift in (0, 0.2))
    else:
      sizes = rng.integers(50, 200, count).astype(np.float64)
      bits = sizes * (1 + 0.3 * rng.standard_normal(count))
      rival = Score(bits, sizes)
      whole = Score(bits - sizes * (0.02 + 0.05 * rng.standard_normal(count)), sizes)
    mask = seen(count, m, n)
    partial = Score(whole.values[mask], whole.sizes[mask], unit)
    value, error = estimate(partial, rival, m, n)
    errors.append(value - whole.value)
    within.append(abs(value - whole.value) <= 2 * error)
    apart, same = difference(partial, rival, m, n)
    assert rival.loss + apart == pytest.approx(value if unit == 'bits/byte' else 1 - value)
    assert same == error
  assert abs(np.mean(errors)) < 3 * np.std(errors) / math.sqrt(len(errors))
  assert 0.935 < np.mean(within) < 0.97


def test_nothing_is_left_to_guess_of_a_candidate_that_was_scored_on_all(two):
  for one, other in (two, (solved([1, 0, 1]), solved([0, 0, 1])), (solved([1]), solved([0]))):
    for n in (1, len(one.values)):
      count = len(one.values)
      own = [places(count, (i, n)) for i in range(n)]
      parts = [Score(one.values[at], one.sizes[at], one.unit) for at in own]
      value, error = estimate(joined(parts, n, count), other, n, n)
      assert value == pytest.approx(one.value, rel=1e-12) and error == 0
      found = compare({'x': one}, {'x': other})['difference']
      assert difference(one, other, n, n) == (pytest.approx(found), 0)
  one, other = two
  with pytest.raises(ValueError, match='1 of 2 parts: the two scores are of other examples'):
    difference(Score(one.values[:2], np.full(2, 0.5)), other, 1, 2)


def test_few_answers_that_agree_prove_little():
  """Of answers of which one in ten is other than the rival's; texts of four sources in turns."""
  rng, count, n = np.random.default_rng(6), 64, 4
  within = {'accuracy': [], 'bits/byte': []}
  for _ in range(1000):
    changed = rng.random(count) < 0.1
    rival = solved(rng.random(count) < 0.5)
    answers = solved(np.where(changed, 1 - rival.values, rival.values))
    text = Score(1 + 0.3 * rng.standard_normal(count), np.ones(count))
    apart = np.tile(rng.standard_normal(4), count // 4) + 0.1 * rng.standard_normal(count)
    for one, other in ((answers, rival), (Score(text.values + apart, text.sizes), text)):
      own = places(count, (0, n))
      partial = Score(one.values[own], one.sizes[own], one.unit)
      value, error = estimate(partial, other, 1, n)
      within[one.unit].append(abs(value - one.value) <= 2 * error)
  assert all(np.mean(each) > 0.9 for each in within.values())


WORDS = 'the cat sat on a mat and some dates'.split()  # so few letters make one tokenizer


@pytest.fixture(scope='module')
def engine(small, tmp_path_factory):
  directory = tmp_path_factory.mktemp('tokenizer')
  write_tiny_tokenizer(directory, [' '.join(WORDS * 3)], small.vocab_size)
  tokenizer = Tokenizer.load(directory)
  return Engine(Model(small), tokenizer, context=32, batch_tokens=128, generate_rows=4)


def make_params(engine, seed):
  leaves = init_leaves(engine.model.config, seed)
  return from_leaves(engine.model, {n: jnp.asarray(a) * 8 for n, a in leaves.items()})


def make_task(kind: str, path: Path):
  """A task of 10 examples, of which one is too long for the context."""
  rng = np.random.default_rng(6)

  def write(name, count):
    rows = [
      {
        'text': ' '.join([name, str(i), *rng.choice(WORDS, 60 if i == 4 else 2 + i % 4)]),
        'choices': [' '.join(rng.choice(WORDS, 2)) for _ in range(2 + i % 3)],
        'label': int(rng.integers(2)),
      }
      for i in range(count)
    ]
    (path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return str(path / f'{name}.jsonl')

  test, dev = write('test', 10), write('dev', 1)
  if kind == 'bits':
    return BitsPerByte('x', Jsonl(dev), Jsonl(test), length=32, rows=10)
  data = Splits(Examples(test), Examples(dev))
  if kind in ('sum', 'length', 'calibrated'):
    return MultipleChoice('x', data, '{text}', score=kind)
  asked = {'data': data, 'prompt': '{text}', 'stops': (), 'max_new': 5}
  if kind == 'code':
    return CodeGeneration('x', **asked, program='{label}{text}{completion}', allow_execution=True)
  return Generation('x', **asked, target='text', sampling=Sampling(temperature=1.0))


@pytest.mark.parametrize('kind', ['bits', 'sum', 'length', 'calibrated', 'sampled', 'code'])
def test_parts_are_the_whole(engine, tmp_path, monkeypatch, compiled, kind):
  monkeypatch.setenv('OPTIMER_CACHE', str(tmp_path / 'cache'))
  # About half of what is written is right, whatever it is.
  odd = lambda _, *texts: zlib.crc32(''.join(texts).encode()) % 2
  monkeypatch.setattr(Generation, 'is_right', odd)
  monkeypatch.setattr(CodeGeneration, '_passes', odd)
  prepared = make_task(kind, tmp_path).prepare(engine, 'test')
  n = 3

  def scored(params):
    return prepared.score(params), [prepared.score(params, (i, n)) for i in range(n)]

  candidates = [make_params(engine, seed) for seed in (0, 1)]
  whole, parts = scored(candidates[0])
  assert [len(part.values) for part in parts] == [4, 3, 3] and len({*whole.values}) > 1
  check_parts(whole, parts)
  with pytest.raises(ValueError, match='there is no part 0 of 11 of 10 examples'):
    prepared.score(None, (0, 11))
  # Another candidate is neither planned nor compiled again.
  monkeypatch.setattr(tasks, 'plan', None)
  compiled.clear()
  other, parts = scored(candidates[1])
  assert not compiled and other.values.tolist() != whole.values.tolist()
  check_parts(other, parts)
  if kind != 'bits':
    assert whole.truncated == 1


def check_parts(whole: Score, parts: list[Score]) -> None:
  n, count = len(parts), len(whole.values)
  for m in range(1, n + 1):
    found, mask = joined(parts[:m], n, count), seen(count, m, n)
    np.testing.assert_array_equal(found.sizes, whole.sizes[mask])
    if whole.unit == 'accuracy':
      np.testing.assert_array_equal(found.values, whole.values[mask])
    else:
      np.testing.assert_allclose(found.values, whole.values[mask], rtol=1e-6)
    assert found.unit == whole.unit
  assert found.truncated == whole.truncated
  assert found.tokens == sum(part.tokens for part in parts)
