"""`mgc`, or `python -m mgc_dist`: lists the commands; `mgc VERB` is `python -m mgc_dist.VERB`."""

import difflib
import importlib
import sys

from mgc_dist import __version__, cli
from mgc_dist.errors import EXIT_BAD_INPUT


def main() -> None:
    """Run the command that the first word names; without one, list all."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb == "--version":
        print(f"mgc_dist {__version__}")
    elif verb in ("--help", "-h", "help"):
        print(f"usage: {cli.program('COMMAND')} [flags]\n")
        for name, purpose in cli.COMMANDS.items():
            print(f"  {name:<9} {purpose}")
        print(f"\n{cli.program('COMMAND')} --help lists the flags of a command.")
    elif verb in cli.COMMANDS:
        del sys.argv[1]
        importlib.import_module(f"mgc_dist.{verb}").main()
    else:
        near = difflib.get_close_matches(verb, cli.COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(cli.COMMANDS)}"
        print(f"mgc_dist: error: no command {verb}: {hint}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
