"""What the vectors look like: norms, angles, signs and ranks, by layer and by module.

Leaves are read once, by blocks of rows, and summed in float64: memory is bounded by one block of
each vector (and, for a sampled matrix, one square of its width), whatever the model's size.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from optimer_jax.checkpoints.leaves import row_blocks
from optimer_jax.checkpoints.names import EMBEDDING, Tensor
from optimer_jax.errors import UserError
from optimer_jax.progress import progress

# Elements of one tensor in float64: a piece of each vector stays in the cache, and products of so
# few are not spread over threads, whose waiting for each other costs more than the sums.
PIECE = 2**13
MODULES = ('embedding', 'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
SAMPLED = ('attn.q_proj', 'mlp.down_proj')  # matrices whose rank is measured


def module_of(leaf: str) -> str:
  """embedding, one of the seven projections, or norms."""
  last = leaf.rsplit('.', 1)[-1]
  return last if last in MODULES else 'norms'


def layer_of(leaf: str) -> int | None:
  """The layer's number; None for the embedding and the last norm."""
  return int(leaf.split('.')[1]) if leaf.startswith('layers.') else None


def geometry(base: Mapping[str, Tensor], vectors: Mapping[str, Mapping[str, Tensor]]) -> dict:
  """Norms, cosines, sign agreement and ranks of a pool, by one pass over the leaves.

  A vector of zeros has no direction: its cosines are 0 and its ranks 0.

  Args:
    base: leaves of the base.
    vectors: data set name to leaves, K of them, of any float dtypes.

  Returns:
    Plain values, ready for JSON:
    `datasets` K names, in whose order the matrices are.
    `norm`, `relative_norm` (to the base's): name -> number.
    `by_layer` name -> L norms; `by_module` name -> {module: norm}; `layer_module` name ->
      {module: L norms}, without the embedding and the last norm.
    `cosine` [K][K]; `cosine_by_layer` [L][K][K]; `cosine_by_module` module -> [K][K].
    `sign_agreement` [K][K]: of the elements where both vectors are nonzero, the share with one
      sign; None where there is no such element.
    `sign_unanimous`: of the elements where at least two vectors are nonzero, the share where all
      nonzero signs are one. `sign_elected`: of the magnitude in these elements, the share that has
      the sign of the plain sum, which TIES elects (arXiv 2306.01708); 1 is no interference, and
      unlike the others it depends on the vectors' lengths. None where there is no such element.
    `effective_rank` name -> {leaf: {effective, stable, bound}} for q_proj and down_proj of the
      first, the middle and the last layer: exp of the entropy of the normalised squared singular
      values, the squared Frobenius norm over the largest squared singular value, and the smaller
      side of the matrix.
    `embedding_share`: name -> share of the squared norm that is in the embedding.
    `embedding_rows_touched`: name -> share of the embedding's rows with a nonzero.

  Raises:
    UserError: a vector that lacks a leaf or has another shape there; both are named.
  """
  names = list(vectors)
  size = len(names)
  # By (layer, module): inner products of the base and the vectors, in this order.
  grams = defaultdict(lambda: np.zeros((size + 1, size + 1)))
  signs = np.zeros((size, size)), np.zeros((size, size)), np.zeros(4)
  ranks, touched = {name: {} for name in names}, np.zeros(size)
  sampled = _sample(base)
  for leaf, root in progress(base.items(), len(base), 'inspect', 'leaves'):
    tensors = [root, *(_fitting(name, vectors[name], leaf, root.shape) for name in names)]
    gram = grams[layer_of(leaf), module_of(leaf)]
    width = math.prod(root.shape[1:])
    # M^T M of each vector where the leaf is in the sample, else of none.
    squares = np.zeros((size if leaf in sampled else 0, width, width))
    for start, stop in row_blocks(root.shape):
      blocks = [np.asarray(tensor.read(start, stop)) for tensor in tensors]
      for x in pieces(blocks):
        gram += products(x)
        for total, part in zip(signs, _signs(x[1:]), strict=True):
          total += part
      if leaf == EMBEDDING:
        touched += [np.count_nonzero((rows != 0).any(axis=1)) for rows in blocks[1:]]
      for square, rows in zip(squares, blocks[1:], strict=False):
        matrix = rows.reshape(-1, width).astype(np.float64)
        square += matrix.T @ matrix
    for name, square in zip(names, squares, strict=False):
      ranks[name][leaf] = _ranks(square, min(root.shape[0], width))
  rows = base[EMBEDDING].shape[0]
  return {
    'datasets': names,
    **_lengths_and_angles(names, grams),
    **_agreement(*signs),
    'effective_rank': ranks,
    'embedding_rows_touched': dict(zip(names, (touched / rows).tolist(), strict=True)),
  }


def pieces(blocks: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
  """Arrays of one size side by side, flattened, as float64 [len(blocks), PIECE or what is left].

  The memory is used again for the next piece.
  """
  flat = [np.ascontiguousarray(block).reshape(-1) for block in blocks]
  buffer = np.empty((len(flat), min(PIECE, flat[0].size)))
  for start in range(0, flat[0].size, PIECE):
    piece = buffer[:, : flat[0].size - start]
    for row, values in zip(piece, flat, strict=True):
      row[:] = values[start : start + PIECE]
    yield piece


def products(x: np.ndarray) -> np.ndarray:
  """Inner products of the rows of a piece [K, n]: [K, K]."""
  return np.vecdot(x[:, None], x[None])


def cosines(gram: np.ndarray) -> np.ndarray:
  """Inner products [K, K] as cosines; 0 where a vector is zero."""
  norms = np.sqrt(np.diag(gram))
  scale = np.where(norms > 0, norms, 1.0)
  return gram / np.outer(scale, scale)


def _fitting(name: str, vector: Mapping[str, Tensor], leaf: str, shape: tuple) -> Tensor:
  if leaf not in vector:
    raise UserError(f'vector {name} has no leaf {leaf}: extract it from a model of this base')
  if tuple(vector[leaf].shape) != tuple(shape):
    raise UserError(
      f'vector {name}: {leaf} has shape {list(vector[leaf].shape)}, but the base {list(shape)}: '
      'extract it from a model of this base'
    )
  return vector[leaf]


def _sample(leaves: Mapping[str, Tensor]) -> set[str]:
  layers = sorted({layer_of(leaf) for leaf in leaves} - {None})
  chosen = {layers[0], layers[len(layers) // 2], layers[-1]}
  return {leaf for leaf in leaves if layer_of(leaf) in chosen and leaf.endswith(SAMPLED)}


def _signs(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Sign counts of a piece [K, n].

  Returns:
    [K, K] elements where both are nonzero and have one sign; [K, K] where both are nonzero; and
    of the elements where two or more are nonzero: their number, the number with one sign only,
    the sum of magnitudes, the magnitude of the sum.
  """
  sign = np.sign(x)
  nonzero = np.abs(sign)
  shared = products(nonzero)
  several = (count := nonzero.sum(0)) > 1
  unanimous = several & (np.abs(sign.sum(0)) == count)
  magnitude, of_sum = np.abs(x).sum(0), np.abs(x.sum(0))
  totals = [several.sum(), unanimous.sum(), magnitude @ several, of_sum @ several]
  return (products(sign) + shared) / 2, shared, np.array(totals)


def _agreement(same: np.ndarray, shared: np.ndarray, totals: np.ndarray) -> dict:
  several, unanimous, magnitude, of_sum = totals.tolist()
  pairs = zip(same.tolist(), shared.tolist(), strict=True)
  return {
    'sign_agreement': [
      [a / n if n else None for a, n in zip(*pair, strict=True)] for pair in pairs
    ],
    'sign_unanimous': unanimous / several if several else None,
    # With P and N the magnitudes of either sign, max(P, N) is (P + N + |P - N|) / 2.
    'sign_elected': (1 + min(of_sum / magnitude, 1.0)) / 2 if magnitude else None,
  }


def _ranks(square: np.ndarray, bound: int) -> dict:
  """Effective and stable rank of a matrix M from M^T M."""
  # What is below zero is rounding.
  values = np.maximum(np.linalg.eigvalsh(square), 0)
  if not values[-1]:
    return {'effective': 0.0, 'stable': 0.0, 'bound': bound}
  shares = values[values > 0] / values.sum()
  return {
    'effective': float(np.exp(-(shares * np.log(shares)).sum())),
    'stable': float(values.sum() / values[-1]),
    'bound': bound,
  }


def _lengths_and_angles(names: list[str], grams: Mapping[tuple, np.ndarray]) -> dict:
  layers = sorted({layer for layer, _ in grams} - {None})
  modules = list(dict.fromkeys(module for _, module in grams))
  inner = [module for module in modules if (layers[0], module) in grams]
  whole = sum(grams.values())
  by_layer = [sum(gram for (at, _), gram in grams.items() if at == layer) for layer in layers]
  by_module = {
    module: sum(gram for (_, kind), gram in grams.items() if kind == module) for module in modules
  }
  lengths = np.sqrt(np.diag(whole))
  norms = dict(zip(names, lengths[1:].tolist(), strict=True))

  def each(norms_of) -> dict:
    return {name: norms_of(i) for i, name in enumerate(names, 1)}

  def norm(gram: np.ndarray, i: int) -> float:
    return float(gram[i, i] ** 0.5)

  return {
    'norm': norms,
    'relative_norm': {n: x / float(lengths[0]) if lengths[0] else 0.0 for n, x in norms.items()},
    'by_layer': each(lambda i: [norm(gram, i) for gram in by_layer]),
    'by_module': each(lambda i: {m: norm(gram, i) for m, gram in by_module.items()}),
    'layer_module': each(
      lambda i: {m: [norm(grams[layer, m], i) for layer in layers] for m in inner}
    ),
    'embedding_share': each(
      lambda i: float(by_module['embedding'][i, i] / (whole[i, i] or 1.0)),
    ),
    'cosine': cosines(whole[1:, 1:]).tolist(),
    'cosine_by_layer': [cosines(gram[1:, 1:]).tolist() for gram in by_layer],
    'cosine_by_module': {m: cosines(gram[1:, 1:]).tolist() for m, gram in by_module.items()},
  }
