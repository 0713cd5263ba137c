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
from typing import TYPE_CHECKING, Any

from rporec.arguments import BENCHMARKS, parse
from rporec.config import Config, ConfigError, load_config, override
from rporec.run import STAGES, Run, contradiction

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    signal.signal(signal.SIGTERM, _terminate)  # as Ctrl-C: every `finally` on the way out runs
    try:
        return COMMANDS[options.command](options) or 0
    except Exception as error:
        message = _mendable(error)
        if options.debug or message is None:
            raise
        print(f"rporec: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hints = {"train": "; --resume goes on from the last checkpoint", "study": "; the same command goes on"}
        hint = hints.get(options.command, "")
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
            k_core=config.data.k_core,
            headline=config.data.headline,
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
    overrides = [*options.overrides, *_data_path(options)]
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
    _train_stages(run, config, stages, address)
    return 0


def _data_path(options: argparse.Namespace) -> list[str]:
    """What `--data` overrides."""
    from rporec.data.remote import is_url

    if options.data is None:
        return []
    where = options.data if is_url(options.data) else str(Path(options.data).absolute())
    return [f"data.path={json.dumps(where)}"]


def _train_stages(run: Run, config: Config, stages: list[str], address: str | None) -> None:
    with run.locked():
        try:
            importlib.import_module("actors.launch").train(run, config, stages, address, _console())
        except Exception:
            run.discard_if_empty()  # faulty data, say: nothing is there to resume
            raise


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
    config = override(run.config(), [*options.overrides, *changes])
    if key := contradiction(run.config(), config):
        raise ConfigError(f"{run.folder}: evaluate takes no other {key} than the run's, which shaped what it learned")
    importlib.import_module("actors.launch").evaluate(
        run, config, ablations=options.ablations, address=_address(options), console=_console()
    )


def _study(options: argparse.Namespace) -> None:
    from rporec import study
    from rporec.evaluation.terminal import print_table

    if options.tables is not None:
        if options.config is not None:
            raise ConfigError(f"study: --tables takes no CONFIG.yaml (got {options.config})")
        from rporec.study_tables import markdown

        print(markdown(options.tables))
        return
    if options.config is None:
        raise ConfigError("study: say CONFIG.yaml, or --tables")
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_config(options.config, [*study.DEFAULTS, *options.overrides, *_data_path(options), *seed])
    path = study.result_path(options.out, config)
    if (result := study.finished(options.out, config)) is None:
        _check_inputs(config)
        folder = options.runs / path.stem
        run = Run.create(folder, config, resume=(folder / "config.json").is_file())
        if stages := [stage for stage in STAGES if stage != "evaluate" and not run.finished(stage)]:
            _train_stages(run, config, stages, None)
        evaluate = importlib.import_module("actors.launch").evaluate
        evaluate(run, config, ablations=True, address=None, console=_console())
        data = ["--data", name] if (name := study.data_name(config)) else []
        words = ["rporec", "study", str(options.config), *options.overrides, *data, "--seed", str(config.seed)]
        study.write_result(options.out, run, config, words)
    else:
        print_table(result.summary, _console())
    print(path)


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


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "data build": _data_build,
    "data synthetic": _data_synthetic,
    "data download": _data_download,
    "train": _train,
    "evaluate": _evaluate,
    "study": _study,
    "status": _status,
    "scale": _scale,
    "plan": _plan,
    "promote": _promote,
    "serve": _serve,
    "report": _report,
    "export": _export,
    "debug rollouts": _debug_rollouts,
    "debug rewards": _debug_rewards,
    "debug learner": _debug_learner,
    "bench": _bench,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
