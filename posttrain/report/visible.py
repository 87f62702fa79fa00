"""Text of others as it may be shown: nothing in it steers a terminal, and no password is in it."""

from __future__ import annotations

import re

from posttrain.config import without_credentials

# C0 and C1 controls, among them the escape that begins a terminal's commands; marks that turn the direction of
# writing, so that a name looks like another; line and paragraph separators; halves of surrogate pairs, which no
# terminal can be sent
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """One line in which control characters are written out, as in \\x1b, and passwords in URIs are not."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], without_credentials(text))
