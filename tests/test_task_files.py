"""Every file of gin/tasks, on a folder with the columns that its set has on the hub."""

from pathlib import Path

import pytest
from small_tasks import contexts, listening_engine, spread_params, write_rows

import gin
from optimer_jax.evaluation.answers import CodeGeneration, Generation
from optimer_jax.evaluation.examples import Examples
from optimer_jax.evaluation.splits import Splits
from optimer_jax.evaluation.tasks import BitsPerByte, MultipleChoice


@pytest.fixture(scope='module')
def engine(small, tmp_path_factory):
  return listening_engine(small, tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def params(small):
  return spread_params(small)


LETTERED = {'A': 'x', 'B': 'y', 'C': 'z', 'D': 'w'}
ARC = {'choices': {'text': ['x', 'y', 'z'], 'label': ['1', '2', '3']}, 'answerKey': '2'}
MGSM = {'answer': None, 'answer_number': 18, 'equation_solution': None}
SOLVED = {'answer': 'Answer: 7', 'answer_number': 7, 'equation_solution': '7'}
CODE = {'prompt': 'def f(x):\n', 'test': 'def check(f):\n  pass', 'entry_point': 'f'}
PROGRAM = {'code': 'x = 1', 'test_list': ['assert 1', 'assert 2'], 'test_setup_code': ''}
FILES = {
  # name: (config, column that differs, other columns, split of what is tested, of dev, of shots)
  'mmlu': ('all', 'question', {'choices': ['x', 'y', 'z', 'w'], 'answer': 3, 'subject': 'law'},
           'test', 'validation', 'dev'),
  'gsm8k': ('main', 'question', {'answer': 'six\n#### 1,006'}, 'test', None, 'train'),
  'mgsm_en': ('en', 'question', MGSM, 'test', None, ('train', SOLVED)),
  'mgsm_ja': ('ja', 'question', MGSM, 'test', None, ('train', SOLVED)),
  'mgsm_zh': ('zh', 'question', MGSM, 'test', None, ('train', SOLVED)),
  'jcommonsenseqa': (None, 'question', {f'choice{i}': f'選{i}' for i in range(5)} | {'label': 4},
                     'validation', None, 'train'),
  'jmmlu': ('law', 'question', LETTERED | {'answer': 'C'}, 'test', None, None),
  'ceval': ('law', 'question', LETTERED | {'answer': 'C', 'id': 1}, 'val', None, 'dev'),
  'cmmlu': ('law', 'Question', LETTERED | {'Answer': 'C'}, 'test', None, 'dev'),
  'humaneval': (None, 'task_id', CODE, 'test', None, None),
  'mbpp': ('full', 'text', PROGRAM, 'test', 'validation', 'prompt'),
  'arc_easy': ('ARC-Easy', 'question', ARC, 'test', 'validation', 'train'),
  'arc_challenge': ('ARC-Challenge', 'question', ARC, 'test', 'validation', 'train'),
}  # fmt: skip
KINDS = (MultipleChoice, Generation, CodeGeneration, BitsPerByte, Splits, Examples)
GIN = Path(__file__).parent.parent / 'gin' / 'tasks'


def hold(value=None):
  return value


def from_gin(name, *bindings):
  """The task that gin/tasks/NAME.gin describes."""
  gin.clear_config()
  for kind in KINDS:
    gin.external_configurable(kind, module=kind.__module__)
  gin.external_configurable(hold, module='held')
  gin.parse_config_file(str(GIN / f'{name}.gin'))
  gin.parse_config([*bindings, f'held.hold.value = %{name}'])
  try:
    return gin.get_configurable('held.hold')()
  finally:
    gin.clear_config()


def write_set(root, name, count):
  import pyarrow as pa
  import pyarrow.parquet

  config, varied, columns, test, dev, shots = FILES[name]
  shots, solved = shots if isinstance(shots, tuple) else (shots, columns)
  for split, others in ((test, columns), (dev, columns), (shots, solved)):
    if split is None:
      continue
    rows = [{varied: f'the cat {split} {n}', **others} for n in range(count)]
    if name == 'humaneval':
      rows = [{**row, 'prompt': f'# {row["task_id"]}\n{row["prompt"]}'} for row in rows]
    path = root / (config or 'data') / f'{split}-00000-of-00001.parquet'
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def test_every_gin_file_is_tried_here():
  assert sorted(FILES) == sorted(path.stem for path in GIN.glob('*.gin'))


@pytest.mark.parametrize('name', FILES)
def test_gin_files(engine, params, tmp_path, name):
  write_set(tmp_path, name, 3)
  kind = type_of(name)
  bindings = [f"{name.upper()} = '{tmp_path}'", f'{name}/Splits.dev_count = 2']
  if name not in ('arc_easy', 'humaneval'):
    bindings.append(f'{name}/{kind}.shots = 1')
  if kind != 'MultipleChoice':
    bindings.append(f'{name}/{kind}.max_new = 3')
  if kind == 'CodeGeneration':
    with pytest.raises(Exception, match='allow_execution = True'):
      from_gin(name, *bindings)
    bindings.append(f'{name}/CodeGeneration.allow_execution = True')
  task = from_gin(name, *bindings)
  assert task.name == name
  divided, own = FILES[name][4] is None, FILES[name][5] is None
  shown = 1 if own and name != 'humaneval' else 0
  for split, count in (('dev', 2 - shown), ('test', 1 if divided else 3)):
    (prompt, *_) = contexts(task, engine, split)
    assert 'the cat' in prompt and prompt == prompt.strip(' ')
    prepared = task.prepare(engine, split)
    assert prepared.count == count
  score = prepared.score(params)
  assert len(score.values) == count
  assert set(score.values) <= {0.0, 1.0} and score.truncated == 0


def type_of(name):
  if name in ('humaneval', 'mbpp'):
    return 'CodeGeneration'
  return 'Generation' if name in ('gsm8k', 'mgsm_en', 'mgsm_ja', 'mgsm_zh') else 'MultipleChoice'


def test_gin_files_take_one_local_file(engine, tmp_path):
  rows = [{'question': f'{n} cats', 'answer': f'so\n#### {n}'} for n in range(12)]
  path = write_rows(tmp_path / 'gsm8k.jsonl', rows)
  task = from_gin('gsm8k', f"GSM8K = '{path}'", 'gsm8k/Splits.dev_count = 8')
  assert task.prepare(engine, 'dev').count == 3
  assert task.prepare(engine, 'test').count == 4
  assert contexts(task, engine)[0].count('Question:') == 6
  rows = [{'question': f'{n} 匹', 'target': str(n)} for n in range(12)]
  path = write_rows(tmp_path / 'mgsm.jsonl', rows)
  task = from_gin(
    'mgsm_ja',
    f"MGSM_JA = '{path}'",
    "mgsm_ja/Generation.target = 'target'",
    r"mgsm_ja/Generation.shot = '問題：{question}\nステップごとの答え：答えは{target}です。'",
    'mgsm_ja/Splits.dev_count = 9',
  )
  (prompt, *_) = contexts(task, engine)
  assert prompt.endswith('匹\nステップごとの答え：') and prompt.count('答えは') == 8
  rows = [{'question': f'{n}?', 'choices': ['a', 'b'], 'label': 1} for n in range(12)]
  path = write_rows(tmp_path / 'jcq.jsonl', rows)
  task = from_gin(
    'jcommonsenseqa',
    f"JCOMMONSENSEQA = '{path}'",
    "jcommonsenseqa/MultipleChoice.options = 'choices'",
    'jcommonsenseqa/Splits.dev_count = 5',
  )
  assert task.prepare(engine, 'dev').count == 2
  (prompt, *_) = contexts(task, engine)
  assert prompt.startswith('質問：') and prompt.count('答え：b\n\n') == 3


def test_gin_files_take_one_csv_a_subject(engine, tmp_path):
  for folder in ('test', 'dev'):
    for subject in ('law', 'art'):
      (tmp_path / folder).mkdir(exist_ok=True)
      rows = [f'{n},{folder} {subject} {n}?,w,x,y,z,C' for n in range(6)]
      text = '\n'.join([',Question,A,B,C,D,Answer', *rows])
      (tmp_path / folder / f'{subject}.csv').write_text(text)
  task = from_gin('cmmlu', f"CMMLU = '{tmp_path}'", 'cmmlu/Splits.dev_count = 4')
  assert task.prepare(engine, 'dev').count == 4
  assert task.prepare(engine, 'test').count == 8
  for prompt in contexts(task, engine):
    (subject,) = {'law', 'art'} & set(prompt.split())
    assert prompt.count(f'dev {subject}') == 5 and prompt.count('答案：C\n') == 5
  (tmp_path / 'j').mkdir()
  for subject in ('law', 'art'):
    rows = [f'{subject} {n}?,w,x,y,z,C' for n in range(12)]
    (tmp_path / 'j' / f'{subject}.csv').write_text('\n'.join(rows))
  task = from_gin('jmmlu', f"JMMLU = '{tmp_path}/j/*.csv'", 'jmmlu/Splits.dev_count = 18')
  assert task.prepare(engine, 'test').count == 6
  assert task.prepare(engine, 'dev').count == 8
