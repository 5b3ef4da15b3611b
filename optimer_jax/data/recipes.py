"""Four domains of real text, built from packages: code, ja, zh, math.

`build` writes train.jsonl, dev.jsonl and test.jsonl, one {"text", "source"} a line. Which split a
source goes to depends on a key without a language in it (the page `ls.1`, chapter 6 of the
handbook), so ja and zh hold out the same pages and chapters.

| name | text                                                        | licence               |
|------|-------------------------------------------------------------|-----------------------|
| code | the standard library of the Python that runs this           | PSF                   |
| ja   | Debian: manpages-ja, debian-handbook (ja-JP)                | free, differs by page |
| zh   | Debian: manpages-zh, debian-handbook (zh-CN), simplified    | free, differs by page |
| math | Debian: metamath-databases, the comments of set.mm          | CC0                   |
"""

import gzip
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from optimer_jax.data.manual import html_paragraphs, man_paragraphs
from optimer_jax.errors import UserError
from optimer_jax.files import atomic_directory, write_json
from optimer_jax.progress import say

VERSION = 1  # of the text that the recipes write: raise it with any change to them
SPLITS = ('train', 'dev', 'test')
TRAIN_BYTES = 6_000_000
HELD_OUT_PERCENT = 6  # each of dev and test
REPEATED = 60  # bytes: shorter paragraphs, such as headings, may stand in many documents
PAGE = 100  # characters: a shorter page is no more than headings


class Page(NamedTuple):
  key: str  # decides the split; shared by all parts of one source and by its translations
  source: str
  paragraphs: list[str]


def build(name: str, directory: Path | str) -> None:
  """Writes the three splits of a domain into `directory`, atomically.

  Raises UserError for an unknown name, and when Debian's packages cannot be had.
  """
  if name not in PAGES:
    close = get_close_matches(name, PAGES, 1, 0.1)
    hint = f'did you mean "{close[0]}"?' if close else f'there are {", ".join(PAGES)}'
    raise UserError(f'there is no recipe "{name}": {hint}')
  directory = Path(directory)
  say(f'building the text of {name} in {directory}')
  splits = split(PAGES[name](directory.parent / 'debian'))
  for part in SPLITS:
    if not splits[part]:
      raise UserError(f'the recipe {name} found no text for {part}: give a path to a file instead')
  with atomic_directory(directory) as new:
    for part, documents in splits.items():
      with open(new / f'{part}.jsonl', 'w', encoding='utf-8') as file:
        for source, text in documents:
          file.write(json.dumps({'text': text, 'source': source}, ensure_ascii=False) + '\n')
    sizes = {part: sum(len(text.encode()) for _, text in splits[part]) for part in SPLITS}
    write_json(new / 'about.json', {'recipe': name, 'version': VERSION, 'bytes': sizes})
  say(f'{name}: ' + ', '.join(f'{part} {size / 1e6:.2f} MB' for part, size in sizes.items()))


def split(pages: Iterable[Page], train_bytes: int = TRAIN_BYTES) -> dict[str, list]:
  """{'train' | 'dev' | 'test': [(source, text)]}, no key in two splits.

  Keys are taken in the order of their hash until a split is full. A longer paragraph stays in the
  first page that has it, train before dev before test.
  """
  ordered = sorted(pages, key=lambda page: (_hash(page.key), page.source))
  limits = {part: train_bytes * HELD_OUT_PERCENT // 88 for part in SPLITS} | {'train': train_bytes}
  parts = {part: [page for page in ordered if split_of(page.key) == part] for part in SPLITS}
  seen = set()
  splits = {}
  for part in SPLITS:
    size, documents = 0, []
    for page in parts[part]:
      kept = [paragraph for paragraph in page.paragraphs if paragraph not in seen]
      text = '\n\n'.join(kept) + '\n'
      # What is left of a page of repeated paragraphs is its headings.
      left = sum(map(len, kept))
      if left < PAGE or left < 0.3 * sum(map(len, page.paragraphs)):
        continue
      if size >= limits[part]:
        break
      seen.update(each for each in kept if len(each.encode()) >= REPEATED)
      size += len(text.encode())
      documents.append((page.source, text))
    splits[part] = documents
  return splits


def split_of(key: str) -> str:
  place = _hash(key) % 100
  return 'train' if place < 88 else 'dev' if place < 88 + HELD_OUT_PERCENT else 'test'


def _hash(key: str) -> int:
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big')


# Code: Python's standard library.

NOT_CODE = re.compile(
  r'(^|/)(tests?|idlelib|idle_test|lib2to3|site-packages|dist-packages|turtledemo|pydoc_data'
  r'|_bundled|lib-dynload|__phello__|config-[^/]*)/|^_sysconfigdata|^encodings/'
)


def code_pages(_: Path) -> list[Page]:
  library = Path(sysconfig.get_paths()['stdlib'])
  pages = []
  for path in sorted(library.rglob('*.py')):
    name = path.relative_to(library).as_posix()
    if NOT_CODE.search(name):
      continue
    try:
      text = path.read_text(encoding='utf-8')
    except (UnicodeDecodeError, OSError):
      continue
    if not re.search(r'(?i)generated (from|by|automatically)', text[:800]):
      pages.append(Page(name, name, _without_licence(text).split('\n\n')))
  if sum(sum(map(len, page.paragraphs)) for page in pages) < 1_000_000:
    raise UserError(
      f'{library} does not hold the sources of the standard library: give a path to code instead'
    )
  return pages


def _without_licence(code: str) -> str:
  """Without opening comments that speak of copyright; they repeat from file to file."""
  head, rest = re.match(r'((?:[ \t]*(?:#.*)?\n)*)(.*)', code, re.DOTALL).groups()
  blocks = re.split(r'\n[ \t]*\n', head)
  kept = [each for each in blocks if not re.search(r'(?i)copyright|licen[cs]e|coding[:=]|#!', each)]
  head = '\n\n'.join(kept).strip('\n')
  return f'{head}\n{rest}'.strip('\n') if head else rest.strip('\n')


# ja and zh: Debian's translated manuals and handbook.


def ja_pages(packages: Path) -> list[Page]:
  return _manual_pages(packages, 'manpages-ja', 'man/ja', 'ja-JP', r'[\u3041-\u30ff]', '')


def zh_pages(packages: Path) -> list[Page]:
  traditional = r'[這個們說時會對為後與裡嗎麼過還進開關機電]'
  return _manual_pages(
    packages, 'manpages-zh', 'man/zh_CN', 'zh-CN', r'[\u4e00-\u9fff]', traditional
  )


def _manual_pages(
  packages: Path, manual: str, folder: str, handbook: str, wanted: str, unwanted: str
) -> list[Page]:
  pages = []
  share = unpack(manual, packages) / 'usr/share'
  for path in sorted((share / folder).glob('man*/*.gz')):
    if not path.is_symlink():
      roff = gzip.decompress(path.read_bytes()).decode('utf-8', 'replace')
      pages.append(Page(path.stem, f'{manual}/{path.stem}', man_paragraphs(roff)))
  share = unpack('debian-handbook', packages) / 'usr/share/doc/debian-handbook/html' / handbook
  for path in sorted(share.glob('*.html')):
    content = path.read_text(encoding='utf-8')
    chapter = re.search(r'<title[^>]*>\D{0,4}?(\d+|[A-F])[\s.]', content)
    if chapter:  # the rest is contents, foreword and colophon
      key = f'handbook chapter {chapter[1]}'
      pages.append(Page(key, f'debian-handbook/{chapter[1]}/{path.stem}', html_paragraphs(content)))
  kept = []
  for page in pages:
    paragraphs = [each for each in page.paragraphs if not _foreign(each, wanted)]
    text = ''.join(paragraphs)
    share = len(re.findall(wanted, text)) / max(1, len(text))
    # The page is a translation, not an original left as it was or a table of figures.
    if share > 0.12 and not (unwanted and len(re.findall(unwanted, text)) > 0.005 * len(text)):
      kept.append(page._replace(paragraphs=paragraphs))
  return kept


def _foreign(paragraph: str, wanted: str) -> bool:
  """Words with hardly a letter of the language among them: left untranslated."""
  words = len(re.findall(r'[A-Za-z]{3,} ', paragraph))
  return words > 15 and len(re.findall(wanted, paragraph)) < 0.05 * len(paragraph)


# math: the comments of metamath's set.mm.


def math_pages(packages: Path) -> list[Page]:
  path = unpack('metamath-databases', packages) / 'usr/share/metamath/databases/set.mm'
  return metamath_pages(path.read_text(encoding='utf-8'))


def metamath_pages(database: str) -> list[Page]:
  """One page for each titled section, keyed by the chapter (`#*#*` rules) that it stands in."""
  pages, key = [], ''
  paragraphs: list[str] = []
  for comment in re.findall(r'\$\(\s(.*?)\s\$\)', database, re.DOTALL):
    if comment.lstrip().startswith('$t'):  # how to typeset each sign
      continue
    title = re.match(
      r'\s*(#{8,}|(?:#\*){4,}#?|(?:=-){4,}=?|(?:-\.){4,}-?)\n(.*?)\n\1', comment, re.DOTALL
    )
    if title:
      name = ' '.join(title[2].split())
      if title[1].startswith('#') or not key:
        key = name
      paragraphs = [name]
      pages.append(Page(key, f'set.mm/{len(pages):04d} {name}', paragraphs))
      comment = comment[title.end() :]
    for block in re.split(r'\n\s*\n', comment):
      text = _prose(block)
      if pages and len(text) > 40 and text not in paragraphs:
        paragraphs.append(text)
  # The first is the file's own header.
  return [page for page in pages[1:] if len(page.paragraphs) > 1]


def _prose(comment: str) -> str:
  text = ' '.join(comment.split())
  # Marks of file inclusion, rules, theorems that were put out of use, and proofs step by step.
  if re.search(r'\$[a-z.=(){}\[\]]|@[a-z.=(){}] |[-=#*.]{10,}|:\w*:?\s*\|-|\|- \(\.', text):
    return ''
  # Who proved what when, and the database's own notes.
  text = re.sub(
    r'\((?:Contributed|Revised|Proof shortened|Proof rewritten|Moved|Unnecessary|Removed) [^()]*'
    r'(?:\([^()]*\)[^()]*)*\)|\((?:New usage|Proof modification) is discouraged\.\)',
    '',
    text,
  )
  # Formulas stand between single backquotes; a double one is a sign in a formula.
  parts = text.replace('``', '‘').split('`')
  for index, part in enumerate(parts):
    if index % 2:
      parts[index] = part.strip()
    else:
      part = re.sub(r'(?i)</?(t[dhr]|li|p|br|[ou]l|table|dd|dt)\b[^<>]*>', ' ', part)
      part = html.unescape(re.sub(r'</?[A-Za-z][^<>]{0,80}>', '', part))
      # A tilde marks a reference; spaces set it and a formula apart from a sign that follows.
      part = re.sub(r'(?<!~)~ (\S+)(?: (?=[,.;:?!)]))?', r'\1', part).replace('~~', '~')
      parts[index] = re.sub(r'^ (?=[,.;:?!)])', '', part) if index else part
  return ' '.join('`'.join(parts).split())


PAGES = {'code': code_pages, 'ja': ja_pages, 'zh': zh_pages, 'math': math_pages}


# Debian packages, without root.


def unpack(package: str, directory: Path) -> Path:
  """The files of a Debian package under `directory`; downloaded and unpacked if not there."""
  place = directory / package
  if place.exists():
    return place
  directory.mkdir(parents=True, exist_ok=True)
  archive = next(directory.glob(f'{package}_*.deb'), None)
  if archive is None:
    archive = _download(package, directory)
  with atomic_directory(place) as new:
    try:
      subprocess.run(['dpkg', '-x', archive, new], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
      archive.unlink(missing_ok=True)
      raise _no_package(package, getattr(error, 'stderr', '') or str(error)) from None
  return place


def _download(package: str, directory: Path) -> Path:
  apt = directory / 'apt'
  for folder in ('state/lists/partial', 'cache/archives/partial'):
    (apt / folder).mkdir(parents=True, exist_ok=True)
  # apt's own lists and caches belong to root: keep a set here. The sandbox user could not write
  # to it.
  options = [f'Dir::State={apt}/state', f'Dir::Cache={apt}/cache']
  options += ['Dir::State::status=/var/lib/dpkg/status', 'Acquire::Languages=none']
  options += [f'APT::Sandbox::User={_user()}', 'Acquire::Retries=2']
  base = ['apt-get', '-q', *(part for option in options for part in ('-o', option))]
  environment = os.environ | {'LC_ALL': 'C'}
  new = directory / f'.{package}.tmp-{os.getpid()}'
  told = ''
  try:
    new.mkdir()
    for command in ('update', 'download'):
      if command == 'update' and (apt / 'updated').exists():
        continue
      say(f'apt-get {command} {package if command == "download" else ""}'.strip())
      arguments = [package] if command == 'download' else []
      done = subprocess.run(
        [*base, command, *arguments], cwd=new, env=environment, capture_output=True, text=True
      )
      # One unreachable repository of several fails `update`; the package may be in another.
      told = done.stderr.strip() or told
      if command == 'update' and done.returncode == 0:
        (apt / 'updated').touch()
    found = next(new.glob('*.deb'), None)
    if found is None:
      (apt / 'updated').unlink(missing_ok=True)
      raise _no_package(package, told)
    archive = directory / found.name
    found.replace(archive)
    return archive
  except OSError as error:
    raise _no_package(package, str(error)) from None
  finally:
    shutil.rmtree(new, ignore_errors=True)


def _user() -> str:
  import pwd

  return pwd.getpwuid(os.getuid()).pw_name


def _no_package(package: str, reason: str) -> UserError:
  lines = [line for line in reason.splitlines() if line.strip()] or ['no reason given']
  return UserError(
    f'the Debian package {package} could not be had with apt-get ({lines[-1].strip()}): give the '
    'domain a path (Jsonl, TextFiles, Parquet) or a data set of the hub (Hub) instead'
  )
