"""Is anything lost when processes are killed? Real runs, struck at random moments, beside runs that nothing disturbed.

`PYTHONPATH=tests python -m harness.faults --kills 100 --seed 0` starts `posttrain clean` on the digits in a process of
its own, again and again, and kills at seeded moments in its steps: the driver, a worker that embeds or scores, a worker
of Ray Train, a node of a local cluster of three, the MLflow server. What ended is started again, as a user would. Each
result has to be that of an undisturbed run: the same removed ids, scores and weights bit for bit, every sample in
exactly one place, one MLflow run per round, and no process left behind. The table is written after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from harness import RESULTS
from harness.comparison import differences, misplaced, tracked
from harness.surroundings import Nodes, Server, end, environment, family
from pipelines.benchmarks.hardware import hardware

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
                end([*family(process.pid), psutil.Process(process.pid)])
                code = f"none within {PATIENCE_S:.0f} s"
            if code != 0:
                raise RuntimeError(f"the undisturbed run failed (exit code {code}); see {self.folder / name}.log")
            ended.write_text(str(time.time()))
        return self.folder / name, read_journal(journal), float(ended.read_text())

    def struck(self, setting: Setting, seed: int, kills: int | None = None) -> Outcome:
        """A run with the kills of this seed, and how its result compares; `kills` as `plan` takes it."""
        beside = "network" if setting == "network" else "head"
        expected, moments, ended = self.undisturbed(beside)
        strikes = plan(moments, ended, setting, random.Random(f"{setting} {seed}"), kills)
        name = f"{setting}-{seed}"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        journal = self.folder / f"{name}.journal"
        journal.unlink(missing_ok=True)
        outcome = Outcome(setting, seed)
        self._strike(self.runfile(name, setting), journal, strikes, moments, outcome)
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
        self, runfile: Path, journal: Path, strikes: Sequence[Strike], undisturbed: Sequence[Moment], outcome: Outcome
    ) -> None:
        """Start the command, make the kills, and start it again until it has come to its end."""
        waiting, seen, killed_at = list(strikes), 0, 0.0
        order = {moment.place: at for at, moment in reversed(list(enumerate(undisturbed)))}
        # what a server was not told while it was away, the next start of the finished run tells it
        undelivered = outcome.setting == "server"
        process, started = self._started(runfile, journal), time.time()
        outcome.starts = 1
        while True:
            for moment in read_journal(journal)[seen:]:
                seen += 1
                while waiting and order.get(moment.place, -1) > waiting[0].at:
                    waiting.pop(0)  # the step did not come
                due = waiting and moment.place == waiting[0].place and process.poll() is None
                if due and self._carry_out(waiting.pop(0), moment, process, journal, outcome):
                    killed_at = time.time()
            code = process.poll()
            if code == 0 and not undelivered:
                return
            if code is not None:
                if code == 0:
                    undelivered = False
                elif killed_at > started:
                    outcome.kills[-1] = replace(outcome.kills[-1], again=True)
                else:
                    self._log(f"  ended by itself ({code}): see {runfile.with_suffix('.log')}")
                    outcome.by_itself += 1
                if outcome.starts > len(strikes) + 3:
                    outcome.different.append(f"does not come to its end; see {runfile.with_suffix('.log')}")
                    return
                if self._server is not None and outcome.setting == "server":
                    self._server.mend()
                process, started = self._started(runfile, journal), time.time()
                outcome.starts += 1
            elif time.time() - started > PATIENCE_S:
                end([*family(process.pid), psutil.Process(process.pid)])
                process.wait()
                outcome.different.append("hangs")
                return
            time.sleep(0.005)

    def _carry_out(
        self, strike: Strike, moment: Moment, process: subprocess.Popen[bytes], journal: Path, outcome: Outcome
    ) -> bool:
        """Whether there was something to kill, at the planned time of the step that has just begun."""
        time.sleep(max(0.0, moment.began + strike.delay_s - time.time()))
        children = family(process.pid)
        killed = self._kill(strike.target, process, random.Random(strike.delay_s))
        if killed:
            # where it struck, which under load is not always where it was to strike
            hit = read_journal(journal)[-1]
            outcome.kills.append(Kill(outcome.setting, strike.target, hit.step, again=False))
            self._log(f"  {strike.target} in {hit.step} of round {hit.round}")
        if strike.target == "driver":
            process.wait()
            outcome.left_behind += self._left(children)
        return killed

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
            for one in family(process.pid):
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    if one.cmdline()[0].startswith(PROCESS[target]):
                        found.append(one)
            if found:
                return end([draw.choice(found)]) == 1
            time.sleep(0.02)
        return False

    def _left(self, family: Sequence[psutil.Process]) -> int:
        """How many processes of a killed driver do not go by themselves; they are ended here."""
        _, alive = psutil.wait_procs(family, timeout=30)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._log(f"  left behind: {' '.join(process.cmdline())[:200]} ({process.status()})")
        return end(alive)


# -- the table ---------------------------------------------------------------------------------------------

_HEAD = """\
# Faults

`PYTHONPATH=tests python -m harness.faults --kills {asked} --seed {seed}`; {hardware}

{kills} kills in {runs} runs of `posttrain clean` on the digits, which took {starts} starts of the command.

- samples lost or doubled: **{lost}**
- runs whose removed ids, scores, weights or MLflow runs differ from those of an undisturbed run: **{different}**
- processes that a killed driver left behind: {left_behind}
- starts that ended though nothing had been killed: {by_itself}

By step; of what was killed, the first line says how often the command had to be started again.

"""


def table(outcomes: Sequence[Outcome], asked: int, seed: int) -> str:
    """What was killed in which step, and what was lost, in Markdown."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    text = _HEAD.format(
        asked=asked,
        seed=seed,
        hardware=hardware(),
        kills=len(kills),
        runs=len(outcomes),
        starts=sum(outcome.starts for outcome in outcomes),
        lost=sum(outcome.lost for outcome in outcomes),
        different=sum(bool(outcome.different) for outcome in outcomes),
        left_behind=sum(outcome.left_behind for outcome in outcomes),
        by_itself=sum(outcome.by_itself for outcome in outcomes),
    )
    targets = list(dict.fromkeys(kill.target for kill in kills))
    counts = Counter((kill.step, kill.target) for kill in kills)
    again = Counter(kill.target for kill in kills if kill.again)
    rows: list[list[object]] = [["step", *targets], ["---"] * (1 + len(targets))]
    rows.append(["started again", *(again[target] for target in targets)])
    for step in sorted({kill.step for kill in kills}):
        rows.append([step, *(counts[step, target] or "" for target in targets)])
    return text + "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="what is finished stays there")
    parser.add_argument("--output", type=Path, default=RESULTS / "faults.md")
    parser.add_argument("--child", nargs=2, metavar=("RUNFILE", "JOURNAL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        watched(options.child[0], Path(options.child[1]))
        return
    arena = Arena(options.folder.absolute(), lambda text: print(text, flush=True))
    # most in the settings in which a run carries most kills
    turn: tuple[Setting, ...] = ("head", "workers", "network", "head", "cluster", "server", "network")
    order: list[Setting] = [setting for setting in turn if setting in options.settings]
    outcomes: list[Outcome] = []
    try:
        while (made := sum(len(outcome.kills) for outcome in outcomes)) < options.kills:
            number = len(outcomes)
            setting: Setting = order[number % len(order)]
            print(f"run {number} ({setting})", flush=True)
            kept = arena.folder / f"{setting}-{options.seed}-{number}.json"
            if kept.exists():
                raw = json.loads(kept.read_text())
                outcomes.append(Outcome(**{**raw, "kills": [Kill(**kill) for kill in raw["kills"]]}))
                continue
            kills = min(AT_ONCE[setting], options.kills - made)
            outcomes.append(arena.struck(setting, 1000 * options.seed + number, kills))
            kept.write_text(json.dumps(asdict(outcomes[-1])))
            options.output.write_text(table(outcomes, options.kills, options.seed))
    finally:
        arena.close()
    print(table(outcomes, options.kills, options.seed))
    if wrong := [f"{one.setting}-{one.seed}: {'; '.join(one.different)}" for one in outcomes if one.different]:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
