"""Answers: the same whatever else is being answered, ended where they should end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_jax.data.tokenizer import Tokenizer, write_tiny_tokenizer
from optimer_jax.errors import UserError
from optimer_jax.evaluation import generation
from optimer_jax.evaluation.engine import Engine
from optimer_jax.evaluation.generation import Prompt, Sampling, common_prefix, generate_texts
from optimer_jax.gemma3 import Model, forward, from_leaves, leaf_shapes

WIDTH = 64
CONTEXT = 60
ASCII = (4 + 32, 4 + 127)  # tokens of the printable bytes


@pytest.fixture(scope='module')
def engine(small, tmp_path_factory):
  directory = tmp_path_factory.mktemp('tokenizer')
  write_tiny_tokenizer(directory, ['a b c d e f g h'], small.vocab_size)
  return Engine(Model(small), Tokenizer.load(directory), context=CONTEXT, generate_rows=4)


def make_params(model: Model, seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  # A small embedding: with a large one a tied model says the same token over and over.
  leaves = {
    name: rng.normal(0, 0.06 if 'embed' in name else 0.4, shape).astype(np.float32)
    for name, shape in leaf_shapes(model.config).items()
  }
  leaves['embedder.embedding'][ASCII[1] :] = 0  # what is written can be read
  leaves['embedder.embedding'][: ASCII[0]] = 0
  return from_leaves(model, leaves)


@pytest.fixture(scope='module')
def params(engine):
  return make_params(engine.model)


def prompts(seed: int, lengths: list[int], new: list[int], shared: int = 0) -> list[Prompt]:
  rng = np.random.default_rng(seed)
  made = []
  for length, most in zip(lengths, new, strict=True):
    tokens = rng.integers(*ASCII, length, dtype=np.int32)
    tokens[:shared] = np.arange(40, 40 + shared)
    tokens[0] = 2
    made.append(Prompt(tokens, most))
  return made


logits = jax.jit(forward, static_argnums=0)


def plain(engine: Engine, params: dict, prompt: Prompt) -> list[int]:
  """One whole forward pass for every token."""
  text = prompt.tokens.tolist()
  for _ in range(prompt.max_new):
    padded = np.zeros((1, WIDTH), np.int32)
    padded[0, : len(text)] = text
    text.append(int(logits(engine.model, params, padded)[0, len(text) - 1].argmax()))
    if text[-1] == engine.tokenizer.eos:
      break
  return text[len(prompt.tokens) :]


def found(engine, params, asked, *sampling) -> list[list[int]]:
  return [g.tokens.tolist() for g in generate_texts(engine, params, asked, *sampling)]


def test_equals_one_pass_for_every_token(engine, params):
  # More prompts than rows, answers longer and shorter than a chunk, rows beyond the local window.
  asked = prompts(0, [20, 3, 9, 14, 2, 30, 5], [20, 3, 17, 16, 1, 25, 30])
  expected = [plain(engine, params, prompt) for prompt in asked]
  assert len({tuple(tokens) for tokens in expected}) == len(asked)
  assert found(engine, params, asked) == expected


def test_a_shared_prefix_changes_nothing(engine, params):
  asked = prompts(1, [45, 38, 41, 36, 50], [9, 5, 8, 9, 6], shared=35)
  assert common_prefix([p.tokens for p in asked]) == 35
  begun = generation._prefix._cache_size()
  expected = [plain(engine, params, prompt) for prompt in asked]
  assert found(engine, params, asked) == expected
  assert generation._prefix._cache_size() == begun + 1  # it was used
  scanned = Engine(Model(engine.model.config, scan=True), engine.tokenizer, CONTEXT, 4, 4)
  assert found(scanned, make_params(scanned.model), asked) == expected


def mixed() -> list[Prompt]:
  return prompts(2, [12, 7, 25, 3, 18, 9], [6, 20, 4, 18, 2, 11])


@pytest.fixture(scope='module')
def mixed_answers(engine, params):
  return [plain(engine, params, prompt) for prompt in mixed()]


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(6)), rows=st.sampled_from([4, 8]))
def test_order_and_rows_change_nothing(engine, params, mixed_answers, order, rows):
  asked = mixed()
  whole = Engine(engine.model, engine.tokenizer, CONTEXT, 4, rows)
  expected = [mixed_answers[i] for i in order]
  assert found(whole, params, [asked[i] for i in order]) == expected


def test_another_candidate_compiles_nothing(engine, params):
  asked = prompts(3, [10, 4, 17, 6, 8], [5, 20, 3, 9, 2])
  one = found(engine, params, asked)
  programs = (generation._begin, generation._write, generation._take, generation._empty_rows)
  sizes = [program._cache_size() for program in programs]
  other = make_params(engine.model, 1)
  two = found(engine, other, asked)
  # Other prompts of about the same lengths neither.
  found(engine, params, prompts(4, [9, 5, 16, 7, 8, 3], [6, 19, 4, 9, 2, 8]))
  assert [program._cache_size() for program in programs] == sizes
  assert one != two and two == [plain(engine, other, prompt) for prompt in asked]


def test_eos_ends_an_answer(engine, params):
  (prompt,) = prompts(5, [8], [24])
  tokens = plain(engine, params, prompt)
  at = next(i for i in range(4, 24) if tokens[i] not in tokens[:i])
  pieces = engine.tokenizer
  ended = Tokenizer(pieces.pieces, pieces.kept, pieces.digest)
  ended.__dict__['eos'] = tokens[at]  # as if that piece were <eos>
  (answer,) = generate_texts(Engine(engine.model, ended, CONTEXT, 4, 4), params, [prompt])
  assert answer.tokens.tolist() == tokens[: at + 1] and answer.ended == 'eos'


def test_stop_strings_end_an_answer_before_them(engine, params):
  asked = prompts(6, [8, 12, 9, 20], [40] * 4)
  cut = 0
  for prompt, whole in zip(asked, generate_texts(engine, params, asked), strict=True):
    text = whole.text
    assert whole.ended == 'length' and len(whole.tokens) == 40
    # Characters that do not stand earlier; the later one's stop goes on behind it.
    places = [i for i in range(1, len(text) - 1) if text.find(text[i]) == i]
    if len(places) < 2:
      continue
    early, late = text[places[0]], text[places[-1] :][:2]
    (answer,) = generate_texts(engine, params, [prompt._replace(stops=('never', late))])
    assert answer.ended == 'stop' and answer.text == text[: places[-1]]
    # Nothing is written behind a stop: here a token is a character.
    assert len(answer.tokens) == places[-1] + 2
    (answer,) = generate_texts(engine, params, [prompt._replace(stops=(late, early))])
    assert answer.text == text[: places[0]] and len(answer.tokens) < 40
    cut += 1
  assert cut >= 2


def test_a_long_prompt_keeps_bos_and_its_end(engine, params):
  (long, short) = prompts(7, [80, 30], [10, 10])
  cut = Prompt(np.concatenate([long.tokens[:1], long.tokens[-(CONTEXT - 11) :]]), 10)
  a, b, c = generate_texts(engine, params, [long, short, cut])
  assert (a.truncated, b.truncated, c.truncated) == (True, False, False)
  assert a.tokens.tolist() == c.tokens.tolist() == plain(engine, params, cut)
  with pytest.raises(UserError, match='answers of 59 tokens leave no room'):
    generate_texts(engine, params, [short._replace(max_new=CONTEXT - 1)])


def test_draws_depend_on_seed_and_place_only(engine, params):
  asked = prompts(8, [12, 7, 25, 3, 18, 9], [8] * 6)
  warm = Sampling(temperature=1.0, seed=3)
  one = found(engine, params, asked, warm)
  assert found(engine, params, asked, Sampling(temperature=1.0, seed=4)) != one
  assert found(engine, params, asked[:1] * 6, warm)[0] == one[0]
  assert len({tuple(t) for t in found(engine, params, asked[:1] * 6, warm)}) > 1


def test_draws_follow_the_distribution(engine, params):
  x = np.random.default_rng(9).normal(size=engine.model.config.embed_dim).astype(np.float32)
  many = 4000
  rows = jnp.broadcast_to(x, (many, len(x)))
  raw = np.asarray(params['embedder']['embedding'], np.float64) @ x
  for cut in ({}, {'top_k': 5, 'top_p': 0.6}):
    sampling = Sampling(temperature=2.0, **cut)
    p = np.exp(raw / 2.0 - (raw / 2.0).max())
    order = np.argsort(-p)
    if cut:
      p[order[5:]] = 0
      p /= p.sum()
      p[order[np.cumsum(p[order]) - p[order] >= 0.6]] = 0
      assert 1 < np.count_nonzero(p) < 5
    p /= p.sum()
    numbers = jnp.arange(many)
    drawn = generation._pick(params, rows, sampling, np.uint32(0), numbers, numbers)
    counts = np.bincount(drawn, minlength=len(p))
    assert not counts[p == 0].any()
    assert (np.abs(counts - many * p) <= 5 * np.sqrt(many * p * (1 - p)) + 1).all()
