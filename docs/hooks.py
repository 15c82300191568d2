"""What the site adds to MkDocs: files of the repository as parts of pages, and formulas as MathML.

A page takes in a file by a line ``<!-- include README.md -->`` and one of its sections, up to the next heading, by
``<!-- include README.md#limits-honestly -->``. MathML needs no script, only a font that knows mathematics: STIX Two, by
way of the package ziamath. So formulas look the same everywhere, without a network too.
"""

import html
import posixpath
import re
import shutil
from pathlib import Path

import griffe
import ziamath
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r"^<!-- include (\S+?)(?:#(\S+))? -->$", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)#\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# where a file of the repository is a page
PAGES = {"README.md": "docs/index.md", "CONTRIBUTING.md": "docs/contributing.md", "CHANGELOG.md": "docs/changelog.md"}


def on_page_markdown(markdown, page, **_):
    return INCLUDE.sub(lambda match: included(match[1], match[2], page.file.src_uri), markdown)


def on_page_content(content, **_):
    display = {"span": "inline", "div": "block"}
    return FORMULA.sub(lambda match: mathml(html.unescape(match[2]), display[match[1]]), content)


def on_post_build(config, **_):
    font = Path(ziamath.__file__).parent / "fonts/STIXTwoMath-Regular.ttf"
    shutil.copy(font, Path(config.site_dir) / "assets")


class Sections(griffe.Extension):
    """Docstrings here have no blank line between their sections, where griffe wants one."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"\n(Returns|Raises|Attributes):\n", r"\n\n\1:\n", obj.docstring.value)


def mathml(latex, display):
    """A formula as MathML; it must use what latex2mathml knows, ``array`` for instance and not ``aligned``."""
    result = convert(latex, display=display)
    if "<mi>&</mi>" in result or "\\" in result:
        raise ValueError(f"not understood: {latex}")
    return result


def included(name, slug, page):
    """The text of a file or of its section, its links written for ``page``."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if slug is not None:
        parts = re.split(r"^#+ (.*)\n", text, flags=re.MULTILINE)[1:]
        sections = {slug_of(title): body for title, body in zip(parts[::2], parts[1::2], strict=True)}
        if slug not in sections:
            raise ValueError(f"{page}: {name} has no section {slug!r}; it has {', '.join(sections)}")
        text = sections[slug]
    here = posixpath.join("docs", posixpath.dirname(page))

    def moved(match):
        if "://" in match[2]:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), match[2]))
        return match[1] + posixpath.relpath(PAGES.get(target, target), here)

    return LINK.sub(moved, text)


def slug_of(title):
    """The anchor of a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
