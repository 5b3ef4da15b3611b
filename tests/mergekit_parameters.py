"""Computes the numbers that mergekit gives to tensors, for tests/test_mergekit_yaml.py.

Needs mergekit (0.1.5) and no network; writes mergekit_parameters.json beside this file:

  python -m tests.mergekit_parameters

The numbers are those of mergekit's own plan of each merge below, made from the configs of models
of 5 layers; nothing is merged.
"""

import contextlib
import json
import tempfile
from pathlib import Path

KEPT = Path(__file__).with_suffix('.json')
LAYERS = 5
TENSORS = (
  'model.embed_tokens.weight',
  'model.layers.0.self_attn.q_proj.weight',
  'model.layers.1.self_attn.o_proj.weight',
  'model.layers.2.mlp.up_proj.weight',
  'model.layers.3.post_attention_layernorm.weight',
  'model.layers.4.mlp.down_proj.weight',
  'model.norm.weight',
  'lm_head.weight',
)
AB = '[{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.7}}]'
CASES = {
  'defaults': f'{{merge_method: ties, base_model: base, models: {AB}}}',
  'gradients': """
    merge_method: dare_ties
    base_model: base
    models:
      - {model: a, parameters: {weight: [0, 0.3, 1.0], density: [0.1, 0.7]}}
      - {model: b, parameters: {weight: [1, 2, 3, 4, 5, 6, 7], density: [0.4]}}
    parameters: {lambda: [1.0, 0.1], rescale: [true, false, true], normalize: [1, 0]}
  """,
  'filters': """
    merge_method: della
    base_model: base
    models:
      - model: a
        parameters:
          weight:
            - {filter: self_attn, value: [0.1, 0.9]}
            - {filter: layers.2, value: 0.5}
            - {filter: mlp, value: [0.2, 0.3]}
            - {filter: '', value: 0}
          density: {filter: mlp, value: 0.25}
      - model: b
        parameters:
          weight: {value: 0.6}
          density:
            - {filter: null, value: 0.35}
            - {filter: mlp, value: 0.9}
          epsilon:
            - {filter: norm, value: 0.01}
            - {filter: '*', value: [0.02, 0.03]}
    parameters:
      density: 0.45
      epsilon: {filter: embed, value: 0.04}
      normalize: [{filter: mlp, value: false}]
  """,
  'precedence': """
    merge_method: breadcrumbs_ties
    base_model: base
    models:
      - {model: a, parameters: {weight: 0.1, gamma: {filter: norm, value: 0.2}}}
      - {model: b, parameters: {density: 0.8, weight: [{filter: self_attn, value: 0.9}]}}
      - {model: c}
    parameters: {weight: [0.4, 0.5], density: 0.7, gamma: [{filter: mlp, value: 0.03}]}
  """,
  'base listed': """
    merge_method: task_arithmetic
    base_model: base
    models:
      - {model: a, parameters: {weight: 0.3}}
      - {model: base, parameters: {weight: 9}}
      - {model: b, parameters: {weight: -0.7}}
    parameters: {lambda: 1.25, int8_mask: true}
  """,
  'base without parameters': """
    merge_method: breadcrumbs
    base_model: base
    models:
      - {model: base}
      - {model: a, parameters: {weight: 0.3, density: 0.9, gamma: 0.02}}
      - {model: b, parameters: {weight: 0}}
    parameters: {normalize: 1.0, rescale: 'yes'}
  """,
  'linear, base appended': """
    merge_method: linear
    base_model: base
    models: [{model: a, parameters: {weight: 0.3}}, {model: b}]
    parameters: {weight: [0.1, 0.2], normalize: off}
  """,
  'linear, base among them': """
    merge_method: linear
    base_model: base
    models: [{model: base, parameters: {weight: 2}}, {model: a, parameters: {weight: 1e-3}}]
  """,
  'linear, no base': f'{{merge_method: linear, models: {AB}}}',
  'texts and truths': """
    merge_method: della_linear
    base_model: base
    models:
      - {model: a, parameters: {weight: '0.125', density: 5e-1, epsilon: 1e-2}}
      - {model: b, parameters: {weight: true, density: [1e-1, '0.9', 1]}}
    parameters: {normalize: 1, rescale: 'False', lambda: 1e0}
  """,
  'words of truth': f"""
    merge_method: ties
    base_model: base
    models: {AB}
    parameters:
      normalize: ['1', 'off', 't', 'false', 'y']
      rescale: ['n', 'on', 'f', 'TRUE', '0']
  """,
  'slerp': """
    merge_method: slerp
    base_model: base
    models: [{model: a}]
    parameters:
      t:
        - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
        - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
        - {value: 0.5}
  """,
  'slerp of slices': """
    merge_method: slerp
    base_model: base
    slices:
      - sources: [{model: base, layer_range: [0, 5]}, {model: a, layer_range: [0, 5]}]
        parameters: {t: {filter: mlp, value: [0.2, 0.9]}}
    parameters: {t: [0.1, 0.4, 0.8]}
  """,
  'ties of slices': """
    merge_method: ties
    base_model: base
    slices:
      - sources:
          - {model: a, layer_range: [0, 5], parameters: {weight: 0.1}}
          - {model: base, layer_range: [0, 5]}
          - {model: b, layer_range: [0, 5], parameters: {density: [{filter: mlp, value: 0.6}]}}
        parameters: {weight: [0.2, 0.3], density: 0.5, normalize: false}
    parameters: {normalize: true, density: 0.9, lambda: 0.5, weight: 7}
  """,
  'linear of slices': """
    merge_method: linear
    base_model: base
    slices:
      - sources:
          - {model: a, layer_range: [0, 5], parameters: {weight: 1}}
          - {model: b, layer_range: [0, 5], parameters: {weight: 2}}
  """,
  'a single layer': """
    merge_method: dare_linear
    base_model: base
    slices:
      - sources: [{model: base, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
    parameters: {weight: [0.1, 0.4, 0.8]}
  """,
  'model stock': """
    merge_method: model_stock
    base_model: base
    models: [{model: a}, {model: b}, {model: base}]
    parameters: {filter_wise: false, int8_mask: 0}
  """,
  'sce': """
    merge_method: sce
    base_model: base
    models: [{model: a}, {model: b}]
    parameters: {select_topk: [{filter: mlp, value: [0.1, 0.5]}, {filter: norm, value: 1}]}
  """,
  'multislerp': f"""
    merge_method: multislerp
    models: {AB}
    parameters: {{normalize_weights: ['Yes', 'no'], eps: 1e-6}}
  """,
  'multislerp with a base': f'{{merge_method: multislerp, base_model: base, models: {AB}}}',
  'an empty list says nothing': """
    merge_method: dare_linear
    base_model: base
    models: [{model: a, parameters: {weight: [], density: [{filter: mlp, value: []}, {value: 1}]}}]
    parameters: {weight: 0.5, density: 0.25}
  """,
  # What mergekit refuses.
  'linear, no weight for the base': f'{{merge_method: linear, base_model: base, models: {AB}}}',
  'no weight': '{merge_method: ties, base_model: base, models: [{model: a}]}',
  'no weight for some tensors': """
    merge_method: ties
    base_model: base
    models: [{model: a, parameters: {weight: {filter: mlp, value: 1}}}]
  """,
  'no base': f'{{merge_method: ties, models: {AB}}}',
  'no t': '{merge_method: slerp, base_model: base, models: [{model: a}]}',
  'slerp of three': """
    {merge_method: slerp, base_model: base, models: [{model: a}, {model: b}], parameters: {t: 1}}
  """,
  'model stock of two': '{merge_method: model_stock, base_model: base, models: [{model: a}]}',
  'twice the same': """
    {merge_method: sce, base_model: base, models: [{model: a}, {model: a}]}
  """,
  'no base in the slice': """
    merge_method: sce
    base_model: base
    slices: [{sources: [{model: a, layer_range: [0, 5]}, {model: b, layer_range: [0, 5]}]}]
  """,
  'half true': f"""
    {{merge_method: ties, base_model: base, models: {AB}, parameters: {{normalize: 0.5}}}}
  """,
  'models and slices': f"""
    merge_method: linear
    models: {AB}
    slices: [{{sources: [{{model: a, layer_range: [0, 5], parameters: {{weight: 1}}}}]}}]
  """,
}


def compute() -> dict:
  """For each case, the models and for each of TENSORS the numbers; None if mergekit refuses it."""
  with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
    for name in ('base', 'a', 'b', 'c'):
      _write_model(Path(name))
    return {name: _plan(text) for name, text in CASES.items()}


def _write_model(path: Path) -> None:
  import torch
  from safetensors.torch import save_file
  from transformers import Gemma3TextConfig

  path.mkdir()
  config = Gemma3TextConfig(num_hidden_layers=LAYERS, architectures=['Gemma3ForCausalLM'])
  config.save_pretrained(path)
  # The plan asks of an optional tensor whether there is one.
  save_file({'lm_head.weight': torch.zeros(1)}, path / 'model.safetensors', {'format': 'pt'})


def _plan(text: str) -> dict | None:
  import yaml
  from mergekit.architecture import get_architecture_info
  from mergekit.config import MergeConfiguration
  from mergekit.io.tasks import LoaderCache
  from mergekit.options import MergeOptions
  from mergekit.plan import MergePlanner

  options = MergeOptions()
  LoaderCache().setup(options=options)
  try:
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    config_of_output = config.referenced_models()[0].config()
    architecture = get_architecture_info(config, options)
    tasks = MergePlanner(config, architecture, options, config_of_output).plan_to_disk('.')
  except (ValueError, RuntimeError):  # pydantic's error is a ValueError
    return None
  tensors = {}
  for task in tasks:
    if getattr(task, 'tensor_name', None) not in TENSORS:
      continue
    plan = task.tensor_task
    numbers = dict(plan.parameters.items())
    own = [dict(plan.input_parameters[model].items()) for model in plan.model_order]
    models = [str(model) for model, each in zip(plan.model_order, own, strict=True)]
    for parameter in dict.fromkeys(key for each in own for key in each):
      numbers[parameter] = {
        model: each[parameter] for model, each in zip(models, own, strict=True) if parameter in each
      }
    tensors[task.tensor_name] = numbers
  layers = sum('input_layernorm' in getattr(task, 'tensor_name', '') for task in tasks)
  return {'layers': layers, 'models': models, 'tensors': tensors}


def main() -> None:
  found = compute()
  lines = []
  for name, case in found.items():
    if case is None:
      lines.append(f' {json.dumps(name)}: null')
      continue
    rows = ',\n'.join(
      f'  {json.dumps(k)}: {json.dumps(v, sort_keys=True)}' for k, v in case['tensors'].items()
    )
    head = f'"layers": {case["layers"]}, "models": {json.dumps(case["models"])}'
    lines.append(f' {json.dumps(name)}: {{{head}, "tensors": {{\n{rows}}}}}')
  KEPT.write_text('{\n' + ',\n'.join(lines) + '\n}\n')
  print(f'{len(found)} merges, {sum(case is None for case in found.values())} of them refused')


if __name__ == '__main__':
  main()
