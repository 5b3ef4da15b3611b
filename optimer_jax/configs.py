"""gin at the edge: finds the files, reads them, and says what is wrong with them in one sentence.

Library code knows nothing of gin; what can be configured is listed here.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import gin
from optimer_jax import run as runs
from optimer_jax.data import datasets, sources
from optimer_jax.errors import UsageError
from optimer_jax.evaluation import answers, examples, generation, harness, splits, tasks
from optimer_jax.merging import candidates, weighted_sum
from optimer_jax.parallel import sharding
from optimer_jax.search import objectives, study
from optimer_jax.training import train

CONFIGURABLE = {
  'optimer_jax.run': (runs.Run, runs.Baselines, runs.EvalConfig),
  'optimer_jax.data.datasets': (
    datasets.Dataset,
    datasets.from_folder,
    datasets.from_jsonl,
    datasets.from_recipe,
    datasets.synthetic,
  ),
  'optimer_jax.data.sources': (
    sources.ArrayRecord,
    sources.Hub,
    sources.Jsonl,
    sources.Parquet,
    sources.TextFiles,
  ),
  'optimer_jax.evaluation.answers': (answers.CodeGeneration, answers.Generation),
  'optimer_jax.evaluation.examples': (examples.Examples,),
  'optimer_jax.evaluation.generation': (generation.Sampling,),
  'optimer_jax.evaluation.harness': (harness.HarnessTask,),
  'optimer_jax.evaluation.splits': (splits.Splits,),
  'optimer_jax.evaluation.tasks': (tasks.BitsPerByte, tasks.MultipleChoice),
  'optimer_jax.merging.candidates': (candidates.MergeConfig,),
  'optimer_jax.merging.weighted_sum': (weighted_sum.Groups,),
  'optimer_jax.parallel.sharding': (sharding.MeshConfig,),
  'optimer_jax.search.objectives': (objectives.Objective,),
  'optimer_jax.search.study': (study.StudyConfig,),
  'optimer_jax.training.train': (train.TrainConfig,),
}


def gin_search_paths() -> list[Path]:
  """The folders where a gin file's name is looked up, the current one first.

  `runs/quickstart.gin` is then found from any folder, and a file of one's own goes before ours.
  """
  package = Path(__file__).resolve().parent
  installed = package / 'gin_files'
  return [Path.cwd(), installed if installed.is_dir() else package.parent / 'gin']


def read_run(files: Sequence[str], bindings: Sequence[str], tasks: Sequence[str] = ()) -> runs.Run:
  """The run that gin files and bindings describe.

  Args:
    files: gin files, by a name that `gin_search_paths` knows or a path.
    bindings: as in a gin file; they come last.
    tasks: more to score on test: NAME of tasks/NAME.gin, or of one of lm-evaluation-harness.

  Raises:
    UsageError: a file is not found, or a name or value in a file or binding is wrong; the nearest
      known name is given.
  """
  gin.clear_config()
  for module, members in CONFIGURABLE.items():
    for member in members:
      # Known by these names in bindings, whether or not a file has mentioned them.
      gin.external_configurable(member, module=module)
  gin.external_configurable(asked_tasks, module='optimer_jax.configs')
  # gin's own readers take data/x.gin for a file of a Python package `data`, where there is one.
  gin.config._FILE_READERS[:] = [(_open, lambda file: _find(file) is not None)]
  for file in files:
    _check_file(file)
    _parse(lambda file=file: gin.parse_config_file(file), f'in {file}')
  if tasks:
    _parse(lambda: gin.parse_config(_asked(tasks)), f'in the tasks {", ".join(tasks)}')
  for binding in bindings:
    _check_macro(binding)
    _parse(lambda binding=binding: gin.parse_config(binding), f'in the binding {binding!r}')
  _parse(gin.finalize, 'in the gin configuration')
  run = _parse(gin.get_configurable(runs.Run), 'in the gin configuration')
  if tasks:
    asked = _parse(gin.get_configurable(asked_tasks), 'in the gin configuration')
    known = {*run.names, *(task.name for task in (*run.tasks, *run.test_tasks))}
    more = tuple(task for task in asked if task.name not in known)
    run = dataclasses.replace(run, test_tasks=(*run.test_tasks, *more))
  check_types(run)
  return dataclasses.replace(run, gin=gin.operative_config_str())


def asked_tasks(tasks: tuple = ()) -> tuple:
  """The tasks of the command line, which gin makes."""
  return tasks


def _asked(tasks: Sequence[str]) -> str:
  """gin that makes the tasks of these names."""
  lines, made = [], []
  for number, name in enumerate(dict.fromkeys(tasks)):
    if _find(f'tasks/{name}.gin'):
      lines.append(f"include 'tasks/{name}.gin'")
      made.append(f'%{name}')
    else:
      task = f'asked_{number}/harness.HarnessTask'
      lines += [f'{task}.{key} = {name!r}' for key in ('name', 'task')]
      lines.append(f'{task}.divide = False')
      made.append(f'@{task}()')
  return '\n'.join([*lines, f'configs.asked_tasks.tasks = ({"".join(f"{m}, " for m in made)})'])


def _parse(action, where: str):
  try:
    return action()
  except Exception as error:  # gin raises every kind there is, and wraps those of constructors
    raise UsageError(_explain(str(error), where)) from error


def _explain(message: str, where: str) -> str:
  """gin's message in one sentence, with the nearest name that it knows."""
  found = re.search(r"No configurable matching (?:reference )?'@?([^']+?)(?:\(\))?'", message)
  if found:
    name = found[1]
    return f'no configurable is called {name!r} {where}{nearest(name.split(".")[-1], _names())}'
  found = re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", message)
  if found:
    name, parameter = found[1].split('.')[-1], found[2]
    return f'{name} has no parameter {parameter!r} {where}{nearest(parameter, _fields(name))}'
  found = re.search(r"No bindings specified for '([^']+)/gin.macro'", message)
  if found:
    return f'the macro {found[1]} has no value {where}: bind it, as in {found[1]} = …'
  found = re.search(r'No values supplied by Gin or caller for arguments: \[(.*?)\]', message)
  if found:
    return f'{found[1]} must be bound {where}: give it a value'
  found = re.search(r'missing \d+ required positional arguments?: (.*)', message)
  if found:
    return f'{found[1].splitlines()[0]} must be bound {where}: give it a value'
  if 'malformed node' in message or 'Unable to parse' in message:
    return f'a value cannot be read {where}: write it as in Python, strings in quotes'
  line = next((line for line in message.splitlines() if line.strip()), 'something cannot be read')
  return f'{line.strip()} {where}'


def check_types(config) -> None:
  """UsageError if a field of a dataclass, or of those in it, is not as annotated."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      check_types(value)
    elif isinstance(value, tuple):
      for item in filter(dataclasses.is_dataclass, value):
        check_types(item)
    elif field.type in (int, float, str, bool):
      # Where a float is wanted an int will do, but True is no number.
      fits = (int, float) if field.type is float else field.type
      if not isinstance(value, fits) or (isinstance(value, bool) and field.type is not bool):
        raise UsageError(
          f'{type(config).__name__}.{field.name} is {value!r}, but must be {field.type.__name__}'
        )


def _names() -> list[str]:
  return [member.__name__ for members in CONFIGURABLE.values() for member in members]


def _fields(name: str) -> list[str]:
  for members in CONFIGURABLE.values():
    for member in members:
      if member.__name__ == name:
        code = member.__init__ if isinstance(member, type) else member
        return [a for a in code.__annotations__ if a != 'return']
  return []


def nearest(name: str, known: Sequence[str]) -> str:
  """What to say of a name that is none: the nearest that is known, or all that are."""
  close = difflib.get_close_matches(name, known, 1, 0.5)
  return f'; did you mean {close[0]}?' if close else f'; known are {", ".join(sorted(known))}'


def _find(file: str) -> Path | None:
  return next((p / file for p in gin_search_paths() if (p / file).is_file()), None)


def _open(file: str):
  return open(_find(file), encoding='utf-8')


def _check_file(file: str) -> None:
  if _find(file):
    return
  known = [
    str(found.relative_to(path)) for path in gin_search_paths()[1:] for found in path.rglob('*.gin')
  ]
  raise UsageError(f'there is no gin file {file}{nearest(file, known)}')


def _check_macro(binding: str) -> None:
  """A macro that no file has is a misspelt one: gin would take it in silence."""
  found = re.match(r'\s*([A-Za-z_]\w*)\s*=(?!=)', binding)
  if not found:
    return
  known = re.findall(r'(?:^|%)([A-Za-z_]\w*)(?= = |$)', gin.config_str(), re.MULTILINE)
  if found[1] not in known:
    raise UsageError(f'no macro is called {found[1]!r}{nearest(found[1], known)}')
