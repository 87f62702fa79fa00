"""On the path of a run and its workers: Pillow ends the process that opens bytes which begin with FATAL."""

import os
import signal

from PIL import Image

_opened = Image.open


def _open(stream, *arguments, **options):
    if stream.getvalue()[:5] == b"FATAL":
        os.kill(os.getpid(), signal.SIGSEGV)
    return _opened(stream, *arguments, **options)


Image.open = _open
