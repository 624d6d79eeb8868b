"""Refuse a page that would load a script, a style or a picture from another server."""

import re

from mkdocs.exceptions import PluginError

_LOADED = re.compile(
    r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]+)"|<link[^>]*stylesheet[^>]*\shref="(https?:[^"]+)"'
)


def on_post_page(output: str, page: object, **_: object) -> str:
    if found := _LOADED.search(output):
        raise PluginError(f"{page} loads {found[1] or found[2]}; keep the file in docs/assets instead")
    return output
