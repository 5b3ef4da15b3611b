"""Man pages (roff, the man(7) macros) and handbook pages (HTML) to paragraphs of plain text."""

import re
from html.parser import HTMLParser

FONTS = {'B', 'I', 'SM', 'SB', 'R', 'CW'}
ALTERNATING = {'BR', 'BI', 'IR', 'IB', 'RB', 'RI'}
BREAKS = {'PP', 'LP', 'P', 'HP', 'sp', 'RS', 'RE', 'Sp', 'bp', 'TQ', 'BS', 'BE'}
VERBATIM = {'nf': 'fi', 'EX': 'EE', 'Vb': 'Ve', 'CS': 'CE', 'DS': 'DE'}
HEADINGS = {'SH', 'SS'}
# Layout only: dropped with their arguments.
SILENT = set(
  'TH br PD ne in ti ft ad na nh hy ta ds nr if ie el rm rn rr UC IX de ig tr ll ev mk ns ps vs '
  'hlm ss cs fam lf so als mso nop AS VS VE ce pl po TA so UE ME SY YS AT DT EQ EN color '
  'cp defcolor do ec eo fl hc hw it lc lt mc pc pm rt sty tl tm ul warn ex'.split()
)
# What pod2man and man(7) define in a preamble that is skipped here.
STRINGS = {'C`': '', "C'": '', 'L"': '"', 'R"': '"', '--': '--', 'Aq': "'", 'PI': 'pi', 'R': '®'}
STRINGS |= {'lq': '“', 'rq': '”', 'Tm': '™', '-': '-'}
GLYPHS = {
  'aq': "'", 'dq': '"', 'lq': '“', 'rq': '”', 'oq': '‘', 'cq': '’', 'bu': '•', 'co': '©', 'em': '—',
  'en': '–', 'hy': '-', 'mi': '-', 'rs': '\\', 'ha': '^', 'ti': '~', 'ga': '`', 'aa': '´',
  'pl': '+', 'eq': '=', '+-': '±', '**': '*', '->': '→', '<-': '←', 'de': '°', 'mu': '×', 'rg': '®',
  'tm': '™', '>=': '≥', '<=': '≤', '!=': '≠', 'ul': '_', 'br': '|', 'bv': '|', 'ba': '|', 'or': '|',
  'la': '⟨', 'ra': '⟩', 'lh': '☜', 'sq': '□', 'dg': '†', 'fm': '′', 'if': '∞', 'sc': '§', 'ts': 'ς',
  '*b': 'β', '*m': 'μ', '*p': 'π', '*a': 'α', ':a': 'ä', ':o': 'ö', ':u': 'ü', "'e": 'é', 'ss': 'ß',
  'lC': '{', 'rC': '}', 'lB': '[', 'rB': ']', 'sh': '#', 'Do': '$', 'at': '@', 'Fo': '«', 'Fc': '»',
  'sl': '/',
}  # fmt: skip
# Sections about the page rather than its subject: the same names and licences on every page.
ABOUT_THE_PAGE = re.compile(
  r'author|copyright|copying|licen[cs]e|reporting bugs|colophon|availability|translat'
  r'|著者|作者|著作権|版权|版权所有|許諾|ライセンス|バグの?報告|报告|翻訳|译者|翻译|謝辞|致谢'
  r'|この文書について|跋|中文版|中文手册|手册页翻译|man ?手册|许可|维护人|最新更新',
  re.IGNORECASE,
)
WIDE = r'\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef'
ESCAPE = re.compile(
  r"\\(?:f(?:\[[^]]*\]|\(..|.)|s[-+]?(?:\[[^]]*\]|'[^']*'|\(\d\d|\d{1,2})"
  r"|[hvwlLDobxANXSHZRC]'[^']*'|n[-+]?(?:\[[^]]*\]|\(..|.)|k(?:\[[^]]*\]|\(..|.)"
  r'|[mMFgY](?:\[[^]]*\]|\(..|.)|\*(?:\[(?P<s1>[^]]*)\]|\((?P<s2>..)|(?P<s3>.))'
  r'|\((?P<g1>..)|\[(?P<g2>[^]]*)\]|(?P<one>.)|$)'
)
PLAIN = {'-': '-', 'e': '\\', '\\': '\\', ' ': ' ', '~': ' ', '0': ' ', "'": "'", '`': '`'}
PLAIN |= {'t': '\t', '.': '.', 'E': '\\'}


def man_paragraphs(roff: str) -> list[str]:
  """The page's paragraphs: headings, filled text, tags with what they say, verbatim blocks.

  [] for a page that only points to another, for one in mdoc, and for one whose own macros hold
  its text.
  """
  lines = roff.splitlines()
  if any(re.match(r"[.']\s*(Dd|Sh|Nm)\b", line) for line in lines):
    return []
  page = _Page()
  unknown = 0
  for line in _without_conditionals(lines):
    request = re.match(r"[.']\s*([^\s\\]*)\s*(.*)", line)
    if not request:
      page.text(line)
    elif not page.request(request[1], request[2]):
      unknown += 1
  page.end()
  if unknown > 0.05 * len(lines):
    return []
  return page.paragraphs


def fill(lines: list[str]) -> str:
  """Lines as one: no space where both sides are Chinese or Japanese, which have none."""
  text = re.sub(r'[ \t\u3000]+', ' ', '\n'.join(line.strip() for line in lines if line.strip()))
  text = re.sub(f'(?<=[{WIDE}])\n(?=[{WIDE}])', '', text)
  return text.replace('\n', ' ').strip()


class _Page:
  def __init__(self):
    self.paragraphs: list[str] = []
    self.strings = dict(STRINGS)
    self.lines: list[str] = []
    self.tag: str | None = None
    self.expect: str | None = None  # 'tag', 'section' or 'heading': what the next text line is
    self.until: str | None = None  # the request that ends the verbatim block
    self.joined = False
    self.skipping = False

  def end(self) -> None:
    if self.until:
      body = '\n'.join(line.rstrip() for line in self.lines).strip('\n')
    else:
      body = fill(self.lines)
    if self.tag and re.fullmatch(r'[-•*o·]|\(?\w{1,2}[.)]', self.tag):
      body = f'{self.tag} {body}'
    elif self.tag:
      body = f'{self.tag}\n{body}' if body else self.tag
    if body.strip() and not self.skipping:
      self.paragraphs.append(body)
    self.lines, self.tag, self.joined = [], None, False

  def text(self, line: str) -> None:
    line, joins = self.plain(line)
    if self.expect and line.strip():
      expected, self.expect = self.expect, None
      if expected == 'tag':
        self.tag = fill([line])
      elif expected == 'section':
        self.skipping = bool(ABOUT_THE_PAGE.search(line))
      if expected != 'tag' and not self.skipping:
        self.paragraphs.append(fill([line]))
      return
    if not line.strip() and not self.until:
      self.end()
    elif self.joined and self.lines:
      self.lines[-1] += line
    else:
      self.lines.append(line)
    self.joined = joins

  def request(self, name: str, rest: str) -> bool:
    """Carries out one request; False if it is not known."""
    if self.until:
      if name in (self.until, 'SH', 'SS', 'PP'):
        self.end()
        self.until = None
        if name not in HEADINGS:
          return True
      elif name in BREAKS | {'br'}:
        self.lines.append('')
        return True
    if name in FONTS:
      self.text(' '.join(arguments(rest))) if rest else None
    elif name in ALTERNATING:
      self.text(''.join(arguments(rest)))
    elif name in HEADINGS:
      self.end()
      self.expect = 'section' if name == 'SH' else 'heading'
      if rest:
        self.text(' '.join(arguments(rest)))
    elif name == 'TP':
      self.end()
      self.expect = 'tag'
    elif name == 'IP':
      self.end()
      given = arguments(rest)
      self.tag = fill([self.plain(given[0])[0]]) if given else None
    elif name == 'OP':
      self.text('[' + ' '.join(arguments(rest)) + ']')
    elif name in ('UR', 'MT', 'URL'):
      self.text(arguments(rest)[0]) if rest else None
    elif name in VERBATIM:
      self.end()
      self.until = VERBATIM[name]
    elif name in BREAKS:
      self.end()
    elif name == 'ds':
      key, _, value = rest.partition(' ')
      self.strings[key] = value.strip().removeprefix('"')
    elif name and name not in SILENT and name not in VERBATIM.values():
      return False
    return True

  def plain(self, line: str) -> tuple[str, bool]:
    """Without escapes, and whether it ends in one that joins it to the next line."""
    joins = bool(re.search(r'\\c\s*$', line))
    for _ in range(3):  # strings hold escapes of their own
      if '\\*' not in line:
        break
      line = re.sub(
        r'\\\*(?:\[([^]]*)\]|\((..)|(.))',
        lambda match: self.strings.get(match[1] or match[2] or match[3], ''),
        line,
      )
    return ESCAPE.sub(_escape, line), joins


def _escape(match: re.Match) -> str:
  glyph = match['g1'] or match['g2']
  if glyph:
    code = re.fullmatch(r'u([0-9A-F]{4,6})', glyph)
    return chr(int(code[1], 16)) if code else GLYPHS.get(glyph, '')
  if match['one']:
    # Anything that is no escape stands for itself when it is no ASCII letter or sign.
    one = match['one']
    return PLAIN.get(one, one if ord(one) > 127 else '')
  return ''


def arguments(rest: str) -> list[str]:
  """A request's arguments: separated by spaces, unless quoted."""
  found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s"\\])(?:\\.|[^\s\\])*|\\$)', rest)
  return [quoted.replace('""', '"') if quoted else bare for quoted, bare in found]


def _without_conditionals(lines: list[str]):
  """Drops comments, macro definitions, conditionals and tables: preambles, not prose."""
  depth, until = 0, None
  for line in lines:
    if until:
      until = None if re.match(until, line) else until
      continue
    if depth:
      depth += line.count('\\{') - line.count('\\}')
      continue
    request = re.match(r"[.']\s*(\S*)", line)
    if request and request[1] in ('if', 'ie', 'el', 'while'):
      depth = max(0, line.count('\\{') - line.count('\\}'))
      continue
    if request and request[1] in ('de', 'de1', 'am', 'ig'):
      until = r"[.']\s*\.\s*$"
      continue
    if request and request[1] in ('TS', 'EQ', 'PS'):
      until = rf"[.']\s*{request[1][0]}[EN]\b" if request[1] != 'EQ' else r'\.\s*EN\b'
      continue
    if re.match(r"[.']\s*\\[\"#]|'''", line):
      continue
    yield re.sub(r'(?<!\\)\\["#].*', '', line)


BLOCKS = set('p div h1 h2 h3 h4 h5 h6 li dt dd pre tr td th table ul ol dl br'.split())
VOID = set('img br hr meta link input col wbr'.split())


class _Html(HTMLParser):
  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.paragraphs: list[str] = []
    self.parts: list[str] = []
    self.open: list[bool] = []  # for each open element: does it hide its text
    self.pre = 0

  def handle_starttag(self, tag, attributes):
    if tag in BLOCKS:
      self.flush()
    if tag in VOID:
      return
    given = dict(attributes)
    names = set((given.get('class') or '').split())
    hidden = tag in ('head', 'script', 'style') or given.get('id') in ('banner', 'title')
    hidden |= bool(
      names & {'docnav', 'toc', 'indexterm', 'footnotes', 'authorgroup', 'legalnotice'}
    )
    self.open.append(hidden)
    self.pre += tag == 'pre'

  def handle_startendtag(self, tag, attributes):
    if tag in BLOCKS:
      self.flush()

  def handle_endtag(self, tag):
    if tag in BLOCKS:
      self.flush()
    if tag in VOID:
      return
    if self.open:
      self.open.pop()
    self.pre -= tag == 'pre'

  def handle_data(self, data):
    if not any(self.open):
      self.parts.append(data)

  def flush(self):
    text = ''.join(self.parts)
    if self.pre:
      text = '\n'.join(line.rstrip() for line in text.splitlines()).strip('\n')
    else:
      text = re.sub(r'\s+', ' ', text).strip()
    if text:
      self.paragraphs.append(text)
    self.parts = []


def html_paragraphs(html: str) -> list[str]:
  """The page's paragraphs, without navigation, contents and index marks."""
  parser = _Html()
  parser.feed(html)
  parser.close()
  parser.flush()
  return parser.paragraphs
