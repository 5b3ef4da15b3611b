"""TPU chips, the slices that are made of them, and the compiler's view of a slice."""

import dataclasses
import difflib
import importlib.util
import math
import re

import jax
from jax.experimental.topologies import get_topology_desc

from optimer_jax.errors import UsageError, UserError
from optimer_jax.parallel.startup import quiet_libtpu
from optimer_jax.training.metrics import PEAK_FLOPS

CHIPS_PER_HOST = 4  # of a slice of several hosts; a host is a virtual machine, one JAX process


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU chip.

  Attributes:
    flops: peak bfloat16 FLOP/s.
    hbm_gib: high-bandwidth memory, GiB.
    limit_gib: what the compiler gives a program of it, GiB: the runtime keeps the rest.
    bandwidth: peak of that memory, bytes/s.
    axes: of the interconnect, 2 or 3: the numbers in a slice's name.
    devices: JAX devices.
    configuration: the compiler's name for a chip whose cores work as one device, if it has two.
  """

  flops: float
  hbm_gib: float
  limit_gib: float
  bandwidth: float
  axes: int
  devices: int = 1
  configuration: str | None = None


# Peaks and memory: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, the tables of key chip
# specifications. Limits: what libtpu says that a program too large exceeds; of 0.0.42 and 0.0.52,
# which differ by 0.01, the smaller.
CHIPS = {
  'v4': Chip(PEAK_FLOPS['TPU v4'], 32, 30.75, 1200e9, axes=3, configuration='megacore'),
  'v5e': Chip(PEAK_FLOPS['TPU v5 lite'], 16, 15.75, 819e9, axes=2),
  'v5p': Chip(PEAK_FLOPS['TPU v5p'], 95, 95.73, 2765e9, axes=3),
  'v6e': Chip(PEAK_FLOPS['TPU v6 lite'], 32, 31.24, 1638e9, axes=2),
}

# The slices of the same pages, smallest first: all of v5e and v6e, and of v4 and v5p those whose
# sides are powers of two, up to 512 chips.
FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
COUNTED_BY_CORES = ('v4', 'v5p')  # in the names of virtual machines; a chip has two
CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8')


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice: chips of one kind, connected in a grid; or several such slices, for one program."""

  kind: str
  sides: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    one = f'{self.kind}:{"x".join(map(str, self.sides))}'
    return one if self.slices == 1 else f'{self.slices}x{one}'

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def chips(self) -> int:
    return self.slices * math.prod(self.sides)

  @property
  def devices(self) -> int:
    return self.chips * self.chip.devices

  @property
  def accelerator_type(self) -> str:
    """As virtual machines call one of the slices."""
    chips = math.prod(self.sides)
    if self.kind in COUNTED_BY_CORES:
      return f'{self.kind}-{2 * chips}'
    return f'v5litepod-{chips}' if self.kind == 'v5e' else f'{self.kind}-{chips}'

  @property
  def hosts(self) -> int:
    return self.slices * max(1, math.prod(self.sides) // CHIPS_PER_HOST)


def topology(name: str) -> Topology:
  """The slice of a name such as v5e:16x16 or v5p:4x4x4; it need not be one of `known`.

  2xv5e:16x16 are two slices.

  Raises:
    UsageError: the name has another form, or an unknown chip.
  """
  found = re.fullmatch(r'(?:(\d+)x)?(\w+):(\d+(?:x\d+)+)', name)
  if not found or found[2] not in CHIPS:
    close = difflib.get_close_matches(name, [t.name for t in known()], 1, 0.5)
    nearest = f'; did you mean {close[0]}?' if close else ''
    raise UsageError(
      f'{name!r} is no slice of {", ".join(CHIPS)}: name one as in v5e:16x16 or v5p:4x4x4{nearest}'
    )
  slices, kind, sides = int(found[1] or 1), found[2], tuple(map(int, found[3].split('x')))
  axes = CHIPS[kind].axes
  if len(sides) != axes or min(slices, *sides) < 1:
    raise UsageError(f'{name!r}: a slice of {kind} has {axes} sides, of 1 chip or more')
  return Topology(kind, sides, slices)


def known(kinds: tuple[str, ...] = tuple(CHIPS)) -> list[Topology]:
  """Slices of these kinds of chip: fewest chips first, and of as many chips least memory first."""
  names = [f'{kind}:{s}' for kind in kinds for s in (FLAT if CHIPS[kind].axes == 2 else CUBES)]
  return sorted(map(topology, names), key=lambda t: (t.chips, t.chip.limit_gib))


def sold(name: str) -> Topology:
  """The slice of a name, if it is one of `known`: one that Google Cloud has.

  Raises:
    UsageError: it is not; the nearest are named.
  """
  one = re.sub(r'^\d+x(?=v)', '', name)
  if one not in {t.name for t in known()} or name.startswith(('0', '1x')):
    nearest = ' or '.join(t.name for t in _nearest(one))
    raise UsageError(f'there is no slice {name!r}: the nearest are {nearest}')
  return topology(name)


def _nearest(name: str) -> list[Topology]:
  """Two slices whose name or number of chips is near that of a name that is none."""
  kind, _, size = re.sub(r'[^a-z0-9]+', ' ', name.lower()).strip().partition(' ')
  kind = {'v5litepod': 'v5e'}.get(kind, kind)
  kind = next(iter(difflib.get_close_matches(kind, CHIPS, 1, 0)))
  numbers = [max(1, int(number)) for number in re.findall(r'\d+', size)] or [4]
  chips = math.prod(numbers) / (2 if len(numbers) == 1 and kind in COUNTED_BY_CORES else 1)
  return sorted(known((kind,)), key=lambda t: abs(math.log(t.chips / chips)))[:2]


def prepare() -> None:
  """Keeps a process that only compiles off all accelerators; call it before JAX computes."""
  jax.config.update('jax_platforms', jax.config.jax_platforms or 'cpu')
  # A program for a slice that is not there cannot be read back from the cache.
  jax.config.update('jax_enable_compilation_cache', False)


def devices(topology: Topology) -> list:
  """The devices of the slices as libtpu describes them: to compile for, not to run on.

  Raises:
    UserError: libtpu is not installed.
    UsageError: there is no such slice.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      "plans are compiled by libtpu, which is not installed: pip install 'optimer_jax[tpu]'"
    )
  quiet_libtpu(attached=True)
  options = {'chips_per_host_bounds': (*(min(2, side) for side in topology.sides[:2]), 1)}
  if topology.chip.configuration:
    options['chip_config_name'] = topology.chip.configuration
  one = dataclasses.replace(topology, slices=1).name
  if topology.slices > 1:
    options['num_slices'] = topology.slices
  try:
    return list(get_topology_desc(one, 'tpu', **options).devices)
  except jax.errors.JaxRuntimeError as error:
    names = ', '.join(t.name for t in known((topology.kind,)))
    raise UsageError(f'the compiler knows no slice {one}; it does know {names}') from error
