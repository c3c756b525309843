"""Where the log of a run goes: the terminal, a file, or nowhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import InfluenceConfig

LOG = logging.getLogger("influence")
LOG_FORMAT = logging.Formatter("%(asctime)s: %(message)s")


def _log_file(filename: str | Path) -> logging.FileHandler:
    Path(filename).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(filename)
    handler.setFormatter(LOG_FORMAT)
    return handler


def init_logging(filename: str | Path | None = None) -> None:
    """Send the log to the terminal, and to `filename` as well when it is given."""
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(LOG_FORMAT)
    LOG.handlers = [terminal, _log_file(filename)] if filename else [terminal]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


@contextmanager
def logging_of(config: InfluenceConfig) -> Iterator[None]:
    """For the time of a run, the log goes to `log_filename`, and not to the terminal when it is to be silent."""
    before, level, filename = LOG.handlers, LOG.level, config.log_filename
    files = [handler for handler in before if isinstance(handler, logging.FileHandler)]
    LOG.handlers = list(before if config.progress else files)
    known = {Path(handler.baseFilename) for handler in files}
    own = _log_file(filename) if filename and Path(filename).absolute() not in known else None
    if own:
        LOG.addHandler(own)
        LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.handlers = before
        LOG.setLevel(level)
        if own:
            own.close()
