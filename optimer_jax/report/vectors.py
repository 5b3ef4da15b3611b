"""The report's section on the distribution vectors."""

from collections.abc import Iterator

from optimer_jax.report.blocks import Cell, Picture, Table, Text, missing
from optimer_jax.report.outcome import number
from optimer_jax.report.read import Run
from optimer_jax.report.style import looks
from optimer_jax.report.vector_plots import vector_figures

FILE = 'vectors/geometry.json'


def vectors(run: Run) -> Iterator:
  """Norms, angles, signs and ranks of the pool, and how straight each training was."""
  figures = vector_figures(run.geometry, run.trajectories, looks(run.datasets))
  if run.geometry:
    yield from _pool(run, figures)
  else:
    yield missing(run, 'the geometry of the vectors', 'inspect', FILE)
  # Without snapshots there is no trajectory, and nothing is missing.
  if 'trajectory' in figures:
    yield from _trajectory(run, figures['trajectory'])


def _pool(run: Run, figures: dict) -> Iterator:
  geometry = run.geometry
  names = [name for name in run.datasets if name in geometry['datasets']]
  span = _span(geometry, 'cosine', names)
  yield Picture(
    'cosine',
    figures['cosine'],
    'Cosine between the distribution vectors; the colour runs from 0 to the largest pair (at '
    f'least .1), blue for positive, orange for negative.{span}',
    f'Heat map of the cosines between {len(names)} vectors.{span}',
  )
  if 'cosine-layers' in figures:
    yield Picture(
      'cosine-layers',
      figures['cosine-layers'],
      'The same cosines within each layer and within each kind of module'
      + (
        ': a pair has the line of its first data set and the markers of its second.'
        if len(names) <= 4
        else '; of each data set the mean with the others.'
      ),
      'Lines of the cosines between the vectors by layer, and points by kind of module.',
    )
  if 'signs' in figures:
    span = _span(geometry, 'sign_agreement', names)
    yield Picture(
      'signs',
      figures['signs'],
      'Sign agreement: of the parameters that both vectors change, the share that they move the '
      f'same way; .5 is chance, blue above it, orange below.{span}{_interference(geometry)}',
      f'Heat map of the sign agreement between {len(names)} vectors.{span}',
    )
  yield _norms(geometry, names)
  if 'norms' in figures:
    layers = {name: row for name in names if (row := geometry['by_layer'].get(name))}
    yield Picture(
      'norms',
      figures['norms'],
      'Norm of each distribution vector by layer and by kind of module.',
      'Norms by layer, largest layer of each vector: '
      + ', '.join(f'{name} {row.index(max(row))}' for name, row in layers.items())
      + '.',
    )
  if 'norms-layers' in figures:
    yield Picture(
      'norms-layers',
      figures['norms-layers'],
      'Norm of each distribution vector by layer and kind of module, all on one scale.',
      'Heat maps of norms by layer and kind of module. The largest of each vector: '
      + '; '.join(_largest(geometry['layer_module'], name) for name in names)
      + '.',
    )
  if ranks := {
    name: row for name in names if (row := (geometry.get('effective_rank') or {}).get(name))
  }:
    yield _ranks(ranks)
  wanted = {
    'norms': 'norms per layer and module',
    'cosine-layers': 'cosines by layer',
    'signs': 'sign agreement',
    'norms-layers': 'norms by layer and module together',
  }
  if len(names) < 2:
    wanted = {key: what for key, what in wanted.items() if key.startswith('norms')}
  absent = [what for key, what in wanted.items() if key not in figures]
  if not ranks:
    absent.append('effective ranks')
  if absent:
    yield missing(run, ', '.join(absent), 'inspect', FILE)


def _span(geometry: dict, key: str, names: list[str]) -> str:
  place = {name: i for i, name in enumerate(geometry['datasets'])}
  pairs = [
    (value, f'{a} and {b}')
    for i, a in enumerate(names)
    for b in names[i + 1 :]
    if (value := geometry[key][place[a]][place[b]]) is not None
  ]
  if not pairs:
    return ''
  (low, first), (high, last) = min(pairs), max(pairs)
  return f' Off the diagonal from {number(low, 3)} ({first}) to {number(high, 3)} ({last}).'


def _interference(geometry: dict) -> str:
  unanimous, elected = geometry.get('sign_unanimous'), geometry.get('sign_elected')
  if unanimous is None or elected is None:
    return ''
  return (
    ' Of the parameters that two or more vectors change, all agree on '
    f'{number(100 * unanimous, 1)}%; of the magnitude there, {number(100 * elected, 1)}% has the '
    'sign of the sum, which TIES keeps.'
  )


def _norms(geometry: dict, names: list[str]) -> Table:
  relative, share, touched = (
    geometry.get(key) or {}
    for key in ('relative_norm', 'embedding_share', 'embedding_rows_touched')
  )
  return Table(
    'Norm of each distribution vector, and relative to the base’s; the share of the squared norm '
    'that is in the embedding, and the share of the embedding’s rows that changed at all.',
    ['data set', 'norm', 'norm / norm of base', 'in the embedding, %', 'rows changed, %'],
    [
      [
        Cell(name),
        Cell(number(geometry['norm'][name])),
        Cell(f'{relative[name]:.3e}' if name in relative else '–'),
        *(
          Cell('–' if values.get(name) is None else number(100 * values[name], 1))
          for values in (share, touched)
        ),
      ]
      for name in names
    ],
  )


def _largest(norms: dict, name: str) -> str:
  each = [
    (value, f'{name} {module} of layer {layer}')
    for module, row in (norms.get(name) or {}).items()
    for layer, value in enumerate(row)
  ]
  return max(each, default=(0, f'{name} none'))[1]


def _ranks(ranks: dict[str, dict[str, dict]]) -> Table:
  leaves = list(dict.fromkeys(leaf for row in ranks.values() for leaf in row))
  return Table(
    'Effective rank (exp of the entropy of the normalised squared singular values) of some '
    'matrices of each vector, of as many as it could be; below, the stable rank (squared norm over '
    'the largest squared singular value).',
    ['data set', *(leaf.removeprefix('layers.') for leaf in leaves)],
    [
      [
        Cell(name),
        *(
          Cell(
            f'{number(row[leaf]["effective"], 1)} of {row[leaf]["bound"]:,}',
            f'stable {number(row[leaf]["stable"], 1)}',
          )
          if leaf in row
          else Cell('–')
          for leaf in leaves
        ),
      ]
      for name, row in ranks.items()
    ],
  )


def _trajectory(run: Run, figure) -> Iterator:
  ways = {name: run.trajectories[name] for name in run.datasets if name in run.trajectories}
  told = '; '.join(f'{name} {number(way["straightness"], 3)}' for name, way in ways.items())
  yield Text(
    'How straight training was: where it is, a vector at weight w acts like the share w of its '
    'training.'
  )
  yield Picture(
    'trajectory',
    figure,
    'Saved checkpoints of each CPT run. Left: the projection of the way so far on τ, as a weight; '
    'dashed: the same from every step. Middle: the cosine of the way so far with τ. Right: the '
    'cosine between successive changes.',
    f'Trajectories of training. Straightness: {told}.',
  )
  yield Table(
    'Straightness is ‖τ‖ over the length of the way through the checkpoints; 1 is a straight line.',
    ['data set', 'checkpoints', 'straightness', 'lowest cosine with τ', 'lowest of successive'],
    [
      [
        Cell(name),
        Cell(str(len(way['steps']))),
        Cell(number(way['straightness'], 3)),
        Cell(number(min(way['final_cosine']), 3)),
        Cell(number(min(way['step_cosine']), 3) if way['step_cosine'] else '–'),
      ]
      for name, way in ways.items()
    ],
  )
