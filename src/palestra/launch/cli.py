"""The command line: `palestra COMMAND ...`. Data on stdout, talk on stderr.

Exit codes: see `outcome`.
Every command imports what it needs when it runs, so that `--help` answers at once.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from palestra import __version__
from palestra.launch.outcome import MISTAKE, Interrupted, exit_code

_OVERRIDE = "section.field=value"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        arguments = _parse(argv)
    except SystemExit as end:  # argparse: 0 after --help, 2 after a wrong argument
        return end.code if isinstance(end.code, int) else MISTAKE
    return exit_code(lambda: arguments.command(arguments))


# --- arguments


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before, between and after the options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in arguments]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="palestra", description="Post-training of language models with asynchronous reinforcement learning."
    )
    parser.add_argument("--version", action="version", version=f"palestra {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_training(commands)
    _add_config(commands)
    _add_runs(commands)
    fetch = _add(commands, "fetch", _fetch, "download a known model and save it in Hugging Face layout")
    fetch.add_argument("name", help="such as smollm2")
    fetch.add_argument("directory", nargs="?", type=Path, help="default: models/NAME")
    _add_serve(commands)
    replay = _add(commands, "replay", _replay, "run one room of a finished run again on what was recorded, and compare")
    replay.add_argument("run")
    replay.add_argument(
        "--from",
        dest="boundary",
        choices=["batches", "replies", "weights"],
        default="batches",
        help="where the record begins",
    )
    replay.add_argument("--only", choices=["train", "env", "infer"], help="what runs live")
    _add_json(replay)
    _add_simulate(commands)
    _add_bench(commands)
    _add_json(_add(commands, "doctor", _doctor, "check this machine and the installation"))
    return parser


def _add(
    commands, name: str, command: Callable[[argparse.Namespace], int | None], text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for machines")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar=_OVERRIDE, help="such as train.steps=20")


def _add_training(commands) -> None:
    texts = {"run": "train as a recipe says", "sft": "train on the recipe's supervised data only"}
    for name, text in texts.items():
        parser = _add(commands, name, _run, text)
        _add_recipe(parser)
        parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
        parser.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
        parser.set_defaults(is_supervised=name == "sft")
        _add_json(parser)


def _add_config(commands) -> None:
    config = commands.add_parser("config", help="show what a recipe means", description="Show what a recipe means.")
    inner = config.add_subparsers(metavar="COMMAND", required=True)
    show = _add(inner, "show", _config_show, "every value of a recipe")
    _add_recipe(show)
    show.add_argument("--sources", action="store_true", help="and where it was set")
    _add_json(show)
    _add(inner, "schema", _config_schema, "the JSON schema of a recipe")


def _add_runs(commands) -> None:
    runs = commands.add_parser("runs", help="list runs, look at one", description="List runs, look at one.")
    inner = runs.add_subparsers(metavar="COMMAND", required=True)
    listing = _add(inner, "ls", _runs_ls, "the runs in a directory")
    listing.add_argument("outputs", nargs="?", type=Path, default=Path("outputs"))
    _add_json(listing)
    show = _add(inner, "show", _runs_show, "one run: status, last metrics, where the time went")
    show.add_argument("run", help="a run directory, or the name of one in outputs/")
    _add_json(show)


def _add_serve(commands) -> None:
    serve = commands.add_parser("serve", help="start one service alone", description="Start one service alone.")
    inner = serve.add_subparsers(metavar="SERVICE", required=True)
    engine = _add(inner, "engine", _serve_engine, "an engine, as runs start it, in the foreground")
    engine.add_argument("model", help="a directory in Hugging Face layout, or a hub name")
    engine.add_argument("overrides", nargs="*", metavar="engine.field=value", help="such as engine.max_model_len=512")
    engine.add_argument("--port", type=int, default=8000)


def _add_simulate(commands) -> None:
    parser = _add(commands, "simulate", _simulate, "predict step time, idle shares and ages of a recipe")
    _add_recipe(parser)
    parser.add_argument("--from", dest="run", metavar="RUN", help="measure the curves from this finished run")
    parser.add_argument("--curves", type=Path, help="read the curves from this file")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the curves as JSON")
    parser.add_argument("--gpus", type=int, help="find the best split of so many between trainer and engines")
    parser.add_argument("--steps", type=int, default=20, help="steps to average over (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    _add_json(parser)


def _add_bench(commands) -> None:
    bench = commands.add_parser("bench", help="measure palestra itself", description="Measure palestra itself.")
    inner = bench.add_subparsers(metavar="WHAT", required=True)
    loop = _add(inner, "loop", _bench_loop, "the loop against its parts alone, each number beside its aim")
    loop.add_argument("--quick", action="store_true", help="ratio 1 alone, fewer steps, no M5")
    inflight = _add(inner, "inflight", _bench_inflight, "updates in flight against waiting for rollouts to end")
    for parser in (loop, inflight):
        parser.add_argument("overrides", nargs="*", metavar=_OVERRIDE, help="of the built-in recipe: train.lr=1e-5")
        parser.add_argument("--outputs", type=Path, help="keep the runs here, and go on with those that are finished")
        _add_json(parser)


# --- commands


def _run(arguments: argparse.Namespace) -> int | None:
    from palestra.launch import closing, plan_view, run
    from palestra.launch.recipes import for_training

    config = for_training(arguments.recipe, arguments.overrides, is_supervised=arguments.is_supervised)
    plan = run.plan_of(config)
    if arguments.dry_run:
        return plan_view.show(plan, as_json=arguments.json)
    try:
        directory = run.run(config, plan, resume=arguments.resume)
    except Interrupted:
        command = "sft" if arguments.is_supervised else "run"
        words = shlex.join(["palestra", command, str(arguments.recipe), *arguments.overrides, "--resume"])
        raise Interrupted(f"go on with: {words}") from None
    return closing.show(directory, as_json=arguments.json)


def _config_show(arguments: argparse.Namespace) -> None:
    from palestra.launch import recipes

    recipes.show(arguments.recipe, arguments.overrides, with_sources=arguments.sources, as_json=arguments.json)


def _config_schema(_: argparse.Namespace) -> None:
    from palestra.launch import recipes

    recipes.show_schema()


def _runs_ls(arguments: argparse.Namespace) -> None:
    from palestra.launch import runs

    runs.show_all(arguments.outputs, as_json=arguments.json)


def _runs_show(arguments: argparse.Namespace) -> None:
    from palestra.launch import runs

    runs.show_one(runs.find(arguments.run), as_json=arguments.json)


def _fetch(arguments: argparse.Namespace) -> int:
    import subprocess

    from palestra.launch.model_path import FETCHED

    directory = arguments.directory or FETCHED / arguments.name
    return subprocess.run([sys.executable, "-m", "palestra.model.fetch", arguments.name, str(directory)]).returncode


def _serve_engine(arguments: argparse.Namespace) -> None:
    from palestra.launch import serve

    serve.engine(arguments.model, arguments.overrides, port=arguments.port)


def _replay(arguments: argparse.Namespace) -> int | None:
    from palestra.core.errors import UserError
    from palestra.launch import replay, replay_env, replay_weights, runs

    pair = {"batches": "train", "replies": "env", "weights": "infer"}
    if arguments.only not in (None, pair[arguments.boundary]):
        raise UserError(f"--from {arguments.boundary} feeds --only {pair[arguments.boundary]}, not {arguments.only}")
    show = {"batches": replay.show, "replies": replay_env.show, "weights": replay_weights.show}[arguments.boundary]
    return show(runs.find(arguments.run), as_json=arguments.json)


def _simulate(arguments: argparse.Namespace) -> None:
    from palestra.launch import runs, simulate

    wish = simulate.Wish(
        recipe=arguments.recipe,
        overrides=arguments.overrides,
        run=runs.find(arguments.run) if arguments.run else None,
        curves=arguments.curves,
        save=arguments.save,
        gpus=arguments.gpus,
        steps=arguments.steps,
        seed=arguments.seed,
    )
    simulate.show(wish, as_json=arguments.json)


def _bench_loop(arguments: argparse.Namespace) -> None:
    from palestra.launch.bench import loop

    loop.show(arguments.overrides, quick=arguments.quick, outputs=arguments.outputs, as_json=arguments.json)


def _bench_inflight(arguments: argparse.Namespace) -> None:
    from palestra.launch.bench import inflight

    inflight.show(arguments.overrides, outputs=arguments.outputs, as_json=arguments.json)


def _doctor(arguments: argparse.Namespace) -> int:
    from palestra.launch import doctor

    return doctor.show(as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
