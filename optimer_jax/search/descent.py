"""A minimiser over a box: many starts at once, one program, no callbacks to the host."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_SHRINK = (1.0, 0.5, 0.2, 0.05, 0.01, 1e-3)  # Step sizes tried side by side.


def descend(
  f: Callable[[jax.Array], jax.Array],
  starts: jax.Array,
  lower: jax.Array,
  upper: jax.Array,
  steps: int,
) -> tuple[jax.Array, jax.Array]:
  """Projected BFGS from every start.

  Where a coordinate lies on its bound and the gradient would push it out, it is left alone for
  the step. Of several step sizes the best is taken, and none if none is better, so that a value
  never rises.

  Args:
    f: [D] -> scalar, differentiable; a value that is not finite is never moved to.
    starts: [R, D], inside the box.
    lower, upper: [D], the box.
    steps: how many to make.

  Returns:
    The end points [R, D] and their values [R].
  """
  return jax.vmap(lambda x: _descend(f, x, lower, upper, steps))(starts)


def _descend(f, start, lower, upper, steps):
  eye = jnp.eye(len(start), dtype=start.dtype)
  shrink = jnp.asarray(_SHRINK, start.dtype)
  gradient = jax.value_and_grad(f)

  def step(carry, _):
    x, x_old, g_old, inverse, lost = carry
    # The gradient is taken here alone, and not before the loop too: half as much to compile.
    y, g = gradient(x)
    s, d = x - x_old, g - g_old
    curvature = s @ d
    learn = curvature > 1e-12 * jnp.sqrt((s @ s) * (d @ d))
    rho = 1.0 / jnp.where(learn, curvature, 1.0)
    # The first curvature seen sets the scale of all directions.
    scale = jnp.where(lost & learn, 1.0 / jnp.where(learn, rho * (d @ d), 1.0), 1.0)
    left = eye - rho * jnp.outer(s, d)
    inverse = jnp.where(learn, left @ (inverse * scale) @ left.T + rho * jnp.outer(s, s), inverse)
    lost = lost & ~learn

    held = ((x <= lower) & (g > 0)) | ((x >= upper) & (g < 0))
    free = jnp.where(held, 0.0, 1.0).astype(x.dtype)
    g_free = g * free
    direction = -free * (inverse @ g_free)
    # Uphill, which rounding can make of a curved estimate: the steepest way down instead.
    direction = jnp.where(direction @ g_free < 0, direction, -g_free)
    # While no scale is known: a tenth of the box.
    longest = jnp.max(jnp.abs(direction) / (upper - lower))
    direction = jnp.where(lost, direction * 0.1 / jnp.maximum(longest, 1e-12), direction)
    tried = jnp.clip(x + shrink[:, None] * direction, lower, upper)
    values = jax.vmap(f)(tried)
    values = jnp.where(jnp.isfinite(values), values, jnp.inf)
    best = jnp.argmin(values)
    better = (values[best] < y) | ~jnp.isfinite(y)
    x_new = jnp.where(better, tried[best], x)
    # Where nothing was better the estimate has led astray: begin it again.
    inverse = jnp.where(better, inverse, eye)
    return (x_new, x, g, inverse, lost | ~better), jnp.where(better, values[best], y)

  carry = (start, start, jnp.zeros_like(start), eye, jnp.asarray(True))
  (x, *_), values = jax.lax.scan(step, carry, length=steps)
  return x, values[-1]
