"""Pallas splash attention over a mesh: what TPUs compute in place of logits and masks [B, T, T].

Shape letters: B batch, T length, N query heads, K key-value heads, H head_dim.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec

from optimer_jax.parallel.sharding import platform, spec

# Queries and keys that are multiplied at once: the largest of these that divides T. Of 512 a
# kernel with head_dim 256 still has room in a TPU's vector memory, forward and backward.
BLOCKS = (512, 384, 256, 128)
# The name of the output and of what the backward pass needs beside it, for `jax.checkpoint`.
SAVED = 'splash_attention'


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['segment_ids'], meta_fields=['window']
)
@dataclasses.dataclass(frozen=True)
class Packed:
  """The view of rows of documents that lie one after the other; no mask is made of it.

  Attributes:
    segment_ids: int32 [B, T]; tokens see their own segment only, and in it what comes before.
    window: how many slots back a token sees, itself among them; None: all of them.
  """

  segment_ids: jax.Array
  window: int | None


def divides(length: int) -> bool:
  """Whether the kernel takes rows of this length."""
  return length % BLOCKS[-1] == 0


def attend(q: jax.Array, k: jax.Array, v: jax.Array, view: Packed) -> jax.Array:
  """Attention [B, T, N, H] of scaled queries [B, T, N, H] over keys and values [B, T, K, H].

  Each device of the mesh that `jax.set_mesh` named computes its rows and heads. Key-value heads are
  repeated as often as it takes to split them as the query heads are. Where the platform is not TPU
  the kernel is interpreted: slow, and the same.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _attend(q, k, v, view.segment_ids, view.window)
  split = spec(('batch', 'length', 'heads', 'head_dim'), q.shape, mesh)
  ways = q.shape[2] // NamedSharding(mesh, split).shard_shape(q.shape)[2]
  k, v = (jnp.repeat(a, ways // math.gcd(ways, a.shape[2]), axis=2) for a in (k, v))
  return jax.shard_map(
    functools.partial(_attend, window=view.window),
    in_specs=(split, split, split, PartitionSpec(*split[:2])),
    out_specs=split,
    check_vma=False,  # the kernel does not say along which axes its results vary
  )(q, k, v, view.segment_ids)


def _attend(q, k, v, segment_ids, window):
  """`attend` on one device."""
  _, length, heads, _ = q.shape
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([_mask(length, window)] * heads),
    block_sizes=_blocks(length),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=SAVED,
    interpret=platform() != 'tpu',
  )
  q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # B N T H
  return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids)).swapaxes(1, 2)


@functools.lru_cache  # kernels of one mask object are traced once
def _mask(length: int, window: int | None):
  shape = length, length
  return splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)


def _blocks(length: int) -> splash.BlockSizes:
  block = next(block for block in BLOCKS if length % block == 0)
  names = [field.name for field in dataclasses.fields(splash.BlockSizes)]
  return splash.BlockSizes(**{name: block for name in names if name.startswith('block_')})
