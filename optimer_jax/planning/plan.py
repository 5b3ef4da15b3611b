"""Compiles a case for its slice, and looks for the smallest slice on which a case fits."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax

from optimer_jax.errors import UsageError, UserError
from optimer_jax.parallel.sharding import make_mesh
from optimer_jax.planning.roofline import Bound, Work, roofline, work
from optimer_jax.planning.stages import (
  STAGES,
  Case,
  Program,
  UnsuitableMesh,
  default_mesh,
  program,
)
from optimer_jax.planning.topologies import CHIPS, Topology, devices, known, topology
from optimer_jax.progress import say

GIB = 2**30
# Less than the usual effort for a fast program: large ones compile in minutes, and where both were
# compared they took the same memory.
OPTIONS = {'exec_time_optimization_effort': -1.0}
# As in '… the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G).'
EXCEEDED = re.compile(r'\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)')


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a case takes, in bytes of HBM on each device, and at least in seconds.

  Attributes:
    case: the question.
    mesh: devices along each axis.
    arguments: what is there before a step: state, or base, vectors and candidate, and rows.
    temporaries: what a step needs beyond them, its program included; where nothing was compiled
      only the gradient of a training step, and None of another stage.
    compile_s: seconds; None where nothing was compiled.
    limit: what a program may have.
    work, bound: see `roofline`.
  """

  case: Case
  mesh: dict[str, int]
  arguments: float
  temporaries: float | None
  compile_s: float | None
  limit: float
  work: Work
  bound: Bound

  @property
  def total(self) -> float:
    return self.arguments + (self.temporaries or 0)

  @property
  def fits(self) -> bool:
    return self.temporaries is not None and self.total <= self.limit

  def row(self) -> dict:
    """The figures as JSON values; sizes in GiB. Those of `bound` and `work` are analytic."""
    case = self.case
    gib = lambda size: None if size is None else round(size / GIB, 2)
    return {
      'model': case.size,
      'stage': case.stage,
      'topology': case.topology.name,
      'layers': case.model.config.num_layers,
      'fits': self.fits,
      'hbm_gib': gib(self.total),
      'limit_gib': gib(self.limit),
      'batch': case.batch if case.computes else None,
      'seq': case.length if case.computes else None,
      'compile_s': self.compile_s and round(self.compile_s, 1),
      'chips': case.topology.chips,
      'hosts': case.topology.hosts,
      'mesh': self.mesh,
      'pieces': case.pieces,
      'vectors': case.vectors if case.stage in ('merge', 'evaluate') else None,
      'arguments_gib': gib(self.arguments),
      'temporaries_gib': gib(self.temporaries),
      'model_flops': self.work.model_flops,
      'flops': self.work.flops,
      'bytes_per_chip': self.work.bytes,
      'step_s_bound': self.bound.step_s,
      'mfu_bound': self.bound.mfu,
      'tokens_per_day_bound': self.bound.tokens_per_day,
    }


def plan(case: Case) -> Plan:
  """Compiles the case's program for its slice, unless it cannot fit by its arguments alone.

  With those of a training step counts its gradient.

  Raises:
    UserError: libtpu is missing; UnsuitableMesh if the mesh does not fit the slice or the rows.
  """
  slice_devices = devices(case.topology)
  try:
    mesh = dataclasses.replace(case.mesh or default_mesh(case), slices=case.topology.slices)
    mesh = make_mesh(mesh, slice_devices)
  except UserError as error:
    raise UnsuitableMesh(f'{case.topology.name}: {error}') from error
  step, counted = program(case, mesh), work(case, mesh.shape)
  limit = case.topology.chip.limit_gib * GIB
  size = Size(step.bytes_before, step.bytes_made or None, None)
  if step.bytes_before + step.bytes_made <= limit:
    say(f'compiling {case.stage} of {case.size} for {case.topology.name} …')
    with jax.set_mesh(mesh):
      size = _compiled(step)
  bound = roofline(counted, case.topology)
  return Plan(case, dict(mesh.shape), *size, limit, counted, bound)


def walk(
  case: Case, slices: Iterable[Topology], compile: Callable[[Case], Plan] = plan
) -> Iterator[Plan]:
  """Plans of the case on one slice after the other, until it fits one.

  Slices that the mesh or the rows do not fit are left out.
  """
  for each in slices:
    try:
      found = compile(dataclasses.replace(case, topology=each))
    except UnsuitableMesh:
      continue
    yield found
    if found.fits:
      return


def exceeded(message: str) -> float | None:
  """Bytes of HBM that a program needs, from the compiler's refusal; None if it has another reason.

  They are those of arguments and temporaries together.
  """
  found = EXCEEDED.search(message)
  return found and float(found[1]) * 1024 ** ' KMGT'.index(found[2] or ' ')


class Size(NamedTuple):
  """See `Plan`."""

  arguments: float
  temporaries: float | None
  compile_s: float | None


def _compiled(step: Program) -> Size:
  before = step.bytes_before
  beside = before - dataclasses.replace(step, beside=()).bytes_before
  began = time.monotonic()
  try:
    compiled = step.function.lower(*step.arguments).compile(compiler_options=OPTIONS)
  except jax.errors.JaxRuntimeError as error:
    needed = exceeded(str(error))
    if needed is None:
      raise
    return Size(before, needed - (before - beside), time.monotonic() - began)
  seconds = time.monotonic() - began
  m = compiled.memory_analysis()
  new = m.output_size_in_bytes - m.alias_size_in_bytes  # not in the place of an argument
  temporaries = new + m.temp_size_in_bytes + m.generated_code_size_in_bytes
  return Size(beside + m.argument_size_in_bytes, temporaries, seconds)


COLUMNS = (
  f'{"stage":9}{"slice":12}{"mesh":>12}{"batch":>6}{"seq":>6}{"args":>8}{"temps":>8}{"total":>8}'
  f'{"limit":>7} fits{"FLOPs":>10}{"GB moved":>10}{"step":>9}{"MFU":>6}{"tokens/day":>12}'
  f'{"compiled":>10}\n'
  f'{"":45}{"GiB a chip":>31}{"":5}{"":10}{"a chip":>10}{">= s":>9}{"<=":>6}{"<=":>12}{"s":>10}'
)


def line(plan: Plan) -> str:
  """A plan under `COLUMNS`. `-` is what a stage does not have, or what was not compiled."""
  row = plan.row()
  show = lambda key, form: '-' if row[key] is None else format(row[key], form)
  return (
    f'{row["stage"]:9}{row["topology"]:12}{"x".join(map(str, plan.mesh.values())):>12}'
    f'{show("batch", ""):>6}{show("seq", ""):>6}{show("arguments_gib", ".2f"):>8}'
    f'{show("temporaries_gib", ".2f"):>8}{show("hbm_gib", ".2f"):>8}{row["limit_gib"]:7.2f}'
    f' {"yes " if plan.fits else "no  "}{row["flops"]:10.2e}{row["bytes_per_chip"] / 1e9:10.2f}'
    f'{row["step_s_bound"]:9.4f}{show("mfu_bound", ".0%"):>6}'
    f'{show("tokens_per_day_bound", ".2e"):>12}{show("compile_s", ".0f"):>10}'
  )


def print_plans(
  size: str,
  stages: Sequence[str],
  names: Sequence[str],
  find_smallest: bool,
  compile: Callable[[Case], Plan] = plan,
  **settings,
) -> None:
  """Prints a line for each stage (default: all) and slice, as soon as it is known.

  Args:
    size, settings: of the `Case`s.
    stages: of `STAGES`.
    names: slices, or with `find_smallest` kinds of chips (default: all).
    find_smallest: take slices one after the other until a stage fits.
    compile: how a case is planned.

  Raises:
    UserError: as in `plan`; UsageError for an unknown name.
  """
  if find_smallest:
    if unknown := [name for name in names if name not in CHIPS]:
      raise UsageError(
        f'{unknown[0]!r} is no kind of chip: with --find-smallest, {", ".join(CHIPS)}'
      )
    slices = known(tuple(names) or tuple(CHIPS))
  elif names:
    slices = [topology(name) for name in names]
  else:
    raise UsageError('name a slice, as in --topology=v5e:16x16, or give --find-smallest')
  cases = [Case(size, stage, slices[0], **settings) for stage in stages or STAGES]
  print(COLUMNS, flush=True)
  for case in cases:
    found = None
    plans = (compile(dataclasses.replace(case, topology=each)) for each in slices)
    for found in walk(case, slices, compile) if find_smallest else plans:
      print(line(found), flush=True)
    if find_smallest and not (found and found.fits):
      print(f'{case.stage}: fits none of {", ".join(each.name for each in slices)}')
