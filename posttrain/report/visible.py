"""Text from outside, made safe to print: without control characters and passwords."""

from __future__ import annotations

import re

from posttrain.config import without_credentials

# C0 and C1 controls, among them the escape that begins a terminal's commands; marks that change the direction of
# writing, so that a name looks like another; line and paragraph separators; halves of surrogate pairs, which cannot
# be encoded
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text as one line, with control characters escaped (as in \\x1b) and passwords in URIs replaced by ***."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], without_credentials(text))
