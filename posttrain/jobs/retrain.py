"""`posttrain retrain`: one start of a job that keeps a model up to date, and `posttrain rollback`.

Read from top to bottom: what is new? If anything is: take the lock, clean everything from the champion's network on
with what former runs found out, compare the result with the champion, and promote it, leave it, or raise the alarm.
Whatever is done twice, after an interruption, ends as if it had been done once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from posttrain import rounds
from posttrain.config import Data, JobFile, Model, RunFile, without_credentials
from posttrain.data import listing
from posttrain.data.listing import File
from posttrain.errors import ConfigError, DataError, InputError, ModelError, StepError, TrackingError
from posttrain.jobs import gate
from posttrain.jobs.job_folder import Base, JobFolder, State, listing_digest
from posttrain.report.progress import StepLog
from posttrain.report.visible import visible
from posttrain.store import lock
from posttrain.store.folder import RunFolder, resolve
from posttrain.store.ledger import Ledger, settings
from posttrain.store.lock import Lock

if TYPE_CHECKING:
    from posttrain.cluster.workers import Network
    from posttrain.runs.boundary import Live
    from posttrain.runs.inputs import Inputs
    from posttrain.runs.steps import Before, CleaningRun
    from posttrain.store.registry import Registry, Version

EXIT_CODES = {"promoted": 0, "nothing new": 0, "not promoted": 10, "alarm": 11}

_FEATURES_KEPT = 2
"""Runs whose features are kept at least, the latest; besides, those of the champion and of the version before."""

_PARENT, _BASE, _FOLDER = "posttrain.parent", "posttrain.base", "posttrain.folder"


def retrain(config: JobFile, *, accept: bool = False, verbose: bool = False, quiet: bool = False) -> dict[str, Any]:
    """What became of this start of the job, with its exit code. Raises PosttrainError.

    `accept`: let the files in that are held back. Progress goes to standard error, the outcome to standard output
    unless `quiet`.
    """
    with _outages_are_failures():
        return _retrained(config, accept=accept, verbose=verbose, quiet=quiet)


@contextmanager
def _outages_are_failures() -> Iterator[None]:
    """What is not the user's to mend fails as such (1): a scheduler tries that again, but no wrong input (2)."""
    try:
        yield
    except TrackingError as error:
        raise StepError(f"{error}; start the same command again") from error


def _retrained(config: JobFile, *, accept: bool, verbose: bool, quiet: bool) -> dict[str, Any]:
    began = time.perf_counter()
    progress = StepLog(Console(stderr=True))
    job = _job(config)
    stock = _stock(config, job)
    if stock.new or (accept and stock.state.held_back) or job.folder.exists(_intent(job)):
        with lock.job_lock(job.folder, lease_s=config.job.lock_lease_s, wait_s=config.job.lock_wait_s) as held:
            summary = _with_the_lease(config, job, held, progress, accept=accept, verbose=verbose)
    else:
        summary = _nothing_new(config, stock)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    if not quiet:
        _print(summary)
    return summary


def _with_the_lease(
    config: JobFile, job: JobFolder, held: Lock, progress: StepLog, *, accept: bool, verbose: bool
) -> dict[str, Any]:
    # again: another start of the job may just have done it
    state = job.state()
    if accept and state.held_back:
        # kept: killed and started again without --accept, the job goes on
        state = replace(state, held_back=(), accepted=tuple(sorted({*state.accepted, *state.held_back})))
        held.assert_held()
        job.write_state(state)
    if job.folder.exists(_intent(job)):
        progress.say("a rollback was begun and not ended: carrying it out")
        _complete_rollback(job, _registry(config, job), held)
    stock = _stock(config, job)
    if not stock.new:
        return _nothing_new(config, stock)
    if not any(file.split == "train" for file in stock.files):
        raise DataError(
            f"all {len(stock.held_back)} training files are held back since an alarm; correct them, or let them in by "
            "--accept"
        )
    registry = _registry(config, job)
    attempt = _attempt(config, job, registry, stock)
    path = attempt.folder.path("decision.json")
    if attempt.folder.exists(path):
        progress.say(f"{attempt.folder.location}: decided already; going on from there")
    else:
        progress.say(_what_is_new(stock))
        # a start that was killed may have left no more than half a file
        job.folder.clear_half_written()
        record = _made(config, job, registry, stock, attempt, held, progress, verbose=verbose)
        held.assert_held()
        attempt.folder.write_json(path, record)
    return _concluded(config, job, registry, stock, attempt, held)


# what is there --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stock:
    """The files of the data set as they are now, and what the job knows of them."""

    state: State
    files: list[File]
    """Those that take part."""
    new: list[File]
    """Of these, those that are new or others than before, or let in by the user."""
    held_back: list[File]
    judged: list[File]
    """The new training files, which may raise an alarm: all but those that the user let in."""
    excused: list[File]
    """Other training files that no champion was made with: let in by the user, or of runs that were not promoted."""
    gone: int
    """Files that the last run still saw."""
    seen: dict[tuple[str, str], File]


def _job(config: JobFile) -> JobFolder:
    folder = RunFolder(config.run.path)
    if not folder.is_local and config.tracking.uri is None:
        raise ConfigError(
            f"run.path = {config.run.path} is not on this machine, and SQLite cannot live there: "
            "set tracking.uri to an MLflow server"
        )
    folder.refuse_unwritable()
    job = JobFolder(folder)
    job.refuse_a_run()
    return job


def _stock(config: JobFile, job: JobFolder) -> _Stock:
    """From names, sizes and times alone: no file is opened, and nothing heavy imported."""
    state = job.state()
    seen = job.seen(state)
    now, local = _files(config.data)
    changed = {(file.split, file.path) for file in listing.changed(now, seen, local=local)}
    waiting = {("train", path) for path in state.held_back} - changed
    let_in = {("train", path) for path in state.accepted} - waiting
    excused = (let_in | {("train", path) for path in state.unused}) - changed - waiting
    return _Stock(
        state,
        [file for file in now if (file.split, file.path) not in waiting],
        [file for file in now if (file.split, file.path) in changed | let_in],
        [file for file in now if (file.split, file.path) in waiting],
        [file for file in now if file.split == "train" and (file.split, file.path) in changed],
        [file for file in now if (file.split, file.path) in excused],
        len(seen.keys() - {(file.split, file.path) for file in now}),
        seen,
    )


def _files(data: Data) -> tuple[list[File], bool]:
    """All files of the data set, and whether they lie on this machine's disks."""
    if data.source not in ("parquet", "folder"):
        # embedded or downloaded once: it never changes
        return [File("train", data.name or data.source, 0, 0)], False
    locations: dict[str, tuple[str, ...]] = {}
    for split in ("train", "validation", "test"):
        if (given := getattr(data, split)) is not None:
            locations[split] = (given,) if isinstance(given, str) else tuple(given)
    from pyarrow import fs

    local = all(isinstance(resolve(place)[0], fs.LocalFileSystem) for given in locations.values() for place in given)
    return listing.list_files(data.source, locations), local


def _what_is_new(stock: _Stock) -> str:
    parts = []
    for split in ("train", "validation", "test"):
        of_split = [file for file in stock.new if file.split == split]
        if of_split:
            name = "training" if split == "train" else split
            parts.append(f"{len(of_split):,} {name} {'file' if len(of_split) == 1 else 'files'}")
    held = f"; {len(stock.held_back):,} held back" if stock.held_back else ""
    gone = f"; {stock.gone:,} gone" if stock.gone else ""
    return f"new or changed: {', '.join(parts)}{held}{gone}"


def _nothing_new(config: JobFile, stock: _Stock) -> dict[str, Any]:
    held = len(stock.held_back)
    total = len(stock.files) + held
    reason = f"none of the {total:,} files is" if total > 1 else "the one file is not"
    reason += " new or changed since the last run"
    if held:
        reason += f"; {held:,} {'is' if held == 1 else 'are'} held back since an alarm (posttrain retrain --accept)"
    if stock.gone:
        reason += f"; {stock.gone:,} {'is' if stock.gone == 1 else 'are'} gone, and the next run does without"
    return _summary(config, "nothing new", reason, stock.state)


# one run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attempt:
    """A run of the job: named by what decides its result, so that the same start again goes on in its folder."""

    name: str
    folder: RunFolder
    champion: Version | None
    """Which it is compared with."""


def _registry(config: JobFile, job: JobFolder) -> Registry:
    from posttrain.store.registry import Registry, is_unused

    local = job.folder.local if job.folder.is_local else Path(".")
    if config.tracking.uri is None and not job.state().runs and is_unused(local / "mlflow.db"):
        # a job that was killed while MLflow made its tables: half of them cannot be gone on with
        for left in local.glob("mlflow.db*"):
            left.unlink()
    return Registry.open(config.tracking.uri, home=local, name=config.job.name)


def _attempt(config: JobFile, job: JobFolder, registry: Registry, stock: _Stock) -> _Attempt:
    from posttrain.store.registry import CHAMPION, RUN

    new = sorted(f"{file.split}\t{file.path}" for file in stock.new)
    judged = sorted(file.path for file in stock.judged)
    digest = listing_digest(stock.files, new, judged, _deciding(config))
    champion = registry.version(CHAMPION)
    if champion is not None and champion.tags.get(RUN, "").startswith(f"{digest}-"):
        # it was promoted by this very run, which was killed before it could say so
        parent = champion.tags.get(_PARENT)
        champion = registry.by_number(parent) if parent else None
    elif champion is None and stock.state.champion is not None:
        raise InputError(
            f"the job's champion was version {stock.state.champion}, but {registry.name} in the registry at "
            f"{without_credentials(registry.uri)} has no version with the alias {CHAMPION}: give one that alias, or "
            "correct job.name or tracking.uri, or begin a job of its own in a new folder"
        )
    name = f"{digest}-v{champion.number if champion else 0}"
    return _Attempt(name, job.run(name), champion)


def _deciding(config: JobFile) -> dict[str, Any]:
    """The settings that decide the result of a run."""
    record = settings(config)
    return {
        **{section: record[section] for section in ("data", "model", "pretrain", "probe", "removal", "refine", "gate")},
        "seed": record["run"]["seed"],
        "precision": record["ray"].get("precision"),
    }


def _made(
    config: JobFile,
    job: JobFolder,
    registry: Registry,
    stock: _Stock,
    attempt: _Attempt,
    held: Lock,
    progress: StepLog,
    *,
    verbose: bool,
) -> dict[str, Any]:
    """The run itself: the challenger, measured beside the champion, and what is decided; written nowhere yet."""
    import pyarrow as pa

    from posttrain.cluster import matching
    from posttrain.runs import clean

    began = time.perf_counter()
    with progress.step("check the inputs"):
        base = _base(config, job, registry, attempt.champion)
        run_config = _run_config(config, attempt, base)
        inputs = _inputs(run_config, stock, base)
    clean.tell_remarks(inputs, progress)
    with ExitStack() as stack:
        address = clean.join_ray(run_config, progress, stack, verbose=verbose)
        from posttrain.runs import leakage
        from posttrain.runs.steps import CleaningRun
        from posttrain.runs.steps import recipe as recipe_of

        splits, fingerprint = clean.read(run_config, inputs, progress)
        ledger = Ledger(attempt.folder)
        leaks = leakage.find(run_config, splits, inputs.spec.image.shape, fingerprint, ledger, progress)
        clean.claim(ledger, run_config, fingerprint)
        workers, train_workers = clean.crew(run_config, on_cluster=address is not None)
        if not train_workers:
            workers.start()
        with progress.step("open MLflow"):
            tracking = stack.enter_context(clean.open_tracking(run_config, attempt.folder, home=job.folder))
            clean.log_data(tracking, run_config, inputs, fingerprint)
        run = CleaningRun(run_config, inputs, splits, attempt.folder, workers, train_workers, tracking, progress)
        run.assert_held = held.assert_held
        run.leave_out(leaks)
        earlier, before = _earlier(job, attempt, run, fingerprint)
        run.take_over(earlier, [job.run(name) for name in reversed(stock.state.runs)], before)
        state = clean.begun(run) or run.begin(clean.first_model(run))
        champion = _champion_by_class(run, registry, attempt)
        limits = rounds.Limits(config.removal.max_rounds, config.removal.min_share, config.removal.patience)
        outcome = rounds.clean(state, run.as_steps(), limits)
        progress.say(f"stopped: {outcome.reason}")
        outcome = run.concluded(outcome)
        summary = clean.finish(run, outcome, began)
        with progress.step("compare"):
            challenger = gate.HeldOut(*run.by_class(outcome.state.model))
            arrivals = _arrivals(config, stock.judged, run)
            excused = gate.together(_arrivals(config, stock.excused, run).values())
        judged = gate.together(arrivals.values())
        taken_now = sum(done.removed + done.relabelled for done in outcome.state.history)
        # without a champion nothing has been cleaned yet
        older = gate.Arrivals(
            outcome.state.history[0].live - judged.samples - excused.samples if champion else 0,
            0,
            taken_now - judged.taken - excused.taken,
        )
        decision = gate.decide(
            champion, challenger, arrivals, older, classes=inputs.classes, **config.gate.model_dump()
        )
        embedded = _embedded(run)
        for line in _embedded_in_words(embedded):
            progress.say(line)
        next_base = run.base_of(outcome.state)
        held.assert_held()
        with progress.step("keep"):
            job.keep_base(Base(next_base.key, recipe_of(next_base.spec), inputs.classes, next_base.weights))
            support = pa.concat_tables([before.support, run.ledger.support(outcome.state.history)])
            taken = matching.taken_out(run.splits["train"], _all_removed(run), run.relabelled, support)
            attempt.folder.write_table(attempt.folder.path("taken.parquet"), taken)
        model_uri = None
        if decision.verdict != "alarm":
            held.assert_held()
            with progress.step("log the model"):
                model_uri = _logged(run, outcome.state.model)
        record = {
            "verdict": decision.verdict,
            "reason": decision.reason,
            "model": model_uri,
            "mlflow_run": tracking.run_id,
            "base": next_base.key,
            "parent": attempt.champion.number if attempt.champion else None,
            "data": fingerprint,
            "champion": asdict(champion) if champion else None,
            "challenger": asdict(challenger),
            "measured_on": "test" if "test" in splits else "validation",
            "arrivals": asdict(judged),
            "alarming": decision.alarming,
            "embedded": embedded,
            "held_out_noise": outcome.state.history[-1].metrics.get("held_out_noise", before.held_out_rate),
            "taken": taken.num_rows,
            "removed_earlier": sum(len(rows) for rows in run.earlier.excluded.values()),
            **{key: summary[key] for key in ("rounds", "live", "removed", "relabelled", "quarantined")},
        }
        tracking.log_metrics(_metrics(record))
    return record


def _base(config: JobFile, job: JobFolder, registry: Registry, champion: Version | None) -> Base | None:
    """The network that the champion's features come from; the champion itself where that is not known."""
    if champion is None:
        return None
    if (key := champion.tags.get(_BASE)) and (known := job.base(key)):
        return known
    with tempfile.TemporaryDirectory() as folder:
        weights, recipe = registry.fetch(champion, Path(folder))
        recipe = known_recipe(recipe, config.model, f"version {champion.number} of {config.job.name}")
        return Base(f"version {champion.number}", recipe or {}, None, weights.read_bytes(), weights.suffix)


def known_recipe(recipe: dict[str, Any] | None, model: Model, where: str) -> dict[str, Any] | None:
    """The recipe of a registered model, if it builds what the job file names, or a network of torchvision.

    Whoever may write to the registry could name any function there, and it would be called. Raises ModelError.
    """
    if recipe is None:
        return None
    named, known = _network(recipe["factory"], recipe["arguments"]), _network(model.factory, model.arguments)
    if named != known and (not isinstance(named, str) or ":" in named):
        raise ModelError(
            f"{where} is to be built by {named!r}, and model.factory is {known!r}: set model.factory to it if you "
            "trust it, or begin a job of its own in a new folder"
        )
    return recipe


def _network(factory: object, arguments: object) -> object:
    """The factory of the network itself, also where a probe was put on it."""
    from posttrain.vision.layers import FACTORY

    return arguments.get("network") if factory == FACTORY and isinstance(arguments, dict) else factory


def _run_config(config: JobFile, attempt: _Attempt, base: Base | None) -> RunFile:
    own: dict[str, Any] = {
        "run": config.run.model_copy(update={"path": attempt.folder.location}),
        # what pre-training would hand down is settled by the job file, not by what the run starts from
        "refine": config.refining,
        "tracking": config.tracking.model_copy(update={"log_model": False}),
    }
    if base is not None:
        recipe = {key: base.recipe[key] for key in ("factory", "arguments", "head") if key in base.recipe}
        own["model"] = config.model.model_copy(update={**recipe, "weights": None})
        if config.data.classes is None and base.classes is not None:
            # the classes stay what they were, whatever labels the files of today hold
            own["data"] = config.data.model_copy(update={"classes": base.classes})
    return config.run_file(**own)


def _inputs(config: RunFile, stock: _Stock, base: Base | None) -> Inputs:
    from posttrain.runs.inputs import prepare
    from posttrain.vision import models

    only: dict[str, set[str]] = {}
    for file in stock.files:
        only.setdefault(file.split, set()).add(file.path)
    inputs = prepare(config, only={split: frozenset(paths) for split, paths in only.items()})
    if base is None:
        return inputs
    if base.classes is None and "validation" not in inputs.sources:
        raise DataError(
            f"the champion ({base.key}) was not made by this job, and the data have no validation set that it has not "
            "seen; set data.validation (sources parquet and folder)"
        )
    if base.classes is not None and base.classes != inputs.classes:
        raise DataError(
            f"the champion tells {len(base.classes)} classes apart ({', '.join(base.classes[:5])}, ...), and the data "
            f"have {len(inputs.classes)} ({', '.join(inputs.classes[:5])}, ...): correct data.classes, or begin a job "
            "of its own in a new folder"
        )
    model = models.build(inputs.spec.factory, classes=inputs.spec.classes, arguments=inputs.spec.arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"base{base.suffix}")
        path.write_bytes(base.weights)
        models.load_weights(model, path)
    return replace(inputs, weights=models.to_bytes(model))


def _earlier(job: JobFolder, attempt: _Attempt, run: CleaningRun, fingerprint: dict[str, str]) -> tuple[Live, Before]:
    """What the champion's run, and those before it, took out, as far as it is still what it was; what they knew."""
    from posttrain.cluster import matching
    from posttrain.runs.boundary import Live
    from posttrain.runs.steps import Before
    from posttrain.schema import NO_SUPPORT

    nothing = Live({}, {}), Before(NO_SUPPORT, 0.0)
    name = attempt.champion.tags.get("posttrain.run") if attempt.champion else None
    if name is None:
        return nothing
    folder = job.run(name)
    path = folder.path("taken.parquet")
    if not folder.exists(path):
        run.progress.say(f"  {path} is gone: what the champion's runs removed takes part again")
        return nothing
    known = matching.found_again(run.splits["train"], folder.read_table(path))
    decided = folder.read_json(folder.path("decision.json"))
    same_held_out = decided["data"].get("validation") == fingerprint["validation"]
    rate = decided["held_out_noise"] if same_held_out else 0.0
    return Live(known.removed, known.relabelled), Before(known.support, rate)


def _champion_by_class(run: CleaningRun, registry: Registry, attempt: _Attempt) -> gate.HeldOut | None:
    """The champion on the held-out set; measured once, while the features of its base are there."""
    if attempt.champion is None:
        return None
    path = run.folder.path("champion.json")
    if not run.folder.exists(path):
        with run.progress.step("champion"):
            samples, correct = run.by_class(_champion(run, registry, attempt.champion), on=run.first)
        run.folder.write_json(path, {"samples": samples, "correct": correct})
    record = run.folder.read_json(path)
    return gate.HeldOut(tuple(record["samples"]), tuple(record["correct"]))


def _champion(run: CleaningRun, registry: Registry, version: Version) -> Network:
    from posttrain.runs.steps import recipe as recipe_of
    from posttrain.vision import models

    spec = run.inputs.spec
    with tempfile.TemporaryDirectory() as folder:
        weights, recipe = registry.fetch(version, Path(folder))
        recipe = known_recipe(recipe, run.config.model, f"version {version.number} of {registry.name}")
        own = {key: recipe[key] for key in ("factory", "arguments", "head")} if recipe else recipe_of(spec)
        if own != recipe_of(spec):
            spec = replace(spec, **own, layers=(own["head"],))
        model = models.build(spec.factory, classes=spec.classes, arguments=spec.arguments)
        models.load_weights(model, weights)
    return run.network(models.to_bytes(model), spec)


def _all_removed(run: CleaningRun) -> Any:
    from posttrain.schema import merged

    return merged(run.earlier.excluded, run.removed)


def _arrivals(config: JobFile, given: list[File], run: CleaningRun) -> dict[str, gate.Arrivals]:
    """By shipment of these files: how many samples looked wrong by the first round's scores, and were taken out."""
    import numpy as np

    from posttrain.cluster import matching
    from posttrain.schema import PARTITION, ROW, merged

    files = _as_read(config.data, given)
    shipments = _shipments(config.data, files)
    names = sorted(set(shipments))
    place = {name: at for at, name in enumerate(names)}
    # the last entry: of rows from other files, which have the place -1
    number = np.array([*(place[name] for name in shipments), len(names)])
    of_rows = {
        partition: number[at].astype(np.int32)
        for partition, at in matching.files_of_rows(run.splits["train"], files).items()
    }
    for partition, rows in merged(run.quarantined, run.earlier.excluded).items():
        if partition in of_rows:
            of_rows[partition][rows] = len(names)

    def counted(partition: int, rows: np.ndarray) -> np.ndarray:
        found = of_rows[partition][rows] if partition in of_rows else number[:0]
        return np.bincount(found, minlength=len(names) + 1)

    counts = np.zeros((3, len(names) + 1), np.int64)
    for partition, at in of_rows.items():
        counts[0] += counted(partition, np.arange(len(at)))
    for table in run.folder.row_groups(run.folder.round(1, "scores.parquet"), [PARTITION, ROW, "mislabel_odds"]):
        if table.num_rows:
            suspect = table["mislabel_odds"].to_numpy() > config.removal.min_log_odds
            counts[1] += counted(table[PARTITION][0].as_py(), table[ROW].to_numpy()[suspect])
    relabelled = run.ledger.relabelled(run.ledger.rounds())
    for partition, rows in merged(
        run.removed, {partition: rows for partition, (rows, _) in relabelled.items()}
    ).items():
        counts[2] += counted(partition, rows)
    return {name: gate.Arrivals(*map(int, column)) for name, column in zip(names, counts.T[:-1], strict=True)}


def _as_read(data: Data, files: list[File]) -> list[str]:
    """What the samples of these files carry as their file."""
    if data.source == "folder":
        assert isinstance(data.train, str), "inputs.prepare refuses several"
        root = resolve(data.train)[1].strip("/")
        return [file.path.strip("/").removeprefix(f"{root}/") for file in files]
    # tables that come with posttrain, or are downloaded whole, are named by their split
    return [file.path if data.source == "parquet" else f"{file.path}/{file.split}" for file in files]


def _shipments(data: Data, files: list[str]) -> list[str]:
    """By what the files are judged: each by itself, but the images of a class folder together."""
    if data.source != "folder":
        return files
    # a URI may hold a key and its secret
    root = resolve(str(data.train))[1] if "://" in str(data.train) else str(data.train)
    return [f"{root.rstrip('/')}/{file.split('/', 1)[0]}" for file in files]


def _embedded(run: CleaningRun) -> dict[str, dict[str, int]]:
    """By split: images that went through the backbone the run began with, of how many, and through later ones."""
    found = {}
    for split, counts in run.through_backbones().items():
        (new, of), *later = counts.values()
        found[split] = {"new": new, "of": of, "for_new_weights": sum(count for count, _ in later)}
    return found


def _embedded_in_words(embedded: dict[str, dict[str, int]]) -> list[str]:
    lines = []
    for split, count in embedded.items():
        line = f"{split}: embedded {count['new']:,} new of {count['of']:,} images"
        if count["for_new_weights"]:
            line += f", and {count['for_new_weights']:,} for the network's new weights"
        lines.append(line)
    return lines


def _logged(run: CleaningRun, model: Network) -> str | None:
    from posttrain.runs.clean import log_model

    assert run.tracking is not None
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "model.safetensors")
        weights.write_bytes(model.weights)
        return log_model(run.tracking, model, weights)


def _metrics(record: dict[str, Any]) -> dict[str, float | None]:
    champion = record["champion"] and gate.HeldOut(**record["champion"])
    arrivals = gate.Arrivals(**record["arrivals"])
    return {
        "gate_champion_accuracy": champion.accuracy if champion else None,
        "gate_challenger_accuracy": gate.HeldOut(**record["challenger"]).accuracy,
        "gate_new_samples": arrivals.samples,
        "gate_suspect_share": arrivals.suspect,
        **{f"embedded_{split}": sum((c["new"], c["for_new_weights"])) for split, c in record["embedded"].items()},
    }


# making it last ---------------------------------------------------------------------------------------------


def _concluded(
    config: JobFile, job: JobFolder, registry: Registry, stock: _Stock, attempt: _Attempt, held: Lock
) -> dict[str, Any]:
    from posttrain.store.registry import CHALLENGER, CHAMPION, PREVIOUS

    record = attempt.folder.read_json(attempt.folder.path("decision.json"))
    verdict = record["verdict"]
    version = None
    if verdict != "alarm":
        held.assert_held()
        version = registry.register(
            record["model"], run=attempt.name, run_id=record["mlflow_run"], tags=_tags(attempt, record)
        )
        serving = registry.version(CHAMPION)
        known = {attempt.champion.number if attempt.champion else None, version.number}
        if (serving.number if serving else None) not in known:
            raise StepError(
                f"version {serving.number if serving else 'none'} of {registry.name} has become champion while this "
                f"run compared itself with version {attempt.champion.number if attempt.champion else 'none'}; "
                "start the same command again"
            )
        held.assert_held()
        former = registry.version(PREVIOUS)
        if verdict != "promoted":
            registry.point(CHALLENGER, version.number)
        elif former is None or former.number != version.number:
            # else it was promoted before this run was killed, and somebody has rolled it back since
            registry.promote(version)
    champion, previous = registry.version(CHAMPION), registry.version(PREVIOUS)
    waiting = {file.path for file in stock.held_back}
    alarming: set[tuple[str, str]] = set()
    if verdict == "alarm":
        shipments = _shipments(config.data, _as_read(config.data, stock.judged))
        alarming = {
            (file.split, file.path)
            for file, name in zip(stock.judged, shipments, strict=True)
            if name in record["alarming"]
        }
        waiting |= {path for _, path in alarming}
    state = replace(
        stock.state,
        runs=(*(name for name in stock.state.runs if name != attempt.name), attempt.name),
        champion=champion.number if champion else None,
        verdict=verdict,
        held_back=tuple(sorted(waiting)),
        accepted=tuple(path for path in stock.state.accepted if path not in waiting) if verdict == "alarm" else (),
        unused=_unused(stock, verdict),
    )
    _, local = _files(config.data)
    # after an alarm the other new files are as new as before: no champion was made with them
    taken_in = [file for file in stock.new if verdict != "alarm" or (file.split, file.path) in alarming]
    others = {(file.split, file.path) for file in [*stock.files, *stock.held_back]}
    others -= {(file.split, file.path) for file in taken_in}
    seen = [known for key, known in stock.seen.items() if key in others]
    seen += listing.with_content(taken_in, local=local)
    held.assert_held()
    job.write_state(state, seen)
    serving_runs = {found.tags.get("posttrain.run") for found in (champion, previous) if found}
    job.drop_features({*state.runs[-_FEATURES_KEPT:], *filter(None, serving_runs)})
    serving_bases = {found.tags.get(_BASE) for found in (champion, previous) if found}
    job.drop_bases({record["base"], *filter(None, serving_bases)})
    return _summary(config, verdict, record["reason"], state, attempt=attempt, record=record, version=version)


def _unused(stock: _Stock, verdict: str) -> tuple[str, ...]:
    """What `State.unused` is after a run."""
    if verdict == "promoted":
        return ()
    there = {file.path for file in stock.files if file.split == "train"}
    used = set(stock.state.unused)
    if verdict == "not promoted":
        used |= {file.path for file in stock.new if file.split == "train"}
    return tuple(sorted(used & there))


def _tags(attempt: _Attempt, record: dict[str, Any]) -> dict[str, str]:
    """What a version tells of where it comes from."""
    tags = {
        _FOLDER: without_credentials(attempt.folder.absolute.location),
        _BASE: record["base"],
        "posttrain.data": ", ".join(f"{name} {digest}" for name, digest in record["data"].items()),
        "posttrain.removed": f"{record['taken']} samples taken out so far, in {attempt.folder.path('taken.parquet')}",
        "posttrain.jobs.gate": record["reason"],
        "posttrain.accuracy": f"{gate.HeldOut(**record['challenger']).accuracy:.6f} ({record['measured_on']})",
    }
    if record["parent"] is not None:
        tags[_PARENT] = record["parent"]
    return tags


def _summary(
    config: JobFile,
    outcome: str,
    reason: str,
    state: State,
    *,
    attempt: _Attempt | None = None,
    record: dict[str, Any] | None = None,
    version: Version | None = None,
) -> dict[str, Any]:
    """What `--json` prints; what is not known is null."""
    of_run: dict[str, Any] = {}
    if record is not None:
        champion = gate.HeldOut(**record["champion"]) if record["champion"] else None
        arrivals = gate.Arrivals(**record["arrivals"])
        of_run = {
            "champion_accuracy": champion.accuracy if champion else None,
            "challenger_accuracy": gate.HeldOut(**record["challenger"]).accuracy,
            "new_samples": arrivals.samples,
            "suspect_share": arrivals.suspect,
            **{
                key: record[key]
                for key in (
                    "measured_on",
                    "embedded",
                    "rounds",
                    "live",
                    "removed",
                    "removed_earlier",
                    "relabelled",
                    "quarantined",
                )
            },
        }
    return {
        "job": config.job.name,
        "outcome": outcome,
        "exit_code": EXIT_CODES[outcome],
        "reason": reason,
        "champion": state.champion,
        "version": version.number if version else None,
        "run": without_credentials(attempt.folder.location) if attempt else None,
        "held_back": list(state.held_back),
        **of_run,
    }


def _print(summary: dict[str, Any]) -> None:
    console = Console()

    def say(text: str) -> None:
        console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    say(f"{summary['job']}: {summary['outcome']}: {summary['reason']}")
    if summary["run"] is None:
        return
    earlier = f", {summary['removed_earlier']:,} by earlier runs" if summary["removed_earlier"] else ""
    relabelled = f", relabelled {summary['relabelled']:,}" if summary["relabelled"] else ""
    say(
        f"  live {summary['live']:,}, removed {summary['removed']:,}{earlier}{relabelled}, quarantined "
        f"{summary['quarantined']:,}"
    )
    for line in _embedded_in_words(summary["embedded"]):
        say(f"  {line}")
    if summary["version"]:
        say(f"  registered as version {summary['version']} of {summary['job']}")
    say(f"  champion: {'version ' + summary['champion'] if summary['champion'] else 'none yet'}")
    if summary["outcome"] == "alarm":
        count = len(summary["held_back"])
        files = "1 training file" if count == 1 else f"{count:,} training files"
        say(f"  held back until changed, or let in by posttrain retrain --accept: {files}")
        for path in summary["held_back"][:5]:
            say(f"    {path}")
    say(f"  run: {summary['run']}")


# back -------------------------------------------------------------------------------------------------------


def rollback(config: JobFile, *, verbose: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Make the previous version the champion again; which is champion now. Raises InputError where there is none."""
    with _outages_are_failures():
        return _rolled_back(config, quiet=quiet)


def _rolled_back(config: JobFile, *, quiet: bool) -> dict[str, Any]:
    from posttrain.store.registry import CHAMPION, PREVIOUS

    job = _job(config)
    if not job.state().runs:
        raise InputError(f"{config.run.path}: the job has not run yet, so that there is no version to go back to")
    with lock.job_lock(job.folder, lease_s=config.job.lock_lease_s, wait_s=config.job.lock_wait_s) as held:
        registry = _registry(config, job)
        done = _complete_rollback(job, registry, held)
        if done is None:
            champion, previous = registry.version(CHAMPION), registry.version(PREVIOUS)
            if champion is None or previous is None or champion.number == previous.number:
                raise InputError(f"{config.job.name} has no previous version to go back to")
            held.assert_held()
            # written first: the two aliases cannot be moved at once
            job.folder.write_json(_intent(job), {"champion": previous.number, "previous": champion.number})
            done = _complete_rollback(job, registry, held)
    assert done is not None
    summary = {"job": config.job.name, "outcome": "rolled back", "exit_code": 0, **done}
    if not quiet:
        Console().print(
            f"{config.job.name}: version {done['champion']} is champion again, version {done['previous']} is previous",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return summary


def _intent(job: JobFolder) -> str:
    return job.folder.path("rollback.json")


def _complete_rollback(job: JobFolder, registry: Registry, held: Lock) -> dict[str, str] | None:
    """Carry out the rollback that was begun, if one was; which version is champion and which previous then."""
    from posttrain.store.registry import CHAMPION, PREVIOUS

    path = _intent(job)
    if not job.folder.exists(path):
        return None
    wanted = job.folder.read_json(path)
    held.assert_held()
    registry.point(CHAMPION, wanted["champion"])
    registry.point(PREVIOUS, wanted["previous"])
    job.write_state(replace(job.state(), champion=wanted["champion"]))
    job.folder.files.delete_file(path)
    return wanted
