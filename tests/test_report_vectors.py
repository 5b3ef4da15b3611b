"""The report's section on the vectors, and their figures, from whole, older and damaged files."""

import re
from pathlib import Path

import numpy as np
import pytest
from fake_vectors import write_vectors
from matplotlib.colors import to_hex

from optimer_jax.files import read_json, write_json
from optimer_jax.report import vector_plots
from optimer_jax.report.blocks import Picture, Text
from optimer_jax.report.read import read_run
from optimer_jax.report.style import LIGHT, looks, svg
from optimer_jax.report.vectors import vectors

DATASETS = ('code', 'ja', 'math', 'zh')


@pytest.fixture
def run(tmp_path) -> Path:
  write_vectors(tmp_path / 'vectors', DATASETS, np.random.default_rng(0))
  return tmp_path


def page(run: Path) -> tuple[set[str], str]:
  """Names of the section's pictures, and its paragraphs; no file may be called damaged."""
  data = read_run(run)
  assert not data.problems
  blocks = list(vectors(data))
  text = '\n'.join(block.text for block in blocks if isinstance(block, Text))
  return {block.name for block in blocks if isinstance(block, Picture)}, text


def test_figures_of_the_vectors_show_the_numbers():
  matrix = [[1.0, 0.25, -0.1], [0.25, 1.0, None], [-0.1, None, 1.0]]
  drawn = [text.get_text() for text in vector_plots.signs(['a', 'b', 'c'], matrix).axes[0].texts]
  assert drawn == ['1', '.250', '−.100', '.250', '1', '–', '−.100', '–', '1']
  squares = vector_plots.cosine(['a', 'b'], [[1.0, -0.2], [0.2, 1.0]]).axes[0].patches
  assert [to_hex(square.get_facecolor()) for square in squares[1:3]] == [LIGHT['d1'], LIGHT['d0']]
  layer = [[1.0, 0.2], [0.2, 1.0]]
  look = looks(['a', 'b'])
  left = vector_plots.cosine_layers(['a', 'b'], [layer, layer], {'norms': layer}, look).axes[0]
  assert list(left.lines[0].get_ydata()) == [0.2, 0.2]
  many = [f's{i}' for i in range(5)]
  matrix = [[1.0 if i == j else i + j for j in range(5)] for i in range(5)]
  figure = vector_plots.cosine_layers(many, [matrix], {'norms': matrix}, looks(many))
  assert [line.get_ydata()[0] for line in figure.axes[0].lines[:5]] == [2.5, 3.25, 4.0, 4.75, 5.5]
  heat = vector_plots.norms_layers({'a': {'q_proj': [0.0, 1.0, 7.9, 8.0], 'norms': [3.9]}})
  cells = {
    to_hex(patch.get_facecolor()): sorted(
      (round(box[:, 0].mean()), round(box[:, 1].mean()))
      for box in (polygon[:4] for polygon in patch.get_path().to_polygons())
    )
    for patch in heat.axes[0].patches
  }
  assert cells == {
    LIGHT['s0']: [(0, 0)],
    LIGHT['s1']: [(1, 0)],
    LIGHT['s3']: [(0, 1)],
    LIGHT['s7']: [(2, 0), (3, 0)],
  }


def test_data_sets_stand_in_the_reports_order():
  """Whatever their order in the file."""
  matrix = [[1.0, 0.1, 0.2], [0.1, 1.0, 0.3], [0.2, 0.3, 1.0]]
  geometry = {'datasets': ['zh', 'code', 'ja'], 'cosine': matrix}
  panel = vector_plots.vector_figures(geometry)['cosine'].axes[0]
  assert [label.get_text() for label in panel.get_xticklabels()] == ['code', 'ja', 'zh']
  drawn = [text.get_text() for text in panel.texts]
  assert drawn == ['1', '.300', '.100', '.300', '1', '.200', '.100', '.200', '1']


FIGURES = {  # what each needs, beside the data sets' names
  'cosine': ['cosine'],
  'cosine-layers': ['cosine_by_layer', 'cosine_by_module'],
  'signs': ['sign_agreement'],
  'norms': ['by_layer', 'by_module'],
  'norms-layers': ['layer_module'],
}


def test_geometry_of_an_older_version_is_drawn_as_far_as_it_goes(run, drawn_once):
  file = run / 'vectors' / 'geometry.json'
  whole = read_json(file)
  assert page(run) == ({*FIGURES, 'trajectory'}, page(run)[1]) and 'Not there' not in page(run)[1]
  needed = ('datasets', 'norm', 'cosine')
  for gone in whole.keys() - set(needed):
    write_json(file, {key: value for key, value in whole.items() if key != gone})
    drawn, text = page(run)
    assert drawn - {'trajectory'} == {name for name, keys in FIGURES.items() if gone not in keys}
    silent = ('relative_norm', 'sign_unanimous', 'sign_elected', 'embedding')
    assert ('vectors/geometry.json' in text) == (not gone.startswith(silent)), gone
  write_json(file, {key: whole[key] for key in needed})
  drawn, text = page(run)
  assert drawn == {'cosine', 'trajectory'}
  for what in ('norms per layer', 'cosines by layer', 'sign agreement', 'effective ranks'):
    assert what in text
  ja = {key: {'ja': whole[key]['ja']} for key in ('by_layer', 'by_module', 'layer_module')}
  write_json(file, whole | ja | {'effective_rank': {'ja': whole['effective_rank']['ja']}})
  assert page(run)[0] == {*FIGURES, 'trajectory'}
  write_json(file, whole | {'sign_agreement': [[None] * 4] * 4, 'sign_unanimous': None})
  assert 'signs' in page(run)[0]
  file.unlink()
  drawn, text = page(run)
  assert drawn == {'trajectory'} and 'the geometry of the vectors' in text


def test_one_vector_has_no_pairs(tmp_path):
  write_vectors(tmp_path / 'vectors', ('ja',), np.random.default_rng(0))
  drawn, text = page(tmp_path)
  assert drawn == {'cosine', 'norms', 'norms-layers', 'trajectory'} and 'Not there' not in text


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'sign_agreement': [[1.0]]}, 'sign_agreement is not 4 x 4'),
    ({'sign_agreement': [[1.5] * 4] * 4}, r'sign_agreement\[0\]\[0\] is 1.5, not from 0 to 1'),
    ({'cosine_by_layer': [[[0.0] * 4] * 3]}, r'cosine_by_layer\[0\] is not 4 x 4'),
    ({'cosine_by_module': {'norms': [[0.0] * 3] * 4}}, 'cosine_by_module.norms is not 4 x 4'),
    (
      {'layer_module': {'ja': {'norms': [-1]}}},
      r'layer_module.ja.norms\[0\] is -1, not at least 0',
    ),
  ],
)
def test_geometry_that_does_not_fit_is_named(run, change, said):
  file = run / 'vectors' / 'geometry.json'
  write_json(file, read_json(file) | change)
  assert re.search(said, read_run(run).problems[0])


def test_trajectories_are_optional_and_checked(run):
  file = run / 'vectors' / 'trajectory.json'
  whole = read_json(file)
  for key in ('steps', 'step_norm', 'step_cosine', 'norm', 'final_cosine', 'projection'):
    write_json(file, whole | {'ja': whole['ja'] | {key: whole['ja'][key][1:]}})
    assert re.search(r'trajectory\.json is damaged \(ja\.', read_run(run).problems[0])
  two = {'steps': [8], 'step_norm': [1], 'step_cosine': [], 'norm': [1], 'straightness': 1}
  write_json(file, {'ja': {**two, 'final_cosine': [1], 'projection': [1]}})
  assert 'trajectory' in page(run)[0]
  figures = vector_plots.vector_figures({}, read_json(file))
  assert set(figures) == {'trajectory'} and '<svg' in svg(figures['trajectory'], 'a')
  file.unlink()
  drawn, text = page(run)
  assert drawn == set(FIGURES) and 'Not there' not in text
