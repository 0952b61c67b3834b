"""The command line. Imports neither torch nor Prefect, and nothing heavy before a command is known."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from flows.inquiry_options import RUN, add_inquiries
from flows.operations_options import add_operations
from flows.option_types import positive
from flows.store_options import add_store_care
from flows.sweep_options import add_sweep

if TYPE_CHECKING:
    from artifacts.errors import RequestError

OK, FAILED, REFUSED = 0, 1, 2
RUNNING = ("run", "sweep")
"""Commands that run a recipe in this process."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One message and where help is, instead of the whole usage."""
        self.exit(REFUSED, f"{self.prog}: {message}\nsee {self.prog} --help\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Arguments that this command does not have; its own help says which it has."""
        from stages.names import nearest

        known = [option for action in self._actions for option in action.option_strings]
        hints = [text + (nearest(text.partition("=")[0], known) if text[:2] == "--" else "") for text in unknown]
        self.error(f"unrecognized arguments: {' '.join(hints)}")

    def require_command(self, arguments: Sequence[str]) -> None:
        """Ends with the nearest command where what stands in its place is none."""
        [commands] = [action.choices for action in self._actions if isinstance(action.choices, dict)]
        first = next((text for text in arguments if text[:1] != "-"), None)
        if first is not None and first not in commands:
            from stages.names import nearest

            self.error(f"there is no command {first!r}{nearest(first, commands)}; there are: {', '.join(commands)}")


class _Version(argparse.Action):
    """Looked up when it is asked for: to find a package's metadata takes longer than `--help`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"posttrain {version('posttrain')}")
        parser.exit(OK)


def parser() -> _Parser:
    """Every command with its options."""
    top = _Parser(prog="posttrain", description="Post-training as pipelines of cached, resumable stages.")
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = _Parser(add_help=False)
    shared.add_argument(
        "--store", metavar="URL", help="the artifact store (default: $POSTTRAIN_STORE or the user's cache)"
    )
    shared.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    changed = _Parser(add_help=False)
    changed.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change a setting: dpo.beta=0.2")
    recipe, forced = _Parser(add_help=False, parents=[changed]), _Parser(add_help=False)
    recipe.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a shipped recipe")
    for parent, option, text in (
        (recipe, "only", "run this stage alone, with its inputs from the store"),
        (recipe, "from", "run this stage and all that follows from it"),
        (recipe, "until", "run this stage and all that it needs"),
        (forced, "force", "run this stage anew, even if its result or a checkpoint is in the store"),
    ):
        parent.add_argument(f"--{option}", action="append", default=[], metavar="S", help=f"{text} (repeatable)")

    def add(name: str, text: str, *parents: _Parser) -> _Parser:
        made = commands.add_parser(name, help=text, description=text, parents=[*parents, shared])
        made.set_defaults(parser=made)
        return made

    add("run", "run a recipe", recipe, forced)
    add_sweep(add, recipe)
    plan = add("plan", "say what a run would do, and why", recipe, forced)
    plan.add_argument("--memory", action="store_true", help="predict what each stage needs, and what would make it fit")
    plan.add_argument(
        "--memory-gb",
        type=positive,
        metavar="GB",
        help="plan for GPUs of so much memory (default: what is found here)",
    )
    reference = "an id (8 digits are enough) or an alias"
    add("show", "an artifact: what it is, its files, metrics and lineage").add_argument("artifact", help=reference)
    add("path", "a local folder with an artifact's files").add_argument("artifact", help=reference)
    add_store_care(add, reference)
    report = add("report", "a run, or a sweep, as one HTML page")
    report.add_argument("run", help=f"{RUN}; or a sweep's name (`latest` is the sweep where that is the newest)")
    report.add_argument(
        "-o", "--output", metavar="FILE.html", help="where to (default: its name .html); a folder; - : stdout"
    )
    add_inquiries(add, changed, reference)
    add_operations(add, changed)
    add("stages", "the stages there are, or one with its fields").add_argument("name", nargs="?")
    add("rewards", "the built-in rewards, or one with its fields and an example").add_argument("name", nargs="?")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: well; 1: a stage failed or something is damaged; 2: the request was wrong; 130: Ctrl-C.

    Without `arguments` those of this process, which is then ours to end.
    """
    top = parser()
    top.require_command(sys.argv[1:] if arguments is None else arguments)
    options, unknown = top.parse_known_args(arguments)
    if unknown:
        options.parser.refuse(unknown)
    from artifacts.errors import PosttrainError, RequestError  # after `--help`, which is three times as fast without

    try:
        from flows import commands

        status = commands.COMMANDS[options.command](options)
        sys.stdout.flush()  # here, where a reader that has gone is no error
        if arguments is None and options.command in RUNNING:
            from flows.pipeline import drain
            from stages.leaving import leave

            drain()
            leave(status)  # all is recorded; to take Prefect down takes longer than to plan a run
        return status
    except RequestError as error:
        if options.json:
            problems = [{"where": problem.where, "what": problem.what} for problem in error.problems]
            _print({"state": "refused", "problems": problems})
        _say(_refusal(error))
        return REFUSED
    except PosttrainError as error:
        if options.json:
            _print({"state": "failed", "error": str(error)})
        _say(f"posttrain: {error}")
        return FAILED
    except KeyboardInterrupt:
        _say(f"posttrain: interrupted{_kept(options) if options.command in RUNNING else ''}")
        return 130
    except BrokenPipeError:
        # whoever read our output has enough; nothing may be written when the interpreter closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED if options.command in RUNNING else OK  # whether the run went well can no longer be told
    except Exception as error:
        if os.environ.get("POSTTRAIN_DEBUG") == "1":
            raise
        _say(f"posttrain: unexpected {type(error).__name__}: {error}\n{_keep_traceback(error)}")
        return FAILED


def _kept(options: argparse.Namespace) -> str:
    """Of a run that Ctrl-C ended; what becomes of a stage that was forced is another thing."""
    kept = "; what is done is kept, and the same command goes on from there"
    if not getattr(options, "force", ()):
        return kept
    names = ", ".join(options.force)
    return (
        f"{kept}, but begins {names} anew: once that has begun, leave `--force` of it out to go on there too (where "
        "its result was in the store before, that is taken instead)"
    )


def _refusal(error: RequestError) -> str:
    if len(error.problems) == 1:
        only = error.problems[0]
        return f"posttrain: {only.what if only.where == 'request' else only}"
    listed = "\n".join(f"  {problem}" for problem in error.problems)
    return f"posttrain: {len(error.problems)} mistakes, nothing was started\n{listed}"


def _keep_traceback(error: Exception) -> str:
    """Write the traceback to a file of the user's cache; says where."""
    import traceback

    from artifacts import default_cache, scrub

    path = default_cache() / "last-error.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(scrub("".join(traceback.format_exception(error))), encoding="utf-8")
    except OSError as reason:
        return f"(no log could be written to {path}: {reason}; POSTTRAIN_DEBUG=1 shows the traceback)"
    return f"the traceback is in {path}; POSTTRAIN_DEBUG=1 shows it"


def _say(text: str) -> None:
    """On stderr, without secrets: what a person typed and what a server answered may hold some."""
    from artifacts import scrub
    from stages.visible import visible

    print(visible(scrub(text)), file=sys.stderr)


def _print(answer: dict[str, object]) -> None:
    """As JSON on stdout, without secrets."""
    from artifacts.sealed import publishable

    print(json.dumps(publishable(answer), indent=1))


if __name__ == "__main__":
    sys.exit(main())
