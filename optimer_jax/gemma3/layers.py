"""The layers of a Gemma 3 block.

Shape letters: B batch, T queries, S keys, P keys of a prefix that rows share, D embed, F mlp, N
query heads, K key-value heads, G = N / K query heads per key-value head, H head_dim, V vocab.

Parameters are what Hugging Face stores, transposed to put the input first and with heads split,
never rescaled. Every parameter carries its logical axes as the metadata `axes`. Modules are
built only under `nnx.eval_shape`: the shapes are declared here, the values come from a
checkpoint. `stack` puts leading axes before a parameter's own, for layers that `jax.lax.scan`
walks.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from optimer_jax.gemma3.config import Gemma3Config
from optimer_jax.gemma3.splash import Packed, attend
from optimer_jax.parallel.sharding import constrain, platform, spec

# The residual stream and its norms are split by length over the devices that share heads and mlp:
# these gather all tokens for their products, and scatter the sums of them.
RESIDUAL = ('batch', 'residual_length', 'embed')
WHOLE = ('batch', 'length', 'embed')


def param(stack: tuple[int, ...], axes: tuple[str, ...], *shape: int) -> nnx.Param:
  return nnx.Param(jnp.zeros((*stack, *shape)), axes=('layers',) * len(stack) + axes)


def project(einsum: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """`jnp.einsum` with the weight in x's dtype; on CPU over flattened tokens (faster there)."""
  if platform() != 'cpu':
    return jnp.einsum(einsum, x, w.astype(x.dtype))
  left, right = einsum.split('->')[0].split(',')
  contracted = sum(axis in right for axis in left)
  rows, columns = x.shape[:-contracted], w.shape[contracted:]
  inner = math.prod(w.shape[:contracted])
  x, w = x.reshape(-1, inner), w.reshape(inner, -1)
  y = bfloat16_product(x, w) if x.dtype == jnp.bfloat16 else x @ w.astype(x.dtype)
  return y.reshape(*rows, *columns)


@jax.custom_vjp
def bfloat16_product(x: jax.Array, w: jax.Array) -> jax.Array:
  """x [R, I] times w [I, C], both rounded to bfloat16: [R, C] in x's dtype, for CPU.

  XLA has bfloat16 products there, on processors with AMX far faster than float32's, but only with
  float32 sums and where the left side is summed over its last axis. All others it takes by way of
  float32, as it would those of the gradients that JAX derives.
  """
  return _float32_sums('RI,IC->RC', x, w).astype(x.dtype)


def _float32_sums(einsum: str, x: jax.Array, y: jax.Array) -> jax.Array:
  x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
  return jnp.einsum(einsum, x, y, preferred_element_type=jnp.float32)


def _pull_back(saved, g):
  x, w = saved
  # The loop has x transposed in memory: elsewhere XLA would put the transposition into the product.
  halves = x.T.reshape(2, -1, x.shape[0])
  of_w = jax.lax.map(lambda half: _float32_sums('IR,RC->IC', half, g), halves)
  of_x = _float32_sums('RC,IC->RI', g, w)
  return of_x.astype(x.dtype), of_w.reshape(w.shape).astype(w.dtype)


bfloat16_product.defvjp(lambda x, w: (bfloat16_product(x, w), (x, w)), _pull_back)


class RMSNorm(nnx.Module):
  """x / rms(x) * (1 + scale), in float32."""

  def __init__(self, dim: int, axis: str, eps: float, stack: tuple[int, ...] = ()):
    self.eps = eps
    self.scale = param(stack, (axis,), dim)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class Rope(NamedTuple):
  """cos and sin of the rotary angles, float32 [B, T, 1, H/2]."""

  cos: jax.Array
  sin: jax.Array


def rope(positions: jax.Array, head_dim: int, theta: float, scale: float = 1.0) -> Rope:
  """Rotary angles of `positions` [B, T]; `scale` stretches the context linearly.

  Frequencies are rounded as transformers rounds them, the power first and then its inverse: at
  position 400 the last bit of a frequency is 400 last bits of the angle.
  """
  power = theta ** (np.arange(0, head_dim, 2) / head_dim)
  frequency = np.float32(1) / power.astype(np.float32) / np.float32(scale)
  angle = positions[:, :, None, None].astype(jnp.float32) * frequency
  return Rope(jnp.cos(angle), jnp.sin(angle))


def rotate(x: jax.Array, r: Rope) -> jax.Array:
  """Rotates the halves of each head of x [B, T, heads, H]."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * r.cos - b * r.sin, b * r.cos + a * r.sin], axis=-1).astype(x.dtype)


class KVCache(NamedTuple):
  """Keys and values of one layer, [B, S, K, H] each, or of a prefix that rows share, [P, K, H]."""

  k: jax.Array
  v: jax.Array


class View(NamedTuple):
  """What the queries of a forward pass may look at; the same for every layer of a kind.

  Attributes:
    mask: bool [B, T, S]: True where a query may look at a key of its own row.
    prefix: bool [B, T, P]: the same for a prefix that all rows share, if there is one.
    slots: int32 [B, T]: where in the cache the keys go before they are looked at; without it the
      row's own keys are looked at.
    keep: int32 [B, S]: which keys of the row fill a new cache, if there is to be one.
  """

  mask: jax.Array
  prefix: jax.Array | None = None
  slots: jax.Array | None = None
  keep: jax.Array | None = None


class Attention(nnx.Module):
  """Grouped-query attention with normalised queries and keys."""

  def __init__(self, c: Gemma3Config, stack: tuple[int, ...] = ()):
    d, n, k, h = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
    self.groups = n // k
    self.scale = c.query_scalar**-0.5
    self.q_proj = param(stack, ('embed', 'heads', 'head_dim'), d, n, h)
    self.k_proj = param(stack, ('embed', 'kv_heads', 'head_dim'), d, k, h)
    self.v_proj = param(stack, ('embed', 'kv_heads', 'head_dim'), d, k, h)
    self.o_proj = param(stack, ('heads', 'head_dim', 'embed'), n, h, d)
    self.q_norm = RMSNorm(h, 'head_dim', c.norm_eps, stack)
    self.k_norm = RMSNorm(h, 'head_dim', c.norm_eps, stack)

  def __call__(
    self, x: jax.Array, r: Rope, view: View | Packed, cache: KVCache | None, prefix: KVCache | None
  ) -> tuple[jax.Array, KVCache | None]:
    """x [B, T, D] to the same, and the cache after it: filled, begun, or None as there is none."""
    q = rotate(self.q_norm(project('BTD,DNH->BTNH', x, self.q_proj[...])), r)
    k = rotate(self.k_norm(project('BTD,DKH->BTKH', x, self.k_proj[...])), r)
    v = project('BTD,DKH->BTKH', x, self.v_proj[...])
    if isinstance(view, Packed):
      out = attend(q * self.scale, k, v, view)
      return project('BTNH,NHD->BTD', out, self.o_proj[...]), None
    rows = jnp.arange(x.shape[0])[:, None]
    if view.slots is not None:
      k, v = cache = KVCache(
        cache.k.at[rows, view.slots].set(k), cache.v.at[rows, view.slots].set(v)
      )
    elif view.keep is not None:
      cache = KVCache(k[rows, view.keep], v[rows, view.keep])
    q = q.reshape(*q.shape[:2], -1, self.groups, q.shape[-1])  # B T K G H
    mask = view.mask
    logits = jnp.einsum('BTKGH,BSKH->BKGTS', q, k, preferred_element_type=jnp.float32)
    if prefix is not None:
      shared = jnp.einsum('BTKGH,PKH->BKGTP', q, prefix.k, preferred_element_type=jnp.float32)
      logits, mask = jnp.concatenate([logits, shared], -1), jnp.concatenate([mask, view.prefix], -1)
    logits = jnp.where(mask[:, None, None], logits * self.scale, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
    own = k.shape[1]
    # In the products' own order of axes: with T in front XLA's CPU code takes seven times as long.
    out = jnp.einsum('BKGTS,BSKH->BKGTH', probs[..., :own], v)
    if prefix is not None:
      out += jnp.einsum('BKGTP,PKH->BKGTH', probs[..., own:], prefix.v)
    out = jnp.moveaxis(out, 3, 1)  # B T K G H
    out = out.reshape(*out.shape[:2], -1, out.shape[-1])  # B T N H
    return project('BTNH,NHD->BTD', out, self.o_proj[...]), cache


def gelu(x: jax.Array) -> jax.Array:
  """x (1 + tanh u) / 2 = x sigmoid(2u): of 1 + tanh u nothing is left where u is far below 0."""
  return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


class MLP(nnx.Module):
  """GELU-gated feed-forward."""

  def __init__(self, c: Gemma3Config, stack: tuple[int, ...] = ()):
    self.gate_proj = param(stack, ('embed', 'mlp'), c.embed_dim, c.mlp_dim)
    self.up_proj = param(stack, ('embed', 'mlp'), c.embed_dim, c.mlp_dim)
    self.down_proj = param(stack, ('mlp', 'embed'), c.mlp_dim, c.embed_dim)

  def __call__(self, x: jax.Array) -> jax.Array:
    gate = gelu(project('BTD,DF->BTF', x, self.gate_proj[...]))
    up = project('BTD,DF->BTF', x, self.up_proj[...])
    inner = constrain(gate * up, ('batch', 'length', 'mlp'))
    return project('BTF,FD->BTD', inner, self.down_proj[...])


class Block(nnx.Module):
  """Attention and MLP, each normalised before and after, added to the residual stream."""

  def __init__(self, c: Gemma3Config, stack: tuple[int, ...] = ()):
    self.pre_attn_norm = RMSNorm(c.embed_dim, 'embed', c.norm_eps, stack)
    self.attn = Attention(c, stack)
    self.post_attn_norm = RMSNorm(c.embed_dim, 'embed', c.norm_eps, stack)
    self.pre_mlp_norm = RMSNorm(c.embed_dim, 'embed', c.norm_eps, stack)
    self.mlp = MLP(c, stack)
    self.post_mlp_norm = RMSNorm(c.embed_dim, 'embed', c.norm_eps, stack)

  def __call__(
    self,
    x: jax.Array,
    r: Rope,
    view: View | Packed,
    cache: KVCache | None = None,
    prefix: KVCache | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    y, cache = self.attn(constrain(self.pre_attn_norm(x), WHOLE), r, view, cache, prefix)
    x = x + self.post_attn_norm(constrain(y, RESIDUAL))
    y = self.mlp(constrain(self.pre_mlp_norm(x), WHOLE))
    return x + self.post_mlp_norm(constrain(y, RESIDUAL)), cache


class Embedder(nnx.Module):
  """The tied embedding, [V, D]."""

  def __init__(self, c: Gemma3Config):
    self.embedding = param((), ('vocab', 'embed'), c.vocab_size, c.embed_dim)

  def encode(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Tokens [B, T] to [B, T, D], times sqrt(D) rounded to `dtype`."""
    table = self.embedding[...]
    return look_up(table, tokens).astype(dtype) * jnp.asarray(table.shape[-1] ** 0.5, dtype)


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Rows [B, T, D] of a table [V, D].

  Where the vocabulary is split, each device looks up what it has, and the sum over all has every
  row: the gradient of the whole table, 5.6 GB of a 27B model, is nowhere in one place.
  """
  mesh, axes = jax.sharding.get_abstract_mesh(), ('vocab', 'embed')
  if mesh.empty or spec(axes, table.shape, mesh)[0] is None:
    return table[tokens]
  vocab, embed = spec(axes, table.shape, mesh)
  rows = spec(('batch', 'length'), tokens.shape, mesh)
  residual = spec((*RESIDUAL[:2], None), (*tokens.shape, table.shape[1]), mesh)
  if rows[0] is None:  # Too few to be split: they need no sum over devices in the gradient.
    embed = None

  def own(table, tokens):
    if embed is not None:
      table = jax.lax.all_gather(table, embed, axis=1, tiled=True)
    at = tokens - jax.lax.axis_index(vocab) * len(table)
    here = (at >= 0) & (at < len(table))
    found = jnp.where(here[..., None], table[jnp.where(here, at, 0)], 0)
    if residual[1] == vocab:
      return jax.lax.psum_scatter(found, vocab, scatter_dimension=1, tiled=True)
    return jax.lax.psum(found, vocab)

  return jax.shard_map(own, in_specs=(PartitionSpec(vocab, embed), rows), out_specs=residual)(
    table, tokens
  )
