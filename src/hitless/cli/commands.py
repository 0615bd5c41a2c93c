"""The commands. Libraries are imported where they are used, so that ``--help`` and small commands start at once."""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hitless.errors import HitlessError
from hitless.known import MODES, PROFILES

if TYPE_CHECKING:
    from hitless.layout.dwarf import Dwarf

__all__ = ["main"]

TROUBLE = 1


def _command(
    trouble: int = TROUBLE, on_node: bool = False
) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Give a command ``--json`` and ``--debug``, and turn its errors into words and an exit code.

    One that works ``on_node`` begins with giving up what it does not need of root's rights: it may run a converter.
    """

    def decorate(function: Callable[..., int | None]) -> Callable[..., None]:
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
        @click.option("--debug", is_flag=True, help="Show where in the program an error came from.")
        @functools.wraps(function)
        def run(*, as_json: bool, debug: bool, **options: Any) -> None:
            try:
                if on_node:
                    from hitless.kernel import capabilities

                    capabilities.require()
                    capabilities.drop_others()
                code = function(as_json=as_json, **options)
            except HitlessError as error:
                if debug:
                    raise
                message = "\n".join((error.message, *getattr(error, "__notes__", ())))
                _complain(_form(as_json, options), error.code, message, error.facts)
                sys.exit(trouble)
            except BrokenPipeError:
                # Whoever reads has seen enough; what was to be done is done or undone, and nobody hears more.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(trouble)
            except OSError as error:
                if debug:
                    raise
                hint = "; run as root" if isinstance(error, PermissionError) else ""
                text = f"{error.filename or 'system call'}: {error.strerror}{hint}"
                _complain(_form(as_json, options), "system", text, {"errno": error.errno})
                sys.exit(trouble)
            except KeyboardInterrupt:
                text = "interrupted; what was running was undone or finished"
                _complain(_form(as_json, options), "interrupted-by-user", text, {})
                sys.exit(130)
            sys.exit(code or 0)

        return run

    return decorate


def _form(as_json: bool, options: dict[str, Any]) -> str:
    return "json" if as_json else str(options.get("form", "text"))


def _complain(form: str, code: str, message: str, facts: dict[str, object]) -> None:
    from hitless.cli.output import annotation, print_json, printable

    if form == "json":
        print_json({"error": {**facts, "code": code, "message": message}})
        return
    if form == "github":
        click.echo(annotation("error", None, "hitless: trouble", message))
    click.echo(printable(f"hitless: {message}", "\n"), err=True)


def _variables(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE")
        found[name] = value
    return found


def _sha256(_context: click.Context, _parameter: click.Parameter, given: str | None) -> str | None:
    if given is not None and not re.fullmatch("[0-9a-fA-F]{64}", given):
        raise click.BadParameter(f"{given!r} is no SHA-256: 64 hexadecimal digits, as inspect prints them")
    return given and given.lower()


_PATH = click.Path(readable=False)  # for shells to complete; what is there is judged by those who read it
_root = click.option(
    "--root", type=_PATH, required=True, metavar="DIR", help="The pin root, a directory on a bpffs.",
)  # fmt: skip
_set = click.option(
    "--set", "variables", multiple=True, callback=_variables, metavar="NAME=VALUE", help="Fill ${NAME} in bundle.toml."
)
_digest = click.option(
    "--digest", callback=_sha256, metavar="SHA256", help="Refuse any BUNDLE but this one; inspect prints the digest.",
)  # fmt: skip
def _header(_context: click.Context, _parameter: click.Parameter, given: str | None) -> Path | None:
    return None if given is None else Path(given)


_types_from = click.option(
    "--types-from", "header", type=_PATH, callback=_header, metavar="HEADER",
    help="A C header with the types of maps that carry none; needs clang.",
)  # fmt: skip
_allow_loss = click.option(
    "--allow-loss", multiple=True, metavar="MAP", help="This map may lose what the plan says it loses."
)
_rate = click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Copy N entries a second at most.",
)  # fmt: skip
_cpu = click.option(
    "--cpu", type=click.FloatRange(0, 100, min_open=True), default=100, metavar="PERCENT",
    help="Copy with PERCENT of one CPU at most; 100 if not given.",
)  # fmt: skip


_wait = click.option(
    "--wait", type=click.FloatRange(min=0), default=10, show_default=True, metavar="SECONDS",
    help="Wait so long for another process that upgrades this root.",
)  # fmt: skip


def _follows(given: list[str], option: str, value: str) -> bool:
    return any(one == option and other == value for one, other in pairwise(given))


class _Commands(click.Group):
    """Bad arguments are trouble like any other: the command's exit code for it, and JSON where that was asked for."""

    def main(self, args: Any = None, *more: Any, **extra: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(given, *more, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            if "--json" in given or "--format=json" in given or _follows(given, "--format", "json"):
                _complain("json", "usage", error.format_message(), {})
            else:
                error.show()
            # click's own 2 would be "changes" of plan.
            sys.exit(2 if given[:1] in (["diff"], ["check"]) else TROUBLE)
        except click.Abort:
            click.echo("Aborted!", err=True)
            sys.exit(TROUBLE)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hitless")
def main() -> None:
    """Upgrade a running eBPF daemon with no connection reset and no state lost."""


@main.command(epilog="Example: hitless inspect release-2/")
@click.argument("what", type=_PATH)
@_types_from
@_command()
def inspect(what: str, header: Path | None, as_json: bool) -> None:
    """Show maps, programs and layouts of WHAT: a .o file, a bundle, a snapshot, a pinned map or a pin root."""
    from hitless.cli.output import print_json, show_source
    from hitless.sources import read_source

    source = read_source(what, _types_of(header))
    if as_json:
        print_json({"schema": 1, **_facts(source)})
    else:
        click.echo(show_source(source))


@main.command(epilog="Example: hitless init build/*.bpf.o -o release-2/ --from release-1/")
@click.argument("objects", nargs=-1, required=True, type=_PATH)
@click.option("-o", "directory", type=_PATH, metavar="DIR", help="Where the bundle is to be; else beside the objects.")
@click.option(
    "--from", "old", type=_PATH, multiple=True, metavar="OLD",
    help="The release before (bundle, snapshot or object, also several): suggest renames and list losses.",
)  # fmt: skip
@_types_from
@click.option("--profile", "daemon", type=click.Choice(PROFILES), help="Fill in what is known of this daemon.")
@click.option(
    "--mode", type=click.Choice(sorted(MODES)), help="Which of its modes; that of the objects, if not given.",
)  # fmt: skip
@click.option(
    "--root", type=_PATH, metavar="DIR",
    help="Look at what a loader pinned and attached on this node, and fill that in; needs root, changes nothing.",
)  # fmt: skip
@_command()
def init(
    objects: tuple[str, ...],
    directory: str | None,
    old: tuple[str, ...],
    header: Path | None,
    daemon: str | None,
    mode: str | None,
    root: str | None,
    as_json: bool,
) -> None:
    """Write a bundle.toml for OBJECTS that a person finishes: whatever is not known is a question in it.

    Without --root it reads files only: no root, no kernel. No command takes the bundle while a question is open.
    """
    from hitless.cli.output import print_json, show_skeleton
    from hitless.skeleton import start_bundle

    if mode is not None and daemon is None:
        raise click.UsageError("--mode is one of a daemon's: say by --profile which")
    if root is not None:
        from hitless.kernel import capabilities

        capabilities.require()
    folder = Path(directory) if directory else None
    pins = Path(root) if root is not None else None
    manifest, made = start_bundle([Path(one) for one in objects], folder, old, header, daemon, mode, pins)
    if as_json:
        print_json({"schema": 1, "file": str(manifest), **_facts(made)})
    else:
        click.echo(show_skeleton(str(manifest), made))


@main.command(epilog="Example: hitless diff release-1/ release-2/")
@click.argument("old", type=_PATH)
@click.argument("new", type=_PATH)
@_types_from
@_command(trouble=2)
def diff(old: str, new: str, header: Path | None, as_json: bool) -> int:
    """Say what changed between the maps of OLD and NEW. Exit code: 0 same, 1 differ, 2 trouble."""
    from hitless.cli.output import print_json, show_diffs
    from hitless.compare import compare

    comparison = compare(old, new, (), _types_of(header))
    if as_json:
        print_json(comparison.to_dict())
    else:
        click.echo(show_diffs(comparison, _width()))
    return 0 if comparison.verdict == "identical" else 1


@main.command(epilog="Example: hitless check release-1/ release-2/ --format github")
@click.argument("old", type=_PATH)
@click.argument("new", type=_PATH)
@_allow_loss
@_types_from
@click.option(
    "--format", "form", type=click.Choice(["text", "json", "github", "html"]), default="text", show_default=True,
    help="html is one page with a memory map of every changed struct; github annotates a pull request.",
)  # fmt: skip
@_command(trouble=2)
def check(
    old: str, new: str, allow_loss: tuple[str, ...], header: Path | None, form: str, as_json: bool
) -> int:
    """Say whether all state of OLD survives an upgrade to NEW: for CI, on any system, without root.

    Exit code: 0 all of it does (or the loss is accepted), 1 some would be lost, 2 trouble.
    """
    from hitless.compare import compare

    comparison = compare(old, new, allow_loss, _types_of(header))
    if as_json or form == "json":
        from hitless.cli.output import print_json

        print_json(comparison.to_dict())
    elif form == "html":
        from hitless.cli.page import page

        click.echo(page(comparison), nl=False)
    else:
        from hitless.cli.output import show_annotations, show_diffs

        click.echo(show_annotations(comparison) if form == "github" else show_diffs(comparison, _width()))
    return 1 if comparison.lost else 0


def _types_of(header: Path | None) -> Dwarf | None:
    from hitless.headers import types_of_header

    return None if header is None else types_of_header(header)


def _width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@main.command(epilog="Example: hitless snapshot release-1/ > release-1.json")
@click.argument("what", type=_PATH)
@click.option(
    "--format", "form", type=click.Choice(["hitless", "kmesh"]), default="hitless", show_default=True,
    help="kmesh is the shape of Kmesh's mapspecs_by_prog.json, which tells less.",
)  # fmt: skip
@_command()
def snapshot(what: str, form: str, as_json: bool) -> None:
    """Print the layouts of WHAT as JSON, for `hitless check`, `diff` and `inspect` to read later."""
    from hitless.layout import kmesh, snapshot
    from hitless.sources import read_objects

    objects = read_objects(what)
    text = kmesh.dump(objects) if form == "kmesh" else snapshot.dump(objects)
    click.echo(text.decode(), nl=False)


@main.command(epilog='Example: clang -target bpf -g -O2 -I"$(hitless include)" -c connect.bpf.c')
@_command()
def include(as_json: bool) -> None:
    """Print the directory of hitless.h, whose macros say in C what was renamed and how counters are merged."""
    import hitless

    if as_json:
        from hitless.cli.output import print_json

        print_json({"schema": 1, "include": hitless.include_dir()})
    else:
        click.echo(hitless.include_dir())


@main.command(epilog="Example: hitless plan release-2/ --root /sys/fs/bpf/mesh --set cgroup=/sys/fs/cgroup/mesh")
@click.argument("bundle", type=_PATH)
@_root
@_set
@_digest
@_allow_loss
@click.option("--out", type=_PATH, metavar="FILE", help="Save the plan, for apply --plan FILE to do exactly that.")
@_command(on_node=True)
def plan(
    bundle: str,
    root: str,
    variables: dict[str, str],
    digest: str | None,
    allow_loss: tuple[str, ...],
    out: str | None,
    as_json: bool,
) -> int:
    """Say what apply would do on this node, and do nothing. Exit code: 0 nothing to do, 2 changes, 1 trouble."""
    import hitless
    from hitless.cli.output import print_json, show_plan

    decided = hitless.plan(hitless.Node(root), hitless.Bundle.load(bundle, variables, digest), allow_loss)
    if out is not None:
        hitless.save_plan(decided, out)
    if as_json:
        print_json(decided)
    else:
        show_plan(decided)
        if out is not None:
            click.echo(f"saved to {out}: apply --plan {out} does exactly this, or refuses if anything changed")
    return 2 if decided.changes_anything else 0


@main.command(epilog="Example: hitless adopt release-1/ --root /sys/fs/bpf/mesh --set cgroup=/sys/fs/cgroup/mesh")
@click.argument("bundle", type=_PATH)
@_root
@_set
@_digest
@_wait
@click.option("--dry-run", is_flag=True, help="Show what would be taken over, and change nothing.")
@_command(on_node=True)
def adopt(
    bundle: str,
    root: str,
    variables: dict[str, str],
    digest: str | None,
    wait: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Take over what another loader started: BUNDLE is the release that runs. Nothing that runs is changed.

    From then on the node can be planned, upgraded, rolled back as any other, and its own loader still finds its maps
    and links where it looks for them.
    """
    import hitless
    from hitless.cli.output import print_json, show_adopted

    node, release = hitless.Node(root), hitless.Bundle.load(bundle, variables, digest)
    found = hitless.recognise_running(node, release) if dry_run else hitless.adopt(node, release, wait)
    if as_json:
        print_json(found)
    else:
        show_adopted(found)


@main.command(epilog="Example: hitless apply release-2/ --root /sys/fs/bpf/mesh --set cgroup=/sys/fs/cgroup/mesh")
@click.argument("bundle", type=_PATH)
@_root
@_set
@_digest
@_allow_loss
@click.option(
    "--plan", "saved", type=_PATH, metavar="FILE",
    help="Do what this plan says (plan --out), or refuse and do nothing.",
)  # fmt: skip
@click.option("--adopt", "adopting", is_flag=True, help="First take over what another loader has started there.")
@click.option(
    "--running", type=_PATH, metavar="OLD", help="With --adopt: the bundle of the release that runs, if it is at hand.",
)  # fmt: skip
@_rate
@_cpu
@_wait
@click.option("--yes", is_flag=True, help="Do not ask on a terminal.")
@_command(on_node=True)
def apply(
    bundle: str,
    root: str,
    variables: dict[str, str],
    digest: str | None,
    allow_loss: tuple[str, ...],
    saved: str | None,
    adopting: bool,
    running: str | None,
    rate: float | None,
    cpu: float,
    wait: float,
    yes: bool,
    as_json: bool,
) -> None:
    """Bring the node to BUNDLE: start it, use it again after a restart, or upgrade what runs.

    With --adopt another loader starts things, and hitless upgrades what that has started: where it has started nothing,
    or BUNDLE already, nothing is done.
    """
    import hitless
    from hitless.cli.output import progress_line, show_plan

    if saved is not None and allow_loss:
        raise click.UsageError("--plan says itself what may be lost: give --allow-loss to plan --out, and look at it")
    if running is not None and not adopting:
        raise click.UsageError("--running says what --adopt takes over: give both")
    node, release = hitless.Node(root), hitless.Bundle.load(bundle, variables, digest)
    if adopting and not _adopted(node, release, running, variables, wait, as_json):
        return
    planned = hitless.load_plan(saved) if saved is not None else None
    if not as_json and not yes and sys.stdin.isatty():
        if planned is None:
            hitless.recover(node, wait=wait)
        show_plan(planned or hitless.plan(node, release, allow_loss))
        click.confirm("Apply this?", abort=True)
    progress, pace = None if as_json else progress_line(), hitless.Pace(rate, cpu / 100)
    result = hitless.apply(node, release, allow_loss, progress=progress, wait=wait, pace=pace, planned=planned)
    _show_done(node, result, as_json)


@main.command(epilog="Example: hitless rollback --root /sys/fs/bpf/mesh --dry-run")
@_root
@_allow_loss
@_rate
@_cpu
@_wait
@click.option("--dry-run", is_flag=True, help="Show what would happen, and change nothing; exit codes as of plan.")
@click.option("--yes", is_flag=True, help="Do not ask on a terminal.")
@_command(on_node=True)
def rollback(
    root: str,
    allow_loss: tuple[str, ...],
    rate: float | None,
    cpu: float,
    wait: float,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Go back to the last release, with the state that the running one has; the next rollback goes forth again."""
    import hitless
    from hitless.cli.output import print_json, progress_line, show_plan

    node = hitless.Node(root)
    if dry_run:
        decided = hitless.plan_rollback(node, allow_loss)
        if as_json:
            print_json(decided)
        else:
            show_plan(decided)
        return 2
    if not as_json and not yes and sys.stdin.isatty():
        hitless.recover(node, wait=wait)
        show_plan(hitless.plan_rollback(node, allow_loss))
        click.confirm("Go back?", abort=True)
    progress, pace = None if as_json else progress_line(), hitless.Pace(rate, cpu / 100)
    _show_done(node, hitless.rollback(node, allow_loss, progress, wait, pace), as_json)
    return 0


def _adopted(
    node: Any, release: Any, running: str | None, variables: dict[str, str], wait: float, as_json: bool
) -> bool:
    """Take over what runs if that was not done before; whether there is anything to upgrade now."""
    import hitless
    from hitless.cli.output import print_json, show_adopted

    node.move_below()
    if node.root.is_dir() and any(node.root.iterdir()):
        return True
    before = hitless.Bundle.load(running, variables) if running is not None else None
    found = hitless.adopt_for(node, release, before, wait)
    if found is not None:
        if not as_json:
            show_adopted(found)
        return True
    if as_json:
        print_json({"schema": 1, "root": str(node.base), "start_type": "none", "committed": False})
    else:
        click.echo(
            f"nothing of {release.name} but maybe {release.version} itself runs under {node.base}: there is nothing to "
            "take over, and its own loader starts it"
        )
    return False


def _show_done(node: Any, result: Any, as_json: bool) -> None:
    """The result of an apply or a rollback, and who still holds the maps that it replaced."""
    from hitless.cli.output import print_json, show_left_behind, show_result

    holders = _holders(node)
    if as_json:
        print_json({**_facts(result), "left_behind": holders.left_behind if holders else None})
        return
    show_result(result)
    if holders:
        show_left_behind(holders)
    else:
        click.echo("who still holds old maps cannot be told, as the pin root changed again; see hitless status")


def _holders(node: Any) -> Any:
    """Who holds maps of ``node``, None if that cannot be told: the upgrade is done, and no hint may deny that."""
    from hitless.upgrade.holders import find_holders

    try:
        current = node.observe().current
        return find_holders(node, current) if current is not None else None
    except HitlessError:
        return None


@main.command(epilog="Example: hitless recover --root /sys/fs/bpf/mesh")
@_root
@_wait
@click.option(
    "--back", is_flag=True, help="Go back to the old release, where the new one is not committed yet.",
)  # fmt: skip
@_command(on_node=True)
def recover(root: str, wait: float, back: bool, as_json: bool) -> None:
    """Finish or undo an upgrade whose process was killed, as apply does first; 0 also if there is nothing to do."""
    import hitless
    from hitless.cli.output import print_json, progress_line, show_recovery
    from hitless.upgrade.recovery import recovery

    found = recovery(hitless.Node(root), back, wait, None if as_json else progress_line())
    if as_json:
        print_json(found)
    else:
        show_recovery(found)


@main.command(epilog="Example: hitless status --root /sys/fs/bpf/mesh")
@_root
@_command(on_node=True)
def status(root: str, as_json: bool) -> int:
    """Show what runs: generation, version, hooks, maps, problems. Exit code: 0 well, 1 problems or trouble."""
    import hitless
    from hitless.cli.output import print_json, show_status
    from hitless.upgrade.status import status as look

    seen = look(hitless.Node(root))
    if as_json:
        print_json(seen)
    else:
        show_status(seen)
    return 1 if seen.problems else 0


@main.command(epilog="Example: hitless verify --root /sys/fs/bpf/mesh")
@_root
@_command(on_node=True)
def verify(root: str, as_json: bool) -> int:
    """Prove that pins, maps, programs, links and record belong together. Exit code: 0 all agree, 1 not, or trouble."""
    import hitless
    from hitless.cli.output import print_json, show_verification

    found = hitless.verify(hitless.Node(root))
    if as_json:
        print_json(found)
    else:
        show_verification(found)
    return 1 if found.problems else 0


@main.command(epilog="Example: hitless gc --root /sys/fs/bpf/mesh --dry-run")
@_root
@click.option("--dry-run", is_flag=True, help="Show what would go, and change nothing.")
@click.option(
    "--allow-loss", multiple=True, metavar="NAME", help="What this ring buffer of the last release holds may be lost.",
)  # fmt: skip
@_wait
@_command(on_node=True)
def gc(root: str, dry_run: bool, allow_loss: tuple[str, ...], wait: float, as_json: bool) -> None:
    """Drop the last release's maps and programs, and what interrupted upgrades left; going back is over then."""
    import hitless
    from hitless.cli.output import print_json, show_garbage

    found = hitless.gc(hitless.Node(root), dry_run, allow_loss, wait)
    if as_json:
        print_json(found)
    else:
        show_garbage(found)


@main.command(epilog="Example: hitless unload --root /sys/fs/bpf/mesh")
@_root
@_wait
@click.option("--yes", is_flag=True, help="Do not ask on a terminal.")
@_command(on_node=True)
def unload(root: str, wait: float, yes: bool, as_json: bool) -> None:
    """Detach every hook and unpin everything under the root: nothing of the bundle runs any more."""
    import hitless
    from hitless.cli.output import print_json

    if not as_json and not yes and sys.stdin.isatty():
        click.confirm(f"Detach all hooks of {root} and drop its maps with all they hold?", abort=True)
    removed = hitless.unload(hitless.Node(root), wait)
    if as_json:
        print_json({"schema": 1, "root": root, "removed": removed})
    elif removed:
        click.echo(f"unloaded {root}: {len(removed)} pins removed")
    else:
        click.echo(f"{root}: nothing was loaded")


def _facts(value: Any) -> dict[str, Any]:
    import msgspec

    facts: dict[str, Any] = msgspec.to_builtins(value)
    return facts


@main.command(epilog="Example: hitless doctor")
@_command()
def doctor(as_json: bool) -> int:
    """Tell what this kernel can do, what hitless does where it cannot, and what is missing.

    Each feature is tried, and nothing is changed. Exits with 1 if hitless cannot work here at all.
    """
    from hitless.cli.output import print_json, show_doctor
    from hitless.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
    else:
        show_doctor(found)
    return TROUBLE if found.problems else 0
