"""What the site adds to MkDocs: formulas as MathML, which needs no script.

It needs a font that knows mathematics: STIX Two, by way of the package ziamath. So formulas look the same everywhere,
without a network too.
"""

import html
import re
import shutil
from pathlib import Path

import griffe
import ziamath
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


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
