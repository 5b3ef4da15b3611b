"""Whether Gemma 3 27B fits TPU slices, by the compiler that a TPU would use, without a TPU.

    python -m benchmarks.plan [--quick]

Compiles each stage at all 62 layers, then looks for the smallest slice for each. Prints memory a
chip, and what the chips' peaks allow at best: bounds, not measurements. Needs the extra `tpu`
(libtpu), 3 GB of memory and minutes on two cores. --quick compiles one training step. The last line
has a row for each table line; `smallest` marks those that a search for the smallest slice ended
with.
"""

import argparse
import functools
import sys

from benchmarks import print_found
from optimer_jax.parallel.sharding import MeshConfig
from optimer_jax.planning import topologies
from optimer_jax.planning.plan import COLUMNS, line, plan, walk
from optimer_jax.planning.stages import Case

TENSOR = 4  # devices that share the work on a row
# Stage, slice, rows, tokens of a row.
ROWS = (
  ('train', 'v5e:16x16', 128, 4096),
  ('train', 'v6e:16x16', 128, 4096),
  ('train', 'v5p:4x4x4', 64, 4096),
  ('train', 'v5p:4x4x4', 32, 8192),
  ('merge', 'v5e:8x8', 64, 4096),
  ('merge', 'v5p:2x2x2', 8, 4096),
  ('evaluate', 'v5e:8x8', 64, 4096),
  ('evaluate', 'v5p:2x2x2', 8, 4096),
)
# Where the smallest slice is looked for, and stage, rows, tokens of a row.
KINDS = ('v5e', 'v6e', 'v5p')
SMALLEST = (
  ('train', 64, 4096),
  ('extract', 8, 4096),
  ('merge', 8, 4096),
  ('evaluate', 8, 4096),
)


def measure(quick: bool) -> dict:
  """The table, printed as it comes, and its rows."""
  topologies.prepare()
  print(COLUMNS, flush=True)
  rows, mesh = [], MeshConfig(data=1, fsdp=-1, tensor=TENSOR)

  planned = functools.cache(plan)  # the walks come by some of the rows again

  def show(found):
    print(line(found), flush=True)
    rows.append(found.row() | {'smallest': False})

  for stage, name, batch, length in ROWS[:1] if quick else ROWS:
    show(planned(Case('27b', stage, topologies.topology(name), batch, length, mesh)))
  slices = topologies.known(KINDS)
  for stage, batch, length in () if quick else SMALLEST:
    for found in walk(Case('27b', stage, slices[0], batch, length, mesh), slices, planned):
      show(found)
    rows[-1]['smallest'] = rows[-1]['fits']
  return {'rows': rows}


def main(arguments: list[str]) -> int:
  """Prints the table and the JSON object; returns the exit status."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.plan')
  parser.add_argument('--quick', action='store_true')
  options = parser.parse_args(arguments)
  return print_found(lambda: measure(options.quick))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
