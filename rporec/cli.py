"""The command `rporec`: the one door that starts Ray's side, by name.

Bad input ends with one clear line and exit status 2; `--debug` keeps the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rporec import __version__
from rporec.config import Config, ConfigError, load_config, override
from rporec.run import STAGES, Run

# Names of `rporec bench`, and their modules in `benchmarks/`.
BENCHMARKS = {
    "all": "all",
    "async": "async_training",
    "baselines": "baselines",
    "control-plane": "control_plane",
    "data": "data_build",
    "learner": "learner",
    "packing": "packing",
    "peer-trl": "peer_trl",
    "retrieval": "retrieval",
    "reward": "reward",
    "rollout": "rollout",
    "serve": "serving",
    "trie": "trie",
    "weights": "weights",
}

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    signal.signal(signal.SIGTERM, _terminate)  # as Ctrl-C: every `finally` on the way out runs
    try:
        return options.command(options) or 0
    except Exception as error:
        message = _mendable(error)
        if options.debug or message is None:
            raise
        print(f"rporec: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if options.command is _train else ""
        print(f"rporec: stopped{hint}", file=sys.stderr)
        return 130


def _mendable(error: Exception) -> str | None:
    """The message of what the user can mend: config, data, a path, an address, an engine's memory; None for others."""
    inner = getattr(error, "cause", None) or error  # what an actor raised arrives wrapped
    if type(inner).__name__ in ("ConfigError", "DataError", "EngineError", "RunError"):
        return str(inner)
    here = isinstance(error, OSError) and type(error).__module__ == "builtins"
    if here and (getattr(error, "filename", None) is not None or isinstance(error, ConnectionError)):
        return str(error)
    return None


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage of every option."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse; `key=value` may also stand behind options, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if "overrides" in options and all("=" in word and not word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _terminate(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _console() -> Console:
    from rich.console import Console

    return Console()


@contextlib.contextmanager
def _bar(name: str, console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """A progress bar as `build` and `download` report to it: (stage, done, total)."""
    from rporec.report.live import progress

    with progress(name, console=console) as bar:
        yield lambda stage, done, total: bar.update(done, total=total, description=f"{name}: {stage}")


# --- data ------------------------------------------------------------------------------------
def _data_build(options: argparse.Namespace) -> None:
    from rporec.data import build

    with _bar("build", _console()) as report:
        dataset = build(
            options.interactions,
            options.items,
            options.out,
            split=options.split,
            window=options.window,
            k_core=options.k_core,
            progress=report,
        )
    print(f"{options.out}: {_counts(dataset.manifest)}")


def _data_synthetic(options: argparse.Namespace) -> None:
    from rporec.data import build
    from rporec.data.folder import check_free
    from rporec.data.synthetic import write_synthetic

    config = load_config(options.config, options.overrides)
    raw = options.out / "source"
    check_free(options.out / "data")
    write_synthetic(raw, config.data.synthetic, config.seed)
    with _bar("build", _console()) as report:
        dataset = build(
            raw / "interactions.parquet",
            raw / "items.parquet",
            options.out / "data",
            split=config.data.split,
            window=config.data.window,
            progress=report,
        )
    print(f"{options.out}/source: raw files; {options.out}/data: {_counts(dataset.manifest)}")


def _data_download(options: argparse.Namespace) -> None:
    from rporec.data.download import download

    with _bar("download", _console()) as report:
        download(options.name, options.out, report)


def _counts(manifest: dict[str, Any]) -> str:
    counts = manifest["counts"]
    samples = ", ".join(f"{number:,} {split}" for split, number in counts["samples"].items())
    left_out = ", ".join(f"{number:,} {event}" for event, number in counts["left_out"].items())
    return (
        f"{counts['users']:,} users, {counts['items']:,} items, {counts['interactions']:,} interactions; "
        f"samples: {samples}" + (f"; left out: {left_out}" if left_out else "")
    )


# --- train, evaluate ---------------------------------------------------------------------------
def _train(options: argparse.Namespace) -> int:
    from rporec.data.remote import is_url

    overrides = [*options.overrides]
    if options.data is not None:
        where = options.data if is_url(options.data) else str(Path(options.data).absolute())
        overrides.append(f"data.path={json.dumps(where)}")
    config = load_config(options.config, overrides)
    stages = options.stages.split(",") if options.stages else list(STAGES)
    submission = importlib.import_module("actors.submission")
    address = _address(options, dashboard=True)
    if address is not None and not (options.run and options.run.is_absolute()):
        raise ConfigError("--run: on a cluster an absolute path, on storage that all its nodes see")
    if address is not None and not submission.in_job() and not options.attached:
        words = [*overrides, *(["--resume"] if options.resume else [])]
        words += ["--stages", options.stages] if options.stages else []
        return submission.submit(options.config, config, options.run, address, words, _console())
    run = Run(options.run or Path("runs") / config.name)
    _check_stages(stages, run)
    _check_inputs(config)
    run = Run.create(run.folder, config, resume=options.resume)
    try:
        importlib.import_module("actors.launch").train(run, config, stages, address, _console())
    except Exception:
        run.discard_if_empty()  # faulty data, say: nothing is there to resume
        raise
    return 0


def _check_stages(stages: list[str], run: Run) -> None:
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"--stages: {stage!r} is none of {', '.join(STAGES)}")
        for earlier in STAGES[: STAGES.index(stage)]:
            if earlier != "stage2" and earlier not in stages and not run.finished(earlier):  # evaluate can do without
                raise ConfigError(f"--stages: {stage} needs {earlier}, which {run.folder} has not finished; add it")


def _check_inputs(config: Config) -> None:
    """What a stage would stumble over an hour later."""
    from rporec.data import find_sources, is_built
    from rporec.data.remote import is_url

    if config.data.path is not None and not is_url(config.data.path) and not is_built(config.data.path):
        find_sources(config.data.path)
    if config.reward.custom is not None:
        from rporec.rl.rewards import load_custom

        load_custom(config.reward.custom)


def _address(options: argparse.Namespace, *, dashboard: bool = False) -> str | None:
    """Of the cluster to join: that of `--address`, in a Ray job the job's, else None. `dashboard`: its URL will do."""
    if options.address is None:
        return "auto" if importlib.import_module("actors.submission").in_job() else None
    importlib.import_module("actors.inspect").check_address(options.address, dashboard=dashboard)
    return options.address


def _evaluate(options: argparse.Namespace) -> None:
    run = Run.open(options.run)
    run.require("data", "evaluate")
    changes = [] if options.baselines is None else [f"evaluate.baselines={json.dumps(options.baselines)}"]
    config = override(run.config(), changes)
    importlib.import_module("actors.launch").evaluate(
        run, config, ablations=options.ablations, address=_address(options), console=_console()
    )


# --- one role of a run alone ---------------------------------------------------------------------
def _debug_rollouts(options: argparse.Namespace) -> None:
    run = _debugged(options, "warmup")
    _debugger().rollouts(run, options.groups, options.out, _address(options), _console())


def _debug_rewards(options: argparse.Namespace) -> None:
    run = _debugged(options, "stage1")
    _debugger().rewards(run, options.replay, options.out, _address(options), _console())


def _debug_learner(options: argparse.Namespace) -> None:
    run = _debugged(options, "warmup")
    _debugger().learner(run, options.replay, options.steps, options.out, _address(options), _console())


def _debugged(options: argparse.Namespace, stage: str) -> Run:
    run = Run.open(options.run)
    run.require(stage, "debug")
    return run


def _debugger() -> Any:
    return importlib.import_module("actors.debug")


# --- looking at a run --------------------------------------------------------------------------
def _status(options: argparse.Namespace) -> None:
    from rporec.status import read_status, status_table

    status = read_status(Run.open(options.run))
    if options.json:
        print(json.dumps(status))
    else:
        _console().print(status_table(status))


def _scale(options: argparse.Namespace) -> None:
    wanted = {"rollout": options.rollout_workers, "reward": options.reward_workers}
    wanted = {role: count for role, count in wanted.items() if count is not None}
    if not wanted:
        raise ConfigError("scale: say --rollout-workers N, --reward-workers M or both")
    if bad := next((role for role, count in wanted.items() if count < 1), None):
        raise ConfigError(f"--{bad}-workers: a run needs 1 or more (got {wanted[bad]})")
    for worker in importlib.import_module("actors.live").scale(Run.open(options.run), wanted):
        print(f"{worker['name']}: {worker['state'].lower()}")


def _promote(options: argparse.Namespace) -> None:
    from rporec.promotion import promote_best, roll_back

    run = Run.open(options.run)
    run.require_head("promote")
    chosen = roll_back(run) if options.rollback else promote_best(run)
    print(f"{run.folder}: version {chosen.version} serves")


def _serve(options: argparse.Namespace) -> None:
    run = Run.open(options.run)
    run.require("stage1", "serve")
    run.require_head("serve")
    if bad := [word for word in options.overrides if not word.startswith(("serve.", "engine.", "device="))]:
        raise ConfigError(f"{bad[0]!r}: serving changes device and keys of serve. and engine.; the rest is the run's")
    if not 0 < options.port < 2**16:
        raise ConfigError(f"--port {options.port}: a port is between 1 and 65535")
    config = override(run.config(), options.overrides)
    launch = importlib.import_module("serve.launch")
    with contextlib.suppress(KeyboardInterrupt):
        launch.serve_run(run, config, options.host, options.port, _address(options), _console())


def _report(options: argparse.Namespace) -> None:
    from rporec.report.html import write_report

    print(write_report(Run.open(options.run).folder))


def _export(options: argparse.Namespace) -> None:
    from rporec.export import export_run

    run = Run.open(options.run)
    run.require_head("export")
    print(export_run(run, options.out))


def _plan(options: argparse.Namespace) -> int:
    from rporec.plan import Speeds, measured, plan, plan_table, read_pools

    given = {"rollout": options.rollout_seconds, "learner": options.learner_seconds}
    for role, seconds in given.items():
        if seconds is not None and not 0 < seconds < float("inf"):
            raise ConfigError(f"--{role}-seconds: seconds of one group, more than 0 (got {seconds:g})")
    config = load_config(options.config, options.overrides)
    pools = read_pools(options.cluster)
    speeds = None
    if options.run is not None:
        known = measured(Run.open(options.run), config.learners)
        speeds = Speeds(given["rollout"] or known.rollout, given["learner"] or known.learner)
    elif None not in given.values():
        speeds = Speeds(**given)
    elif any(given.values()):
        raise ConfigError("plan: --rollout-seconds and --learner-seconds go together, or --run has the other one")
    balance = importlib.import_module("actors.forecast").balance if speeds else None
    planned = plan(config, pools, speeds, balance)
    if options.json:
        print(json.dumps(planned))
    else:
        _console().print(plan_table(planned))
    return 0 if planned["fits"]["start"] else 2


def _bench(options: argparse.Namespace) -> None:
    benchmark = importlib.import_module(f"benchmarks.{BENCHMARKS[options.name]}")
    result = benchmark.run(**getattr(benchmark, "QUICK", {}) if options.quick else {})
    if not options.json:
        for key, value in result["ratios"].items():
            print(f"{key:>36}  {value}")
    print(json.dumps(result))


def _doctor(options: argparse.Namespace) -> int:
    from rporec.doctor import examine, report_table

    report = examine(options.address)
    if options.json:
        print(json.dumps(report))
    else:
        _console().print(report_table(report))
    return 0 if report["can_run"] else 2


# --- arguments -----------------------------------------------------------------------------------
def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rporec", description="Teach a language model to reason before it recommends.")
    parser.add_argument("--version", action="version", version=f"rporec {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(group: Any, name: str, command: Any, help: str) -> argparse.ArgumentParser:
        sub = group.add_parser(name, help=help, description=help)
        sub.add_argument("--debug", action="store_true", help="keep tracebacks")
        sub.set_defaults(command=command)
        return sub

    data = commands.add_parser("data", help="build, make or download a data set").add_subparsers(
        required=True, metavar="ACTION"
    )
    build = add(data, "build", _data_build, "check interactions and items (CSV, JSONL, Parquet) and write a data set")
    build.add_argument(
        "--interactions",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="SOURCE",
        help="files, or folders of Parquet parts, with user_id, item_id, timestamp; optional rating, seq, event",
    )
    build.add_argument(
        "--items",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="SOURCE",
        help="the same, with item_id and whatever attributes there are",
    )
    build.add_argument("--out", type=Path, required=True)
    build.add_argument("--split", default="time", help="time[:8:1:1] | leave-one-out | column:NAME (default: time)")
    build.add_argument("--window", type=int, default=20, help="history items of a sample (default: 20)")
    build.add_argument("--k-core", type=int, default=0, help="keep users and items with at least K interactions")

    synthetic = add(data, "synthetic", _data_synthetic, "write the embedded world, raw and built")
    synthetic.add_argument("--out", type=Path, required=True)
    synthetic.add_argument("--config", type=Path, help="YAML whose data.synthetic and seed are used")
    synthetic.add_argument("overrides", nargs="*", default=[], metavar="key=value")

    download = add(data, "download", _data_download, "fetch a public data set")
    download.add_argument("name", help="movielens-100k|1m|20m|32m, movietweetings, amazon-2023:CATEGORY")
    download.add_argument("--out", type=Path, required=True)

    train = add(commands, "train", _train, "run all stages of a config, or some")
    train.add_argument("config", type=Path, metavar="CONFIG.yaml")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted paths, YAML values: rl.lr=1e-4"
    )
    train.add_argument(
        "--data",
        metavar="DIR|URL",
        help="built data set, or folder with interactions.* and items.*; also s3://…, gs://…",
    )
    train.add_argument("--run", type=Path, metavar="DIR", help="run directory (default: runs/<name of the config>)")
    train.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    train.add_argument("--stages", help=f"comma list of {','.join(STAGES)}")
    train.add_argument(
        "--address",
        help="submit to this Ray cluster: auto or HOST:PORT on a node of it, http://HOST:PORT of its dashboard "
        "(default: start one on this machine)",
    )
    train.add_argument(
        "--attached",
        action="store_true",
        help="with --address: train from this process, a node's, instead of submitting a job; Ctrl-C ends the training",
    )

    evaluate = add(commands, "evaluate", _evaluate, "rank test with every method of a run")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument(
        "--ablations",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also with CoT and answer blanked and shuffled between users",
    )
    evaluate.add_argument(
        "--baselines", metavar="NAMES", help="all, none, or a comma list (default: evaluate.baselines of the run)"
    )
    evaluate.add_argument("--address", help="Ray cluster to join")

    status = add(commands, "status", _status, "what a run is doing now")
    status.add_argument("run", type=Path, metavar="RUN")
    status.add_argument("--json", action="store_true")

    scale = add(commands, "scale", _scale, "change how many workers a live run has; no group is lost")
    scale.add_argument("run", type=Path, metavar="RUN")
    scale.add_argument("--rollout-workers", type=int, metavar="N")
    scale.add_argument("--reward-workers", type=int, metavar="M")

    plan = add(commands, "plan", _plan, "which nodes a config would bring, whether it fits, who would wait for whom")
    plan.add_argument("config", type=Path, metavar="CONFIG.yaml")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="as for train")
    plan.add_argument("--cluster", type=Path, required=True, metavar="FILE", help="cluster file of `ray up`")
    plan.add_argument("--run", type=Path, metavar="DIR", help="take the speeds that this run had")
    plan.add_argument("--rollout-seconds", type=float, metavar="S", help="of one group, for one rollout worker")
    plan.add_argument("--learner-seconds", type=float, metavar="S", help="of one group, for all ranks together")
    plan.add_argument("--json", action="store_true")

    promote = add(commands, "promote", _promote, "have the best version serve, or the one before the present one")
    promote.add_argument("run", type=Path, metavar="RUN")
    promote.add_argument("--rollback", action="store_true", help="go back to the version promoted before")

    serving = add(commands, "serve", _serve, "answer over HTTP, on the cluster of the run or one started here")
    serving.add_argument("run", type=Path, metavar="RUN")
    serving.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of serve. and engine.: serve.timeout_ms=2000"
    )
    serving.add_argument("--host", default="127.0.0.1", help="other than loopback needs a token (default: 127.0.0.1)")
    serving.add_argument("--port", type=int, default=8000)
    serving.add_argument("--address", help="Ray cluster (default: the one the run trains on, else one started here)")

    report = add(commands, "report", _report, "write RUN/report.html")
    report.add_argument("run", type=Path, metavar="RUN")

    export = add(commands, "export", _export, "Hugging Face folder, RecHead and item index, model card")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--out", type=Path, required=True)

    debug = commands.add_parser("debug", help="one role of a run alone; the run is only read").add_subparsers(
        required=True, metavar="ROLE"
    )

    def role(name: str, command: Any, help: str, *, replay: bool, out: str, required: bool) -> argparse.ArgumentParser:
        sub = add(debug, name, command, help)
        sub.add_argument("run", type=Path, metavar="RUN")
        if replay:
            sub.add_argument(
                "--replay", type=Path, required=True, metavar="DIR", help="saved groups, as in RUN/rollouts"
            )
        sub.add_argument("--out", type=Path, required=required, metavar="DIR", help=out)
        sub.add_argument("--address", help="Ray cluster to join (default: start one on this machine)")
        return sub

    help = "sample the first groups of stage 2 with the LLM before RL"
    rollouts = role("rollouts", _debug_rollouts, help, replay=False, out="new folder for the groups", required=True)
    rollouts.add_argument("--groups", type=int, metavar="N", help="how many (default: those of one step)")
    help = "score saved groups"
    role("rewards", _debug_rewards, help, replay=True, out="new folder for the scored groups", required=False)
    help = "train on saved, scored groups from the LLM before RL on"
    learner = role("learner", _debug_learner, help, replay=True, out="new folder for steps.jsonl", required=True)
    learner.add_argument("--steps", type=int, metavar="N", help="how many (default: as many as there are groups for)")

    bench = add(commands, "bench", _bench, "measure what the documentation claims; ends with one JSON object")
    bench.add_argument("name", choices=sorted(BENCHMARKS))
    bench.add_argument("--json", action="store_true", help="nothing but the JSON object")
    bench.add_argument("--quick", action="store_true", help="fewer rounds or a smaller size, where it has such")

    doctor = add(commands, "doctor", _doctor, "what this machine or cluster can run, and what is missing")
    doctor.add_argument("--address", help="also ask this Ray cluster")
    doctor.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
