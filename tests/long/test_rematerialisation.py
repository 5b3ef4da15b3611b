"""What layers keep, and compute again, for their gradients."""

import dataclasses

import jax

from optimer_jax.gemma3 import Model, abstract_params, token_nats
from tests.test_loss import batch


def test_rematerialisation_holds_less(small):
  """What an unrolled layer computes again is not computed before it is needed."""

  def held(remat):
    model = Model(dataclasses.replace(small, num_layers=6), remat=remat)
    loss = lambda p, b: token_nats(model, p, **b)[0].sum()
    compiled = jax.jit(jax.grad(loss)).lower(abstract_params(model), batch()).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  layer, dots, none = map(held, ('layer', 'dots', 'none'))
  assert layer < dots < none
  assert layer < none / 2
