"""Is anything lost when processes are killed? Real runs, struck at random moments, beside runs that nothing disturbed.

`python -m harness.faults --kills 100 --seed 0` starts `posttrain clean` on the digits in a process of its
own, again and again, and kills at seeded moments in its steps: the driver, a worker that embeds or scores, a worker of
Ray Train, a node of a local cluster of three, the MLflow server. What ended is started again, as a user would. Each
result has to be that of an undisturbed run: the same removed ids, scores and weights bit for bit, every sample in
exactly one place, one MLflow run per round, and no process left behind. The table is written after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pyarrow.parquet as pq
import yaml

from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.tables import document, markdown

Target = Literal["driver", "worker", "training worker", "node", "MLflow server"]
Setting = Literal["head", "workers", "network", "cluster", "server"]

TARGETS: dict[Setting, tuple[Target, ...]] = {
    "head": ("driver", "worker", "worker"),
    "workers": ("worker",),
    "network": ("driver", "worker", "training worker", "training worker"),
    "cluster": ("node",),
    "server": ("MLflow server",),
}
"""What is killed in which setting; `worker` twice: as often as that."""

AT_ONCE: dict[Setting, int] = {"head": 6, "workers": 10, "network": 4, "cluster": 1, "server": 2}
"""Kills per run."""

STEPS_OF: dict[Target, frozenset[str]] = {
    "worker": frozenset({"embed", "embed validation", "fit", "curvature", "calibrate", "score", "refine", "evaluate"}),
    "training worker": frozenset({"refine", "pretrain"}),
    "node": frozenset({"embed", "fit", "curvature", "calibrate", "score", "select", "refine", "evaluate", "commit"}),
    "MLflow server": frozenset({"fit", "curvature", "calibrate", "score", "select", "refine", "evaluate", "commit"}),
}
"""Where a target is to be found; the driver is there in every step."""

PROCESS = {"worker": "ray::_Worker", "training worker": "ray::RayTrainWorker"}
"""How the title of a target's process begins."""

SAMPLES = 1203
"""Of the digits' training set."""

_COMING_BACK_S = 20.0

_AWAY_S = (2.0, 20.0)
"""For how long an MLflow server that was killed is not started again."""

PATIENCE_S = 600.0
"""A start that takes longer hangs."""


# -- the run that is struck --------------------------------------------------------------------------------


def watched(runfile: str, journal: Path) -> None:
    """`posttrain clean` in this process, with a line in the journal whenever a step begins."""
    from posttrain import cli
    from posttrain.report.progress import StepLog

    real = StepLog.step

    @contextlib.contextmanager
    def step(self: StepLog, name: str) -> Iterator[Callable[[int, int], None]]:
        with journal.open("a") as stream:
            stream.write(json.dumps([time.time(), self._round, name]) + "\n")
        with real(self, name) as tell:
            yield tell

    StepLog.step = step
    sys.argv = ["posttrain", "clean", runfile, "--json"]
    cli.main()


@dataclass(frozen=True)
class Moment:
    """A step of a run, and when it began."""

    began: float
    round: int | None
    step: str

    @property
    def place(self) -> tuple[int | None, str]:
        return self.round, self.step


def read_journal(journal: Path) -> list[Moment]:
    if not journal.exists():
        return []
    # the last line may be half written
    return [Moment(*json.loads(line)) for line in journal.read_text().split("\n")[:-1]]


@dataclass(frozen=True)
class Strike:
    """A kill that is planned: in which step of the undisturbed run, and after which share of its time."""

    target: Target
    at: int
    """Index of the step in the order of the undisturbed run."""
    place: tuple[int | None, str]
    delay_s: float


@dataclass(frozen=True)
class Kill:
    """A kill that was made."""

    setting: Setting
    target: Target
    step: str
    again: bool
    """Whether the command had to be started again."""
    lost_s: float
    """How much later than undisturbed the next step began."""


@dataclass
class Outcome:
    """What came of one run with all its kills."""

    setting: Setting
    seed: int
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    lost: int = 0
    """Samples that are in no place, or in two."""
    different: list[str] = field(default_factory=list)
    by_itself: int = 0
    """Starts that ended without having been struck, such as for a Ray that does not come up on a machine under load."""
    left_behind: int = 0
    """Processes of a killed run that were still there after half a minute."""


def plan(
    undisturbed: Sequence[Moment], end: float, setting: Setting, draw: random.Random, kills: int | None = None
) -> list[Strike]:
    """Strikes of one run in the order of its steps, no two in the same step, each target at least once.

    `kills`: how many; None: as many as the setting has.
    """
    kills = kills or AT_ONCE[setting]
    first = list(dict.fromkeys(TARGETS[setting]))[:kills]
    ends = [*(moment.began for moment in undisturbed[1:]), end]
    strikes: dict[int, Strike] = {}
    for _ in range(20 * kills):
        target = first[-1] if first else draw.choice(TARGETS[setting])
        steps = STEPS_OF.get(target)
        names = {moment.step for moment in undisturbed if steps is None or moment.step in steps}
        # first among the kinds of step, so that the rare ones are struck as often as those of every round
        step = draw.choice(sorted(names))
        at = draw.choice([i for i, moment in enumerate(undisturbed) if moment.step == step])
        seconds = ends[at] - undisturbed[at].began
        strike = Strike(target, at, undisturbed[at].place, draw.random() * seconds)
        if at in strikes:
            continue
        strikes[at] = strike
        del first[-1:]
        if len(strikes) == kills:
            break
    return [strikes[at] for at in sorted(strikes)]


# -- what surrounds a run ----------------------------------------------------------------------------------


def environment(folder: str) -> dict[str, str]:
    """Of processes that know nothing of any other Ray on this machine."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **own,
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        # Ray's workers give way to all others by default: beside other work these would wait for minutes
        "RAY_worker_niceness": "0",
        # short: the path of a socket has at most 107 characters
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    }


NODES = """
import sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
others = [cluster.add_node(**node) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "kill":
        cluster.remove_node(others.pop(0), allow_graceful=False)
    elif line.strip() == "mend":
        while len(others) < 2:
            others.append(cluster.add_node(**node))
    else:
        break
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A cluster of three nodes of one CPU each on this machine, in a process of its own."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NODES],
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError("the local cluster has not started")

    def ask(self, what: Literal["kill", "mend"]) -> None:
        """Kill all processes of a node that is not the head; or start as many nodes as there were."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def close(self) -> None:
        own = _family(self._process.pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=60)
        _end(own)


class Server:
    """An MLflow server on loopback."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination"),
            *(str(folder / "mlartifacts"), "--workers", "1"),
        ]
        self._env = dict(env)
        self._returning: threading.Thread | None = None
        self._start()

    def _start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(
            self._command, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError("the MLflow server does not answer") from None
                time.sleep(0.2)

    def kill(self) -> None:
        """Also where it is dead already."""
        family = _family(self._process.pid)
        self._process.kill()
        self._process.wait()
        _end(family)

    def come_back(self, after_s: float) -> None:
        """Start it once so many seconds are over, while the caller goes on."""

        def start() -> None:
            time.sleep(after_s)
            self._start()

        self._returning = threading.Thread(target=start)
        self._returning.start()

    def mend(self) -> None:
        """Wait until it is back; start it where it has died."""
        if self._returning is not None:
            self._returning.join()
            self._returning = None
        if self._process.poll() is not None:
            self._start()

    def close(self) -> None:
        self.mend()
        self.kill()


def _family(pid: int) -> list[psutil.Process]:
    """The descendants of a process."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _end(processes: Sequence[psutil.Process]) -> int:
    """SIGKILLs those that are still there (psutil tells a process from another with the same id)."""
    count = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                count += 1
    return count


# -- striking ----------------------------------------------------------------------------------------------


class Arena:
    """Runs in a folder, with what they need around them."""

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        self.folder, self._log = folder, log
        folder.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.mkdtemp(prefix="pt", dir="/tmp")
        self.env = environment(self._temporary)
        self._nodes: Nodes | None = None
        self._server: Server | None = None

    def close(self) -> None:
        for surrounding in (self._nodes, self._server):
            if surrounding is not None:
                surrounding.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def runfile(self, name: str, setting: Setting) -> Path:
        """Writes the run file of a run; starts what its setting needs."""
        raw: dict[str, Any] = {
            "run": {"path": str(self.folder / name)},
            "pretrain": {"epochs": 40},
            "removal": {"max_rounds": 2 if setting == "network" else 3},
            "ray": {"workers": 2},
            "tracking": {"log_model": False},
        }
        if setting == "network":
            raw["ray"] |= {"train_workers": 1, "num_cpus": 3}
            raw["refine"] = {"scope": "network", "epochs": 2, "learning_rate": 0.001, "augment": "crop"}
        if setting == "cluster":
            self._nodes = self._nodes or Nodes(self.env)
            self._nodes.ask("mend")
            # the driver trains, as in the runs beside which this one is held
            raw["ray"] |= {"address": self._nodes.address, "workers": 3, "train_workers": 0}
        if setting == "server":
            self._server = self._server or Server(self.folder, self.env)
            self._server.mend()
            raw["tracking"]["uri"] = self._server.uri
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    def undisturbed(self, setting: Setting) -> tuple[Path, list[Moment], float]:
        """The run, its steps and when it ended; made once."""
        name = f"undisturbed-{setting}"
        ended = self.folder / f"{name}.ended"
        journal = self.folder / f"{name}.journal"
        if not ended.exists():
            shutil.rmtree(self.folder / name, ignore_errors=True)
            journal.unlink(missing_ok=True)
            process = self._started(self.runfile(name, setting), journal)
            try:
                code: object = process.wait(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                _end([*_family(process.pid), psutil.Process(process.pid)])
                code = f"none within {PATIENCE_S:.0f} s"
            if code != 0:
                raise RuntimeError(f"the undisturbed run failed (exit code {code}); see {self.folder / name}.log")
            ended.write_text(str(time.time()))
        return self.folder / name, read_journal(journal), float(ended.read_text())

    def struck(self, setting: Setting, seed: int, kills: int | None = None) -> Outcome:
        """A run with the kills of this seed, and how its result compares; `kills` as `plan` takes it."""
        beside = "network" if setting == "network" else "head"
        expected, moments, end = self.undisturbed(beside)
        strikes = plan(moments, end, setting, random.Random(f"{setting} {seed}"), kills)
        name = f"{setting}-{seed}"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        journal = self.folder / f"{name}.journal"
        journal.unlink(missing_ok=True)
        outcome = Outcome(setting, seed)
        self._strike(self.runfile(name, setting), journal, strikes, moments, end, outcome)
        run = self.folder / name
        outcome.different += differences(run, expected)
        outcome.different += tracked(run, (self.folder if setting == "server" else run) / "mlflow.db")
        outcome.lost = misplaced(run)
        if not outcome.different and not outcome.lost:
            shutil.rmtree(run)
        return outcome

    def _started(self, runfile: Path, journal: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "harness.faults", "--child", str(runfile), str(journal)]
        with runfile.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def _strike(
        self,
        runfile: Path,
        journal: Path,
        strikes: Sequence[Strike],
        undisturbed: Sequence[Moment],
        end: float,
        outcome: Outcome,
    ) -> None:
        waiting = list(strikes)
        order = {moment.place: at for at, moment in reversed(list(enumerate(undisturbed)))}
        lengths = [after.began - moment.began for moment, after in itertools.pairwise(undisturbed)]
        lengths.append(end - undisturbed[-1].began)
        made: list[tuple[Kill, Moment, float]] = []
        # what a server was not told while it was away, the next start of the finished run tells it
        undelivered = outcome.setting == "server"
        process = self._started(runfile, journal)
        outcome.starts, started = 1, time.time()
        seen = 0
        while True:
            code = process.poll()
            moments = read_journal(journal)
            for moment in moments[seen:]:
                while waiting and order.get(moment.place, -1) > waiting[0].at:
                    waiting.pop(0)  # the step did not come
                if waiting and moment.place == waiting[0].place and code is None:
                    strike = waiting.pop(0)
                    time.sleep(max(0.0, moment.began + strike.delay_s - time.time()))
                    family = _family(process.pid)
                    if self._kill(strike.target, process, random.Random(strike.delay_s)):
                        # where it struck, which under load is not always where it was to strike
                        hit = read_journal(journal)[-1]
                        made.append((Kill(outcome.setting, strike.target, hit.step, False, 0.0), hit, time.time()))
                        self._log(f"  {strike.target} in {hit.step} of round {hit.round}")
                    if strike.target == "driver":
                        process.wait()
                        outcome.left_behind += self._left(family)
            seen = len(moments)
            code = process.poll()
            if code is not None:
                if code == 0 and not undelivered:
                    break
                if code == 0:
                    undelivered = False
                elif made and made[-1][2] > started:
                    made[-1] = (replace(made[-1][0], again=True), *made[-1][1:])
                else:
                    self._log(f"  ended by itself ({code}): see {runfile.with_suffix('.log')}")
                    outcome.by_itself += 1
                if self._server is not None and outcome.setting == "server":
                    self._server.mend()
                if outcome.starts > len(strikes) + 3:
                    outcome.different.append(f"does not come to its end; see {runfile.with_suffix('.log')}")
                    break
                process = self._started(runfile, journal)
                outcome.starts, started = outcome.starts + 1, time.time()
            elif time.time() - started > PATIENCE_S:
                family = _family(process.pid)
                process.kill()
                process.wait()
                _end(family)
                outcome.different.append("hangs")
                break
            time.sleep(0.005)
        now = time.time()
        moments = read_journal(journal)
        for kill, hit, at in made:
            beyond = order.get(hit.place, len(undisturbed))
            later = (m.began for m in moments if m.began > at and order.get(m.place, -1) > beyond)
            length = lengths[beyond] if beyond < len(lengths) else 0.0
            outcome.kills.append(replace(kill, lost_s=max(0.0, next(later, now) - hit.began - length)))

    def _kill(self, target: Target, process: subprocess.Popen[bytes], draw: random.Random) -> bool:
        """Whether there was something to kill."""
        if target == "driver":
            process.kill()
            return True
        if target == "node":
            assert self._nodes is not None
            self._nodes.ask("kill")
            return True
        if target == "MLflow server":
            assert self._server is not None
            self._server.mend()
            self._server.kill()
            self._server.come_back(draw.uniform(*_AWAY_S))
            return True
        # one that was lost just now may still be on its way back
        deadline = time.monotonic() + _COMING_BACK_S
        while process.poll() is None and time.monotonic() < deadline:
            found = []
            for one in _family(process.pid):
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    if one.cmdline()[0].startswith(PROCESS[target]):
                        found.append(one)
            if found:
                return _end([draw.choice(found)]) == 1
            time.sleep(0.02)
        return False

    def _left(self, family: Sequence[psutil.Process]) -> int:
        """How many processes of a killed driver do not go by themselves; they are ended here."""
        _, alive = psutil.wait_procs(family, timeout=30)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._log(f"  left behind: {' '.join(process.cmdline())[:200]} ({process.status()})")
        return _end(alive)


# -- comparing ---------------------------------------------------------------------------------------------


def differences(run: Path, expected: Path) -> list[str]:
    """In what a run's results are not those of the other, bit for bit."""
    found = []
    if not (run / "summary.json").exists():
        return ["no summary"]
    ids = [pq.read_table(folder / "removed.parquet")["sample_id"].to_pylist() for folder in (run, expected)]
    if ids[0] != ids[1]:
        found.append("removed ids")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run, expected)]
    if weights[0] != weights[1]:
        found.append("weights")
    for path in sorted(expected.glob("rounds/*/scores.parquet")):
        own = run / path.relative_to(expected)
        if not own.exists() or own.read_bytes() != path.read_bytes():
            found.append(f"scores of round {path.parent.name}")
    names = [sorted(p.parent.name for p in folder.glob("rounds/*/round.json")) for folder in (run, expected)]
    if names[0] != names[1]:
        found.append("committed rounds")
    found += [f"{path.relative_to(run)} left behind" for path in run.rglob("*.tmp")]
    found += [f"{path.relative_to(run)} left behind" for path in run.glob("rounds/*/scoring")]
    return found


def misplaced(run: Path) -> int:
    """Training samples that are not in exactly one of kept, removed and quarantined."""
    try:
        manifest = pq.read_table(run / "manifest.parquet")["sample_id"].to_pylist()
        quarantined = pq.read_table(run / "quarantine.parquet").to_pylist()
        removed = pq.read_table(run / "removed.parquet")["sample_id"].to_pylist()
        images = [
            i for p in sorted((run / "cleaned").glob("part-*.parquet")) for i in pq.read_table(p)["id"].to_pylist()
        ]
    except FileNotFoundError:
        return SAMPLES
    places = Counter([*manifest, *removed, *(row["sample_id"] for row in quarantined if row["split"] == "train")])
    doubled = sum(count - 1 for count in places.values())
    return doubled + abs(SAMPLES - len(places)) + sum((Counter(images) - Counter(manifest)).values())


def tracked(run: Path, database: Path) -> list[str]:
    """In what MLflow's database does not hold one run per round, at its end, beneath one parent."""
    if not (run / "tracking.json").exists():
        return ["not in MLflow"]
    with contextlib.closing(sqlite3.connect(database)) as connection:
        runs = {key: rest for key, *rest in connection.execute("SELECT run_uuid, name, status FROM runs")}
        tags = connection.execute("SELECT run_uuid, key, value FROM tags").fetchall()
    parents = [key for key, name, value in tags if (name, value) == ("posttrain.run", str(run))]
    own = json.loads((run / "tracking.json").read_text())["run_id"]
    beneath = [runs[key] for key, name, value in tags if (name, value) == ("mlflow.parentRunId", own)]
    names = sorted(name for name, _ in beneath)
    expected = [f"round {path.parent.name}" for path in sorted(run.glob("rounds/*/round.json"))]
    found = [] if names == expected else [f"MLflow holds {names}"]
    found += [f"{name} is {status}" for name, status in (*beneath, runs[own]) if status != "FINISHED"]
    if parents != [own]:
        found.append(f"{len(parents)} parents in MLflow")
    return found


# -- the report --------------------------------------------------------------------------------------------


def report(outcomes: Sequence[Outcome], command: str, remark: str) -> str:
    """The tables in Markdown."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    rows = []
    for target in dict.fromkeys(kill.target for kill in kills):
        mine = [kill for kill in kills if kill.target == target]
        rows.append(
            [
                target,
                str(len(mine)),
                str(sum(not kill.again for kill in mine)),
                str(sum(kill.again for kill in mine)),
                f"{statistics.median(kill.lost_s for kill in mine):.1f}",
                f"{max(kill.lost_s for kill in mine):.1f}",
            ]
        )
    targets = list(dict.fromkeys(kill.target for kill in kills))
    steps = sorted({kill.step for kill in kills})
    by_step = [
        [step, *(str(sum(k.step == step and k.target == target for k in kills) or "") for target in targets)]
        for step in steps
    ]
    by_setting = [
        [
            setting,
            str(len(mine)),
            str(sum(len(outcome.kills) for outcome in mine)),
            str(sum(outcome.starts for outcome in mine)),
        ]
        for setting in dict.fromkeys(outcome.setting for outcome in outcomes)
        if (mine := [outcome for outcome in outcomes if outcome.setting == setting])
    ]
    wrong = [
        f"- {outcome.setting}-{outcome.seed}: {'; '.join(outcome.different)}"
        for outcome in outcomes
        if outcome.different
    ]
    return document(
        [
            [
                "# Faults",
                "",
                f"`{command}`; {hardware()}",
                *([remark] if remark else []),
                "",
                f"{len(kills)} kills in {len(outcomes)} runs of `posttrain clean` on the digits, which took "
                f"{sum(outcome.starts for outcome in outcomes)} starts of the command.",
                "",
                f"- samples lost or doubled: **{sum(outcome.lost for outcome in outcomes)}**",
                f"- runs whose removed ids, scores, weights or MLflow runs differ from those of an undisturbed run: "
                f"**{len(wrong)}**",
                f"- processes that a killed driver left behind: {sum(outcome.left_behind for outcome in outcomes)}",
                f"- starts that ended though nothing had been killed: {sum(outcome.by_itself for outcome in outcomes)}",
                *wrong,
            ],
            [
                "*Went on*: without a start by hand. *Seconds lost*: how much later than undisturbed the next step",
                "began, the start of the program included where it had to be started again; behind a killed driver its",
                "processes are waited for first, half a minute at most, which counts as well.",
                "",
                *markdown(["killed", "kills", "went on", "started again", "lost s, median", "worst"], rows),
            ],
            [
                "*head*: `refine.scope: head`, two workers; *workers*: the same, and only workers are killed;",
                "*network*: `refine.scope: network` by one worker of Ray Train; *cluster*: three nodes of one CPU",
                "each, of which a lost one comes back only for the next run; *server*: an MLflow server, back after",
                f"{_AWAY_S[0]:.0f} to {_AWAY_S[1]:.0f} s; the finished run is started once more, to tell it the rest.",
                "",
                *markdown(["setting", "runs", "kills", "starts"], by_setting),
            ],
            ["Kills by step:", "", *markdown(["step", *targets], by_step)],
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="what is finished stays there")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "faults.md")
    parser.add_argument("--remark", default="", help="a line for the report, such as what else ran on the machine")
    parser.add_argument("--child", nargs=2, metavar=("RUNFILE", "JOURNAL"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        watched(options.child[0], Path(options.child[1]))
        return
    arena = Arena(options.folder.absolute(), lambda text: print(text, flush=True))
    kept = arena.folder / f"outcomes-{options.seed}.json"
    outcomes = []
    for raw in json.loads(kept.read_text()) if kept.exists() else []:
        raw["kills"] = [Kill(**kill) for kill in raw["kills"]]
        outcomes.append(Outcome(**raw))
    # most in the settings in which a run carries most kills
    turn: tuple[Setting, ...] = ("head", "workers", "network", "head", "cluster", "server", "network")
    order = [setting for setting in turn if setting in options.settings]
    command = f"python -m harness.faults --kills {options.kills} --seed {options.seed}"
    try:
        while sum(len(outcome.kills) for outcome in outcomes) < options.kills:
            number = len(outcomes)
            setting: Any = order[number % len(order)]
            print(f"run {number} ({setting})", flush=True)
            outcomes.append(arena.struck(setting, 1000 * options.seed + number))
            kept.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
            options.output.write_text(report(outcomes, command, options.remark))
    finally:
        arena.close()
    print(report(outcomes, command, options.remark))


if __name__ == "__main__":
    main()
