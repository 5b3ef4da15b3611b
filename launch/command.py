"""What the launchers' command lines have in common."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.description import STAGES
from optimer_jax.errors import UsageError, UserError


def parser(module: str, text: str) -> argparse.ArgumentParser:
  """Takes a description and what of it to launch."""
  found = argparse.ArgumentParser(
    prog=f'python -m {module}',
    description=text,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  found.add_argument('description', type=Path, help='a YAML file: see launch/description.py')
  found.add_argument(
    '--stage', action='append', choices=STAGES, help='may be repeated; default: all, in order'
  )
  found.add_argument('--dry-run', action='store_true', help='print what would be submitted')
  found.add_argument('--force', action='store_true', help='also what the plan says does not fit')
  return found


def run(
  parser: argparse.ArgumentParser,
  arguments: Sequence[str] | None,
  action: Callable[[argparse.Namespace], None],
) -> None:
  """Acts, and says in one sentence what is wrong; exits with 1, or 2 for wrong usage."""
  options = parser.parse_args(arguments)
  name = parser.prog.removeprefix('python -m ')
  try:
    action(options)
  except UserError as error:
    print(f'{name}: {error}', file=sys.stderr)
    sys.exit(2 if isinstance(error, UsageError) else 1)
  except KeyboardInterrupt:
    print(f'{name}: stopped; what was submitted goes on, and so does this command', file=sys.stderr)
    sys.exit(1)


def call(arguments: Sequence[str], text: str | None = None) -> str:
  """Runs a program, which reads `text`, and gives back what it prints.

  Raises:
    UserError: it is not installed, or failed.
  """
  try:
    done = subprocess.run(arguments, input=text, text=True, capture_output=True)
  except FileNotFoundError:
    raise UserError(
      f'{arguments[0]} is not installed: install it, or print what it would be told with --dry-run'
    ) from None
  if done.returncode:
    reason = ' '.join(done.stderr.split()) or f'it exited with {done.returncode}'
    raise UserError(f'{shlex.join(arguments[:5])}: {reason}')
  return done.stdout.strip()
