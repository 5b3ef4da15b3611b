"""Runs a description on Google Kubernetes Engine.

    python -m launch.gke launch/runs/paper_27b.yaml --dry-run        # prints what it would submit
    python -m launch.gke launch/runs/paper_27b.yaml --setup          # once for each cluster
    python -m launch.gke launch/runs/paper_27b.yaml                  # every stage, in order
    python -m launch.gke launch/runs/paper_27b.yaml --stage=search

Started again, it goes on where it was: what is done and unchanged is left, what failed is replaced.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence

from launch import command
from launch import description as descriptions
from launch.description import SERVE, STAGES, Description, Job
from launch.fit import check_fits
from launch.manifests import DIGEST, as_yaml, manifests, setup
from optimer_jax.errors import UserError
from optimer_jax.progress import say

_POLL_S = 15


def apply(objects: Sequence[dict]) -> str:
  return command.call(['kubectl', 'apply', '--filename=-'], as_yaml(objects))


def state(found: dict | None, wanted: dict) -> str:
  """'absent', 'running', 'done', 'failed', or 'changed' if it was submitted with other contents."""
  if found is None:
    return 'absent'
  notes = found['metadata'].get('annotations', {})
  if notes.get(DIGEST) != wanted['metadata']['annotations'][DIGEST]:
    return 'changed'
  held = {
    each['type']
    for each in found.get('status', {}).get('conditions', ())
    if each['status'] == 'True'
  }
  if held & {'Complete', 'Completed'}:
    return 'done'
  return 'failed' if 'Failed' in held else 'running'


def look(wanted: dict) -> str:
  """The state of an object on the cluster."""
  text = _kubectl('get', wanted, '--output=json')
  return state(json.loads(text) if text else None, wanted)


def delete(wanted: dict) -> None:
  _kubectl('delete', wanted, '--wait=true')


def _kubectl(verb: str, wanted: dict, option: str) -> str:
  """Does something to an object, if it is there."""
  kind, meta = wanted['kind'].lower(), wanted['metadata']
  place = f'--namespace={meta["namespace"]}'
  return command.call(['kubectl', verb, kind, meta['name'], place, '--ignore-not-found', option])


def run_step(
  description: Description, step: Sequence[Job], only: str | None, pause: Callable[[], None]
) -> None:
  """Submits jobs that run side by side, and waits until all are done.

  A study's server is there while one of its workers is.

  Args:
    description, step: of `description.jobs`.
    only: the name of the one job that is meant; None for all.
    pause: called between two looks at the cluster.

  Raises:
    UserError: one failed, or kubectl did.
  """
  wanted = {job.name: manifests(description, job)[0] for job in step if job.stage != SERVE}
  names = [only] if only else [*wanted]
  states = {name: look(wanted[name]) for name in names}
  workers = {
    server: [job.name for job in step if job.stage != SERVE and job.study == server.study]
    for server in step
    if server.stage == SERVE
  }
  for server, its in workers.items():
    if any(states.get(name, 'done') != 'done' for name in its):
      apply(manifests(description, server))
  for name, now in states.items():
    if now in ('failed', 'changed'):
      delete(wanted[name])
    if now in ('absent', 'failed', 'changed'):
      apply([wanted[name]])
      now = 'submitted'
    say(f'{name}: {now}')
  waiting = [name for name in names if states[name] != 'done']
  while waiting:
    pause()
    for name in [*waiting]:
      now = look(wanted[name])
      if now == 'running':
        continue
      if now != 'done':
        namespace = wanted[name]['metadata']['namespace']
        raise UserError(
          f'{name}: {now}; see kubectl logs --namespace={namespace} '
          f'--selector=app.kubernetes.io/instance={description.name} and start this again'
        )
      waiting.remove(name)
      say(f'{name}: done')
  for server, its in workers.items():
    if all(look(wanted[name]) == 'done' for name in its):
      for each in manifests(description, server):
        delete(each)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = command.parser('launch.gke', __doc__)
  parser.add_argument('--job', help='of these stages, this job only, as --dry-run names it')
  parser.add_argument('--setup', action='store_true', help='the objects that a cluster needs first')
  command.run(parser, arguments, _main)


def _main(options: argparse.Namespace) -> None:
  found = descriptions.read(options.description)
  if options.setup:
    objects = setup(found)
    print(as_yaml(objects) if options.dry_run else apply(objects))
    return
  steps = descriptions.jobs(found, options.stage or STAGES)
  if options.job:
    meant = [job.name for step in steps for job in step if job.stage != SERVE]
    descriptions.check_names([options.job], meant, '--job')
    steps = [step for step in steps if options.job in [job.name for job in step]]
  asked = [job for step in steps for job in step if options.job in (None, job.name)]
  objects = [each for job in asked for each in manifests(found, job)]
  check_fits(found, asked, options.force)
  if options.dry_run:
    print(as_yaml(objects), end='')
    return
  for step in steps:
    run_step(found, step, options.job, lambda: time.sleep(_POLL_S))


if __name__ == '__main__':
  main()
