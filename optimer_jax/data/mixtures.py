"""Rows to batches. A batch depends on (seed, step) alone: there is no iterator state to save.

B: rows in a global batch; T: tokens in a row.
"""

import zlib
from collections.abc import Mapping

import grain
import numpy as np

from optimer_jax.data.rows import Rows
from optimer_jax.errors import UserError


def mixture(rows: Mapping[str, Rows], weights: Mapping[str, float], seed: int) -> grain.MapDataset:
  """An endless data set of {tokens, segment_ids, positions}, int32[T] each.

  Each data set is shuffled anew every pass, and drawn from in proportion to its weight: all rows
  have T tokens, so row weights are token weights. A data set of weight 0 is left out. Its order
  depends on `seed` and its name only, not on what it is mixed with.

  Raises UserError if the names of `rows` and `weights` differ, for weights that are no ratios, and
  for rows of different lengths.
  """
  if set(rows) != set(weights):
    odd = sorted(set(rows) ^ set(weights))
    raise UserError(f'the mixture needs one weight for each data set: check {", ".join(odd)}')
  if not all(0 <= weight < float('inf') for weight in weights.values()) or not any(
    weights.values()
  ):
    raise UserError(f'mixture ratios are numbers >= 0, not all 0: these are {dict(weights)}')
  used = [name for name in rows if weights[name] > 0]
  lengths = {name: rows[name].tokens.shape[1] for name in used}
  if len(set(lengths.values())) > 1:
    raise UserError(f'a mixture needs rows of one length: these have {lengths} tokens')
  shuffled = []
  for name in used:
    if not len(rows[name]):
      raise UserError(f'{rows[name].name} has no rows: it needs at least one document')
    own = int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])
    shuffled.append(grain.MapDataset.source(rows[name]).shuffle(seed=own).repeat())
  if len(used) == 1:
    return shuffled[0]
  return grain.MapDataset.mix(shuffled, [float(weights[name]) for name in used])


def global_batch(
  dataset: grain.MapDataset, step: int, batch: int, first: int = 0, last: int | None = None
) -> dict[str, np.ndarray]:
  """Rows `first` to `last` (all, by default) of the global batch [B, T] of `step`.

  A row is the same whoever asks for it. Raises UserError for a data set shorter than one batch.
  """
  for rows in _data_sets(dataset):
    if len(rows) < batch:
      raise UserError(
        f'{rows.name} has {len(rows)} rows, less than one batch of {batch}: give it more text, or '
        'take a smaller batch or shorter rows'
      )
  wanted = range(batch)[first:last]
  examples = [dataset[step * batch + row] for row in wanted]
  return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _data_sets(dataset: grain.MapDataset) -> list[Rows]:
  if not dataset.parents:
    return [dataset._source]
  return [rows for parent in dataset.parents for rows in _data_sets(parent)]
