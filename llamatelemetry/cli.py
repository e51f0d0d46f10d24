"""The command line: doctor, models, run, capture, engine, notebooks, kaggle."""

import argparse
import os
import sys
from pathlib import Path

from . import __version__
from .errors import LlamaTelemetryError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; errors of the package become one message on stderr and exit status 1."""
    arguments, typed = _typed(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    if typed:
        options.parameters = typed
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be UTF-8
    try:
        return options.command(options) or 0
    except LlamaTelemetryError as error:
        print(f"llamatelemetry: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `llamatelemetry models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _typed(arguments):
    """(arguments without `-p NAME VALUE` of notebooks, those pairs): argparse takes no VALUE that
    begins with "-"."""
    rest, pairs = list(arguments), []
    while rest[:1] == ["notebooks"] and "-p" in rest and rest.index("-p") + 2 < len(rest):
        at = rest.index("-p")
        pairs.append(rest[at + 1 : at + 3])
        del rest[at : at + 3]
    return rest, pairs


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="llamatelemetry",
        description="See inside a quantized language model while llama.cpp runs it.",
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name, command, text, to=commands):
        sub = to.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    add("doctor", doctor, "Print what is on this machine and what is missing.")
    models = add("models", list_models, "List the models known by name, and those on this machine.")
    models.add_argument("--here", action="store_true", help="only those on this machine")

    run = add("run", infer, "Continue a prompt with llama-server.")
    run.add_argument("model", help="a name from `llamatelemetry models`, a GGUF file or repo:file")
    run.add_argument("prompt")
    run.add_argument("--max-tokens", type=int, default=128)
    run.add_argument("--temperature", type=float, default=0.7)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--ctx-size", type=int)

    capture = add(
        "capture", capture_text, "Save tensors of one forward pass as a safetensors file."
    )
    capture.add_argument("model")
    capture.add_argument("text")
    capture.add_argument(
        "--stages", default="attention,hidden", help="comma-separated; default: %(default)s"
    )
    capture.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")

    engine = commands.add_parser("engine", help="Build the engine: bindings, llama-server, tools.")
    steps = engine.add_subparsers(required=True, metavar="STEP")
    build = add(
        "build",
        build_engine,
        "Make the engine wheel from source, or take it from the cache.",
        steps,
    )
    build.add_argument("--cuda", metavar="ARCH", help="GPU architectures: 75 (T4), '75;90', native")
    build.add_argument(
        "--portable", action="store_true", help="for other CPUs than this one, too (AVX2)"
    )
    build.add_argument(
        "--jobs", type=int, help="compilers at a time; default: the cores, 1.5 GB of memory each"
    )
    build.add_argument("--out", type=Path, help="a folder that gets a copy of the wheel")
    build.add_argument("--install", action="store_true", help="install the wheel into this Python")

    notebooks = add("notebooks", run_notebooks, "Run notebooks and keep them as .ipynb and .html.")
    notebooks.add_argument("names", nargs="*", help="notebooks to run, such as 12; default: all")
    notebooks.add_argument("--folder", type=Path, default=Path("notebooks"))
    notebooks.add_argument("--out", type=Path, default=Path("executed"))
    notebooks.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a notebook parameter, such as -p MODEL gemma-3-1b-Q4_K_M; its type is that of the "
        "notebook's own default",
    )

    from .kaggle.commands import add_commands

    add_commands(commands)
    return top


def doctor(options):
    from .tools.doctor import report

    return report()


def list_models(options):
    from .files.models import list_models

    table = list_models()
    if options.here:
        table = table[table["here"]]
    size = table["size_bytes"].map(lambda n: f"{n / 1e6:,.0f} MB", na_action="ignore")
    shown = {
        "name": table["name"],
        "parameters": table["parameters"].fillna(""),
        "here": size.fillna(""),
        "repo": table["repo"].fillna(""),
    }
    rows = [list(shown), *zip(*shown.values())]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell!s:{width}}" for cell, width in zip(row, widths)).rstrip())


def infer(options):
    from .engine import InferenceEngine

    with InferenceEngine() as engine:
        engine.load_model(options.model, ctx_size=options.ctx_size, silent=True)
        result = engine.infer(
            options.prompt,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
    print(result.text)
    said = f"{result.tokens_generated} tokens, {result.tokens_per_sec:.1f} tokens/s"
    print(said, file=sys.stderr)


def capture_text(options):
    from .engine import InferenceEngine
    from .errors import shown
    from .files.models import resolve_model
    from .files.outputs import check_output, path_of

    out = path_of(options.out)
    if out.suffix != ".safetensors":
        raise LlamaTelemetryError(f"--out {options.out}: a capture is saved as a .safetensors file")
    if not out.parent.is_dir():
        raise LlamaTelemetryError(f"--out {options.out}: there is no such folder")
    model = resolve_model(options.model)
    check_output(out, [model])
    with InferenceEngine() as engine:
        engine.load_model(model, auto_start=False, silent=True)
        stages = tuple(filter(None, options.stages.replace(" ", "").split(",")))
        capture = engine.capture(options.text, stages=stages)
        for stage in capture.stages:
            sizes = (f"{dim} {size}" for dim, size in capture[stage].sizes.items())
            print(f"{stage}: {', '.join(sizes)}")
        capture.save(out)
    print(f"{shown(options.out)}: {out.stat().st_size / 1e6:,.1f} MB")


def build_engine(options):
    from .tools.build import build, install

    wheel = build(options.cuda, options.out, options.jobs, options.portable)
    print(wheel)
    if options.install:
        install(wheel)
    else:
        print("The same command with --install puts it into this Python.", file=sys.stderr)


def run_notebooks(options):
    from .tools.notebooks import run_all

    names = [name for name, _ in options.parameters]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise LlamaTelemetryError(f"-p {twice} is given twice: leave one of them.")
    run_all(options.folder, options.out, options.names, dict(options.parameters), typed=True)


if __name__ == "__main__":
    sys.exit(main())
