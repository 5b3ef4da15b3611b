"""Models that come in from files of others and go out to them again."""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from imported_model import CONFIG, VOCABULARY, assert_same_leaves, bring_in, save_hf
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM

from benchmarks.parity import torch_logits, torch_model
from optimer_jax.checkpoints import base, huggingface, store
from optimer_jax.checkpoints.base import export, open_source, read_leaves
from optimer_jax.gemma3 import leaf_shapes

# Orbax gives up a damaged read while others are under way, and those complain afterwards.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 20), dtype=np.int32)
# Ascending, without the first or last id, with gaps.
KEPT = np.array([1, 2, 3, 7, 8, 40, 41, 63, 70], np.int32)


@pytest.fixture(scope='module')
def theirs():
  return torch_model(CONFIG)


@pytest.fixture(scope='module')
def hf(theirs, tmp_path_factory) -> Path:
  return save_hf(tmp_path_factory.mktemp('hf'), theirs)


@pytest.fixture(scope='module')
def imported(hf, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('imported') / 'base'
  bring_in(hf, path)
  return path


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
  out = {}
  for file in path.glob('*.safetensors'):
    out |= safetensors.torch.load_file(file)
  return out


def config_in(path: Path) -> dict:
  return json.loads((path / 'config.json').read_text())


def write_hf(path: Path, tensors: dict, config: dict, shards: int = 1) -> Path:
  path.mkdir()
  tensors = {name: tensor.clone() for name, tensor in tensors.items()}
  names = sorted(tensors)
  index = {}
  for i in range(shards):
    file = f'model-{i + 1:05}-of-{shards:05}.safetensors' if shards > 1 else 'model.safetensors'
    part = {name: tensors[name] for name in names[i::shards]}
    safetensors.torch.save_file(part, path / file, metadata={'format': 'pt'})
    index |= dict.fromkeys(part, file)
  if shards > 1:
    content = json.dumps({'metadata': {}, 'weight_map': index})
    (path / 'model.safetensors.index.json').write_text(content)
  (path / 'config.json').write_text(json.dumps(config))
  return path


def assert_same_tensors(found: dict, expected: dict):
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    assert found[name].dtype == tensor.dtype, name
    assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


# In and out again.


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
  ('prefix', 'shards', 'others', 'head'),
  [
    ('model.', 1, '', ''),
    ('model.', 3, '', 'lm_head.weight'),
    ('model.language_model.', 1, 'model.', ''),
    ('model.language_model.', 2, 'model.', 'lm_head.weight'),
    ('language_model.model.', 1, '-', 'language_model.lm_head.weight'),
    ('language_model.model.', 4, '-', ''),
  ],
)
def test_import_then_export_is_bitwise(hf, theirs, tmp_path, prefix, shards, others, head, dtype):
  plain = {k: v.to(dtype) for k, v in theirs.model.state_dict().items()}
  tensors = {prefix + name: tensor for name, tensor in plain.items()}
  config = {**config_in(hf), 'dtype': str(dtype).removeprefix('torch.')}
  if others:
    others = others.replace('-', '')
    tensors[f'{others}vision_tower.vision_model.embeddings.patch.weight'] = torch.randn(3, 2, 4)
    tensors[f'{others}vision_tower.vision_model.bias'] = torch.randn(5).half()
    tensors[f'{others}multi_modal_projector.mm_soft_emb_norm.weight'] = torch.randn(7).to(dtype)
    config = {'model_type': 'gemma3', 'text_config': config, 'vision_config': {'x': [1, 2.5]}}
  if head:
    tensors[head] = plain['embed_tokens.weight']
  source = write_hf(tmp_path / 'source', tensors, config, shards)

  manifest = bring_in(source, tmp_path / 'base')
  assert manifest.model == CONFIG
  loaded, leaves = store.load(tmp_path / 'base', 'base')
  assert loaded == manifest and list(leaves) == list(leaf_shapes(CONFIG))
  q = plain['layers.1.self_attn.q_proj.weight'].float().numpy()  # (N H) D
  np.testing.assert_array_equal(
    leaves['layers.1.attn.q_proj'].astype(np.float32), q.T.reshape(32, 4, 16)
  )
  export(tmp_path / 'base', tmp_path / 'base', tmp_path / 'out')
  assert_same_tensors(tensors_in(tmp_path / 'out'), tensors)
  assert config_in(tmp_path / 'out') == config


def test_transformers_loads_an_export(theirs, hf, imported, tmp_path):
  export(imported, imported, tmp_path / 'out')
  assert_same_tensors(tensors_in(tmp_path / 'out'), tensors_in(hf))
  assert config_in(tmp_path / 'out') == config_in(hf)
  for file in ('tokenizer.json', 'tokenizer.model'):
    assert (tmp_path / 'out' / file).read_bytes() == (hf / file).read_bytes()
  card = (tmp_path / 'out' / 'README.md').read_text()
  assert 'Gemma Terms of Use' in card and store.read_manifest(imported).fingerprint in card
  again, info = AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', attn_implementation='eager', output_loading_info=True
  )
  assert type(again) is Gemma3ForCausalLM
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  np.testing.assert_array_equal(torch_logits(again, TOKENS), torch_logits(theirs, TOKENS))


def test_transformers_multimodal_model(theirs, tmp_path):
  """A whole Gemma3ForConditionalGeneration, as transformers itself names and saves it."""
  from transformers import AutoModelForImageTextToText
  from transformers.models.gemma3 import Gemma3Config as TheirConfig
  from transformers.models.gemma3 import Gemma3ForConditionalGeneration

  vision = {'hidden_size': 16, 'intermediate_size': 16, 'num_hidden_layers': 1}
  vision |= {'num_attention_heads': 2, 'image_size': 28, 'patch_size': 14}
  ids = {'boi_token_index': 90, 'eoi_token_index': 91, 'image_token_index': 92}
  config = TheirConfig(
    text_config=theirs.config.to_dict(), vision_config=vision, mm_tokens_per_image=4, **ids
  )
  whole = Gemma3ForConditionalGeneration._from_config(config, attn_implementation='eager').eval()
  whole.model.language_model.load_state_dict(theirs.model.state_dict())
  whole.save_pretrained(tmp_path / 'hf')
  saved = tensors_in(tmp_path / 'hf')
  assert any('vision_tower.' in name for name in saved)

  bring_in(tmp_path / 'hf', tmp_path / 'base', KEPT)
  export(tmp_path / 'base', tmp_path / 'base', tmp_path / 'out')
  assert_same_tensors(tensors_in(tmp_path / 'out'), saved)
  assert config_in(tmp_path / 'out') == config_in(tmp_path / 'hf')
  again = AutoModelForImageTextToText.from_pretrained(
    tmp_path / 'out', attn_implementation='eager'
  ).eval()
  np.testing.assert_array_equal(torch_logits(again, TOKENS), torch_logits(theirs, TOKENS))


def test_hub_id(hf, tmp_path, monkeypatch, refused):
  import huggingface_hub.constants as hub

  monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  place = tmp_path / 'hub' / 'models--someone--gemma'
  shutil.copytree(hf, place / 'snapshots' / 'abc')
  (place / 'refs').mkdir()
  (place / 'refs' / 'main').write_text('abc')
  source = open_source('someone/gemma', tmp_path)
  assert (source.name, source.config) == ('someone/gemma', CONFIG)
  refused(lambda: open_source('someone/else', tmp_path), 'someone/else')
  refused(lambda: open_source(f'{tmp_path}/no such folder', tmp_path), 'no such folder')


def test_random_source(tmp_path, refused):
  one, again, other = (open_source(f'random:tiny:{seed}', tmp_path) for seed in (3, 3, 4))
  read = lambda source: read_leaves(source, None)[1]
  assert_same_leaves(read(one), read(again))
  assert not np.array_equal(read(one)[base.EMBEDDING], read(other)[base.EMBEDDING])
  assert one.config == huggingface.from_hf(one.config_json, '')
  refused(lambda: open_source('random:huge:0', tmp_path), 'huge', '270m')
  refused(lambda: open_source('package:no_such_package', tmp_path), 'no_such_package')


# Vocabularies.


@pytest.mark.parametrize('text_vocabulary', [262_144, 64], ids=['all text', '32 extra rows'])
@pytest.mark.parametrize('trimmed', [False, True])
def test_vocabulary(hf, tmp_path, monkeypatch, text_vocabulary, trimmed):
  monkeypatch.setattr(base, 'TEXT_VOCABULARY', text_vocabulary)
  kept = KEPT[text_vocabulary > KEPT] if trimmed else None
  manifest = bring_in(hf, tmp_path / 'base', kept)
  _, leaves = store.load(tmp_path / 'base')
  full = tensors_in(hf)['model.embed_tokens.weight'].numpy()
  rows = kept if trimmed else np.arange(min(text_vocabulary, VOCABULARY))
  assert manifest.model == dataclasses.replace(CONFIG, vocab_size=len(rows))
  np.testing.assert_array_equal(leaves[base.EMBEDDING], full[rows])
  found = base.kept_vocabulary(tmp_path / 'base')
  if len(rows) < VOCABULARY:
    np.testing.assert_array_equal(found, rows)
  else:
    assert found is None
  assert any('trimmed to' in note for note in manifest.facts['notes']) == trimmed
  export(tmp_path / 'base', tmp_path / 'base', tmp_path / 'out')
  assert_same_tensors(tensors_in(tmp_path / 'out'), tensors_in(hf))
  assert config_in(tmp_path / 'out') == config_in(hf)


@pytest.mark.parametrize('dtype', [None, 'float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('head', [False, True])
def test_export_of_a_trained_model(hf, theirs, tmp_path, head, dtype):
  tensors = {f'model.{k}': v for k, v in theirs.model.state_dict().items()}
  if head:
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
  config = {**config_in(hf), 'dtype': 'bfloat16'}
  source = write_hf(tmp_path / 'source', tensors, config)
  manifest = bring_in(source, tmp_path / 'base', KEPT)

  # A float32 model whose every value is a third more, trained from the bfloat16 base.
  _, leaves = store.load(tmp_path / 'base')
  trained = {k: v.astype(np.float32) * np.float32(4 / 3) for k, v in leaves.items()}
  store.save(
    tmp_path / 'cpt', 'cpt', manifest.model, trained, parents={'base': manifest.fingerprint}
  )
  export(tmp_path / 'cpt', tmp_path / 'base', tmp_path / 'out', dtype)

  kind = getattr(torch, dtype or 'bfloat16')
  expected = {k: (v.float() * np.float32(4 / 3)).to(kind) for k, v in tensors.items()}
  unkept = np.setdiff1d(np.arange(VOCABULARY), KEPT)
  for name in ('model.embed_tokens.weight', 'lm_head.weight'):
    if name in expected:  # rows that were not trained are the base's
      expected[name][unkept] = tensors[name][unkept].to(kind)
  assert_same_tensors(tensors_in(tmp_path / 'out'), expected)
  found = config_in(tmp_path / 'out')
  assert found['dtype'] == (dtype or 'bfloat16')
  if dtype is None:
    assert found == config
  again = AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  assert again.dtype == kind


def test_sharded_export(hf, imported, tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface, 'SHARD_BYTES', 20_000)
  export(imported, imported, tmp_path / 'out')
  files = sorted((tmp_path / 'out').glob('*.safetensors'))
  index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
  assert len(files) > 3
  assert [f.name for f in files] == sorted(set(index['weight_map'].values()))
  assert files[0].name == f'model-00001-of-{len(files):05}.safetensors'
  for file in files:
    held = safetensors.torch.load_file(file)
    size = sum(t.nbytes for t in held.values())
    assert size <= 20_000 or len(held) == 1
    assert {k for k, v in index['weight_map'].items() if v == file.name} == held.keys()
  expected = tensors_in(hf)
  assert index['metadata']['total_size'] == sum(t.nbytes for t in expected.values())
  assert_same_tensors(tensors_in(tmp_path / 'out'), expected)
  assert_same_leaves(
    read_leaves(open_source(str(tmp_path / 'out'), tmp_path), None)[1], store.load(imported)[1]
  )
  again = AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  assert_same_tensors(
    {k: v for k, v in again.state_dict().items() if k != 'lm_head.weight'}, expected
  )


def test_export_refuses_what_is_not_of_the_base(imported, tmp_path, refused):
  manifest, leaves = store.load(imported)
  make = lambda name, kind, **more: store.save(
    tmp_path / name, kind, manifest.model, leaves, **more
  )
  make('stranger', 'merged', parents={'base': '0123456789abcdef'})
  make('vector', 'vector', parents={'base': manifest.fingerprint})
  out = tmp_path / 'out'
  refused(lambda: export(tmp_path / 'stranger', imported, out), 'stranger', '01234567')
  refused(lambda: export(tmp_path / 'vector', imported, out), 'vector')
  refused(lambda: export(imported, tmp_path / 'stranger', out), 'stranger')
  refused(lambda: export(imported, tmp_path / 'no', out), 'no/manifest.json')


# Bad files of Hugging Face's layout.


def drop(name):
  return lambda tensors: tensors.pop(name)


def put(name, *shape, dtype=torch.float32):
  return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    (drop('model.layers.1.self_attn.k_norm.weight'), 'model.layers.1.self_attn.k_norm.weight'),
    (drop('model.norm.weight'), 'model.norm.weight'),
    (drop('model.embed_tokens.weight'), 'embed_tokens.weight'),
    (put('model.layers.2.mlp.up_proj.weight', 64, 32), 'model.layers.2.mlp.up_proj.weight'),
    (put('model.layers.0.self_attn.q_proj.bias', 64), 'model.layers.0.self_attn.q_proj.bias'),
    (put('score.weight', 2, 32), 'score.weight'),
    (put('model.layers.1.mlp.down_proj.weight', 64, 32), 'model.layers.1.mlp.down_proj.weight'),
    (put('model.norm.weight', 33), 'model.norm.weight'),
    (put('model.embed_tokens.weight', 95, 32), 'model.embed_tokens.weight'),
    (put('model.norm.weight', 32, dtype=torch.int8), 'model.norm.weight'),
    (put('lm_head.weight', VOCABULARY, 32), 'lm_head.weight'),
  ],
)
@pytest.mark.parametrize('shards', [1, 2])
def test_wrong_tensors(hf, tmp_path, refused, shards, change, named):
  tensors = tensors_in(hf)
  change(tensors)
  bad = write_hf(tmp_path / 'bad', tensors, config_in(hf), shards)
  (tmp_path / 'tokenizer').mkdir()
  refused(lambda: bring_in(bad, tmp_path / 'base'), str(bad), named)


def test_missing_and_damaged_files(hf, tmp_path, refused):
  tensors, config = tensors_in(hf), config_in(hf)
  bad = write_hf(tmp_path / 'bad', tensors, config, 3)
  (tmp_path / 'tokenizer').mkdir()
  index = bad / 'model.safetensors.index.json'
  action = lambda: bring_in(bad, tmp_path / 'base')

  (bad / 'model-00002-of-00003.safetensors').rename(tmp_path / 'away')
  refused(action, 'model-00002-of-00003.safetensors is missing')
  (tmp_path / 'away').rename(bad / 'model-00002-of-00003.safetensors')
  action()
  shutil.rmtree(tmp_path / 'base')

  whole = index.read_text()
  for content in (whole[:-20], '', '{"metadata": {}}', '[]'):
    index.write_text(content)
    refused(action, 'model.safetensors.index.json')
  for file in (index, *bad.glob('*.safetensors')):
    file.unlink()
  refused(action, str(bad), '.safetensors')

  for content in (json.dumps(config)[:-10], '', '{}', json.dumps({'model_type': 'llama'})):
    (bad / 'config.json').write_text(content)
    refused(action, 'config.json')
  (bad / 'config.json').unlink()
  refused(action, 'config.json')


def cuts(size: int, count: int = 24) -> list[int]:
  """Lengths to cut a file to: the first bytes one by one, then evenly, then the last byte."""
  return sorted({0, 1, 7, 8, 9, *np.linspace(10, size - 2, count).astype(int).tolist(), size - 1})


def test_truncated_safetensors(hf, tmp_path, refused):
  bad = Path(shutil.copytree(hf, tmp_path / 'bad'))
  (tmp_path / 'tokenizer').mkdir()
  whole = (hf / 'model.safetensors').read_bytes()
  for length in cuts(len(whole)):
    (bad / 'model.safetensors').write_bytes(whole[:length])
    refused(lambda: bring_in(bad, tmp_path / 'base'), 'model.safetensors')


# GGUF.


def write_gguf(path: Path, theirs, quantised=False, arch='gemma3', skip=(), tokens=True) -> None:
  """As llama.cpp's converter writes it, names from the gguf package's own table."""
  writer = gguf.GGUFWriter(path, arch)
  c = CONFIG
  writer.add_block_count(c.num_layers)
  writer.add_embedding_length(c.embed_dim)
  writer.add_feed_forward_length(c.mlp_dim)
  writer.add_head_count(c.num_heads)
  writer.add_head_count_kv(c.num_kv_heads)
  if 'key_length' not in skip:
    writer.add_key_length(c.head_dim)
  writer.add_value_length(c.head_dim)
  writer.add_layer_norm_rms_eps(c.norm_eps)
  writer.add_sliding_window(c.window)
  writer.add_rope_freq_base(c.global_theta)
  writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
  writer.add_rope_scaling_factor(c.rope_scale)
  if tokens:
    names = ['<pad>', '<eos>', '<bos>', '<unk>', *(f'piece{i}' for i in range(VOCABULARY - 4))]
    writer.add_tokenizer_model('llama')
    writer.add_token_list(names)
    writer.add_token_scores([float(-i) for i in range(VOCABULARY)])
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * 92)
  table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, c.num_layers)
  for name, tensor in theirs.state_dict().items():
    if name == 'lm_head.weight' or name in skip:
      continue
    values = tensor.numpy()
    if name.endswith('norm.weight'):
      values = values + 1
    key = table.get_name(name, try_suffixes=('.weight',))
    if quantised and values.ndim == 2:
      kind = gguf.GGMLQuantizationType.Q8_0
      writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
      writer.add_tensor(key, values)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(scope='module')
def rounded():
  """A model for GGUF: 1 + w of its norms is exact, and its query scale is GGUF's, head_dim."""
  model = torch_model(dataclasses.replace(CONFIG, query_scalar=16.0))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if name.endswith('norm.weight'):
        parameter.copy_((parameter * 1024).round() / 1024 + 0.0)  # no -0
  return model


def test_gguf_equals_hugging_face(rounded, tmp_path):
  rounded.save_pretrained(tmp_path / 'hf')
  write_gguf(tmp_path / 'm.gguf', rounded)
  source = open_source(str(tmp_path / 'm.gguf'), tmp_path)
  expected = open_source(str(tmp_path / 'hf'), tmp_path)
  assert source.config == expected.config
  assert_same_leaves(read_leaves(source, None)[1], read_leaves(expected, None)[1])

  bring_in(tmp_path / 'm.gguf', tmp_path / 'base', KEPT)
  export(tmp_path / 'base', tmp_path / 'base', tmp_path / 'out')
  assert_same_tensors(tensors_in(tmp_path / 'out'), tensors_in(tmp_path / 'hf'))
  assert json.loads((tmp_path / 'out' / 'tokenizer.json').read_text())['model']['vocab']
  again = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', attn_implementation='eager')
  np.testing.assert_array_equal(torch_logits(again, TOKENS), torch_logits(rounded, TOKENS))


def test_quantised_gguf(rounded, tmp_path):
  write_gguf(tmp_path / 'm.gguf', rounded, quantised=True)
  _, leaves = read_leaves(open_source(str(tmp_path / 'm.gguf'), tmp_path), None)
  rounded.save_pretrained(tmp_path / 'hf')
  _, exact = read_leaves(open_source(str(tmp_path / 'hf'), tmp_path), None)
  for name, leaf in exact.items():
    if leaf.ndim == 1:
      np.testing.assert_array_equal(leaves[name], leaf)
      continue
    # Q8_0 rounds each 32 values of a row, [out, in], to 255 steps, and the step to float16.
    a, b = (base.to_torch(name, x).reshape(-1, 32) for x in (leaves[name], leaf))
    step = np.abs(b).max(1, keepdims=True) / 127
    error = np.abs(a - b)
    assert error.max() > 0 and (error <= step * (0.5 + 127 / 2048)).all(), name


def test_truncated_gguf(rounded, tmp_path, refused):
  path = tmp_path / 'm.gguf'
  (tmp_path / 'tokenizer').mkdir()
  write_gguf(path, rounded)
  whole = path.read_bytes()
  header = whole.index(b'blk.0.')  # in the middle of the tensors' table
  for length in {*cuts(len(whole)), 20, 24, 100, header, header + 30}:
    path.write_bytes(whole[:length])
    refused(lambda: bring_in(path, tmp_path / 'base'), 'm.gguf')


@pytest.mark.parametrize(
  ('how', 'named'),
  [
    ({'arch': 'llama'}, 'llama'),
    ({'skip': ['key_length']}, 'attention.key_length'),
    ({'skip': ['model.layers.1.mlp.up_proj.weight']}, 'blk.1.ffn_up.weight'),
    ({'tokens': False}, 'tokenizer.ggml.tokens'),
  ],
)
def test_wrong_gguf(rounded, tmp_path, refused, how, named):
  write_gguf(tmp_path / 'm.gguf', rounded, **how)
  (tmp_path / 'tokenizer').mkdir()
  refused(lambda: bring_in(tmp_path / 'm.gguf', tmp_path / 'base'), 'm.gguf', named)
  refused(lambda: open_source(f'{tmp_path}/none.gguf', tmp_path), 'none.gguf is missing')
