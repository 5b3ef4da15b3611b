"""Whether a description's jobs fit their slices, by the compiler for TPUs."""

from collections.abc import Callable, Sequence

from launch.description import Description, Job, run_of
from optimer_jax.errors import UserError
from optimer_jax.planning import topologies
from optimer_jax.planning.plan import Plan, line, plan
from optimer_jax.planning.stages import Case
from optimer_jax.progress import say
from optimer_jax.run import planned

PLANNED = {'train': 'train', 'search': 'evaluate', 'evaluate': 'evaluate'}  # as a plan calls it


def cases(description: Description, jobs: Sequence[Job]) -> list[Case]:
  """What the jobs on TPUs ask of their slices; nothing without a model."""
  run = run_of(description)
  rows = max(1, run.evaluation.batch_tokens // run.length)
  found = {}
  for job in jobs:
    if description.model and job.on.topology and job.stage in PLANNED:
      stage = PLANNED[job.stage]
      found[stage, job.on.topology] = Case(
        description.model,
        stage,
        job.on.topology,
        batch=run.training.batch if stage == 'train' else rows,
        vectors=len({*run.vector_paths, *description.datasets}),
        pool=run.pool if run.pool != 'auto' else 'device',
        **planned(run),
      )
  return [*found.values()]


def check_fits(
  description: Description,
  jobs: Sequence[Job],
  force: bool = False,
  compile: Callable[[Case], Plan] = plan,
) -> None:
  """Plans every stage on its slices, and says how much of a chip's memory it takes.

  Args:
    description, jobs: of `description.jobs`.
    force: say it, and go on.
    compile: how a case is planned.

  Raises:
    UserError: a job does not fit.
  """
  asked = cases(description, jobs)
  if asked:
    topologies.prepare()
  for case in asked:
    found = compile(case)
    say(line(found))
    if not found.fits and not force:
      gib = lambda size: f'{size / 2**30:.2f} GiB'
      raise UserError(
        f'{case.stage} of {case.size} does not fit {case.topology.name}: it needs '
        f'{gib(found.total)} of the {gib(found.limit)} of a chip; take more chips (optimer plan '
        f'--model={case.size} --stage={case.stage} --find-smallest), or submit it with --force'
      )
