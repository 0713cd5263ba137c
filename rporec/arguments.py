"""What stands behind `rporec` on the command line: every command with its arguments and their help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from rporec import __version__
from rporec.run import STAGES

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


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage of every option."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse; `command` names what was asked for, "data build" say.

    `key=value` may also stand behind options, which argparse alone does not allow.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if "overrides" in options and all("=" in word and not word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rporec", description="Teach a language model to reason before it recommends.")
    parser.add_argument("--version", action="version", version=f"rporec {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for add_some in (_add_data, _add_training, _add_steering, _add_using, _add_debug, _add_machine):
        add_some(commands)
    return parser


def _add(group: Any, name: str, help: str) -> argparse.ArgumentParser:
    sub = group.add_parser(name, help=help, description=help)
    sub.add_argument("--debug", action="store_true", help="keep tracebacks")
    sub.set_defaults(command=sub.prog.removeprefix("rporec "))
    return sub


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="build, make or download a data set").add_subparsers(
        required=True, metavar="ACTION"
    )
    build = _add(data, "build", "check interactions and items (CSV, JSONL, Parquet) and write a data set")
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

    synthetic = _add(data, "synthetic", "write the embedded world, raw and built")
    synthetic.add_argument("--out", type=Path, required=True)
    synthetic.add_argument("--config", type=Path, help="YAML whose section data and seed are used")
    synthetic.add_argument("overrides", nargs="*", default=[], metavar="key=value")

    download = _add(data, "download", "fetch a public data set")
    download.add_argument("name", help="movielens-100k|1m|10m|20m|25m|32m, movietweetings, amazon-2023:CATEGORY")
    download.add_argument("--out", type=Path, required=True)


def _add_training(commands: Any) -> None:
    train = _add(commands, "train", "run all stages of a config, or some")
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

    evaluate = _add(commands, "evaluate", "rank test with every method of a run")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="what --resume may change: rere.more_beams=[50]"
    )
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

    help = "train and evaluate one (config, data set, seed) into one result file; call it again to go on"
    study = _add(commands, "study", help)
    study.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml")
    study.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="as for train")
    study.add_argument("--data", metavar="DIR|URL", help="as for train")
    study.add_argument("--seed", type=int, metavar="N", help="(default: the config's)")
    study.add_argument("--out", type=Path, default=Path("docs/study"), metavar="DIR", help="(default: docs/study)")
    study.add_argument("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="(default: runs/study)")
    study.add_argument(
        "--tables",
        type=Path,
        nargs="?",
        const=Path("docs/study"),
        metavar="DIR",
        help="print the Markdown tables of the results in DIR (default: docs/study), and do nothing else",
    )


def _add_steering(commands: Any) -> None:
    status = _add(commands, "status", "what a run is doing now")
    status.add_argument("run", type=Path, metavar="RUN")
    status.add_argument("--json", action="store_true")

    scale = _add(commands, "scale", "change how many workers a live run has; no group is lost")
    scale.add_argument("run", type=Path, metavar="RUN")
    scale.add_argument("--rollout-workers", type=int, metavar="N")
    scale.add_argument("--reward-workers", type=int, metavar="M")

    plan = _add(commands, "plan", "which nodes a config would bring, whether it fits, who would wait for whom")
    plan.add_argument("config", type=Path, metavar="CONFIG.yaml")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="as for train")
    plan.add_argument("--cluster", type=Path, required=True, metavar="FILE", help="cluster file of `ray up`")
    plan.add_argument("--run", type=Path, metavar="DIR", help="take the speeds that this run had")
    plan.add_argument("--rollout-seconds", type=float, metavar="S", help="of one group, for one rollout worker")
    plan.add_argument("--learner-seconds", type=float, metavar="S", help="of one group, for all ranks together")
    plan.add_argument("--json", action="store_true")


def _add_using(commands: Any) -> None:
    promote = _add(commands, "promote", "have the best version serve, or the one before the present one")
    promote.add_argument("run", type=Path, metavar="RUN")
    promote.add_argument("--rollback", action="store_true", help="go back to the version promoted before")

    serving = _add(commands, "serve", "answer over HTTP, on the cluster of the run or one started here")
    serving.add_argument("run", type=Path, metavar="RUN")
    serving.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="device, or of serve. and engine.: serve.timeout_ms=2000",
    )
    serving.add_argument("--host", default="127.0.0.1", help="other than loopback needs a token (default: 127.0.0.1)")
    serving.add_argument("--port", type=int, default=8000)
    serving.add_argument("--address", help="Ray cluster (default: the one the run trains on, else one started here)")

    report = _add(commands, "report", "write RUN/report.html")
    report.add_argument("run", type=Path, metavar="RUN")

    export = _add(commands, "export", "Hugging Face folder, RecHead and item index, model card")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--out", type=Path, required=True)


def _add_debug(commands: Any) -> None:
    debug = commands.add_parser("debug", help="one role of a run alone; the run is only read").add_subparsers(
        required=True, metavar="ROLE"
    )

    def role(name: str, help: str, *, replay: bool, out: str, required: bool) -> argparse.ArgumentParser:
        sub = _add(debug, name, help)
        sub.add_argument("run", type=Path, metavar="RUN")
        if replay:
            sub.add_argument(
                "--replay", type=Path, required=True, metavar="DIR", help="saved groups, as in RUN/rollouts"
            )
        sub.add_argument("--out", type=Path, required=required, metavar="DIR", help=out)
        sub.add_argument("--address", help="Ray cluster to join (default: start one on this machine)")
        return sub

    help = "sample the first groups of stage 2 with the LLM before RL"
    rollouts = role("rollouts", help, replay=False, out="new folder for the groups", required=True)
    rollouts.add_argument("--groups", type=int, metavar="N", help="how many (default: those of one step)")
    help = "score saved groups"
    role("rewards", help, replay=True, out="new folder for the scored groups", required=False)
    help = "train on saved, scored groups from the LLM before RL on"
    learner = role("learner", help, replay=True, out="new folder for steps.jsonl", required=True)
    learner.add_argument("--steps", type=int, metavar="N", help="how many (default: as many as there are groups for)")


def _add_machine(commands: Any) -> None:
    bench = _add(commands, "bench", "measure what the documentation claims; ends with one JSON object")
    bench.add_argument("name", choices=sorted(BENCHMARKS))
    bench.add_argument("--json", action="store_true", help="nothing but the JSON object")
    bench.add_argument("--quick", action="store_true", help="fewer rounds or a smaller size, where it has such")

    doctor = _add(commands, "doctor", "what this machine or cluster can run, and what is missing")
    doctor.add_argument("--address", help="also ask this Ray cluster")
    doctor.add_argument("--json", action="store_true")
