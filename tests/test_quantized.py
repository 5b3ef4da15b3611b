"""int8 leaves: the error's bound, the channels, blocks of rows, and life as a pytree."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from optimer_jax.checkpoints.names import EMBEDDING, to_torch
from optimer_jax.checkpoints.quantized import (
  Quantized,
  channel_axes,
  channel_scale,
  quantize_rows,
)
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import leaf_shapes

Q, O, DOWN, NORM = (f'layers.0.{x}' for x in ('attn.q_proj', 'attn.o_proj', 'mlp.down_proj', 'n.s'))


def quantize(leaf, array):
  scale = channel_scale(leaf, [array])
  return Quantized(quantize_rows(leaf, array, scale), scale)


def gaussian(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


@given(
  arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-(2.0**126), 2.0**126, width=32),
  ),
  st.sampled_from([EMBEDDING, DOWN]),
)
@example(np.array([[1e-44, 0], [0, 1e-40]], np.float32), DOWN)  # subnormal
def test_error_is_at_most_half_a_scale(array, leaf):
  stored = quantize(leaf, array)
  error = np.abs(array.astype(np.float64) - stored.dequantize())
  slack = np.spacing(np.abs(array))  # the quotient and the product are rounded once each
  assert (error <= stored.scale.astype(np.float64) / 2 + slack).all()
  assert np.abs(stored.values.astype(int)).max() <= 127


def test_scale_is_of_the_channels_that_torch_stores_as_rows(small):
  for leaf, shape in leaf_shapes(small).items():
    if leaf.endswith('.scale'):
      assert channel_axes(leaf) is None
      continue
    array = gaussian(*shape)
    scale = channel_scale(leaf, [array])
    assert scale.dtype == np.float32
    assert scale.shape == tuple(
      n if axis in channel_axes(leaf) else 1 for axis, n in enumerate(shape)
    )
    peaks = np.abs(to_torch(leaf, array)).max(1)
    np.testing.assert_array_equal(scale.reshape(-1), peaks / np.float32(127))


def test_shapes_of_scales_are_the_documented_ones():
  V, D, N, H, F = 7, 6, 4, 3, 5
  for leaf, shape, expected in [
    (EMBEDDING, (V, D), (V, 1)),
    (Q, (D, N, H), (1, N, H)),
    (Q.replace('q_', 'k_'), (D, N, H), (1, N, H)),
    (O, (N, H, D), (1, 1, D)),
    (DOWN, (F, D), (1, D)),
    (DOWN.replace('down', 'up'), (D, F), (1, F)),
  ]:
    assert channel_scale(leaf, [gaussian(*shape)]).shape == expected


@pytest.mark.parametrize('leaf, shape', [(EMBEDDING, (10, 4)), (Q, (10, 2, 3)), (DOWN, (10, 4))])
def test_blocks_give_what_the_whole_leaf_gives(leaf, shape):
  array = gaussian(*shape)
  whole = quantize(leaf, array)
  blocks = [array[:3], array[3:4], array[4:]]
  scale = channel_scale(leaf, iter(blocks))
  np.testing.assert_array_equal(scale, whole.scale)
  own = [channel_scale(leaf, [b]) if leaf == EMBEDDING else scale for b in blocks]
  parts = [quantize_rows(leaf, b, s) for b, s in zip(blocks, own, strict=True)]
  np.testing.assert_array_equal(np.concatenate(parts), whole.values)
  if leaf == EMBEDDING:
    np.testing.assert_array_equal(np.concatenate(own), whole.scale)


def test_rounds_to_nearest_even():
  rows = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127]], np.float32)
  stored = quantize(EMBEDDING, rows)
  np.testing.assert_array_equal(stored.scale, [[1]])
  np.testing.assert_array_equal(stored.values, [[127, 0, 2, 2, 0, -2, -127]])


def test_channel_of_zeros_stays_zero_without_a_warning():
  array = gaussian(4, 3)
  array[:, 1] = 0
  with np.errstate(all='raise'):
    stored = quantize(DOWN, array)
  assert stored.scale[0, 1] == 0 and (stored.scale[0, [0, 2]] > 0).all()
  assert (stored.dequantize()[:, 1] == 0).all()


def test_value_that_is_not_finite_is_refused_by_name():
  for bad in (np.nan, np.inf, -np.inf):
    array = gaussian(4, 3)
    array[2, 1] = bad
    with pytest.raises(UserError, match=r'mlp\.down_proj has values that are not finite'):
      channel_scale(DOWN, [array[:2], array[2:]])


def test_scales_of_other_rows_are_refused():
  array = gaussian(4, 3)
  with pytest.raises(ValueError, match='4 scales for 2 rows'):
    quantize_rows(EMBEDDING, array[:2], channel_scale(EMBEDDING, [array]))


def test_bfloat16_rows_are_quantized_as_their_float32_values():
  array = gaussian(8, 4).astype(ml_dtypes.bfloat16)
  stored, same = quantize(DOWN, array), quantize(DOWN, array.astype(np.float32))
  np.testing.assert_array_equal(stored.values, same.values)
  np.testing.assert_array_equal(stored.scale, same.scale)


def test_quantized_is_a_pytree_in_numpy_and_under_jit():
  stored = [quantize(Q, gaussian(8, 2, 3, seed=seed)) for seed in range(3)]
  assert stored[0].shape == (8, 2, 3)
  stack = jax.tree.map(lambda *a: np.stack(a), *stored)
  assert isinstance(stack, Quantized) and stack.shape == (3, 8, 2, 3)
  assert stack.scale.shape == (3, 1, 2, 3)
  expected = np.stack([s.dequantize() for s in stored])
  assert isinstance(stack.dequantize(), np.ndarray)
  np.testing.assert_array_equal(stack.dequantize(), expected)
  traced = jax.jit(lambda q: q.dequantize())(jax.tree.map(jnp.asarray, stack))
  assert isinstance(traced, jax.Array) and traced.dtype == jnp.float32
  np.testing.assert_array_equal(traced, expected)
  # Layers are scanned over: each step sees one layer's values and scales.
  _, sums = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, jax.tree.map(jnp.asarray, stack))
  np.testing.assert_array_equal(sums, expected)


def test_error_of_a_gaussian_leaf_is_under_one_percent():
  array = gaussian(1024, 256)
  error = array - quantize(DOWN, array).dequantize()
  relative = np.linalg.norm(error) / np.linalg.norm(array)
  # Uniform within a step of 3.2 sigma / 127: step / sqrt(12).
  assert 0.006 < relative < 0.009, relative
