"""The recipes on Debian's real packages: needs apt, the network, and a minute."""

import re
import shutil

import pytest

from optimer_jax.data.recipes import SPLITS
from optimer_jax.data.sources import Recipe

pytestmark = pytest.mark.skipif(not shutil.which('apt-get'), reason='needs apt')


@pytest.fixture(scope='module')
def domains(tmp_path_factory):
  cache = str(tmp_path_factory.mktemp('cache'))
  names = ('ja', 'zh', 'math')
  return {
    name: {split: list(Recipe(name, split, cache).documents()) for split in SPLITS}
    for name in names
  }


@pytest.mark.parametrize('name', ['ja', 'zh', 'math'])
def test_sizes_and_splits(domains, name):
  splits = domains[name]
  size = {
    split: sum(len(document.text.encode()) for document in documents)
    for split, documents in splits.items()
  }
  assert 2e6 < size['train'] < 6.5e6
  assert 1e5 < size['dev'] < 9e5 and 1e5 < size['test'] < 9e5
  sources = {split: {document.source for document in splits[split]} for split in SPLITS}
  assert all(len(each) >= 30 for each in sources.values())
  assert not sources['train'] & (sources['dev'] | sources['test'])
  assert not sources['dev'] & sources['test']
  paragraphs = {
    split: {each for document in splits[split] for each in document.text.strip().split('\n\n')}
    for split in SPLITS
  }
  shared = paragraphs['train'] & (paragraphs['dev'] | paragraphs['test'])
  assert not [each for each in shared if len(each.encode()) >= 60]


def test_ja_and_zh_hold_out_the_same(domains):
  def keys(name, splits):
    return {
      re.sub(r'^(manpages|debian-handbook)-?(ja|zh)?/', '', document.source).split('/')[0]
      for split in splits
      for document in domains[name][split]
    }

  held_out, train = ['dev', 'test'], ['train']
  assert not keys('ja', train) & keys('zh', held_out)
  assert not keys('zh', train) & keys('ja', held_out)
  assert len(keys('ja', held_out) & keys('zh', held_out)) > 10


def test_what_is_left_reads_as_text(domains):
  for name, letter in (('ja', r'[\u3041-\u30ff]'), ('zh', r'[\u4e00-\u9fff]')):
    text = ''.join(document.text for split in SPLITS for document in domains[name][split])
    assert len(re.findall(letter, text)) > 0.15 * len(text)
    # Font changes and requests of roff are left in a few pages that teach roff.
    marked = [
      document.source
      for split in SPLITS
      for document in domains[name][split]
      if re.search(r'\\f[BIRP]|^\.(TP|PP|SH|BR)\b', document.text, re.MULTILINE)
    ]
    assert len(marked) < 12, marked
    handbook = ''.join(
      document.text
      for document in domains[name]['train']
      if document.source.startswith('debian-handbook/')
    )
    assert len(handbook) > 100_000
    assert not re.findall(r'</?(div|span|code|em|strong)\b', handbook)
    assert text.count('\ufffd') < 20
  assert not re.findall('[這們說嗎]', ''.join(d.text for d in domains['zh']['dev']))
  math = ''.join(document.text for document in domains['math']['train'])
  assert not re.search(r'\$[=.({]|@p \|-|=-=-=|#\*#\*|htmldef', math)
  assert math.count('Contributed by') < 5
