"""What is installed is complete, what is imported is declared, and what is declared is pinned."""

import ast
import functools
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import optimer_jax
from optimer_jax.configs import gin_search_paths

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'optimer_jax'
GIN = ROOT / 'gin'
PYTHONS = ('3.11', '3.12', '3.13')
# Nothing here imports these: Vizier's GP bandit does, and leaves it to its user to install them.
FOR_VIZIER = {'chex', 'equinox', 'jaxopt', 'jaxtyping', 'tfp-nightly', 'typeguard'}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """The unpacked wheel of a copy of the checkout, so that the build leaves nothing behind here."""
  source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
  ignore = shutil.ignore_patterns('__pycache__')
  for name in ('optimer_jax', 'gin'):
    shutil.copytree(ROOT / name, source / name, ignore=ignore)
  shutil.copy(ROOT / 'setup.py', source)
  build = ['pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', out, '.']
  subprocess.run([sys.executable, '-m', *build], cwd=source, check=True)
  (file,) = out.glob('*.whl')
  with zipfile.ZipFile(file) as archive:
    archive.extractall(out / 'unpacked')
  return out / 'unpacked'


@pytest.fixture(scope='module')
def declared(wheel):
  """Extra ('' for none) to its requirements, as the wheel states them."""
  (info,) = wheel.glob('*.dist-info')
  requires = [Requirement(text) for text in metadata.PathDistribution(info).requires]
  extras = {'': {}}
  for requirement in requires:
    match = re.search(r'extra == "([^"]+)"', str(requirement.marker))
    name = canonicalize_name(requirement.name)
    extras.setdefault(match.group(1) if match else '', {})[name] = requirement
  return extras


@pytest.fixture(scope='module')
def pins():
  """constraints.txt as a list of requirements."""
  lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
  return [Requirement(line) for line in lines if line and not line.startswith('#')]


def modules():
  walked = pkgutil.walk_packages([str(PACKAGE)], 'optimer_jax.')
  return ['optimer_jax', *sorted(module.name for module in walked)]


def imports(file):
  """(top-level names imported when the file is loaded, those imported later, in a function)."""
  tree = ast.parse(file.read_text(encoding='utf-8'))
  inside = {
    node
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for node in ast.walk(function)
  }
  at_once, later = set(), set()
  for node in ast.walk(tree):
    names = later if node in inside else at_once
    if isinstance(node, ast.Import):
      names.update(alias.name.partition('.')[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
      names.add(node.module.partition('.')[0])
  own = {'optimer_jax', 'benchmarks', 'launch', 'tests'}
  if PACKAGE not in file.parents:
    # pytest puts the folders of a test file, up to tests/, on the path.
    own |= {f.stem for folder in (file.parent, ROOT / 'tests') for f in folder.glob('*.py')}
  return at_once - own - sys.stdlib_module_names, later - own - sys.stdlib_module_names


@functools.cache
def providers():
  return metadata.packages_distributions()


def undeclared(names, allowed):
  return {
    name
    for name in names
    if not {canonicalize_name(d) for d in providers().get(name, [name])} & set(allowed)
  }


def pins_for(python, pins):
  environment = {
    'python_version': python,
    'python_full_version': f'{python}.9',
    'sys_platform': 'linux',
    'platform_machine': 'x86_64',
  }
  return [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]


def test_every_file_is_in_a_package_and_every_module_imports():
  names = modules()
  files = {
    '.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    for file in PACKAGE.rglob('*.py')
  }
  assert files == set(names), 'a folder without __init__.py'
  for name in names:
    if not name.endswith('.__main__'):
      importlib.import_module(name)


def test_the_wheel_holds_every_file(wheel):
  def files(folder):
    return {f.relative_to(folder) for f in folder.rglob('*') if f.is_file() and f.suffix != '.pyc'}

  assert files(wheel / 'optimer_jax') == files(PACKAGE) | {
    Path('gin_files') / file for file in files(GIN)
  }


def test_the_metadata(wheel):
  (info,) = wheel.glob('*.dist-info')
  installed = metadata.PathDistribution(info)
  assert installed.name == 'optimer_jax'
  assert installed.version == optimer_jax.__version__
  assert installed.metadata['Requires-Python'] == '>=3.11,<3.14'
  (script,) = installed.entry_points
  assert (script.group, script.name) == ('console_scripts', 'optimer')
  assert callable(script.load())


def test_every_import_is_declared(declared):
  anywhere = {name for names in declared.values() for name in names}
  for file in PACKAGE.rglob('*.py'):
    at_once, later = imports(file)
    assert not undeclared(at_once, declared['']), f'{file} needs what a plain install lacks'
    assert not undeclared(later, anywhere), f'{file} needs what no extra installs'
  for folder in ('tests', 'benchmarks', 'launch'):
    for file in (ROOT / folder).rglob('*.py'):
      assert not undeclared(set.union(*imports(file)), anywhere), f'{file}'


def test_every_declared_dependency_is_used(declared):
  used = {name for file in PACKAGE.rglob('*.py') for name in set.union(*imports(file))}
  distributions = {canonicalize_name(d) for name in used for d in providers().get(name, [name])}
  assert set(declared['']) - distributions - FOR_VIZIER == set()


def test_constraints_name_versions_and_no_address(pins):
  text = (ROOT / 'constraints.txt').read_text(encoding='utf-8')
  assert not re.search(r'://|^-|^[./]| @ |\+cpu', text, re.MULTILINE)
  for pin in pins:
    assert re.fullmatch(r'==[^*,]+', str(pin.specifier)), pin


@pytest.mark.parametrize('python', PYTHONS)
def test_each_python_has_one_pin_a_package_that_meets_what_is_declared(python, pins, declared):
  here = pins_for(python, pins)
  versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix('==') for pin in here}
  assert len(here) == len(versions), 'two pins of one package'
  for extra, requirements in declared.items():
    for name, requirement in requirements.items():
      assert name in versions, f'{name} of extra {extra!r} is not pinned'
      assert requirement.specifier.contains(versions[name], prereleases=True), requirement


def test_every_installed_dependency_is_the_pinned_one(pins, declared):
  """Walks what the plain install, `test` and `gemma270m` need, as far as it goes."""
  here = pins_for('.'.join(map(str, sys.version_info[:2])), pins)
  pinned = {canonicalize_name(pin.name): pin for pin in here}
  todo = [
    (r.name, r.extras)
    for extra in ('', 'test', 'gemma270m')
    for r in declared[extra].values()
    if r.marker is None or r.marker.evaluate({'extra': extra})
  ]
  seen = set()
  while todo:
    name, extras = todo.pop()
    key = (canonicalize_name(name), frozenset(extras))
    if key in seen:
      continue
    seen.add(key)
    assert key[0] in pinned, f'{name} is installed and not pinned: make constraints.txt again'
    assert pinned[key[0]].specifier.contains(metadata.version(name), prereleases=True), (
      f'{name} {metadata.version(name)} is not {pinned[key[0]]}: make venv'
    )
    for text in metadata.requires(name) or []:
      needed = Requirement(text)
      if any(
        needed.marker is None or needed.marker.evaluate({'extra': extra}) for extra in ('', *extras)
      ):
        todo.append((needed.name, needed.extras))
  assert len(seen) > 50


def test_the_gin_folder_does_not_hide_the_library():
  assert not [f for f in GIN.rglob('*') if f.is_file() and f.suffix != '.gin']
  # -m and -c put the current folder first on the path, as running from the checkout does.
  show = 'import gin; print(gin.__file__, gin.parse_config)'
  out = subprocess.run([sys.executable, '-c', show], cwd=ROOT, capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  assert str(GIN) not in out.stdout


def gin_names():
  return sorted(str(file.relative_to(GIN)) for file in GIN.rglob('*.gin'))


def test_gin_files_are_found_by_name_in_a_checkout(tmp_path, monkeypatch):
  assert gin_names()
  monkeypatch.chdir(tmp_path)
  for name in gin_names():
    (first, *_) = [folder / name for folder in gin_search_paths() if (folder / name).exists()]
    assert first == GIN / name


def test_gin_files_are_found_by_name_in_an_installation(wheel, tmp_path):
  find = (
    'import sys; from optimer_jax.configs import gin_search_paths as paths\n'
    'for name in sys.argv[1:]:\n'
    '  print(next(p / name for p in paths() if (p / name).exists()))'
  )
  out = subprocess.run(
    [sys.executable, '-c', find, *gin_names()],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(wheel)},
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  assert out.split() == [str(wheel / 'optimer_jax' / 'gin_files' / name) for name in gin_names()]


def test_a_gin_file_of_the_current_folder_goes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert gin_search_paths()[0] == tmp_path


FLOORS = [
  {'errors', 'files', 'progress', 'parallel'},
  {'gemma3'},
  {'checkpoints', 'data'},
  {'training', 'vectors', 'merging', 'evaluation'},
  {'search', 'report', 'planning'},
  {'run', 'evaluate', 'pipeline', 'baselines', 'configs', 'cli', '__main__'},
]


def test_a_room_imports_only_its_own_floor_and_those_below():
  floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
  for file in PACKAGE.rglob('*.py'):
    room = file.relative_to(PACKAGE).parts[0].removesuffix('.py')
    if room == '__init__':
      continue
    tree = ast.parse(file.read_text(encoding='utf-8'))
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom) and node.module.startswith('optimer_jax'):
        parts = node.module.split('.')[1:2] or [alias.name for alias in node.names]
        for part in parts:
          assert floor.get(part, 0) <= floor[room], f'{file} imports {node.module}'
