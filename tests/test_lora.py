"""LoRA adapters in and out, against PEFT itself; the singular value decomposition beneath."""

import itertools
import json
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import Gemma3Config as MultimodalConfig
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from optimer_jax.checkpoints.names import EMBEDDING, Tensor, external_name, from_torch, to_torch
from optimer_jax.errors import UsageError, UserError
from optimer_jax.gemma3 import init_leaves, leaf_shapes
from optimer_jax.gemma3.config import to_hf
from optimer_jax.vectors import low_rank
from optimer_jax.vectors.lora import export_lora, open_adapter
from optimer_jax.vectors.low_rank import factorize

ALL = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
pytestmark = pytest.mark.filterwarnings('ignore')  # of peft and transformers about themselves


def lazy(leaves):
  return {
    name: Tensor(a.shape, a.dtype.name, lambda start=0, stop=None, a=a: a[start:stop])
    for name, a in leaves.items()
  }


@pytest.fixture(scope='module')
def base(small):
  return init_leaves(small, 0)


@pytest.fixture(scope='module')
def model_of(small):
  """Leaves as a torch model."""

  def build(leaves):
    model = Gemma3ForCausalLM(Gemma3TextConfig(**to_hf(small, 'float32')))
    state = {
      f'model.{external_name(name, 0)}': torch.from_numpy(to_torch(name, a).copy())
      for name, a in leaves.items()
    }
    missing, extra = model.load_state_dict(state, strict=False)
    assert missing == ['lm_head.weight'] and not extra
    return model.eval()

  return build


@pytest.fixture
def adapted(model_of, base, tmp_path):
  """A random adapter of the base, as peft saves it; gives its directory and peft's model."""

  def build(targets=ALL, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {'r': 4, 'lora_alpha': 6, 'init_lora_weights': False, **settings}
    model = get_peft_model(
      model_of(base), LoraConfig(target_modules=targets, task_type='CAUSAL_LM', **settings)
    )
    with torch.no_grad():
      seen = set()
      for name, value in model.named_parameters():
        if 'modules_to_save' in name and value.data_ptr() not in seen:
          value.add_(torch.randn_like(value), alpha=0.1)
        seen.add(value.data_ptr())
    model.save_pretrained(tmp_path / 'adapter')
    return tmp_path / 'adapter', model.eval()

  return build


def merged_leaves(model, config):
  state = model.merge_and_unload().state_dict()
  return {
    name: from_torch(name, state[f'model.{external_name(name, 0)}'].numpy(), shape)
    for name, shape in leaf_shapes(config).items()
  }


def logits(model, length=17):
  with torch.no_grad():
    return model(torch.arange(3, 3 + length)[None]).logits.numpy()


def close(actual, expected, tolerance=1e-6):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'use_rslora': True},
    {'fan_in_fan_out': True},  # means nothing for torch's Linear, and peft ignores it
    {'targets': ['q_proj', 'o_proj']},
    {'rank_pattern': {'q_proj': 2, 'layers.1.mlp.up_proj': 7}, 'alpha_pattern': {'.*mlp.*': 3}},
    {'alpha_pattern': {'proj': 99, 'k_proj': 5, 'layers.0.self_attn.k_proj': 2}},
    {'targets': ['v_proj', 'embed_tokens']},
    {'modules_to_save': ['norm', 'input_layernorm']},
    {'targets': ['q_proj'], 'modules_to_save': ['embed_tokens'], 'ensure_weight_tying': True},
    {'targets': ['q_proj'], 'modules_to_save': ['down_proj']},
  ],
  ids=str,
)
def test_expanded_adapter_is_what_peft_merges(settings, adapted, base, small):
  path, model = adapted(**settings)
  vector = open_adapter(path, small, lazy(base))
  assert {name: t.shape for name, t in vector.items()} == leaf_shapes(small)
  merged, changed = merged_leaves(model, small), 0
  for name, tensor in vector.items():
    delta = tensor.read()
    assert delta.dtype == np.float32 and delta.shape == tensor.shape
    close(base[name] + delta, merged[name])
    if (merged[name] == base[name]).all():
      assert not delta.any()
    changed += delta.any()
  assert changed >= 2


def test_tied_embedding_lora_is_the_model_that_was_trained(adapted, base, small, model_of):
  """peft's own merge adds a tied pair to the shared weight twice, so the logits are compared."""
  path, model = adapted(targets=['embed_tokens', 'q_proj'], ensure_weight_tying=True)
  vector = open_adapter(path, small, lazy(base))
  assert vector[EMBEDDING].read().any()
  ours = model_of({name: base[name] + t.read() for name, t in vector.items()})
  close(logits(ours), logits(model), 2e-6)


@pytest.mark.parametrize('part', ['lora_A', 'lora_B', 'scale', 'base_layer'])
def test_lm_head_that_differs_from_its_tied_embedding_is_refused(part, adapted, base, small):
  pattern = {'lm_head': 3} if part == 'scale' else {}
  targets = ['embed_tokens', 'q_proj']
  path, _ = adapted(targets=targets, ensure_weight_tying=True, alpha_pattern=pattern)
  if part != 'scale':
    tensors = load_file(path / 'adapter_model.safetensors')
    tensors[f'base_model.model.lm_head.{part}.weight'][2, 2] += 1
    save_file(tensors, path / 'adapter_model.safetensors')
  with pytest.raises(UserError, match='Gemma 3 ties them'):
    open_adapter(path, small, lazy(base))


def test_rows_of_an_adapter_are_the_rows_of_the_whole(adapted, base, small):
  path, _ = adapted(targets=[*ALL, 'embed_tokens'], modules_to_save=['input_layernorm'])
  vector = open_adapter(path, small, lazy(base))
  for tensor in vector.values():
    whole, n = tensor.read(), tensor.shape[0]
    cuts = sorted({0, 1, n // 2, n})
    parts = [tensor.read(a, b) for a, b in itertools.pairwise(cuts)]
    close(np.concatenate(parts), whole)
    np.testing.assert_array_equal(tensor.read(n // 2), parts[-1])


def test_half_precision_adapter_is_expanded_in_float32(adapted, base, small):
  path, _ = adapted(targets=['q_proj'])
  tensors = load_file(path / 'adapter_model.safetensors')
  rounded = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
  save_file(rounded, path / 'adapter_model.safetensors')
  leaf, module = 'layers.1.attn.q_proj', 'base_model.model.model.layers.1.self_attn.q_proj'
  a, b = (rounded[f'{module}.lora_{x}.weight'].astype(np.float64) for x in 'AB')
  delta = open_adapter(path, small, lazy(base))[leaf].read()
  close(delta, ((6 / 4) * b @ a).T.reshape(delta.shape))


@pytest.mark.parametrize('prefix', ['model.language_model.', 'language_model.model.'])
def test_prefixes_of_multimodal_models_are_read(prefix, adapted, base, small):
  path, _ = adapted()
  expected = {name: t.read() for name, t in open_adapter(path, small, lazy(base)).items()}
  file = path / 'adapter_model.safetensors'
  was, now = 'base_model.model.model.', f'base_model.model.{prefix}'
  save_file({now + key.removeprefix(was): v for key, v in load_file(file).items()}, file)
  for name, tensor in open_adapter(path, small, lazy(base)).items():
    np.testing.assert_array_equal(tensor.read(), expected[name])


LAYER = 'base_model.model.model.layers.0'


def put(key, value):
  return lambda tensors: tensors.update({key: np.asarray(value, np.float32)})


def cut(tensors):
  key = f'{LAYER}.self_attn.q_proj.lora_B.weight'
  tensors[key] = np.ascontiguousarray(tensors[key][:-1])


@pytest.mark.parametrize(
  'config, change, message',
  [
    ({'peft_type': 'LOHA'}, None, "adapter_config.json: peft_type is 'LOHA', but only LORA"),
    ({'use_dora': True}, None, 'use_dora is set, but only plain LoRA'),
    ({'trainable_token_indices': [1]}, None, 'trainable_token_indices is set'),
    ({'init_lora_weights': 'pissa'}, None, "init_lora_weights 'pissa' changes the base"),
    ({'r': 5}, None, r'lora_A of model.layers.0.* has shape \[4, 32\].* \[5, 32\]'),
    ({'r': 0}, None, 'make no sense'),
    ({'lora_alpha': None}, None, 'make no sense'),
    ({'lora_alpha': float('nan')}, None, 'make no sense'),
    ({'rank_pattern': {'(': 3}}, None, 'make no sense'),
    ({}, cut, r'lora_B of model.layers.0.self_attn.q_proj has shape \[63, 4\].* \[64, 4\]'),
    ({}, lambda t: t.clear(), 'has no tensors'),
    ({}, lambda t: t.pop(f'{LAYER}.mlp.up_proj.lora_A.weight'), 'no lora_A of model.layers.0.mlp'),
    ({}, put(f'{LAYER}.mlp.up_proj.lora_magnitude_vector', [1]), 'up_proj.*it is DoRA'),
    ({}, put(f'{LAYER}.mlp.up_proj.lora_B.bias', [1]), r'up_proj.lora_B.bias, but .* no biases'),
    ({}, put(f'{LAYER}.mlp.up_proj.bias', [1]), "no biases: train it with bias='none'"),
    (
      {},
      put('base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight', [[1]]),
      'vision_tower.*but only the text tower',
    ),
    ({}, put(f'{LAYER}.mlp.up_proj.lora_E', [1]), 'a tensor .*lora_E'),
    ({}, put(f'{LAYER}.mlp.up_proj.lora_embedding_A', [[1]]), 'lora_embedding_A that plain LoRA'),
    (
      {},
      put(f'{LAYER}.input_layernorm.lora_A.weight', [[1]]),
      'norm.lora_A.weight that',
    ),
    ({}, put('base_model.model.model.layers.9.mlp.up_proj.lora_A.weight', [[1]]), 'layers.9.mlp'),
    ({}, put('base_model.model.model.norm.weight', [1]), r'norm has shape \[1\].* \[32\]'),
    ({}, put('base_model.model.lm_head.weight', np.ones((300, 32))), 'Gemma 3 ties them'),
    ({}, put('base_model.model.lm_head.lora_A.weight', np.ones((4, 32))), 'Gemma 3 ties them'),
    ({}, put('base_model.model.model.embed_tokens.weight', np.ones((300, 32))), 'ties them'),
  ],
)
def test_what_is_not_plain_lora_is_refused_by_name(config, change, message, adapted, base, small):
  path, _ = adapted()
  raw = json.loads((path / 'adapter_config.json').read_text()) | config
  (path / 'adapter_config.json').write_text(json.dumps(raw))
  tensors = load_file(path / 'adapter_model.safetensors')
  if change:
    change(tensors)
  save_file(tensors, path / 'adapter_model.safetensors')
  with pytest.raises(UserError, match=message) as error:
    open_adapter(path, small, lazy(base))
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'use_dora': True}, 'use_dora'),
    ({'targets': ['lm_head', 'q_proj']}, 'Gemma 3 ties them'),
    ({'modules_to_save': ['embed_tokens']}, 'Gemma 3 ties them'),
    ({'modules_to_save': ['embed_tokens', 'lm_head']}, 'Gemma 3 ties them'),
    ({'lora_bias': True}, 'lora_bias'),
    ({'trainable_token_indices': [3, 5]}, 'trainable_token_indices'),
  ],
  ids=str,
)
def test_adapters_of_peft_that_no_vector_is_are_refused(settings, message, adapted, base, small):
  path, _ = adapted(**settings)
  with pytest.raises(UserError, match=message):
    open_adapter(path, small, lazy(base))


@pytest.mark.parametrize('part', ['layers.1.mlp.down_proj.lora_B.weight', 'norm.weight'])
def test_values_that_are_not_finite_are_refused_when_they_are_read(part, adapted, base, small):
  path, _ = adapted(modules_to_save=['norm'])
  tensors = load_file(path / 'adapter_model.safetensors')
  tensors[f'base_model.model.model.{part}'].reshape(-1)[5] = np.nan
  save_file(tensors, path / 'adapter_model.safetensors')
  vector = open_adapter(path, small, lazy(base))
  with pytest.raises(UserError, match=rf'{part.split(".lora")[0].removesuffix(".weight")} has val'):
    for tensor in vector.values():
      tensor.read()


def test_missing_and_damaged_files_are_named(adapted, base, small):
  path, _ = adapted()
  file = path / 'adapter_model.safetensors'
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2])
  with pytest.raises(UserError, match=r'adapter_model\.safetensors is damaged'):
    open_adapter(path, small, lazy(base))
  file.unlink()
  with pytest.raises(UserError, match=r'adapter_model\.safetensors is missing'):
    open_adapter(path, small, lazy(base))
  (path / 'adapter_config.json').unlink()
  with pytest.raises(UserError, match=r'adapter_config\.json is missing'):
    open_adapter(path, small, lazy(base))


# --- the decomposition ---


def with_spectrum(m, n, singular, seed=0):
  rng = np.random.default_rng(seed)
  k = len(singular)
  u, v = (np.linalg.qr(rng.standard_normal((s, k)))[0] for s in (m, n))
  return ((u * singular) @ v.T).astype(np.float32)


def residual(matrix, a, b):
  return np.linalg.norm(matrix.astype(np.float64) - (b.astype(np.float64) @ a).T)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.integers(0, 100))
def test_exact_factors_leave_the_tail_singular_values(m, n, rank, seed):
  matrix = np.random.default_rng(seed).standard_normal((m, n), np.float32)
  a, b, error = factorize(matrix, rank)
  assert a.shape == (rank, m) and b.shape == (n, rank) and a.dtype == b.dtype == np.float32
  assert a.flags.c_contiguous and b.flags.c_contiguous
  singular = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
  norm = np.linalg.norm(singular)
  tail = np.linalg.norm(singular[rank:]) / norm
  assert abs(error - tail) < 1e-6
  assert abs(residual(matrix, a, b) / norm - tail) < 1e-6


def test_random_start_finds_nearly_the_best(monkeypatch):
  singular = 1 / np.arange(1, 301)
  matrix = with_spectrum(500, 300, singular)
  monkeypatch.setattr(low_rank, 'EXACT_SIDE', 10)
  for oriented in (matrix, np.ascontiguousarray(matrix.T)):
    a, b, error = factorize(oriented, 20)
    best = np.linalg.norm(singular[20:]) / np.linalg.norm(singular)
    assert best * (1 - 1e-5) <= error < 1.01 * best
    # Measured on what is returned, not estimated from norms.
    assert abs(residual(oriented, a, b) / np.linalg.norm(oriented) - error) < 1e-6
    again = factorize(oriented, 20)
    np.testing.assert_array_equal(a, again[0])


def test_random_start_recovers_a_matrix_of_lower_rank(monkeypatch):
  monkeypatch.setattr(low_rank, 'EXACT_SIDE', 10)
  matrix = with_spectrum(400, 300, np.linspace(1, 2, 12))
  a, b, error = factorize(matrix, 16)
  assert error < 1e-6 and residual(matrix, a, b) < 1e-6 * np.linalg.norm(matrix)


def test_tiny_error_is_measured_where_norms_would_cancel():
  singular = np.array([1.0, 1.0, 3e-5])
  *_, error = factorize(with_spectrum(50, 40, singular), 2)
  assert error == pytest.approx(3e-5 / np.linalg.norm(singular), rel=1e-2)


def test_blocks_of_rows_do_not_change_the_factors(monkeypatch):
  matrix = with_spectrum(70, 30, 1 / np.arange(1, 31))
  whole = factorize(matrix, 5)
  monkeypatch.setattr(low_rank, '_BLOCK', 100)
  a, b, error = factorize(matrix, 5)
  assert error == pytest.approx(whole[2], rel=1e-6)
  close((b @ a), whole[1] @ whole[0], 1e-5)


def test_matrix_of_zeros_and_factors_of_one_magnitude():
  a, b, error = factorize(np.zeros((8, 5), np.float32), 3)
  assert not a.any() and error == 0
  a, b, _ = factorize(1e-6 * with_spectrum(30, 20, np.full(4, 7.0)), 4)
  ratio = np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=0)
  assert ((ratio >= 0.5) & (ratio <= 2)).all()


# --- export ---


@pytest.fixture
def delta(small):
  """A change of every leaf but the norms, of full rank."""
  leaves = init_leaves(small, 7)
  return {name: np.float32(0.5) * a for name, a in leaves.items()}


@pytest.mark.parametrize('include_embedding', [False, True])
def test_exported_adapter_gives_the_merged_models_logits(
  include_embedding, base, delta, small, model_of, tmp_path
):
  if not include_embedding:
    delta[EMBEDDING] = np.zeros_like(delta[EMBEDDING])
  report = export_lora(lazy(delta), tmp_path / 'out', 64, 'me/base', 'model.', include_embedding)
  assert report['error'] < 1e-6
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    loaded = PeftModel.from_pretrained(model_of(base), tmp_path / 'out').eval()
  assert not [w for w in told if 'keys' in str(w.message)]  # missing or left over
  assert loaded.peft_config['default'].base_model_name_or_path == 'me/base'
  expected = logits(model_of({name: base[name] + delta[name] for name in base}))
  close(logits(loaded), expected, 5e-6)
  assert np.abs(logits(model_of(base)) - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize('include_embedding', [False, True])
def test_export_for_a_multimodal_model_leaves_the_vision_tower_alone(
  include_embedding, base, delta, small, model_of, tmp_path
):
  text = to_hf(small, 'float32')
  vision = {
    'hidden_size': 16,
    'intermediate_size': 32,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'image_size': 28,
    'patch_size': 14,
  }
  model = Gemma3ForConditionalGeneration(
    MultimodalConfig(text_config=text, vision_config=vision, mm_tokens_per_image=4)
  ).eval()
  state = model_of(base).model.state_dict()
  model.model.language_model.load_state_dict(state)
  if not include_embedding:
    delta[EMBEDDING] = np.zeros_like(delta[EMBEDDING])
  export_lora(lazy(delta), tmp_path / 'out', 64, 'b', 'language_model.model.', include_embedding)
  for key in load_file(tmp_path / 'out' / 'adapter_model.safetensors'):
    assert key.startswith(('base_model.model.model.language_model.', 'base_model.model.lm_head.'))
  loaded = PeftModel.from_pretrained(model, tmp_path / 'out').eval()
  adapted = [name for name, _ in loaded.named_parameters() if 'lora_' in name]
  assert adapted and not any('vision' in name for name in adapted)
  close(logits(loaded), logits(model_of({name: base[name] + delta[name] for name in base})), 5e-6)


def test_export_then_open_is_the_delta_from_its_true_rank_on(adapted, base, small, tmp_path):
  path, _ = adapted(targets=[*ALL, 'embed_tokens'], r=5)
  vector = open_adapter(path, small, lazy(base))
  for rank in (5, 9):
    export_lora(vector, tmp_path / 'out', rank, 'b', 'model.', include_embedding=True)
    again = open_adapter(tmp_path / 'out', small, lazy(base))
    for name, tensor in vector.items():
      close(again[name].read(), tensor.read(), 2e-6)


def test_reconstruction_is_measured_per_leaf_module_and_whole(base, delta, small, tmp_path):
  rng = np.random.default_rng(3)
  for name in delta:
    if name.endswith('.scale'):
      delta[name] = rng.standard_normal(delta[name].shape, np.float32) * np.float32(0.1)
  square = {name: float(np.sum(a.astype(np.float64) ** 2)) for name, a in delta.items()}
  last = 1.0
  for rank in (1, 8, 24):
    report = export_lora(lazy(delta), tmp_path / 'out', rank, 'b', 'model.')
    assert json.loads((tmp_path / 'out' / 'reconstruction.json').read_text()) == report
    again = open_adapter(tmp_path / 'out', small, lazy(base))
    lost = {
      name: float(np.sum((delta[name].astype(np.float64) - again[name].read()) ** 2))
      for name in delta
    }
    for name, entry in report['leaves'].items():
      assert entry['norm'] == pytest.approx(square[name] ** 0.5)
      assert entry['error'] == pytest.approx((lost[name] / square[name]) ** 0.5, abs=1e-6)
      if name.endswith('_proj'):
        singular = np.linalg.svd(to_torch(name, delta[name]), compute_uv=False)
        tail = np.linalg.norm(singular[rank:]) / np.linalg.norm(singular)
        assert entry['error'] == pytest.approx(tail, abs=1e-6)
    assert report['error'] == pytest.approx((sum(lost.values()) / sum(square.values())) ** 0.5)
    down = [name for name in delta if name.endswith('down_proj')]
    assert report['modules']['down_proj']['error'] == pytest.approx(
      (sum(lost[n] for n in down) / sum(square[n] for n in down)) ** 0.5
    )
    assert report['modules']['norms']['error'] == report['modules']['embedding']['error'] == 1
    assert report['left_out']['embedding'] == pytest.approx(
      square[EMBEDDING] / sum(square.values())
    )
    assert set(report['left_out']) == {'embedding', 'norms'}
    kept = [name for name in delta if name.endswith('_proj')]
    assert report['error_of_adapted'] == pytest.approx(
      (sum(lost[n] for n in kept) / sum(square[n] for n in kept)) ** 0.5, abs=1e-6
    )
    assert report['error_of_adapted'] < last
    last = report['error_of_adapted']


def test_bfloat16_vector_is_exported_from_its_float32_values(base, delta, small, tmp_path):
  rounded = {name: a.astype(ml_dtypes.bfloat16) for name, a in delta.items()}
  export_lora(lazy(rounded), tmp_path / 'out', 32, 'b', 'model.')
  again = open_adapter(tmp_path / 'out', small, lazy(base))
  leaf = 'layers.0.mlp.up_proj'
  close(again[leaf].read(), rounded[leaf].astype(np.float32), 2e-6)


def test_export_that_fails_leaves_the_old_adapter(base, delta, small, tmp_path):
  export_lora(lazy(delta), tmp_path / 'out', 2, 'b', 'model.')
  before = (tmp_path / 'out' / 'adapter_model.safetensors').read_bytes()
  for bad in ('layers.1.attn.o_proj', 'final_norm.scale'):
    broken = {name: a.copy() for name, a in delta.items()}
    broken[bad].reshape(-1)[3] = np.inf
    with pytest.raises(UserError, match=rf'{bad} has values that are not finite'):
      export_lora(lazy(broken), tmp_path / 'out', 2, 'b', 'model.')
  assert (tmp_path / 'out' / 'adapter_model.safetensors').read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_wrong_ranks_and_prefixes_are_refused(delta, tmp_path):
  with pytest.raises(UsageError, match='a rank of 1 or more, not 0'):
    export_lora(lazy(delta), tmp_path / 'out', 0, 'b', 'model.')
  with pytest.raises(UsageError, match=r"not 'text\.'"):
    export_lora(lazy(delta), tmp_path / 'out', 2, 'b', 'text.')
