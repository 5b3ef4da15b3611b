"""Runs a description with XManager: a work unit for each data set, each search worker, each stage.

    xmanager launch launch/xm_launch.py -- --description=launch/runs/tiny.yaml
    xmanager launch launch/xm_launch.py -- --description=launch/runs/paper_27b.yaml --backend=gke

local runs the units on this machine, with the environment that XManager is in; gke has them submit
the manifests of `launch.gke` and wait for them. Stages follow one another; a unit that fails ends
the experiment, and the same command goes on from there.
"""

import asyncio
import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags
from xmanager import xm, xm_local

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `xmanager launch` knows of this file alone.

from launch import description as descriptions  # noqa: E402
from launch.description import SERVE, STAGES, Description, Job  # noqa: E402
from launch.fit import check_fits  # noqa: E402
from optimer_jax.errors import UserError  # noqa: E402

_DESCRIPTION = flags.DEFINE_string(
  'description', None, 'A YAML file: see launch/description.py.', required=True
)
_STAGES = flags.DEFINE_multi_enum('stage', STAGES, STAGES, 'May be repeated; default: all.')
_BACKEND = flags.DEFINE_enum('backend', 'local', ['local', 'gke'], 'Where units compute.')
_AT_ONCE = flags.DEFINE_integer('at_once', 0, 'Local units side by side; 0: all.', lower_bound=0)
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print the units and their commands only.')
_FORCE = flags.DEFINE_bool('force', False, 'With gke: also what the plan says does not fit.')


def command(job: Job) -> list[str]:
  """What the unit of a job runs: the job itself, or what submits it and waits for it."""
  if _BACKEND.value == 'local':
    return [str(Path(sys.executable).parent / job.command[0]), *job.command[1:]]
  module = [sys.executable, '-m', 'launch.gke', _DESCRIPTION.value]
  # Whether all of them fit was asked once, before.
  return [*module, f'--stage={job.stage}', f'--job={job.name}', '--force']


@contextlib.contextmanager
def served(job: Job, found: Description) -> Iterator[None]:
  """Runs `optimer serve` beside a study's workers.

  Not as a unit: XManager waits for all of them in the end, and cannot stop one that is local.
  """
  run = descriptions.run_of(found, job.study)
  address = run.path / 'studies' / run.study.name / 'server.json'
  with subprocess.Popen(command(job)) as server:
    try:
      while not address.exists():
        if server.poll() is not None:
          raise UserError(f'{job.name} ended before it served: see what it says above')
        time.sleep(0.2)
      yield
    finally:
      server.terminate()


async def run_step(experiment: xm.Experiment, found: Description, step: list[Job]) -> None:
  """Runs jobs side by side; a unit's failure is raised when the others have ended, too."""
  turns = asyncio.Semaphore(_AT_ONCE.value or len(step))

  async def one(job: Job) -> None:
    async with turns:
      path, *arguments = command(job)
      spec = xm_local.Local.Spec()
      (executable,) = experiment.package([xm.binary(spec, path)])
      environment = {'PYTHONPATH': str(ROOT)} if _BACKEND.value == 'gke' else {}
      unit = await experiment.add(
        xm.Job(executable, xm_local.Local(), job.name, args=arguments, env_vars=environment)
      )
      await unit.wait_until_complete()

  with contextlib.ExitStack() as servers:
    for job in step:
      if job.stage == SERVE and _BACKEND.value == 'local':
        servers.enter_context(served(job, found))
    units = [one(job) for job in step if job.stage != SERVE]
    ended = await asyncio.gather(*units, return_exceptions=True)
  for error in ended:
    if error is not None:
      raise error


async def run(found: Description, steps: list[list[Job]]) -> None:
  async with xm_local.create_experiment(experiment_title=found.name) as experiment:
    for step in steps:
      await run_step(experiment, found, step)


def main(arguments: list[str]) -> None:
  if len(arguments) > 1:
    raise app.UsageError(f'{arguments[1]!r} is no flag')
  try:
    found = descriptions.read(_DESCRIPTION.value)
    steps = descriptions.jobs(found, _STAGES.value)
    if _DRY_RUN.value:
      for job in (job for step in steps for job in step):
        print(f'{job.name}: {shlex.join(command(job))}')
      return
    if _BACKEND.value == 'gke':
      check_fits(found, [job for step in steps for job in step], _FORCE.value)
    asyncio.run(run(found, steps))
  except UserError as error:
    sys.exit(f'xm_launch: {error}')
  except xm.ExperimentUnitError as error:
    sys.exit(f'xm_launch: a work unit failed ({error}): see what it says above')


if __name__ == '__main__':
  app.run(main)
