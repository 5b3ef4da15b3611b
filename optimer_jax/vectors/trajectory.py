"""How straight training went from the base to its last checkpoint.

On a straight line, w tau is the model of some earlier step: the weight acts as training length.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from optimer_jax.checkpoints.leaves import row_blocks
from optimer_jax.checkpoints.names import Tensor
from optimer_jax.errors import UserError
from optimer_jax.progress import progress
from optimer_jax.vectors.geometry import cosines, pieces, products


def trajectory(checkpoints: Sequence[tuple[int, Mapping[str, Tensor]]]) -> dict:
  """Lengths and angles of the way through saved checkpoints, by one pass over the leaves.

  What the checkpoints' own rounding adds is not on the line: take float32 ones.

  Args:
    checkpoints: (step, leaves) in training order, the base first; S + 1 of them, S >= 1. A block of
      rows of each is in memory at once.

  Returns:
    Plain values, ready for JSON, with theta_0 the base, theta_S the last and tau their difference:
    `steps` S steps, without the base's.
    `step_norm` [S]: norm of theta_i - theta_(i-1).
    `step_cosine` [S - 1]: cosine of successive differences.
    `norm` [S]: norm of theta_i - theta_0.
    `final_cosine` [S]: cosine of theta_i - theta_0 and tau.
    `projection` [S]: <theta_i - theta_0, tau> / <tau, tau>, the merge weight that acts like
      training up to there; 0 where tau is zero.
    `straightness`: norm of tau over the sum of `step_norm`; 1 is a straight line, 0 no way at all.

  Raises:
    UserError: fewer than two checkpoints, steps out of order, a checkpoint of another model.
  """
  steps = [step for step, _ in checkpoints]
  if len(steps) < 2:
    raise UserError('a trajectory needs the base and a checkpoint at least: keep some in training')
  if steps != sorted(set(steps)):
    raise UserError(f'checkpoints must be in the order of their steps, each once, not {steps}')
  base = checkpoints[0][1]
  gram = np.zeros((len(steps) - 1, len(steps) - 1))
  for leaf, root in progress(base.items(), len(base), 'trajectory', 'leaves'):
    for step, leaves in checkpoints:
      if leaf not in leaves or tuple(leaves[leaf].shape) != tuple(root.shape):
        raise UserError(
          f'the checkpoint of step {step} has no leaf {leaf} of shape {list(root.shape)}: '
          'it is of another model than the base'
        )
    for start, stop in row_blocks(root.shape):
      blocks = [np.asarray(leaves[leaf].read(start, stop)) for _, leaves in checkpoints]
      for x in pieces(blocks):
        # Differences of successive checkpoints, not from the base: sums of these do not cancel.
        gram += products(np.diff(x, axis=0))
  # theta_i - theta_0 is the sum of the first i differences.
  upto = np.tril(np.ones_like(gram))
  whole = upto @ gram @ upto.T
  lengths, way = np.sqrt(np.diag(whole)), np.sqrt(np.diag(gram))
  return {
    'steps': steps[1:],
    'step_norm': way.tolist(),
    'step_cosine': np.diag(cosines(gram), 1).tolist(),
    'norm': lengths.tolist(),
    'final_cosine': cosines(whole)[-1].tolist(),
    'projection': (whole[-1] / (whole[-1, -1] or 1.0)).tolist(),
    'straightness': float(lengths[-1] / (way.sum() or 1.0)),
  }
