"""The loss by blocks of the vocabulary, and what a training step holds on one device."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimer_jax.gemma3 import Model, abstract_params
from optimer_jax.gemma3.loss import nats_by_blocks
from optimer_jax.training.train import TrainConfig, optimizer, train_step

LENGTH = 48


@pytest.mark.parametrize('block', [7, 60, 1000])
def test_loss_by_blocks_of_the_vocabulary(block):
  rng = np.random.default_rng(0)
  table, x, factors = (rng.standard_normal(n, np.float32) for n in ((300, 16), (40, 16), 40))
  targets = rng.integers(0, 300, 40, dtype=np.int32)
  targets[:2] = 0, 299

  def plain(table, x):
    log_probs = jax.nn.log_softmax(x @ table.T)
    return -jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]

  found, back = jax.vjp(lambda table, x: nats_by_blocks(table, x, targets, block), table, x)
  expected, plain_back = jax.vjp(plain, table, x)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
  for gradient, right in zip(back(factors), plain_back(factors), strict=True):
    np.testing.assert_allclose(gradient, right, rtol=1e-5, atol=1e-5)


def batch() -> dict:
  row = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
  return {'tokens': row, 'positions': row, 'segment_ids': row}


def test_a_step_holds_one_gradient_and_no_copies(small):
  """Beside the state: of the embedding, which is nearly all of this model, one array."""
  model, config = Model(dataclasses.replace(small, vocab_size=2**16)), TrainConfig()
  params = abstract_params(model)
  state = jax.eval_shape(lambda p: {'params': p, 'optimizer': optimizer(config).init(p)}, params)
  found = train_step.lower(model, config, state, batch()).compile().memory_analysis()
  embedding = 4 * math.prod(params['embedder']['embedding'].shape)
  assert embedding < found.temp_size_in_bytes < 1.3 * embedding
