"""Runs a description on Google Kubernetes Engine.

    python -m launch.gke launch/runs/paper_27b.yaml --dry-run        # prints what it would submit
    python -m launch.gke launch/runs/paper_27b.yaml --setup          # once for each cluster
    python -m launch.gke launch/runs/paper_27b.yaml                  # every stage, in order
    python -m launch.gke launch/runs/paper_27b.yaml --stage=search

Started again, it goes on where it was: what is done and unchanged is left, what failed is replaced.
"""

import argparse
import json
import subprocess
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


def kubectl(*arguments: str, text: str | None = None) -> str:
  """Runs kubectl.

  Raises:
    UserError: it is not installed, or failed.
  """
  try:
    done = subprocess.run(['kubectl', *arguments], input=text, text=True, capture_output=True)
  except FileNotFoundError:
    raise UserError(
      'kubectl is not installed: install it, or print the manifests with --dry-run'
    ) from None
  if done.returncode:
    message = ' '.join(done.stderr.split()) or f'it exited with {done.returncode}'
    raise UserError(f'kubectl {" ".join(arguments[:2])}: {message}')
  return done.stdout


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
  meta = wanted['metadata']
  text = kubectl(
    'get',
    wanted['kind'].lower(),
    meta['name'],
    f'--namespace={meta["namespace"]}',
    '--ignore-not-found',
    '--output=json',
  )
  return state(json.loads(text) if text.strip() else None, wanted)


def delete(wanted: dict) -> None:
  meta = wanted['metadata']
  kubectl(
    'delete',
    wanted['kind'].lower(),
    meta['name'],
    f'--namespace={meta["namespace"]}',
    '--ignore-not-found',
    '--wait=true',
  )


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
  for server in (job for job in step if job.stage == SERVE):
    workers = [job.name for job in step if job.stage != SERVE and job.study == server.study]
    if any(states.get(name, 'done') != 'done' for name in workers):
      kubectl('apply', '--filename=-', text=as_yaml(manifests(description, server)))
  for name, now in states.items():
    if now in ('failed', 'changed'):
      delete(wanted[name])
    if now in ('absent', 'failed', 'changed'):
      kubectl('apply', '--filename=-', text=as_yaml([wanted[name]]))
    say(f'{name}: {"submitted" if now in ("absent", "failed", "changed") else now}')
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
  for server in (job for job in step if job.stage == SERVE):
    workers = [job for job in step if job.stage != SERVE and job.study == server.study]
    if all(look(wanted[job.name]) == 'done' for job in workers):
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
    text = as_yaml(setup(found))
    print(text if options.dry_run else kubectl('apply', '--filename=-', text=text), end='')
    return
  steps = descriptions.jobs(found, options.stage or STAGES)
  if options.job:
    meant = [job.name for step in steps for job in step if job.stage != SERVE]
    descriptions.check_names([options.job], meant, '--job')
    steps = [step for step in steps if options.job in [job.name for job in step]]
  asked = [job for step in steps for job in step if options.job in (None, job.name)]
  text = as_yaml(each for job in asked for each in manifests(found, job))
  check_fits(found, asked, options.force)
  if options.dry_run:
    print(text, end='')
    return
  for step in steps:
    run_step(found, step, options.job, lambda: time.sleep(_POLL_S))


if __name__ == '__main__':
  main()
