"""The command line: `palestra COMMAND ...`. Data on stdout, talk on stderr.

Exit codes: see `outcome`.
Every command imports what it needs when it runs, so that `--help` answers at once.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from palestra import __version__
from palestra.launch import hub_arguments
from palestra.launch.outcome import MISTAKE, Interrupted, exit_code

_OVERRIDE = "section.field=value"
_SANDBOX = "where programs of rollouts run: see docs/sandboxes.md (default: the best that works here)"
_RESUME = "go on with this one; what is named beside it must be what DIR holds, save --concurrency"


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
    _add_view(commands)
    fetch = _add(commands, "fetch", _fetch, "download a known model and save it in Hugging Face layout")
    fetch.add_argument("name", help="such as smollm2")
    fetch.add_argument("directory", nargs="?", type=Path, help="default: models/NAME")
    _add_eval(commands)
    _add_env(commands)
    _add_serve(commands)
    _add_sandbox_commands(commands)
    hub_arguments.add_hub(commands, _add, _add_json)
    replay = _add(commands, "replay", _replay, "run one room of a finished run again on what was recorded, and compare")
    replay.add_argument("run")
    replay.add_argument(
        "--from",
        dest="boundary",
        choices=["batches", "replies", "weights"],
        default="batches",
        help="where the record begins",
    )
    replay.add_argument("--rewards", action="store_true", help="of an evaluation: score its rollouts again")
    replay.add_argument("--only", choices=["train", "env", "infer"], help="what runs live")
    _add_json(replay)
    _add_simulate(commands)
    _add_plan(commands)
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
    explain = _add(inner, "explain", _config_explain, "what settings mean")
    explain.add_argument("names", nargs="*", metavar="NAME", help="such as train.muon or sync.kind (default: all)")
    explain.add_argument("--markdown", action="store_true", help="as docs/settings.md")
    _add_json(explain)


def _add_runs(commands) -> None:
    runs = commands.add_parser("runs", help="list runs, look at one", description="List runs, look at one.")
    inner = runs.add_subparsers(metavar="COMMAND", required=True)
    listing = _add(inner, "ls", _runs_ls, "the runs in a directory")
    listing.add_argument("outputs", nargs="?", type=Path, default=Path("outputs"))
    _add_json(listing)
    show = _add(inner, "show", _runs_show, "one run: status, last metrics, where the time went")
    show.add_argument("run", help="a run directory, or the name of one in outputs/")
    _add_json(show)
    tell = _add(inner, "tell", _runs_tell, "tell a place of all metrics of a run: one that failed, or is new")
    tell.add_argument("run", help="a run directory, or the name of one in outputs/")
    tell.add_argument("place", choices=["tensorboard", "wandb", "trackio"])


def _add_view(commands) -> None:
    view = _add(commands, "view", _view, "look into runs in a browser: curves, time, rollouts")
    view.add_argument("outputs", nargs="?", type=Path, default=Path("outputs"), help="runs, or one (default: outputs)")
    view.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    view.add_argument("--port", type=int, default=8003, help="0: a free one, which is said (default: 8003)")
    view.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="what browsers may call it")


def _add_eval(commands) -> None:
    text = "measure environments with an endpoint, or with a checkpoint served here"
    parser = _add(commands, "eval", _eval, text)
    _add_wish(parser, split="test", also="; or: compare A B; or: import DIR... --output DIR")
    parser.add_argument("--push", action="store_true", help="to the leaderboards of the hub that one has logged in at")
    parser.add_argument("--push-to", metavar="OWNER", help="the same, where the environments are somebody else's")
    generate = _add(commands, "generate", _generate, "play environments and keep good rollouts as supervised data")
    _add_wish(generate, split="train")
    generate.add_argument("--to", type=Path, required=True, metavar="FILE", help="JSON lines with `messages`")
    generate.add_argument("--gold", action="store_true", help="known answers of the tasks, without a model")
    generate.add_argument("--min-reward", type=float, default=1.0, help="of what is kept (default: 1)")


def _add_wish(parser: argparse.ArgumentParser, *, split: str, also: str = "") -> None:
    text = f"an environment, or {_OVERRIDE} such as engine.max_model_len=8192{also}"
    parser.add_argument("words", nargs="*", metavar="ENVIRONMENT", help=text)
    parser.set_defaults(overrides=[], default_split=split)
    parser.add_argument("--model", help="its name at the endpoint")
    parser.add_argument("--base-url", help="an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--key-env", metavar="NAME", help="the environment variable that holds the endpoint's key")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a model in Hugging Face layout, served here")
    parser.add_argument("-n", "--num-tasks", type=int, help="of each environment (default: 100)")
    parser.add_argument("-r", "--rollouts", type=int, help="of each task (default: 1)")
    parser.add_argument("--temperature", type=float, help="default: 0 for one rollout of each task, 1 for more")
    parser.add_argument("--max-tokens", type=int, help="of each reply (default: 1024)")
    parser.add_argument("--split", help=f"of the tasks (default: {split})")
    parser.add_argument("--args", type=json.loads, metavar="JSON", help="of the environments")
    parser.add_argument("--seat", action="append", metavar="NAME=URL,MODEL", help="who speaks for another seat, a user")
    _add_sandbox(parser)
    parser.add_argument("--concurrency", type=int, help="rollouts at once (default: 32)")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/evals/NAMES-MODEL-TIME")
    parser.add_argument("--resume", type=Path, metavar="DIR", help=_RESUME)
    _add_json(parser)


def _add_sandbox(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sandbox", metavar="NAME", help=_SANDBOX)


def _add_env(commands) -> None:
    env = commands.add_parser("env", help="write, check, list environments", description="Environments as packages.")
    inner = env.add_subparsers(metavar="COMMAND", required=True)
    new = _add(inner, "new", _env_new, "write a package that works, with its test, and install it")
    new.add_argument("name", help="small letters, digits and -, such as word-game")
    new.add_argument("directory", nargs="?", type=Path, help="default: environments/NAME, or NAME, with _ for -")
    new.add_argument("--no-install", action="store_true", help="write it only")
    check = _add(inner, "check", _env_check, "prove without a model what must hold for an environment")
    check.add_argument("names", nargs="*", metavar="NAME", help="an installed one, module:Class or FILE.py:Class")
    check.add_argument("--all", action="store_true", help="every installed one")
    check.add_argument("-n", "--num-tasks", type=int, help="tasks to look at (default: 20, or what it says)")
    _add_sandbox(check)
    check.add_argument("--deadline-s", type=float, default=600, help="for each environment (default: 600)")
    _add_json(check)
    _add_json(_add(inner, "list", _env_list, "the installed environments"))


def _add_serve(commands) -> None:
    serve = commands.add_parser("serve", help="start one service alone", description="Start one service alone.")
    inner = serve.add_subparsers(metavar="SERVICE", required=True)
    engine = _add(inner, "engine", _serve_engine, "an engine, as runs start it, in the foreground")
    engine.add_argument("model", help="a directory in Hugging Face layout, or a hub name")
    engine.add_argument("overrides", nargs="*", metavar="engine.field=value", help="such as engine.max_model_len=512")
    engine.add_argument("--port", type=int, default=8000)

    text = "the APIs that agent programs speak, before an engine; everything asked is recorded"
    proxy = _add(inner, "proxy", _serve_proxy, text)
    proxy.add_argument("model", help="whose tokenizer and template are used: a directory, or a hub name")
    proxy.add_argument("overrides", nargs="*", metavar=_OVERRIDE, help="such as sampling.temperature=0.7")
    proxy.add_argument("--engine", default="http://127.0.0.1:8000", metavar="URL", help="default: port 8000 here")
    proxy.add_argument("--port", type=int, default=8001, help="0: a free one, which is said (default: 8001)")
    proxy.add_argument(
        "--to", type=Path, default=Path("outputs/proxy.jsonl"), metavar="FILE", help="a line per session"
    )
    proxy.add_argument("--idle-s", type=float, default=600, help="after which a session is written (default: 600)")
    _add_serve_sandbox(inner)
    hub_arguments.add_serve(inner, _add)


def _add_serve_sandbox(inner) -> None:
    sandbox = _add(inner, "sandbox", _serve_sandbox, "sandboxes for programs, by HTTP, for tenants with tokens")
    sandbox.add_argument("--backend", metavar="NAME", help="default: the best that works here")
    sandbox.add_argument("--host", help="default: 127.0.0.1, this machine alone")
    sandbox.add_argument("--port", type=int, help="0: a free one, which is said (default: 8002)")
    sandbox.add_argument("--tokens", type=Path, metavar="FILE", help="tenants (default: one, whose token is said)")
    sandbox.add_argument("--token-for", metavar="NAME", help="print a fresh token and its lines of FILE, and end")
    sandbox.add_argument("--data", type=Path, metavar="DIR", help="where it is written what tenants used")
    sandbox.add_argument("--most", type=int, help="sandboxes at once (default: 2048)")
    sandbox.add_argument("--most-memory-mb", type=int, help="of all together (default: 3/4 of this machine's)")
    sandbox.add_argument("--starting", type=int, help="sandboxes in the making (default: 2 for each core)")
    sandbox.add_argument("--running", type=int, help="one-shot programs at once (default: 2 for each core)")
    sandbox.add_argument("--most-waiting", type=int, help="programs of a tenant that wait (default: 1024)")
    sandbox.add_argument("--wait-s", type=float, help="the longest that one waits (default: 60)")
    sandbox.add_argument("--most-lifetime-s", type=float, help="of a sandbox (default: a day)")
    sandbox.add_argument("--most-program-s", type=float, help="of a program (default: an hour)")
    sandbox.add_argument("--most-body-mb", type=int, help="of a request (default: 16)")
    sandbox.add_argument("--drain-s", type=float, help="for programs to end when it is told to (default: 30)")


def _add_sandbox_commands(commands) -> None:
    text = "programs in sandboxes"
    inner = commands.add_parser("sandbox", help=text, description="Programs in sandboxes.").add_subparsers(
        metavar="COMMAND", required=True
    )
    run = _add(inner, "run", _sandbox_run, "a Python file in a sandbox; its exit code is that of the command")
    run.add_argument("file", type=Path, metavar="FILE")
    run.add_argument("--backend", metavar="NAME", help="or a service, http://... (default: the best that works here)")
    run.add_argument("--timeout-s", type=float, default=10, help="of the program alone (default: 10)")
    run.add_argument("--memory-mb", type=int, default=512, help="default: 512")
    run.add_argument("--stdin", type=Path, metavar="FILE", help="what it reads (default: nothing)")
    _add_json(run)
    check = _add(inner, "check", _sandbox_check, "attack the sandboxes of this machine, and tell what they withstand")
    check.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    check.add_argument("--backend", metavar="NAME", help="default: the best that works here")
    check.add_argument("--image", help="what programs see instead of this machine's own")
    check.add_argument(
        "--packages", nargs="+", default=[], metavar="NAME", help="installed here, and shown to programs"
    )
    check.add_argument("--without", nargs="+", default=[], metavar="WALL", help="taken away, to see what it is for")
    _add_json(check)


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


def _add_plan(commands) -> None:
    parser = _add(commands, "plan", _plan, "tell what training a recipe asks of its devices, without any")
    _add_recipe(parser)
    text = "the model's config.json (default: NAME.config.json beside the recipe, then what model.path names)"
    parser.add_argument("--config", type=Path, metavar="FILE", help=text)
    parser.add_argument("--gpu", default="H200", help="A100, H100, H200, B200 or cpu (default: H200)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: 8")
    parser.add_argument("--mean-tokens", type=int, help="of a rollout or sample (default: half of the longest)")
    parser.add_argument("--mfu", type=float, help="share of the peak FLOP/s that training reaches (default: 0.35)")
    _add_json(parser)


def _add_bench(commands) -> None:
    bench = commands.add_parser("bench", help="measure palestra itself", description="Measure palestra itself.")
    inner = bench.add_subparsers(metavar="WHAT", required=True)
    loop = _add(inner, "loop", _bench_loop, "the loop against its parts alone, each number beside its aim")
    loop.add_argument("--quick", action="store_true", help="ratio 1 alone, fewer steps, no M5")
    inflight = _add(inner, "inflight", _bench_inflight, "updates in flight against waiting for rollouts to end")
    env = _add(inner, "env", _bench_env, "what a rollout costs beside the model")
    for parser in (loop, inflight, env):
        parser.add_argument("overrides", nargs="*", metavar=_OVERRIDE, help="of the built-in recipe: train.lr=1e-5")
        parser.add_argument("--outputs", type=Path, help="keep the runs here, and go on with those that are finished")
        _add_json(parser)
    _add_bench_trainer(inner)
    sandbox = _add(inner, "sandbox", _bench_sandbox, "programs in sandboxes beside programs without any")
    sandbox.add_argument("--quick", action="store_true", help="a fifth of everything")
    _add_json(sandbox)


def _add_bench_trainer(inner) -> None:
    parser = _add(inner, "trainer", _bench_trainer, "the trainer's step on random tokens: tokens/s, MFU, memory")
    parser.add_argument("overrides", nargs="*", metavar=_OVERRIDE, help="such as train.shard=2 model.dtype=float32")
    parser.add_argument(
        "--model", default="smollm2-135m", help="qwen3-0.6b, glm4moe-layers, ... (default: smollm2-135m)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a model's config.json instead")
    parser.add_argument("--tokens", type=int, default=4096, help="of a pack (default: 4096)")
    parser.add_argument("--packs", type=int, default=1, help="of each rank and step (default: 1)")
    parser.add_argument("--documents", type=int, default=8, help="of a pack, of unequal lengths (default: 8)")
    parser.add_argument("--kind", choices=["rl", "sft"], default="rl", help="default: rl, a quarter is prompt")
    parser.add_argument("--steps", type=int, default=3, help="after one that warms up (default: 3)")
    parser.add_argument("--against", choices=["transformers"], help="the same step without palestra")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="what takes the time of one more step, in a table")
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


def _config_explain(arguments: argparse.Namespace) -> None:
    from palestra.launch import recipes

    recipes.explain_settings(arguments.names, as_markdown=arguments.markdown, as_json=arguments.json)


def _runs_ls(arguments: argparse.Namespace) -> None:
    from palestra.launch import runs

    runs.show_all(arguments.outputs, as_json=arguments.json)


def _runs_show(arguments: argparse.Namespace) -> None:
    from palestra.launch import runs

    runs.show_one(runs.find(arguments.run), as_json=arguments.json)


def _runs_tell(arguments: argparse.Namespace) -> int:
    from palestra.launch import runs
    from palestra.launch.sinks.keeping import tell

    return tell(runs.find(arguments.run), arguments.place)


def _view(arguments: argparse.Namespace) -> None:
    from palestra.launch import view

    view.view(arguments.outputs, host=arguments.host, port=arguments.port, names=arguments.allow_host)


def _fetch(arguments: argparse.Namespace) -> int:
    import subprocess

    from palestra.launch.model_path import FETCHED

    directory = arguments.directory or FETCHED / arguments.name
    return subprocess.run([sys.executable, "-m", "palestra.model.fetch", arguments.name, str(directory)]).returncode


def _eval(arguments: argparse.Namespace) -> None:
    from palestra.core.errors import UserError
    from palestra.launch import evaluation

    if arguments.words[:1] == ["compare"]:
        if len(arguments.words) != 3:
            raise UserError("usage: palestra eval compare DIR DIR")
        one, other = map(Path, arguments.words[1:])
        evaluation.compare(one, other, as_json=arguments.json)
    elif arguments.words[:1] == ["import"]:
        _import(arguments)
    elif arguments.push or arguments.push_to:
        _measure_and_push(arguments)
    else:
        _measure(arguments)


def _measure_and_push(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub_evals

    at = hub_evals.require_account()
    run = _measure(arguments)
    hub_evals.push([run.path], hub=at.url, owner=arguments.push_to or "", as_json=False)


def _import(arguments: argparse.Namespace) -> None:
    from palestra.core.errors import UserError
    from palestra.launch import evaluation, imports

    if len(arguments.words) < 2 or arguments.output is None:
        raise UserError("usage: palestra eval import DIR... --output DIR")
    run = imports.import_all([Path(word) for word in arguments.words[1:]], arguments.output)
    evaluation.show(run, as_json=arguments.json)


def _generate(arguments: argparse.Namespace) -> None:
    from palestra.launch import evaluation

    evaluation.require_free(arguments.to)
    if arguments.gold:
        evaluation.write_gold(_wish(arguments), arguments.to, arguments.min_reward)
    else:
        evaluation.keep_good(_measure(arguments), arguments.to, arguments.min_reward)


def _measure(arguments: argparse.Namespace):
    """The directory with the results."""
    from palestra.launch import evaluation

    wish = _wish(arguments)
    if arguments.resume is None:
        return evaluation.evaluate(wish, as_json=arguments.json)
    given = [_FIELDS.get(name, name) for name in _WISHED if getattr(arguments, name) is not None]
    given += ["environments"] if wish.environments else []
    return evaluation.resume(arguments.resume, wish, given, as_json=arguments.json)


def _wish(arguments: argparse.Namespace):
    from palestra.launch.evaluation import Wish

    given = {name: value for name in _WISHED if (value := getattr(arguments, name)) is not None}
    wished = _WISHED | {"split": arguments.default_split} | given
    wished = {_FIELDS.get(name, name): value for name, value in wished.items()}
    wished["seats"] = dict(map(_seat, wished["seats"]))
    environments = [word for word in arguments.words if "=" not in word]
    overrides = [*(word for word in arguments.words if "=" in word), *arguments.overrides]
    return Wish(environments=environments, overrides=overrides, **wished)


_WISHED: dict[str, Any] = {
    "model": None,
    "base_url": None,
    "key_env": None,
    "checkpoint": None,
    "num_tasks": 100,
    "rollouts": 1,
    "temperature": None,
    "max_tokens": 1024,
    "split": None,
    "args": {},
    "seat": (),
    "concurrency": 32,
    "seed": 0,
    "output": None,
    "sandbox": None,
}
"""Options of an evaluation, and what they are if they are not given."""
_FIELDS = {"rollouts": "rollouts_per_task", "seat": "seats"}
"""Of a `Wish`, where an option is called otherwise."""


def _seat(word: str) -> tuple[str, dict[str, str]]:
    """Errors: UserError, if it is no NAME=URL,MODEL."""
    from palestra.core.errors import UserError

    name, is_named, place = word.partition("=")
    url, has_model, model = place.rpartition(",")
    if not (is_named and has_model and name and url and model):
        raise UserError(f"--seat {word} is not NAME=URL,MODEL, such as user=http://127.0.0.1:8000/v1,qwen")
    return name, {"url": url, "model": model}


def _env_new(arguments: argparse.Namespace) -> None:
    from palestra.launch import env

    env.new(arguments.name, arguments.directory, install=not arguments.no_install)


def _env_check(arguments: argparse.Namespace) -> int:
    from palestra.launch import env

    return env.check(
        arguments.names,
        all_installed=arguments.all,
        num_tasks=arguments.num_tasks,
        sandbox=arguments.sandbox,
        deadline_s=arguments.deadline_s,
        as_json=arguments.json,
    )


def _env_list(arguments: argparse.Namespace) -> None:
    from palestra.launch import env

    env.show_all(as_json=arguments.json)


def _serve_engine(arguments: argparse.Namespace) -> None:
    from palestra.launch import serve

    serve.engine(arguments.model, arguments.overrides, port=arguments.port)


def _serve_proxy(arguments: argparse.Namespace) -> None:
    from palestra.launch import serve

    serve.proxy(
        arguments.model,
        arguments.engine,
        arguments.overrides,
        port=arguments.port,
        to=arguments.to,
        idle_s=arguments.idle_s,
    )


_OF_SERVICE = (
    *("host", "port", "tokens", "data", "most", "most_memory_mb", "starting", "running", "most_waiting", "wait_s"),
    *("most_lifetime_s", "most_program_s", "most_body_mb", "drain_s"),
)


def _serve_sandbox(arguments: argparse.Namespace) -> None:
    from palestra.launch import sandbox

    if arguments.token_for is not None:
        sandbox.print_token(arguments.token_for)
    else:
        sandbox.serve(arguments.backend, {name: getattr(arguments, name) for name in _OF_SERVICE})


def _sandbox_run(arguments: argparse.Namespace) -> int:
    from palestra.launch import sandbox

    wish = sandbox.Wish(
        file=arguments.file,
        backend=arguments.backend,
        timeout_s=arguments.timeout_s,
        memory_mb=arguments.memory_mb,
        stdin=arguments.stdin,
    )
    return sandbox.run(wish, as_json=arguments.json)


def _sandbox_check(arguments: argparse.Namespace) -> int:
    from palestra.launch import sandbox_check
    from palestra.sandbox import Isolation, Options

    options = Options(
        backend=arguments.backend,
        min_isolation=None if arguments.backend else Isolation.PROCESS,
        image=arguments.image,
        packages=tuple(arguments.packages),
        without=tuple(arguments.without),
    )
    return sandbox_check.show(options, only=arguments.cases, as_json=arguments.json)


def _replay(arguments: argparse.Namespace) -> int | None:
    from palestra.core.errors import UserError
    from palestra.launch import replay, replay_env, replay_rewards, replay_weights, runs

    if arguments.rewards:
        return replay_rewards.show(runs.find(arguments.run), as_json=arguments.json)
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


def _plan(arguments: argparse.Namespace) -> None:
    from palestra.launch import planning

    wish = planning.Wish(
        recipe=arguments.recipe,
        overrides=arguments.overrides,
        model_config=arguments.config,
        gpu=arguments.gpu,
        gpus_per_node=arguments.gpus_per_node,
        mean_tokens=arguments.mean_tokens,
        mfu=arguments.mfu,
    )
    planning.show(wish, as_json=arguments.json)


def _bench_loop(arguments: argparse.Namespace) -> None:
    from palestra.launch.bench import loop

    loop.show(arguments.overrides, quick=arguments.quick, outputs=arguments.outputs, as_json=arguments.json)


def _bench_inflight(arguments: argparse.Namespace) -> None:
    from palestra.launch.bench import inflight

    inflight.show(arguments.overrides, outputs=arguments.outputs, as_json=arguments.json)


def _bench_env(arguments: argparse.Namespace) -> None:
    from palestra.launch.bench import env

    env.show(arguments.overrides, outputs=arguments.outputs, as_json=arguments.json)


def _bench_trainer(arguments: argparse.Namespace) -> None:
    from palestra.launch.bench import trainer

    fields = ("model", "config", "tokens", "packs", "documents", "kind", "steps", "against", "profile", "overrides")
    wish = trainer.Wish(**{name: getattr(arguments, name) for name in fields})
    trainer.show(wish, as_json=arguments.json)


def _bench_sandbox(arguments: argparse.Namespace) -> None:
    from palestra.launch.bench import sandbox

    sandbox.show(quick=arguments.quick, as_json=arguments.json)


def _doctor(arguments: argparse.Namespace) -> int:
    from palestra.launch import doctor

    return doctor.show(as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
