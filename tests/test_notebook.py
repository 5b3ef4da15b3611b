"""The notebook as it is written; tests/long/test_notebook.py executes it."""

import ast
import json

import notebook
import pytest


def cells(file):
  """(kind, source) of each, and nothing of how the file writes them."""
  return [(cell.cell_type, cell.source) for cell in notebook.read(file).cells]


def test_both_files_have_the_same_cells():
  assert cells(notebook.NOTEBOOK) == cells(notebook.SCRIPT)
  for file in (notebook.NOTEBOOK, notebook.SCRIPT):
    metadata = notebook.read(file).metadata
    assert metadata['jupytext']['formats'] == 'ipynb,py:percent'
    assert metadata['kernelspec']['name'] == 'python3'


def test_a_change_of_one_file_is_noticed(tmp_path):
  changed = tmp_path / 'quickstart.py'
  text = notebook.SCRIPT.read_text(encoding='utf-8')
  changed.write_text(text.replace('STEPS = 60', 'STEPS = 61'), encoding='utf-8')
  assert cells(changed) != cells(notebook.NOTEBOOK)


def test_no_output_is_kept():
  found = json.loads(notebook.NOTEBOOK.read_text(encoding='utf-8'))
  code = [cell for cell in found['cells'] if cell['cell_type'] == 'code']
  assert len(code) > 5
  assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in code)


def test_forms_can_be_read():
  found = notebook.fields()
  assert list(found) == [
    *('REPOSITORY', 'MODEL', 'FOLDER', 'OBJECTIVE', 'STEPS', 'TRIALS', 'DIRECTORY'),
    *('EXPORT_TO', 'HUB_NAME'),
  ]
  kinds = {'string': str, 'integer': int}
  for name, (text, kind) in found.items():
    value = ast.literal_eval(text)
    assert value in kind if isinstance(kind, list) else type(value) is kinds[kind['type']], name
  assert ast.literal_eval(found['EXPORT_TO'][0]) == 'nowhere'


MODELS, OBJECTIVES = (notebook.fields()[name][1] for name in ('MODEL', 'OBJECTIVE'))


@pytest.mark.parametrize('model', MODELS)
def test_each_choice_of_a_model_describes_a_run(model, tmp_path):
  for language in ('ja', 'zh'):
    (tmp_path / language).mkdir()
    for split in ('train', 'dev'):
      (tmp_path / language / f'{split}.jsonl').write_text('{"text": "a text"}\n')
  names = {name: ast.literal_eval(text) for name, (text, _) in notebook.fields().items()}
  names |= {'MODEL': model, 'DIRECTORY': "it's here", 'STEPS': 70, 'TRIALS': 5}
  exec(notebook.code('def described('), names)
  for folder, datasets in (('', ('north', 'east', 'south', 'west')), (str(tmp_path), ('ja', 'zh'))):
    names['FOLDER'] = folder
    for objective in OBJECTIVES:
      run = names['described'](objective, 4)
      assert run.names == datasets and run.directory == "it's here"
      assert {'tiny': 'random:', '270m': 'package:', '1b': 'google/gemma-3-1b'}[model] in run.base
      assert (run.training.steps, run.training.warmup) == (70, 7)
      assert (run.study.trials, run.study.name, run.dtype) == (4, objective, 'float32')
      assert run.trim_vocabulary and run.length <= 512
      assert (run.study.objective.kind, run.study.objective.scale) == (objective, 'base')
