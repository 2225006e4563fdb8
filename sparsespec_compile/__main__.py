"""`python -m sparsespec_compile COMMAND ...`."""

import sys
from collections.abc import Callable
from importlib import import_module

COMMANDS = {
    "serve": ("sparsespec_compile.integrations.serve", "main", "serve"),
    "audit": ("sparsespec_compile.trial.command", "audit_command", ""),
    "bench": ("sparsespec_compile.trial.command", "bench_command", ""),
}
"""Commands, where the functions of their arguments are, and the extra that installs what they need."""


def main(arguments: list[str]) -> int:
    """Run a command; returns the exit status."""
    if not arguments or arguments[0] not in COMMANDS:
        print(f"usage: python -m sparsespec_compile {{{','.join(COMMANDS)}}} ... (--help says more)", file=sys.stderr)
        return 2
    module, name, extra = COMMANDS[arguments[0]]
    try:
        command: Callable[[list[str]], int] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if not extra:
            raise
        need = f"{arguments[0]} needs {error.name}, which is not installed"
        print(f"{need}. Run: pip install 'sparsespec-compile[{extra}]'", file=sys.stderr)
        return 2
    return command(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
