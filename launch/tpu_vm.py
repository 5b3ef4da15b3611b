"""Runs a description on TPU virtual machines, as the TPU Research Cloud lends them.

    python -m launch.tpu_vm launch/runs/paper_27b.yaml --dry-run       # prints the commands
    python -m launch.tpu_vm launch/runs/paper_27b.yaml --stage=train

Each job on TPUs is a queued resource: it is asked for, waited for, the image is run on all its
hosts, and it is given back. Spot machines that are taken away are asked for again, and the job goes
on from its last state. Jobs without TPUs, and `optimer serve`, run on one virtual machine without
them (`Site.helper`). RUN is in a directory that all mount (`Site.nfs`).

Started again, it goes on: a queued resource that is there is used, and what is done in RUN is not
done again.
"""

import argparse
import concurrent.futures
import dataclasses
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence

from launch import command
from launch import description as descriptions
from launch.description import SERVE, STAGES, Description, Job, addressed, check_shared, made
from launch.fit import check_fits
from optimer_jax.errors import UsageError, UserError
from optimer_jax.progress import say

# cloud.google.com/tpu/docs/runtimes: the software of a virtual machine for JAX.
RUNTIMES = {
  'v4': 'tpu-ubuntu2204-base',
  'v5e': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}
GONE = ('SUSPENDING', 'SUSPENDED', 'FAILED', 'DELETING')
_POLL_S = 30


@dataclasses.dataclass(frozen=True)
class Site:
  """What the description's `tpu_vm` says.

  Attributes:
    zone, project: of all machines.
    nfs: HOST:/PATH of the directory that all machines share; mount: where they have it.
    helper: a virtual machine without TPUs, with docker, that is there already.
    hub_secret: a secret of Secret Manager with the hub's token; '' for none.
    grace_s: seconds from SIGTERM to SIGKILL; more than saving a state takes.
    restarts: how often a job may fail while its machines are there.
  """

  zone: str
  project: str
  nfs: str
  helper: str
  mount: str = '/runs'
  hub_secret: str = ''
  grace_s: int = 600
  restarts: int = 3


def site_of(description: Description) -> Site:
  """UsageError if something that jobs need there is wrong or missing."""
  site = made(Site, description.tpu_vm, f'{description.name}: tpu_vm')
  check_shared(description, site.mount)
  return site


def _gcloud(site: Site, *arguments: str) -> list[str]:
  return ['gcloud', *arguments, f'--project={site.project}', f'--zone={site.zone}', '--quiet']


def resource(description: Description, job: Job) -> str:
  """The name of a job's queued resource."""
  return f'{description.name}-{job.name}'


def create(description: Description, site: Site, job: Job) -> list[str]:
  """The command that asks for a job's slices."""
  name, slices = resource(description, job), job.on.topology.slices
  nodes = [f'--node-id={name}']
  if slices > 1:
    nodes = [f'--node-count={slices}', f'--node-prefix={name}']
  return _gcloud(
    site,
    *('compute', 'tpus', 'queued-resources', 'create', name, *nodes),
    f'--accelerator-type={job.on.topology.accelerator_type}',
    f'--runtime-version={RUNTIMES[job.on.topology.kind]}',
    *(['--spot'] if description.spot else []),
  )


def delete(description: Description, site: Site, job: Job) -> list[str]:
  name = resource(description, job)
  return _gcloud(site, 'compute', 'tpus', 'queued-resources', 'delete', name, '--force')


def describe(description: Description, site: Site, job: Job) -> list[str]:
  name = resource(description, job)
  asked = ('compute', 'tpus', 'queued-resources', 'list', f'--filter=name~/{name}$')
  return _gcloud(site, *asked, '--format=value(state.state)')


def run(description: Description, site: Site, job: Job) -> list[str]:
  """The command that runs a job's image on all hosts of its slices, or on the helper."""
  ssh = ('compute', 'ssh', site.helper)
  if job.on.topology:
    ssh = ('alpha', 'compute', 'tpus', 'queued-resources', 'ssh', resource(description, job))
    ssh = (*ssh, '--worker=all', '--node=all')
  return _gcloud(site, *ssh, f'--command={remote(description, site, job)}')


def remote(description: Description, site: Site, job: Job) -> str:
  """What a host's shell is given: mounts the shared directory, and runs the image."""
  mount = shlex.quote(site.mount)
  shared = f'sudo mkdir -p {mount} && (mountpoint -q {mount} || sudo mount -t nfs '
  shared += f'{shlex.quote(site.nfs)} {mount})'
  token, environment = '', [f'OPTIMER_CACHE={site.mount}/.cache']
  if site.hub_secret:
    secret = f'gcloud secrets versions access latest --secret={shlex.quote(site.hub_secret)}'
    token, environment = f' && export HF_TOKEN="$({secret})"', [*environment, 'HF_TOKEN']
  if not job.on.topology:
    environment.append('JAX_PLATFORMS=cpu')
  name = resource(description, job)
  docker = [
    *('sudo', '--preserve-env=HF_TOKEN', 'docker', 'run', '--rm', '--init'),
    *('--privileged', '--network=host', f'--name={name}'),
    f'--stop-timeout={site.grace_s}',
    f'--volume={site.mount}:{site.mount}',
    *(f'--env={each}' for each in environment),
    *(['--detach'] if job.stage == SERVE else []),
    description.image,
    *addressed(job, site.helper)[1:],  # The image begins with `optimer`.
  ]
  # What a lost connection left running saves its state, and makes room.
  alone = f'(sudo docker stop {name} > /dev/null 2>&1 || true)'
  return f'{shared}{token} && {alone} && {shlex.join(docker)}'


def stop_server(description: Description, site: Site, job: Job) -> list[str]:
  stop = f'sudo docker stop {resource(description, job)}'
  return _gcloud(site, 'compute', 'ssh', site.helper, f'--command={stop}')


def complete(description: Description, site: Site, job: Job, pause: Callable[[], None]) -> None:
  """Runs a job to its end, on as many machines, one after the other, as are taken away.

  Raises:
    UserError: it failed `Site.restarts` times while its machines were there, or gcloud failed.
  """
  failures, told = 0, ''
  while True:
    now = command.call(describe(description, site, job)) if job.on.topology else 'ACTIVE'
    if now != told:
      say(f'{job.name}: {now.lower() or "asking for it"}')
      told = now
    if now in GONE:
      command.call(delete(description, site, job))
    elif not now:
      command.call(create(description, site, job))
    elif now == 'ACTIVE':
      if subprocess.run(run(description, site, job)).returncode == 0:
        break
      # Not the machines' fault: they are still there.
      failures += not job.on.topology or command.call(describe(description, site, job)) == 'ACTIVE'
      if failures > site.restarts:
        raise UserError(f'{job.name} failed {failures} times: see what it says above')
      say(f'{job.name}: going on from its last state')
    pause()
  if job.on.topology:
    command.call(delete(description, site, job))
  say(f'{job.name}: done')


def run_step(
  description: Description, site: Site, step: Sequence[Job], pause: Callable[[], None]
) -> None:
  """Runs jobs side by side; an error is raised when the others have ended, too."""
  servers = [job for job in step if job.stage == SERVE]
  others = [job for job in step if job.stage != SERVE]
  if len(servers) > 1:
    raise UsageError(
      'one study at a time has workers on TPU virtual machines: take one with studies'
    )
  for server in servers:
    command.call(run(description, site, server))
  try:
    with concurrent.futures.ThreadPoolExecutor(len(others)) as pool:
      ended = [pool.submit(complete, description, site, job, pause) for job in others]
  finally:
    for server in servers:
      command.call(stop_server(description, site, server))
  for each in ended:
    each.result()


def main(arguments: Sequence[str] | None = None) -> None:
  command.run(command.parser('launch.tpu_vm', __doc__), arguments, _main)


def _main(options: argparse.Namespace) -> None:
  found = descriptions.read(options.description)
  site, steps = site_of(found), descriptions.jobs(found, options.stage or STAGES)
  check_fits(found, [job for step in steps for job in step], options.force)
  if not options.dry_run:
    for step in steps:
      run_step(found, site, step, lambda: time.sleep(_POLL_S))
    return
  for job in (job for step in steps for job in step):
    for make in (create, run, delete) if job.on.topology else (run,):
      print(shlex.join(make(found, site, job)))


if __name__ == '__main__':
  main()
