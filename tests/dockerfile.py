"""Reads launch/Dockerfile and its .dockerignore: as much of both formats as these use."""

import fnmatch
import json
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / 'launch' / 'Dockerfile'
KNOWN = ('FROM', 'ENV', 'ARG', 'RUN', 'COPY', 'WORKDIR', 'USER', 'ENTRYPOINT')


def instructions() -> list[tuple[str, str]]:
  """(instruction, its arguments) in order; fails on one that `KNOWN` lacks."""
  lines = DOCKERFILE.read_text(encoding='utf-8').splitlines()
  text = '\n'.join(line for line in lines if not line.startswith('#'))
  found = []
  for line in re.sub(r'\\\n\s*', '', text).splitlines():
    if line.strip():
      name, arguments = line.split(maxsplit=1)
      assert name in KNOWN, f'{name} is not read here'
      assert (
        not re.search(r'<<|--(?:from|mount|chown|chmod)|^\[', arguments) or name == 'ENTRYPOINT'
      )
      found.append((name, arguments))
  return found


def named(name: str) -> list[str]:
  """The arguments of each instruction of this name."""
  return [arguments for each, arguments in instructions() if each == name]


def settings() -> dict[str, str]:
  """What all ENV instructions together set."""
  return dict(each.split('=', 1) for text in named('ENV') for each in text.split())


def copied(arguments: str) -> tuple[list[str], str]:
  """(sources, target) of a COPY."""
  *sources, target = arguments.split()
  return sources, target


def entrypoint() -> list[str]:
  """Of the exec form; ValueError for the shell's."""
  (arguments,) = named('ENTRYPOINT')
  return json.loads(arguments)


def ignored(path: str) -> bool:
  """Whether .dockerignore leaves a path of the checkout out: the last pattern that fits decides."""
  lines = (ROOT / 'launch' / 'Dockerfile.dockerignore').read_text(encoding='utf-8').splitlines()
  out = False
  for line in filter(None, (line.partition('#')[0].strip() for line in lines)):
    parents = ['/'.join(path.split('/')[: i + 1]) for i in range(path.count('/') + 1)]
    pattern = line.removeprefix('!')
    if any(_fits(pattern, parent) for parent in parents):
      out = not line.startswith('!')
  return out


def _fits(pattern: str, path: str) -> bool:
  if pattern.startswith('**/'):
    return fnmatch.fnmatchcase(path.split('/')[-1], pattern[3:])
  return '/' not in path and fnmatch.fnmatchcase(path, pattern)


def context(files: Iterable[str]) -> list[str]:
  """Those files of the checkout that a build sees."""
  return [file for file in files if not ignored(file)]
