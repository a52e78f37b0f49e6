"""The commands of ``python -m bench``, each of which is a module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import (
    bandwidth,
    blocks,
    compare,
    costs,
    fine_tuning,
    gpu_command,
    layers,
    memory,
    models,
    overhead,
    page,
    plot,
    predict,
    projection,
    readme,
    scaling,
)
from .options import MissingError, UsageError, check
from .runner import WrongResultError

COMMANDS = {
    "layers": layers,
    "blocks": blocks,
    "models": models,
    "bandwidth": bandwidth,
    "memory": memory,
    "overhead": overhead,
    "scaling": scaling,
    "costs": costs,
    "projection": projection,
    "fine-tuning": fine_tuning,
    "predict": predict,
    "gpu": gpu_command,
    "compare": compare,
    "plot": plot,
    "report": page,
    "readme": readme,
}
"""Each has ``HELP``, ``add_arguments(parser)`` and ``run(options)``, which returns the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    0 for success, 1 for a failure that was explained, 2 for what cannot be had here, 130 for an interruption.
    """
    options = _parser().parse_args(arguments)
    try:
        check(options)
        return options.run(options)
    except UsageError as error:
        return _fail(str(error), 2)
    except (MissingError, WrongResultError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Deep Control on this machine.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _fail(message: str, status: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
