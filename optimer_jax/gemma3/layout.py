"""Named leaves: the form in which parameters are stored, compared and exchanged.

A leaf is one array of one layer, named by its place in the unrolled tree
(`layers.3.attn.q_proj`). Stored artifacts and fingerprints know leaves only, so they are the same
whichever layout a process computes with.
"""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from optimer_jax.gemma3.config import PERIOD, Gemma3Config
from optimer_jax.gemma3.transformer import Model, abstract_params

INIT_STD = 0.02  # Hugging Face's initializer_range


def _named(tree: dict) -> dict:
  """Flattens nested dicts to dotted names; a leaf is anything that is not a dict."""
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out |= {f'{key}.{name}': leaf for name, leaf in _named(value).items()}
    else:
      out[str(key)] = value
  return out


def _nested(leaves: Mapping) -> dict:
  tree = {}
  for name, leaf in leaves.items():
    *path, last = (int(part) if part.isdigit() else part for part in name.split('.'))
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    node[last] = leaf
  return tree


def leaf_shapes(config: Gemma3Config) -> dict[str, tuple[int, ...]]:
  """Shape of every leaf, in the tree's order."""
  return {name: a.shape for name, a in _named(abstract_params(Model(config))).items()}


def to_leaves(config: Gemma3Config, params: dict) -> dict[str, jax.Array]:
  """Parameters of either layout as named leaves."""
  if 'layers' in params:
    return _named(params)
  layers = {}
  for group in range(config.num_groups):
    for j in range(PERIOD - 1):
      layers[group * PERIOD + j] = jax.tree.map(
        lambda a, g=group, j=j: a[g, j], params['groups']['local']
      )
    layers[group * PERIOD + PERIOD - 1] = jax.tree.map(
      lambda a, g=group: a[g], params['groups']['global']
    )
  for j in range(config.num_tail):
    layers[config.num_groups * PERIOD + j] = jax.tree.map(lambda a, j=j: a[j], params['tail'])
  rest = {key: params[key] for key in ('embedder', 'final_norm')}
  leaves = _named({**rest, 'layers': layers})
  return {name: leaves[name] for name in leaf_shapes(config)}


def from_leaves(model: Model, leaves: Mapping[str, jax.Array]) -> dict:
  """Named leaves as parameters in the model's layout."""
  tree = _nested(leaves)
  if not model.scan:
    return tree
  c, layers = model.config, tree.pop('layers')

  def stack(indices, *shape):
    def pile(*arrays):
      kind = np if isinstance(arrays[0], np.ndarray) else jnp
      return kind.stack(arrays).reshape(*shape, *arrays[0].shape)

    return jax.tree.map(pile, *(layers[i] for i in indices))

  cut = c.num_groups * PERIOD
  if c.num_groups:
    tree['groups'] = {
      'local': stack([i for i in range(cut) if not c.is_global(i)], c.num_groups, PERIOD - 1),
      'global': stack([i for i in range(cut) if c.is_global(i)], c.num_groups),
    }
  if c.num_tail:
    tree['tail'] = stack(range(cut, c.num_layers), c.num_tail)
  return tree


def init_leaves(config: Gemma3Config, seed: int) -> dict[str, np.ndarray]:
  """Random float32 leaves, as transformers initialises: normal(0, 0.02), norm scales 0.

  A leaf's values depend on the seed, its name and its shape only.
  """
  out = {}
  for name, shape in leaf_shapes(config).items():
    if name.endswith('.scale'):
      out[name] = np.zeros(shape, np.float32)
    else:
      rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
      out[name] = rng.standard_normal(shape, np.float32) * np.float32(INIT_STD)
  return out
