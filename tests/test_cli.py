"""The command line as a person meets it: help, exit codes, one sentence for each mistake."""

import os
import re
import subprocess
import sys

import pytest

from optimer_jax import cli, pipeline
from optimer_jax.errors import UserError

TINY = '--gin_file=runs/quickstart_tiny.gin'


def run(capsys, *arguments):
  """Exit code and what was printed to stderr."""
  with pytest.raises(SystemExit) as stop:
    cli.main(list(arguments))
  return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize('verb', cli.VERBS)
def test_help_says_what_is_read_written_and_costs(verb, capsys):
  with pytest.raises(SystemExit) as stop:
    cli.main([verb, '--help'])
  out = capsys.readouterr().out
  assert stop.value.code == 0
  assert 'Reads' in out or verb in ('evaluate', 'report')
  assert 'Writes' in out and 'Costs' in out and '--gin_file' in out


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['--gin_file=runs/quikstart.gin'], 'no gin file runs/quikstart.gin; did you mean runs/qui'),
    ([TINY, '--gin.TrainConfg.steps=3'], "'TrainConfg' in the binding .*; did you mean TrainConf"),
    ([TINY, '--gin.TrainConfig.stps=3'], "no parameter 'stps' in the binding .* mean steps?"),
    ([TINY, '--gin.STEP=3'], "no macro is called 'STEP'; did you mean STEPS?"),
    ([TINY, '--gin.STEPS=%NOPE'], 'the macro NOPE has no value'),
    ([TINY, '--gin.STEPS=x = ('], 'a value cannot be read in the binding'),
    ([TINY, "--gin.TrainConfig.seed='a'"], "TrainConfig.seed is 'a', but must be int"),
    ([TINY, '--gin.TrainConfig.clip=True'], 'TrainConfig.clip is True, but must be float'),
    ([TINY, '--gin.StudyConfig.trials=0.5'], 'StudyConfig.trials is 0.5, but must be int'),
    (['--gin_file=models/tiny.gin'], "'datasets', 'directory' must be bound"),
    ([TINY, '--unknown=3'], '--unknown=3 is not an option of optimer import'),
  ],
)
def test_usage_errors_are_one_sentence(capsys, arguments, sentence):
  code, err = run(capsys, 'import', *arguments)
  assert code == 2
  assert err.count('\n') == 1 and err.startswith('optimer import: ')
  pattern = sentence.replace('(', r'\(').replace('?', r'\?')
  assert re.search(pattern, err), err


def test_a_mistake_in_a_file_names_the_file(capsys, tmp_path):
  file = tmp_path / 'mine.gin'
  file.write_text("include 'runs/quickstart_tiny.gin'\nrun.Run.lenght = 3\n")
  code, err = run(capsys, 'train', f'--gin_file={file}')
  assert code == 2 and f'in {file}' in err and 'did you mean length?' in err


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['search'], 'base/manifest.json is missing'),
    (['merge', '--weights=north=1'], 'best.json|one weight for each of north, east, south, west'),
    (['train', '--dataset=nort'], "has no data set 'nort'; it has north, east, south, west"),
    (['import', "--gin.Run.base='/no/such'"], '/no/such is missing: give a directory'),
    (['import', "--gin.Run.base='random:huge'"], "'huge' is no size; the sizes are 270m, 1b"),
    (['import', "--gin.Run.base='package:no_such_package'"], 'no_such_package is not installed'),
    (['report'], 'missing|not a run|nothing'),
  ],
)
def test_failures_exit_1_and_write_nothing(capsys, tmp_path, arguments, sentence):
  directory = tmp_path / 'run'
  code, err = run(capsys, arguments[0], TINY, f"--gin.DIRECTORY='{directory}'", *arguments[1:])
  assert code == 1
  last = err.strip().splitlines()[-1]
  assert last.startswith(f'optimer {arguments[0]}: ')
  assert re.search(sentence, last), err
  left = {p.name for p in directory.rglob('*') if p.is_file()}
  assert left <= {'costs.jsonl', 'operative.gin'}, left


def test_debug_shows_the_traceback(tmp_path):
  with pytest.raises(UserError):
    cli.main(['search', TINY, f"--gin.DIRECTORY='{tmp_path}'", '--debug'])


def test_unknown_weights_are_usage(capsys):
  code, err = run(capsys, 'merge', TINY, '--weights=north')
  assert code == 2 and 'write it as in ja=0.3,zh=0.2' in err


def test_module_and_script_are_one_command_and_light():
  """--help loads no JAX: it answers at once."""
  code = 'import sys; sys.argv = ["optimer", "--help"]\n'
  code += 'import runpy\ntry: runpy.run_module("optimer_jax", run_name="__main__")\n'
  code += 'except SystemExit as e: print(e.code, "jax" in sys.modules)'
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.splitlines()[-1] == '0 False'
  assert all(verb in out.stdout for verb in cli.VERBS)


def test_interrupt_says_how_to_go_on(capsys, monkeypatch, tmp_path):
  def stop(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(pipeline, 'search', stop)
  code, err = run(capsys, 'search', TINY, f"--gin.DIRECTORY='{tmp_path}'")
  assert code == 1 and 'the same command goes on from here' in err


def test_what_is_told_to_stop_says_how_to_go_on():
  code = (
    'import os, signal, time; from optimer_jax import cli; '
    'cli._run = lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)); '
    "cli.main(['search'])"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 75
  assert done.stderr == 'optimer search: stopped; the same command goes on from here\n'


def test_found_from_any_folder(tmp_path):
  (tmp_path / 'data').mkdir()  # a folder named as one of ours must not come between
  environment = {**os.environ, 'PYTHONPATH': ''}
  out = subprocess.run(
    [sys.executable, '-m', 'optimer_jax', 'search', TINY, f"--gin.DIRECTORY='{tmp_path}/r'"],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert out.returncode == 1 and 'base/manifest.json is missing' in out.stderr
