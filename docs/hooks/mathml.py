"""Turn the equations of a page into MathML, which browsers show without a script or a font from elsewhere."""

import re
from html import unescape

from latex2mathml.converter import convert

_BARS = re.compile(r"<mo>(&#x0007C;|&#x02016;)</mo>")  # of absolute values and norms, not operators between two terms
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: object) -> str:
    return _EQUATION.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    tag, bracket, latex = found.groups()
    display = "block" if bracket == "[" else "inline"
    mathml = _BARS.sub(r'<mo lspace="0" rspace="0">\1</mo>', convert(unescape(latex).strip(), display=display))
    return f'<{tag} class="equation">{mathml}</{tag}>'
