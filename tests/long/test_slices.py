"""What a training step on two slices sends from one to the other, by the TPU's compiler."""

import math
import re

import jax
import pytest

from optimer_jax.gemma3 import SIZES
from optimer_jax.parallel.sharding import MeshConfig, make_mesh
from optimer_jax.planning.plan import OPTIONS
from optimer_jax.planning.stages import Case, program
from optimer_jax.planning.topologies import devices, topology

SENT = re.compile(r'= \(\w+\[([\d,]+)\].* send\(.*')


def sent(length: int) -> list[int]:
  """Elements of each array that a device sends to the other slice."""
  case = Case('tiny', 'train', topology('2xv5e:2x2'), 8, length)
  mesh = make_mesh(MeshConfig(2, 2, 2, slices=2), devices(case.topology))
  step = program(case, mesh)
  with jax.set_mesh(mesh):
    compiled = step.function.lower(*step.arguments).compile(compiler_options=OPTIONS)
  found = list(SENT.finditer(compiled.as_text()))
  assert all('_xla_megascale_transfer_type="ALL_REDUCE"' in each[0] for each in found)
  return sorted(math.prod(map(int, each[1].split(','))) for each in found)


def test_slices_exchange_gradients_only():
  pytest.importorskip('libtpu')
  found = sent(256)
  assert found == sent(512)  # nothing that is computed of the rows
  # At most each device's quarter of the gradient, and once more that of the embedding, which is
  # used twice; layers that a loop computes are counted once.
  config = SIZES['tiny']
  assert 0 < sum(found) < (config.num_params + config.vocab_size * config.embed_dim) / 4
