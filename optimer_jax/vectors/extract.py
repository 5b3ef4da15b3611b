"""tau = theta - theta_0, leaf by leaf in float32 (arXiv 2603.28858, section 3)."""

from pathlib import Path

import ml_dtypes
import numpy as np

from optimer_jax.checkpoints import store
from optimer_jax.errors import UserError

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


def extract(
  base: Path | str, trained: Path | str, out: Path | str, name: str, dtype: str = 'float32'
) -> store.Manifest:
  """Writes the distribution vector of a CPT model.

  Args:
    base: the base artifact.
    trained: a CPT model of that base.
    out: the vector artifact to write.
    name: the data set's name.
    dtype: float32, or bfloat16 at half the size; the rounding error is recorded relative to the
      vector's norm.

  Raises:
    UserError: another base, another dtype name, a value that is not finite; the leaf is named.
  """
  if dtype not in DTYPES:
    raise UserError(f'vectors are stored as {" or ".join(DTYPES)}, not {dtype!r}')
  base_manifest, base_leaves = store.load(base, 'base')
  manifest, leaves = store.load(trained, ('cpt', 'base', 'merged'))
  check_parent(manifest, base_manifest.fingerprint, trained, base)
  vector, squares, errors = {}, 0.0, 0.0
  for leaf, value in leaves.items():
    delta = value.astype(np.float32) - base_leaves.pop(leaf).astype(np.float32)
    if not np.isfinite(delta).all():
      raise UserError(f'{trained}: {leaf} has values that are not finite: train it again')
    vector[leaf] = delta.astype(DTYPES[dtype])
    squares += float(np.vdot(delta, delta))
    if dtype != 'float32':
      error = delta - vector[leaf].astype(np.float32)
      errors += float(np.vdot(error, error))
  return store.save(
    out,
    'vector',
    manifest.model,
    vector,
    parents={'base': base_manifest.fingerprint, 'model': manifest.fingerprint},
    facts={
      'dataset': name,
      'norm': squares**0.5,
      'rounding_error': (errors / squares) ** 0.5 if squares else 0.0,
      'tokens': manifest.facts.get('tokens'),
    },
  )


def check_parent(manifest: store.Manifest, fingerprint: str, path, base) -> None:
  """Refuses an artifact that was made from another base."""
  parent = manifest.parents.get('base', manifest.fingerprint)
  if parent != fingerprint:
    raise UserError(
      f'{path} was made from the base {parent[:8]}, but {base} is {fingerprint[:8]}: '
      'use the base that it was trained from'
    )
