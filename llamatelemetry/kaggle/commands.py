"""`llamatelemetry kaggle`: stage, push, setup-cell."""

from pathlib import Path

from .cells import setup_cell, write_setup_cell
from .push import push
from .stage import stage


def add_commands(commands):
    """The steps of `llamatelemetry kaggle`; `commands`: an argparse sub-parser action."""
    steps = commands.add_parser(
        "kaggle", help="Stage and push the suite for Kaggle."
    ).add_subparsers(required=True, metavar="STEP")

    def add(name, command, text):
        sub = steps.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    sub = add(
        "stage", _stage_command, "Write upload-ready folders: wheels, engine, notebooks, models."
    )
    sub.add_argument(
        "--user", required=True, help="your Kaggle account, as in the address of your profile"
    )
    sub.add_argument("--out", type=Path, default=Path("staged"))
    sub.add_argument("--checkout", type=Path, default=Path("."))
    sub.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="GGUF files for a dataset of their own",
    )
    sub.add_argument(
        "--engine",
        nargs="+",
        default=[],
        type=Path,
        metavar="WHEEL",
        help="engine wheels built already",
    )
    sub = add(
        "push",
        _push_command,
        "Send staged folders with the kaggle client, datasets and engine first.",
    )
    sub.add_argument("names", nargs="*", help="folders to send; default: all")
    sub.add_argument("--folder", type=Path, default=Path("staged"))
    sub.add_argument(
        "--no-wait",
        action="store_true",
        help="wait for no session; the same command, later, goes on",
    )
    sub.add_argument(
        "--again", action="store_true", help="send and run also what is there unchanged"
    )
    sub = add(
        "setup-cell",
        _cell_command,
        "Print the notebooks' first code cell, or write it into notebooks.",
    )
    sub.add_argument("--write", nargs="+", default=[], type=Path, metavar="NOTEBOOK")
    sub.add_argument("--checkout", type=Path, default=Path("."))


def _stage_command(options):
    made = stage(options.user, options.out, options.checkout, options.models, options.engine)
    for name, folder in made.items():
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {len(list(folder.iterdir()))} files, {size / 1e6:,.1f} MB")
    print(f"Next: llamatelemetry kaggle push --folder {options.out}")


def _push_command(options):
    push(options.folder, options.names, wait=not options.no_wait, again=options.again)


def _cell_command(options):
    if not options.write:
        print(setup_cell(options.checkout))
    for path in write_setup_cell(options.write, options.checkout):
        print(f"written: {path}")
