"""The verb `evaluate`: any model, any task, what is kept of it, and what people get wrong."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_run import make_run

from optimer_jax import cli, pipeline
from optimer_jax.data.datasets import synthetic
from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluate import compare, evaluate, looks
from optimer_jax.evaluation.examples import Examples
from optimer_jax.evaluation.splits import Splits
from optimer_jax.evaluation.tasks import MultipleChoice
from optimer_jax.files import read_json, read_jsonl, write_text
from optimer_jax.search.objectives import Objective
from optimer_jax.search.study import StudyConfig

FIRST = {
  'base': 'base',
  'cpt-north': 'cpt-north',
  'average': 'north=0.5,east=0.5',
  'exported': 'export/optimer',
}


def write_rows(path: Path, rows: list[dict]) -> str:
  write_text(path, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
  return str(path)


def questions(run, count: int = 24) -> list[dict]:
  """How a text of the first language goes on, and how it does not."""
  texts = [document.text.split() for document in run.datasets[0].dev.documents()][:count]
  rows = []
  for i, words in enumerate(texts):
    ends = [' '.join(words[8:12]), ' '.join(reversed(texts[i - 1][20:24]))]
    rows.append({'q': ' '.join(words[:8]), 'choices': ends[:: 1 - 2 * (i % 2)], 'label': i % 2})
  return rows


def choice(run, path: Path, name: str = 'ends', **changes) -> MultipleChoice:
  data = Splits(Examples(write_rows(path, questions(run))), dev_count=10)
  return dataclasses.replace(MultipleChoice(name, data, '{q}'), **changes)


@pytest.fixture(scope='module')
def scored(done, tmp_path_factory):
  """The finished run, to be scored in a place of its own."""
  run = make_run(tmp_path_factory.mktemp('evaluate') / 'run', cache=done.cache)
  # Others may be adding merges and exports of theirs.
  for part in (
    'base',
    'cpt',
    'vectors',
    'studies',
    'merged/optimer',
    'export/optimer',
    'evaluations',
  ):
    shutil.copytree(done.path / part, run.path / part)
  return run


def values(found: dict, task: str) -> np.ndarray:
  return np.array(found['per_example'][task]['values'])


def test_what_was_scored_is_kept_and_not_scored_again(done, scored):
  again = evaluate(scored)
  assert not (scored.path / 'costs.jsonl').exists()
  names = ['base', 'cpt-north', 'cpt-east', 'average', 'optimer', 'exported']
  assert [*again] == names
  for name in names:
    kept = read_json(done.path / 'evaluations' / f'{name}.json')
    assert again[name] == kept
    assert kept['mean'] == pytest.approx(np.mean([s['value'] for s in kept['scores'].values()]))
    for task, score in kept['scores'].items():
      each = kept['per_example'][task]
      assert score['count'] == len(each['values']) == len(each['sizes']) == 6
      assert score['value'] == pytest.approx(sum(each['values']) / sum(each['sizes']))
  rows = read_jsonl(done.path / 'evaluations' / 'test_looks.jsonl')
  assert [row['model'] for row in rows] == names
  assert looks(done) == {'north': 6, 'east': 6}
  pairs = read_json(done.path / 'evaluations' / 'comparisons.json')
  assert {(pair['a'], pair['b']) for pair in pairs} == {
    ('optimer', other) for other in names if other != 'optimer'
  }


def test_one_model_by_any_of_its_names(done, scored):
  """Merged in memory, read from an artifact or from its export: the same scores."""
  asked = ['north=1', 'cpt/north', 'merged/optimer', 'export/optimer', 'studies/default']
  asked.append('snapshots/north/6')
  with pytest.raises(UserError, match='snapshots/north/6 is missing'):
    evaluate(scored, asked)
  found = evaluate(scored, asked[:-1])
  names = ['north=1', 'cpt-north', 'merged-optimer', 'export-optimer', 'studies-default']
  assert [*found] == names
  standard = {name: read_json(done.path / f'evaluations/{name}.json') for name in FIRST}
  standard['optimer'] = read_json(done.path / 'evaluations/optimer.json')
  for name, same, tolerance in [
    ('north=1', 'cpt-north', 0),
    ('cpt-north', 'cpt-north', 1e-3),  # the vector is rounded to bfloat16
    ('merged-optimer', 'optimer', 1e-6),
    ('export-optimer', 'exported', 0),
    ('studies-default', 'optimer', 0),
  ]:
    for task in scored.names:
      expected = values(standard[same], task)
      np.testing.assert_allclose(values(found[name], task), expected, rtol=tolerance)
  assert found['north=1']['weights'] == {'north': 1.0, 'east': 0.0}


def test_what_is_watched_is_scored_and_does_not_count(scored):
  watched = dataclasses.replace(scored, watched=(synthetic('west'),))
  for weights, counted in {(): ('north', 'east', 'west'), ('west',): ('north', 'east')}.items():
    study = StudyConfig(objective=Objective(weights=dict.fromkeys(weights, 0.0)))
    (found,) = evaluate(dataclasses.replace(watched, study=study), ['base']).values()
    assert [*found['scores']] == ['north', 'east', 'west']
    assert found['mean'] == np.mean([found['scores'][task]['value'] for task in counted])
  with pytest.raises(UsageError, match="two tasks are called 'east'"):
    dataclasses.replace(scored, watched=(synthetic('east'),))


def test_tasks_are_added_and_only_they_are_scored(scored, tmp_path):
  task = choice(scored, tmp_path / 'ends.jsonl')
  run = dataclasses.replace(scored, test_tasks=(task,))
  before = looks(run)
  first = evaluate(run, ['base', 'cpt-east'])
  rows = read_jsonl(run.path / 'evaluations' / 'test_looks.jsonl')
  assert [list(row['tasks']) for row in rows[-2:]] == [['ends'], ['ends']]
  assert looks(run) == before | {'ends': 2}
  score = first['base']['scores']['ends']
  assert score['unit'] == 'accuracy' and score['count'] == 14
  # A task that no search sees is no part of the mean, and is kept when it is not asked for.
  text = [first['base']['scores'][name]['value'] for name in run.names]
  assert first['base']['mean'] == pytest.approx(np.mean(text))
  assert evaluate(scored, ['base'])['base'] == first['base']
  pair = compare(run, 'base', 'cpt-east')
  assert set(pair['per_task']) == {'north', 'east', 'ends'}
  each = [pair['per_task'][name]['difference'] for name in pair['per_task']]
  assert pair['difference'] == pytest.approx(np.mean(each))
  # Other data of a task of that name: scored again.
  changed = dataclasses.replace(run, test_tasks=(dataclasses.replace(task, score='length'),))
  second = evaluate(changed, ['base'])
  assert second['base']['tasks']['ends'] != first['base']['tasks']['ends']
  with pytest.raises(UserError, match='base and exported were scored on no task in common'):
    alone = dataclasses.replace(changed, datasets=(), vectors={})
    other = read_json(run.path / 'evaluations' / 'exported.json')
    write_text(run.path / 'evaluations' / 'exported.json', json.dumps(other | {'tasks': {}}))
    compare(alone, 'base', 'exported')


def test_a_search_over_likelihoods_and_choices(done, tmp_path):
  run = make_run(tmp_path / 'run', cache=done.cache)
  for part in ('base', 'cpt', 'vectors'):
    shutil.copytree(done.path / part, run.path / part)
  data = tmp_path / 'ends.jsonl'
  run = dataclasses.replace(run, tasks=(choice(run, data),))
  best = pipeline.search(run)
  rows = read_jsonl(run.path / 'studies' / 'default' / 'trials.jsonl')
  kept = read_jsonl(run.path / 'studies' / 'default' / 'examples.jsonl')
  assert [row['trial'] for row in kept] == [1, 2, 3, 4]
  for row, examples in zip(rows, kept, strict=True):
    assert {task: s['unit'] for task, s in row['scores'].items()} == {
      'north': 'bits/byte',
      'east': 'bits/byte',
      'ends': 'accuracy',
    }
    losses = [row['scores'][name]['value'] for name in run.names]
    losses.append(1 - row['scores']['ends']['value'])
    assert row['objective'] == pytest.approx(np.mean(losses))
    assert len(examples['per_example']['ends']['values']) == 10
  assert pipeline.search(run) == best
  # Its file changes under the study.
  data.write_text(data.read_text().replace('"q": "', '"q": "x'))
  with pytest.raises(UserError, match='development data of ends are not those of trial 1 in'):
    pipeline.search(run)
  assert read_jsonl(run.path / 'studies' / 'default' / 'trials.jsonl') == rows


@pytest.mark.parametrize(
  ('model', 'kind', 'sentence'),
  [
    ('nort=1', UsageError, "no vector 'nort': there are north, east"),
    ('north=a', UsageError, "'north=a' cannot be read: write it as in ja=0.3,zh=0.2"),
    ('vectors/north', UsageError, 'is a vector: give it a weight, as in north=0.5'),
    ('./nowhere', UserError, 'nowhere is missing: give a directory'),
  ],
)
def test_models_that_are_none(scored, model, kind, sentence):
  with pytest.raises(kind, match=sentence):
    evaluate(scored, [model])


# The command line, on a checkpoint without a run.


TASK = """
from __gin__ import dynamic_registration
from optimer_jax.evaluation import examples
from optimer_jax.evaluation import splits
from optimer_jax.evaluation import tasks

mine/examples.Examples.path = 'mine.jsonl'
mine/splits.Splits.test = @mine/examples.Examples()
mine/splits.Splits.dev_count = 10
mine/tasks.MultipleChoice.name = 'mine'
mine/tasks.MultipleChoice.data = @mine/splits.Splits()
mine/tasks.MultipleChoice.prompt = '{q}'
mine = @mine/tasks.MultipleChoice()
"""


@pytest.fixture
def folder(done, tmp_path, monkeypatch) -> Path:
  """A current folder with a task file of one's own."""
  monkeypatch.chdir(tmp_path)
  write_text(tmp_path / 'tasks' / 'mine.gin', TASK)
  write_rows(tmp_path / 'mine.jsonl', questions(done))
  return tmp_path


def call(capsys, *arguments: str) -> tuple[int, str, str]:
  try:
    cli.main(['evaluate', *arguments])
    code = 0
  except SystemExit as stop:
    code = stop.code
  printed = capsys.readouterr()
  return code, printed.out, printed.err


def test_a_checkpoint_without_a_run(done, folder, capsys):
  shutil.copytree(done.path / 'export' / 'optimer', folder / 'model')
  code, out, err = call(capsys, '--model=model', '--tasks=mine')
  assert code == 0, err
  found = read_json(folder / 'runs' / 'model' / 'evaluations' / 'model.json')
  assert found['scores']['mine']['count'] == 14
  assert 'mine: 14 test examples, which 1 model were' in out
  assert f'{found["scores"]["mine"]["value"]:.1%}' in out
  assert 'runs/model/evaluations' in out.splitlines()[-1]


def test_two_models_in_pairs(done, folder, capsys):
  directory = folder / 'run'
  for part in ('base', 'vectors'):
    shutil.copytree(done.path / part, directory / part)
  run = [
    '--gin_file=runs/quickstart_tiny.gin',
    f"--gin.DIRECTORY='{directory}'",
    "--gin.north/datasets.synthetic.name='north'",
    '--gin.Run.datasets=(@north/datasets.synthetic(), @east/datasets.synthetic())',
    '--gin.EvalConfig.text=False',
    '--tasks=mine',
  ]
  code, out, err = call(capsys, *run, '--compare', 'north=1', 'base')
  assert code == 0, err
  assert 'north=1 - base, losses: below 0, north=1 is better' in out
  (pair,) = read_json(directory / 'evaluations' / 'comparisons.json')
  assert f'{pair["difference"]:+.4f} ± {pair["stderr"]:.4f}  p = {pair["p"]:.4f}' in out

  # What the objective does not count is compared, and is not in the mean.
  run[4:] = ["--gin.Objective.weights={'east': 0.0}"]
  code, out, err = call(capsys, *run, '--compare', 'north=1', 'base')
  assert code == 0, err
  (pair,) = read_json(directory / 'evaluations' / 'comparisons.json')
  assert {*pair['per_task']} == {'north', 'east', 'mine'}
  assert pair['difference'] == pair['per_task']['north']['difference']


def change(folder: Path, old: str, new: str) -> None:
  file = folder / 'tasks' / 'mine.gin'
  text = file.read_text()
  assert old in text
  file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
  ('old', 'new', 'code', 'sentence'),
  [
    ('MultipleChoice.prompt =', 'MultipleChoice.promt =', 2, 'did you mean prompt?'),
    ("prompt = '{q}'", "prompt = '{q'", 2, r'MultipleChoice.prompt is malformed \('),
    ("prompt = '{q}'", "prompt = '{question}'", 1, 'mine.jsonl:1 has no key "question"'),
    ("prompt = '{q}'", 'prompt = (', 2, 'in the tasks mine'),
    ('dev_count = 10', 'dev_count = 30', 1, 'no example is left for test of 24: lower Splits.dev'),
    ('dev_count = 10', 'dev_count = 0', 2, 'Splits.dev_count is 0: give a number of 1'),
    ("'mine.jsonl'", "'gone.jsonl'", 1, 'no file matches gone.jsonl: check the path'),
    ('mine = @mine', 'yours = @mine', 2, 'the macro mine has no value'),
  ],
)
def test_mistakes_in_a_task_file(done, folder, capsys, old, new, code, sentence):
  change(folder, old, new)
  model = f'--model={done.path / "export" / "optimer"}'
  found, _, err = call(capsys, model, '--tasks=mine')
  last = err.splitlines()[-1]
  assert found == code and last.startswith('optimer evaluate: ') and re.search(sentence, last), err
  assert not [*folder.rglob('evaluations/*')]


@pytest.mark.parametrize(
  ('content', 'sentence'),
  [
    ('', 'mine.jsonl holds no examples: it is empty'),
    ('{"q": "a", "choices": ["b", "c"], "label": "0"\n', 'mine.jsonl:1 is not JSON'),
    ('{"q": "a", "choices": ["b"], "label": 0}\n', 'is not a list of 2 to 26 options'),
  ],
)
def test_mistakes_in_a_task_s_data(done, folder, capsys, content, sentence):
  (folder / 'mine.jsonl').write_text(content)
  model = f'--model={done.path / "export" / "optimer"}'
  code, _, err = call(capsys, model, '--tasks=mine')
  assert code == 1 and sentence in err.splitlines()[-1], err


def test_an_answer_out_of_range(done, folder, capsys):
  rows = questions(done)
  for row in rows:
    row['label'] += 1
  write_rows(folder / 'mine.jsonl', rows)
  model = f'--model={done.path / "export" / "optimer"}'
  code, _, err = call(capsys, model, '--tasks=mine')
  pattern = r'mine\.jsonl:\d+, key "label", is 2, not one of 0 to 1: mend the row'
  assert code == 1 and re.search(pattern, err.splitlines()[-1]), err


def test_long_prompts_are_cut_counted_and_reported(done, folder, capsys):
  rows = questions(done)
  for row in rows[::3]:
    row['q'] = f'{row["q"]} ' * 20
  write_rows(folder / 'mine.jsonl', rows)
  model = f'--model={done.path / "export" / "optimer"}'
  options = [model, '--tasks=mine', '--gin.Run.evaluation=@EvalConfig()']
  code, out, err = call(capsys, *options, '--gin.EvalConfig.context=64')
  assert code == 0, err
  (file,) = folder.rglob('evaluations/*optimer.json')
  truncated = read_json(file)['scores']['mine']['truncated']
  assert 0 < truncated <= 8
  assert f'{truncated} prompts truncated' in out and f'{truncated} prompts truncated' in err


def test_a_run_or_a_model_is_needed(folder, capsys):
  code, _, err = call(capsys, '--tasks=mine')
  assert code == 2 and 'give a run with --gin_file, or the one --model to score without' in err
