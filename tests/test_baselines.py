"""Ratios that are tried, data sets of which only a file is given, and the tables of RESULTS.md."""

import numpy as np
import pytest

from benchmarks import study
from optimer_jax.baselines import mixture_ratios
from optimer_jax.data.datasets import from_folder
from optimer_jax.errors import UserError


def test_ratios_are_spread_over_the_simplex():
  names = ('ja', 'zh', 'math', 'code')
  found = mixture_ratios(names, 64)
  assert [*found][:2] == ['uniform', 'ratios-1'] and len(found) == 65
  points = np.array([[*each.values()] for each in found.values()])
  np.testing.assert_allclose(points.sum(1), 1, atol=2e-4)
  assert points.min() >= 0 and all([*each] == [*names] for each in found.values())
  # As even as a Dirichlet distribution of ones: means of 1/4, deviations of sqrt(3/80).
  np.testing.assert_allclose(points[1:].mean(0), 0.25, atol=0.02)
  np.testing.assert_allclose(points[1:].std(0), np.sqrt(3 / 80), atol=0.03)
  # Whoever asks for more gets the same ones first.
  assert [*mixture_ratios(names, 4).items()] == [*found.items()][:5]


def test_one_data_set_has_one_mixture():
  assert mixture_ratios(('ja',), 4) == {'uniform': {'ja': 1.0}}


def test_a_file_alone_is_divided(tmp_path):
  texts = [f'text {number}' for number in range(400)]
  lines = [f'{{"text": "{text}"}}\n' for text in [*texts, *texts[:50]]]
  (tmp_path / 'de.jsonl').write_text(''.join(lines))
  (tmp_path / 'fr').mkdir()
  for split in ('train', 'valid'):
    (tmp_path / 'fr' / f'{split}.jsonl').write_text(''.join(lines))
  de, fr = from_folder(str(tmp_path))
  assert (de.name, fr.name) == ('de', 'fr')
  parts = [[d.text for d in source.documents()] for source in (de.train, de.dev, de.test)]
  assert sum(map(len, parts)) == 450 and 20 < len({*parts[1]}) < 60 and 20 < len({*parts[2]}) < 60
  # A text that stands twice is in one part only.
  assert sum(len({*part}) for part in parts) == 400
  halves = [{d.text for d in source.documents()} for source in (fr.dev, fr.test)]
  assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 400
  assert from_folder(str(tmp_path), ()) == ()
  with pytest.raises(UserError, match='it needs train'):
    from_folder(str(tmp_path), ('it',))


def test_the_results_are_those_of_what_is_kept():
  text = study.RESULTS.read_text(encoding='utf-8')
  _, made = study.tables()
  assert study.filled(text, made) == text
  assert sum(f'<!-- {name} -->' in text for name in made) >= 6
