"""`python -m sparsespec_compile COMMAND ...`."""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A command.

    Attributes:
        module, name: where the function of its arguments is.
        extra: what installs what it needs; empty = nothing else is needed.
        does: what it is for.
    """

    module: str
    name: str
    extra: str
    does: str


COMMANDS = {
    "serve": Command(
        "sparsespec_compile.integrations.serve",
        "main",
        "serve",
        "transformers' OpenAI-compatible server with this engine",
    ),
    "audit": Command(
        "sparsespec_compile.trial.command", "audit_command", "", "check a model's texts with and without drafts"
    ),
    "bench": Command(
        "sparsespec_compile.trial.command", "bench_command", "", "measure what drafts gain on a model and prompts"
    ),
}


def main(arguments: list[str]) -> int:
    """Run a command; returns the exit status.

    Raises:
        SystemExit: help was asked for, or there is no such command.
    """
    lines = [f"  {name:7}{command.does}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m sparsespec_compile",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["commands, each with a --help of its own:", *lines]),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    given = parser.parse_args(arguments)
    module, name, extra, _ = COMMANDS[given.command]
    try:
        run: Callable[[list[str]], int] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if not extra:
            raise
        need = f"{given.command} needs {error.name}, which is not installed"
        print(f"{need}. Run: pip install 'sparsespec-compile[{extra}]'", file=sys.stderr)
        return 2
    return run(given.arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
