"""`tinker-jax`: look after checkpoints, export and import them.

Results go to stdout; an error is one line on stderr and exit status 2. Listing needs no jax, so it is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import tinker_jax
from tinker_jax.checkpoints.records import CheckpointRecord
from tinker_jax.checkpoints.store import Store
from tinker_jax.types.errors import TinkerError

_DESCRIPTION = (
    "Look after the checkpoints of tinker_jax, export and import them. An error is one line on stderr and exit status 2."
)
_FAILED = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, or 2 after an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names and metadata may hold what the terminal cannot show
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except TinkerError as error:
        print("tinker-jax:", " ".join(str(error).split()), file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("tinker-jax: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` say, has seen enough; without this Python complains again while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tinker-jax", description=_DESCRIPTION)
    _shared_options(parser, format="table", home=None)
    parser.add_argument("--version", action="version", version=tinker_jax.__version__)
    groups = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(where: Any, name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        made = where.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        _shared_options(made)
        return made

    def group(name: str, help: str) -> Any:
        return groups.add_parser(name, help=help, description=help).add_subparsers(metavar="COMMAND", required=True)

    export = group("export", "write a checkpoint for other tools")
    for name, help in (
        ("peft", "a PEFT adapter"),
        ("merged", "a complete Hugging Face model with the adapter merged in"),
        ("tinker", "an adapter in Tinker's own layout"),
    ):
        made = command(export, name, _export, help)
        made.set_defaults(layout=name)
        made.add_argument("path", metavar="PATH", help="tinker://<run id>/<weights|sampler_weights>/<name>")
        made.add_argument("directory", metavar="DIR", help="a directory that does not exist, or is empty")
        made.add_argument("--base-model", metavar="MODEL", help="where the base model is, if it has moved")
        if name == "merged":
            made.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of a file, like 500MB (default: 5GB)")
            made.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as the base model is stored)")

    made = command(group("import", "make a checkpoint of what another tool wrote"), "peft", _import_peft, "a PEFT adapter")
    made.add_argument("directory", metavar="DIR", help="with adapter_config.json and adapter_model.safetensors")
    made.add_argument("--base-model", metavar="MODEL", help="where the base model is, if not where the adapter says")

    checkpoint = group("checkpoint", "list and manage checkpoints")
    made = command(checkpoint, "list", _checkpoint_list, "list checkpoints, newest first")
    made.add_argument("--run-id", metavar="ID", help="of this run only")
    made = command(checkpoint, "info", _checkpoint_info, "show one checkpoint")
    made.add_argument("path", metavar="PATH")
    made = command(checkpoint, "delete", _checkpoint_delete, "delete checkpoints for good")
    made.add_argument("paths", metavar="PATH", nargs="+")
    made.add_argument("-y", "--yes", action="store_true", help="do not ask")
    made = command(checkpoint, "set-ttl", _checkpoint_set_ttl, "let a checkpoint expire, or keep it")
    made.add_argument("path", metavar="PATH")
    choice = made.add_mutually_exclusive_group(required=True)
    choice.add_argument("--ttl", metavar="SECONDS", type=int, help="expire this many seconds from now")
    choice.add_argument("--remove", action="store_true", help="never expire")

    runs = group("run", "list training runs")
    command(runs, "list", _run_list, "list training runs, newest first")
    command(groups, "version", _version, "print the version")
    return parser


def _shared_options(parser: argparse.ArgumentParser, **defaults: str | None) -> None:
    """Options that may stand before or after the command; without a default the later one leaves the earlier one's value."""
    add = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    add("-f", "--format", choices=("table", "json"), help="how to print (default: table)")
    add("--home", metavar="DIR", help="the store (default: $TINKER_JAX_HOME, else ~/.tinker_jax)")
    parser.set_defaults(**defaults)


def _export(args: argparse.Namespace) -> None:
    # Merging is the host's work; an accelerator may be busy training.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tinker_jax.checkpoints import export_merged, export_peft, export_tinker

    common = {"home": args.home, "base_model": args.base_model}
    if args.layout == "merged":
        made = export_merged(args.path, args.directory, max_shard_size=args.max_shard_size, dtype=args.dtype, **common)
    else:
        made = {"peft": export_peft, "tinker": export_tinker}[args.layout](args.path, args.directory, **common)
    print(made)


def _import_peft(args: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # as for an export
    from tinker_jax.checkpoints import import_peft

    print(import_peft(args.directory, home=args.home, base_model=args.base_model))


def _checkpoint_list(args: argparse.Namespace) -> None:
    store = Store(args.home)
    records = store.list_checkpoints(args.run_id)
    columns = ("path", "base_model", "rank", "size", "time", "expires")
    rows = [
        (r.path, r.base_model, str(r.lora_rank), _size(r.size_bytes), _when(r.time), _when(r.expires_at, "never"))
        for r in records
    ]
    _print_list(args, [_plain(record) for record in records], columns, rows, f"no checkpoints in {store.home}")


def _checkpoint_info(args: argparse.Namespace) -> None:
    _print_one(args, Store(args.home).get(args.path))


def _checkpoint_delete(args: argparse.Namespace) -> None:
    store = Store(args.home)
    for path in args.paths:
        store.get(path)  # all must exist before the first one goes
    if not args.yes:
        print("\n".join(args.paths))
        try:
            answer = input("Delete for good? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            raise TinkerError("nothing deleted; pass -y to delete without being asked")
    for path in args.paths:
        store.delete(path)
        print(f"deleted {path}")


def _checkpoint_set_ttl(args: argparse.Namespace) -> None:
    _print_one(args, Store(args.home).set_ttl(args.path, None if args.remove else args.ttl))


def _run_list(args: argparse.Namespace) -> None:
    store = Store(args.home)
    runs = store.list_runs()
    columns = ("run", "base_model", "rank", "created", "last request")
    rows = [(r.run_id, r.base_model, str(r.lora_rank), _when(r.created), _when(r.last_request_time)) for r in runs]
    _print_list(args, [_plain(run) for run in runs], columns, rows, f"no runs in {store.home}")


def _version(args: argparse.Namespace) -> None:
    print(tinker_jax.__version__)


def _plain(record: Any) -> dict[str, Any]:
    """A record as JSON values."""

    def value(name: str) -> Any:
        field = getattr(record, name)
        if isinstance(field, datetime):
            return field.isoformat()
        return os.fspath(field) if isinstance(field, os.PathLike) else field

    return {field.name: value(field.name) for field in dataclasses.fields(record)}


def _print_list(
    args: argparse.Namespace,
    plain: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    empty: str,
) -> None:
    if args.format == "json":
        print(json.dumps(plain, indent=2))
    elif rows:
        print(_table([columns, *rows]))
    else:
        print(empty)


def _print_one(args: argparse.Namespace, record: CheckpointRecord) -> None:
    plain = _plain(record)
    if args.format == "json":
        print(json.dumps(plain, indent=2))
        return
    size = f"{record.size_bytes} ({_size(record.size_bytes)})"
    shown = plain | {"size_bytes": size, "expires_at": _when(record.expires_at, "never")}
    print(_table((name, str(value)) for name, value in shown.items()))


def _table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _when(time: datetime | None, never: str = "") -> str:
    return never if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


if __name__ == "__main__":
    sys.exit(main())
