"""Planned log likelihoods are those of one request at a time. As a program: a process of a mesh.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.test_scoring OUT.json
XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.test_scoring OUT.json PORT ID
"""

import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimer_jax.errors import UserError
from optimer_jax.evaluation import scoring
from optimer_jax.evaluation.scoring import Continuation, log_likelihoods, plan
from optimer_jax.gemma3 import (
  Gemma3Config,
  Model,
  abstract_params,
  forward,
  from_leaves,
  leaf_shapes,
  logical_axes,
)
from optimer_jax.parallel.sharding import MeshConfig, make_mesh, shardings

BOS = 2
VOCAB = 300
LONGEST = 128  # tokens of a request in these tests, so that the plain scorer is one program
TOLERANCE = 5e-5  # nats of a whole target, whose nats are up to some hundreds
MESHES = ((8, 1, 1), (2, 2, 2))


def model_of(scan: bool) -> Model:
  """Local layers alone, or all kinds of layers in their stacks."""
  layers = 7 if scan else 2
  config = Gemma3Config(layers, 32, 64, 4, 2, 16, window=8, query_scalar=16.0, vocab_size=VOCAB)
  return Model(config, scan=scan)


@functools.cache
def params_of(model: Model, seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  shapes = leaf_shapes(model.config)
  return from_leaves(
    model, {name: rng.normal(0, 0.2, s).astype(np.float32) for name, s in shapes.items()}
  )


def tokens_of(rng: np.random.Generator, count: int) -> np.ndarray:
  return rng.integers(3, VOCAB, count).astype(np.int32)


def mixture(seed: int = 0) -> list[Continuation]:
  """Choices after worked examples, choices without them, windows, all in a drawn order."""
  rng = np.random.default_rng(seed)
  requests = []
  shots = np.r_[BOS, tokens_of(rng, 60)].astype(np.int32)
  for _ in range(12):
    question = np.r_[shots, tokens_of(rng, rng.integers(1, 20))]
    requests += [Continuation(question, tokens_of(rng, n)) for n in (1, 1, 3, 12)]
  for _ in range(6):
    question = np.r_[BOS, tokens_of(rng, rng.integers(3, 30))].astype(np.int32)
    requests += [Continuation(question, tokens_of(rng, n)) for n in rng.integers(1, 6, 3)]
  bos = np.array([BOS], np.int32)
  requests += [Continuation(bos, tokens_of(rng, n)) for n in (1, 20, 90, 120)]
  return [requests[i] for i in rng.permutation(len(requests))]


@functools.partial(jax.jit, static_argnums=0)
def log_softmax(model, params, tokens):
  return jax.nn.log_softmax(forward(model, params, tokens[None])[0])


def plain(model: Model, params: dict, requests) -> tuple[np.ndarray, np.ndarray]:
  """Nats and greedy of each request by itself: a row of its own, all logits."""
  nats, greedy = [], []
  for context, target in requests:
    row = np.zeros(LONGEST, np.int32)
    row[: len(context) + len(target)] = np.r_[context, target]
    scores = np.asarray(log_softmax(model, params, row))[len(context) - 1 :][: len(target)]
    nats.append(-scores[np.arange(len(target)), target].astype(np.float64).sum())
    greedy.append((scores.argmax(-1) == target).all())
  return np.array(nats), np.array(greedy)


def greedy_targets(model: Model, params: dict, requests) -> list[Continuation]:
  """The same contexts with what the model itself goes on with, right and with one token wrong."""
  out = []
  for context, _ in requests:
    tokens = list(context)
    for _ in range(3):
      row = np.zeros(LONGEST, np.int32)
      row[: len(tokens)] = tokens
      tokens.append(int(log_softmax(model, params, row)[len(tokens) - 1].argmax()))
    right = np.array(tokens[len(context) :], np.int32)
    for wrong in (None, 0, 1, 2):
      target = right.copy()
      if wrong is not None:
        target[wrong] = (target[wrong] + 1) % VOCAB
      out.append(Continuation(context, target))
  return out


def batches(planned) -> list:
  return [batch for group in planned.groups for batch in group.batches]


def programs() -> tuple[int, int]:
  return scoring.score_batch._cache_size(), scoring._prefix._cache_size()


@pytest.mark.parametrize('scan', [False, True])
def test_equals_one_request_at_a_time(scan):
  model = model_of(scan)
  params = params_of(model)
  requests = mixture()
  requests += greedy_targets(model, params, requests[:3])
  planned = plan(requests, LONGEST, 256)
  assert any(group.length for group in planned.groups)  # a shared prefix, longer than the window
  assert any(not group.length for group in planned.groups)
  assert any((batch.branch_ids > 1).any() for batch in batches(planned))
  nats, greedy = plain(model, params, requests)
  found = log_likelihoods(model, params, planned)
  np.testing.assert_allclose(found.nats, nats, atol=TOLERANCE, rtol=0)
  np.testing.assert_array_equal(found.greedy, greedy)
  assert greedy.sum() == 3
  assert found.nats.dtype == np.float64
  assert found.greedy.dtype == bool


def test_nothing_depends_on_what_stands_beside_it():
  model = model_of(False)
  params = params_of(model)
  requests = mixture()
  expected = log_likelihoods(model, params, plan(requests, LONGEST, 256))
  order = np.random.default_rng(1).permutation(len(requests))
  for chosen, batch_tokens in ((order, 256), (order[:20], 256), (order[::-1], 1024), (order, 64)):
    found = log_likelihoods(model, params, plan([requests[i] for i in chosen], 128, batch_tokens))
    np.testing.assert_allclose(found.nats, expected.nats[chosen], atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(found.greedy, expected.greedy[chosen])


def test_windows_are_scored_whole_in_pieces():
  model = model_of(False)
  params = params_of(model)
  rng = np.random.default_rng(3)
  bos = np.array([BOS], np.int32)
  requests = [Continuation(bos, tokens_of(rng, 127 - i % 2)) for i in range(33)]
  planned = plan(requests, LONGEST, 32 * 128)
  assert planned.tokens == planned.lengths.sum()  # the last token is not computed, BOS is
  assert scoring.logit_slots(32, VOCAB) < max(batch.scored for batch in batches(planned)) / 8
  nats, greedy = plain(model, params, requests)
  found = log_likelihoods(model, params, planned)
  np.testing.assert_allclose(found.nats, nats, atol=4 * TOLERANCE, rtol=0)
  np.testing.assert_array_equal(found.greedy, greedy)


def test_a_number_that_is_not_finite_is_its_request_s_own():
  model = model_of(False)
  params = jax.tree.map(np.array, params_of(model))
  # Where the first hidden number is above 1.2, the logit of a token that no request has overflows.
  params['embedder']['embedding'][1] = 0
  params['embedder']['embedding'][1, 0] = 2.8e38
  requests = mixture()
  nats, _ = plain(model, params, requests)
  finite = np.isfinite(nats)
  assert 10 < finite.sum() < len(requests) - 10
  found = log_likelihoods(model, params, plan(requests, LONGEST, 256))
  np.testing.assert_array_equal(np.isnan(found.nats), ~finite)
  np.testing.assert_allclose(found.nats[finite], nats[finite], rtol=1e-5)


# What is computed.


def test_contexts_and_prefixes_are_computed_once():
  rng = np.random.default_rng(0)
  shots = np.r_[BOS, tokens_of(rng, 60)].astype(np.int32)
  requests, expected = [], 61
  for first in range(10, 20):  # the first token after the shots differs
    question = np.r_[shots, first, tokens_of(rng, 5)].astype(np.int32)
    requests += [Continuation(question, tokens_of(rng, n)) for n in (1, 1, 4)]
    expected += 6 + 0 + 0 + 3
  planned = plan(requests, LONGEST, 256)
  assert planned.tokens == expected
  assert planned.slots == sum(batch.tokens.size for batch in batches(planned)) + 128
  assert planned.truncated == 0
  np.testing.assert_array_equal(planned.lengths, [1, 1, 4] * 10)
  # Asked for twice is computed once.
  assert plan(requests + requests[:7], LONGEST, 256).tokens == expected
  # Too few for a prefix; the contexts are still shared.
  assert plan(requests[:6], LONGEST, 256).tokens == 2 * (61 + 6 + 3)
  # One token less where the prefix is a whole context, whose last token predicts.
  assert plan([*requests, Continuation(shots, shots[1:2])], LONGEST, 256).tokens == expected + 10


def test_a_straggler_gets_no_call_of_its_own():
  rng = np.random.default_rng(0)
  shots = np.r_[BOS, tokens_of(rng, 60)].astype(np.int32)
  requests = [Continuation(np.r_[shots, i], tokens_of(rng, 2)) for i in range(10, 110)]
  requests.append(Continuation(np.r_[shots[:-1], 5].astype(np.int32), tokens_of(rng, 2)))
  (group,) = plan(requests, LONGEST, 256).groups
  assert group.length == 60


def test_several_prefixes():
  rng = np.random.default_rng(0)
  subjects = [np.r_[BOS, tokens_of(rng, 70 + i)].astype(np.int32) for i in range(3)]
  requests = [
    Continuation(np.r_[subject, i].astype(np.int32), tokens_of(rng, 2))
    for subject in subjects
    for i in range(10, 30)
  ]
  planned = plan(requests, LONGEST, 256)
  assert sorted(group.length for group in planned.groups) == [71, 72, 73]
  assert len({(len(g.prefix), *b.tokens.shape) for g in planned.groups for b in g.batches}) <= 2
  model = model_of(False)
  nats, _ = plain(model, params_of(model), requests)
  found = log_likelihoods(model, params_of(model), planned)
  np.testing.assert_allclose(found.nats, nats, atol=TOLERANCE, rtol=0)


def test_a_context_with_very_many_targets_is_split():
  rng = np.random.default_rng(0)
  context = np.r_[BOS, tokens_of(rng, 39)].astype(np.int32)
  requests = [Continuation(context, tokens_of(rng, 1 + i % 9)) for i in range(600)]
  planned = plan(requests, 4096, 4096)
  assert max(batch.tokens.shape[1] for batch in batches(planned)) <= 1024
  assert planned.slots < 1.3 * planned.tokens
  check(planned, requests)


def test_truncation_keeps_bos_and_the_end():
  model = model_of(False)
  params = params_of(model)
  rng = np.random.default_rng(0)
  long = np.r_[BOS, tokens_of(rng, 99)].astype(np.int32)
  target = tokens_of(rng, 10)
  requests = [
    Continuation(long, target),
    Continuation(long[:30], target),  # just fits
    Continuation(long[:31], target),
    Continuation(long, tokens_of(rng, 39)),  # leaves room for BOS only
  ]
  planned = plan(requests, 40, 256)
  assert planned.truncated == 3
  cut = [
    Continuation(np.r_[BOS, long[-29:]], target),
    requests[1],
    Continuation(np.r_[BOS, long[2:31]], target),
    Continuation(long[:1], requests[3].target),
  ]
  found = log_likelihoods(model, params, planned)
  np.testing.assert_allclose(found.nats, plain(model, params, cut)[0], atol=TOLERANCE, rtol=0)


def test_requests_that_cannot_be_scored():
  bos, target = np.array([BOS], np.int32), np.arange(3, 43, dtype=np.int32)
  good = Continuation(bos, target[:39])
  assert plan([good], 40, 256).truncated == 0
  with pytest.raises(UserError, match=r'request 1 .* 40 tokens, .* context of 40 '):
    plan([good, Continuation(bos, target)], 40, 256)
  with pytest.raises(UserError, match='request 2 has 1 context and 0 target'):
    plan([good, good, Continuation(bos, target[:0])], 40, 256)
  with pytest.raises(UserError, match='request 0 has 0 context and 39 target'):
    plan([Continuation(bos[:0], target[:39])], 40, 256)


def test_no_requests():
  planned = plan([], 40, 256)
  model = model_of(False)
  found = log_likelihoods(model, params_of(model), planned)
  assert (planned.tokens, planned.slots, planned.truncated) == (0, 0, 0)
  assert found.nats.shape == found.greedy.shape == (0,)


def test_candidates_and_plans_share_programs():
  model = model_of(False)
  requests = mixture()
  planned = plan(requests, LONGEST, 256)
  first = log_likelihoods(model, params_of(model), planned)
  before = programs()
  second = log_likelihoods(model, params_of(model, 1), planned)
  assert np.abs(first.nats - second.nats).min() > 1e-3
  assert programs() == before
  rng = np.random.default_rng(0)
  bos = np.array([BOS], np.int32)
  shapes, counts, pieces = [], [], []
  for length in (127, 70):  # windows that fill a row: as many rows, with more or less to score
    planned = plan([Continuation(bos, tokens_of(rng, length)) for _ in range(32)], 128, 4096)
    log_likelihoods(model, params_of(model), planned)
    shapes.append([batch.tokens.shape for batch in batches(planned)])
    pieces.append([batch.scored // scoring.logit_slots(32, VOCAB) for batch in batches(planned)])
    counts.append(programs())
  assert shapes[0] == shapes[1] == [(32, 128)]
  assert pieces[0] != pieces[1]
  assert counts[0] == counts[1]


# Properties.

words = st.lists(st.integers(3, 6), min_size=1, max_size=8)


@st.composite
def request_lists(draw, longest: int) -> list[Continuation]:
  """Contexts that begin with one of a few headers, go on with few different tokens, and meet."""
  rng = np.random.default_rng(draw(st.integers(0, 9)))
  headers = [np.r_[BOS, tokens_of(rng, n)] for n in (0, longest // 3, longest // 2)]
  contexts = draw(
    st.lists(st.tuples(st.sampled_from(range(3)), st.just([]) | words), min_size=1, max_size=12)
  )
  contexts = [np.r_[headers[i], tail].astype(np.int32) for i, tail in contexts]
  chosen = draw(st.lists(st.tuples(st.sampled_from(range(len(contexts))), words), max_size=30))
  return [Continuation(contexts[i], np.array(target, np.int32)) for i, target in chosen]


def check(planned, requests) -> None:
  """Follows what each target token's hidden state has seen."""
  seen = {}
  for group in planned.groups:
    start = group.prefix[: group.length]
    assert len(group.prefix) % 128 == 0
    for batch in group.batches:
      assert batch.tokens.shape[0] % planned.shards == 0
      assert ((batch.at > 0).sum(1) <= batch.scored).all()
      for row, pick in np.argwhere(batch.owner >= 0):
        assert batch.columns[row, pick] < batch.scored
        slot = batch.at[row, batch.columns[row, pick]]
        segment, branch = batch.segment_ids[row], batch.branch_ids[row]
        visible = (segment == segment[slot]) & ((branch == 0) | (branch == branch[slot]))
        visible &= np.arange(len(visible)) <= slot
        assert segment[slot] > 0
        positions = batch.positions[row, visible]
        np.testing.assert_array_equal(positions, group.length + np.arange(len(positions)))
        seen.setdefault(int(batch.owner[row, pick]), []).append(
          (*start, *batch.tokens[row, visible], batch.targets[row, pick])
        )
  assert len(seen) == len({(tuple(c), tuple(t)) for c, t in requests})
  for number, (context, target) in zip(planned.distinct, requests, strict=True):
    whole = (*context, *target)
    assert sorted(seen[number], key=len) == [
      whole[: len(context) + i] for i in range(1, len(target) + 1)
    ]
  computed = sum(int((b.segment_ids > 0).sum()) for b in batches(planned))
  assert planned.tokens == computed + sum(group.length for group in planned.groups)


@settings(max_examples=150, deadline=None)
@given(request_lists(90), st.sampled_from([1, 64, 256, 1000, 4096]), st.sampled_from([1, 2, 8]))
def test_every_target_token_is_predicted_from_what_is_before_it(requests, batch_tokens, shards):
  check(plan(requests, 4096, batch_tokens, shards), requests)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(request_lists(100))
def test_any_requests_equal_one_at_a_time(requests):
  model = model_of(True)
  params = params_of(model)
  found = log_likelihoods(model, params, plan(requests, LONGEST, 128))
  nats, greedy = plain(model, params, requests)
  np.testing.assert_allclose(found.nats, nats, atol=TOLERANCE, rtol=0)
  np.testing.assert_array_equal(found.greedy, greedy)


def test_padding_is_rare():
  rng = np.random.default_rng(0)
  requests = []
  for _ in range(1000):
    question = np.r_[BOS, tokens_of(rng, int(rng.lognormal(3.5, 0.4)))].astype(np.int32)
    requests += [Continuation(question, tokens_of(rng, n)) for n in rng.integers(1, 5, 4)]
  for batch_tokens in (2048, 4096, 16384):
    planned = plan(requests, 4096, batch_tokens)
    assert planned.tokens / planned.slots > 0.88
    assert len({batch.tokens.shape for batch in batches(planned)}) <= 4
    scored = sum((batch.at > 0).sum() for batch in batches(planned))
    assert scored / sum(len(batch.at) * batch.scored for batch in batches(planned)) > 0.75


def test_rows_are_little_longer_than_what_they_hold():
  rng = np.random.default_rng(0)
  for length, slots in ((100, 128), (200, 256), (300, 384), (400, 512), (700, 768), (1400, 1536)):
    requests = [Continuation(np.array([BOS]), tokens_of(rng, length)) for _ in range(16)]
    planned = plan(requests, 4096, 8 * slots)
    assert {batch.tokens.shape for batch in batches(planned)} == {(8, slots)}


@pytest.mark.parametrize('vocab', [300, 35_526, 262_144, 262_208])
@pytest.mark.parametrize('rows', [1, 3, 16, 64, 512])
def test_logits_held_at_once(rows, vocab):
  chunk = scoring.logit_slots(rows, vocab)
  assert 128 % chunk == 0
  assert chunk == 1 or chunk * rows * vocab * 4 <= 2**27
  assert chunk == 1 or chunk * rows <= 256


# Meshes and processes.


def main(out: Path) -> None:
  model = model_of(True)
  results = {}
  for sizes in MESHES:
    mesh = make_mesh(MeshConfig(*sizes))
    placement = shardings(logical_axes(model), abstract_params(model), mesh)
    params = jax.tree.map(
      lambda a, s: jax.make_array_from_callback(a.shape, s, lambda at: a[at]),
      jax.tree.map(np.asarray, params_of(model)),
      placement,
    )
    planned = plan(mixture(), LONGEST, 1024, math.prod(sizes[:2]))
    found = log_likelihoods(model, params, planned, mesh)
    batch = batches(planned)[-1]
    with jax.set_mesh(mesh):
      arrays = {name: scoring._placed(getattr(batch, name), mesh) for name in scoring.ARRAYS}
      lowered = scoring.score_batch.lower(model, 8, params, None, np.int32(1), **arrays)
    results[str(sizes)] = {
      'nats': found.nats.tolist(),
      'greedy': found.greedy.tolist(),
      'shape': batch.tokens.shape,
      'gathered': re.findall(r'(\w+\[[\d,]*\])\S* all-gather\(', lowered.compile().as_text()),
    }
  out.write_text(json.dumps(results))


@pytest.fixture(scope='module')
def meshes(tmp_path_factory) -> list[dict]:
  """What one process with eight devices finds, and two processes with four each."""
  place = tmp_path_factory.mktemp('scoring')
  with socket.socket() as found:
    found.bind(('localhost', 0))
    port = str(found.getsockname()[1])
  running = []
  for number, (devices, rest) in enumerate(((8, []), (4, [port, '0']), (4, [port, '1']))):
    flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
    running.append(
      subprocess.Popen(
        [sys.executable, '-m', 'tests.test_scoring', str(place / f'{number}.json'), *rest],
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  errors = [process.communicate(timeout=120)[1] for process in running]
  for process, error in zip(running, errors, strict=True):
    assert process.returncode == 0, error
    assert 'Involuntary full rematerialization' not in error  # an array made whole everywhere
  return [json.loads((place / f'{number}.json').read_text()) for number in range(3)]


@pytest.mark.parametrize('mesh', MESHES)
def test_every_process_of_a_mesh_gets_every_result(meshes, mesh):
  model = model_of(True)
  expected = log_likelihoods(model, params_of(model), plan(mixture(), LONGEST, 256))
  for result in meshes:
    row = result[str(mesh)]
    np.testing.assert_allclose(row['nats'], expected.nats, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(row['greedy'], expected.greedy)
    assert row['shape'][0] % math.prod(mesh[:2]) == 0


def test_rows_stay_where_they_are(meshes):
  for result in meshes:
    row = result['(8, 1, 1)']
    # Nothing but the results, a number for each slot, goes from device to device.
    batch, length = row['shape']
    assert set(row['gathered']) == {f'f32[{batch},{length}]', f'pred[{batch},{length}]'}


if __name__ == '__main__':
  if len(sys.argv) > 2:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'localhost:{sys.argv[2]}', 2, int(sys.argv[3]))
  main(Path(sys.argv[1]))
