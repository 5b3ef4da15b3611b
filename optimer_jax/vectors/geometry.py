"""What the vectors look like: norms by layer and module, and the angles between them."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

MODULES = ('embedding', 'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


def module_of(leaf: str) -> str:
  """embedding, one of the seven projections, or norms."""
  last = leaf.rsplit('.', 1)[-1]
  return last if last in MODULES else 'norms'


def layer_of(leaf: str) -> int | None:
  """The layer's number; None for the embedding and the last norm."""
  return int(leaf.split('.')[1]) if leaf.startswith('layers.') else None


def geometry(
  base: Mapping[str, np.ndarray], vectors: Mapping[str, Mapping[str, np.ndarray]]
) -> dict:
  """Norms and cosines of a pool, by one pass over the leaves.

  Args:
    base: leaves of the base.
    vectors: data set name to leaves.

  Returns:
    `datasets`; `norm` and `relative_norm` (to the base's) of each; `cosine` [K][K];
    `by_layer` name -> L norms; `by_module` name -> {module: norm}.
  """
  names = list(vectors)
  gram = np.zeros((len(names), len(names)))
  by_layer = {name: defaultdict(float) for name in names}
  by_module = {name: defaultdict(float) for name in names}
  base_squares = 0.0
  for leaf, value in base.items():
    flat = [np.asarray(vectors[name][leaf], np.float32).reshape(-1) for name in names]
    root = np.asarray(value, np.float32).reshape(-1)
    base_squares += float(root @ root)
    for i, name in enumerate(names):
      for j in range(i, len(names)):
        gram[i, j] += float(flat[i] @ flat[j])
      square = float(flat[i] @ flat[i])
      by_module[name][module_of(leaf)] += square
      if layer_of(leaf) is not None:
        by_layer[name][layer_of(leaf)] += square
  gram = np.triu(gram) + np.triu(gram, 1).T
  norms = np.sqrt(np.diag(gram))
  # An empty vector has no direction; its cosines are 0.
  scale = np.where(norms > 0, norms, 1.0)
  cosine = gram / np.outer(scale, scale)
  return {
    'datasets': names,
    'norm': dict(zip(names, norms.tolist(), strict=True)),
    'relative_norm': {n: float(x / base_squares**0.5) for n, x in zip(names, norms, strict=True)},
    'cosine': cosine.tolist(),
    'by_layer': {
      name: [layers[i] ** 0.5 for i in sorted(layers)] for name, layers in by_layer.items()
    },
    'by_module': {
      name: {module: square**0.5 for module, square in modules.items()}
      for name, modules in by_module.items()
    },
  }
