"""What ends a run that nobody asked for wrongly."""

from __future__ import annotations


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why and what is kept, so no traceback is shown. Equal on every rank."""
