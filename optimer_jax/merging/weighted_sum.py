"""theta_0 + sum_i w_i tau_i: the kernel that every candidate of a search goes through."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def weighted_sum(buffer: dict, base: dict, vectors: Sequence[dict], weights: jax.Array) -> dict:
  """Writes base + sum_i weights[i] vectors[i] into the buffer of an earlier candidate.

  Sums in float32 and rounds once, to the buffer's dtype. Every byte of base and vectors is read
  once and nothing is allocated: on CPU a fresh output costs three times the time. New weights do
  not recompile. Arrays are combined place by place, so sharded ones need no communication.

  Args:
    buffer: parameters whose memory is given up (donated): do not use them again.
    base: parameters of the same structure.
    vectors: K trees of the same structure, of any float dtypes.
    weights: float32 [K].

  Returns:
    The candidate, in the buffer's place.
  """

  def leaf(out, base, *vectors):
    total = base.astype(jnp.float32)
    for i, vector in enumerate(vectors):
      total += weights[i] * vector.astype(jnp.float32)
    return total.astype(out.dtype)

  return jax.tree.map(leaf, buffer, base, *vectors)
