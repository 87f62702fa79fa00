"""Embed: the features of every sample, by the network that a round works on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from posttrain.cluster.network import Network
from posttrain.live import Live
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.runs.networks import network_of_round
from posttrain.runs.quarantine import quarantine, refuse_more
from posttrain.store.features import ShardSummary


def embed(run: Run, state: State[Network, Any]) -> tuple[str, Live]:
    """The name of the feature store of the round's network, written where it is not there; what is live now."""
    run.progress.begin_round(state.number + 1)
    return features_of(run, network_of_round(run, state), state.live, ("train", "validation"))


def features_of(
    run: Run, network: Network, live: Live, splits: Iterable[str], *, may_quarantine: bool = True
) -> tuple[str, Live]:
    """The name of the network's feature store with these splits in it, and what is live without the unreadable.

    Without `may_quarantine`, a network that cannot embed a sample that others can raises RecipeError.
    """
    backbone = network.backbone
    summaries: dict[str, list[ShardSummary]] = {}
    for name in splits:
        split = run.splits[name]
        excluded = live.excluded if name == "train" else run.left_out(name)
        with run.progress.step("embed" if name == "train" else f"embed {name}") as tell:
            summaries[name] = run.workers.embed(
                network,
                split.partitions,
                run.folder,
                backbone=backbone,
                split=name,
                excluded=excluded,
                progress=tell,
                previous_runs=run.previous.folders or (),
            )
        if run.previous.folders is not None:
            embedded = sum(found.embedded for found in summaries[name])
            _note_embedded(run, backbone, name, embedded, split.rows - len(excluded))
    if any(shard.embedded for found in summaries.values() for shard in found):
        _say_gpus(run)
    if (at_once := run.workers.reduced_batch()) is not None:
        run.progress.say_once(f"  embed: memory did not suffice; going on with {at_once} images at a time")
    if not may_quarantine:
        refuse_more(run, summaries)
        return backbone, live
    return backbone, quarantine(run, summaries, live)


def _say_gpus(run: Run) -> None:
    """Say on which GPUs the workers embed, where Ray sees any."""
    if not run.workers.gpus_per_worker:
        return
    found = run.workers.gpus()
    if names := sorted({name for name in found if name}):
        run.progress.say_once(f"  embed: on {', '.join(names)}")
    if None in found:
        run.progress.say_once("  embed: without a GPU, although Ray sees one: is this a torch for the CPU?")


def embedded_counts(run: Run) -> dict[str, dict[str, tuple[int, int]]]:
    """By split and backbone, the first one first: images that went through it, and those that were asked for.

    Known of the runs of a job.
    """
    path = run.folder.path("embedded.json")
    if not run.folder.exists(path):
        return {}
    return {
        split: {backbone: (new, of) for backbone, (new, of) in counts.items()}
        for split, counts in run.folder.read_json(path).items()
    }


def _note_embedded(run: Run, backbone: str, split: str, new: int, asked: int) -> None:
    counts = embedded_counts(run)
    # only the first time counts: later the shards exist
    if backbone not in counts.setdefault(split, {}):
        counts[split][backbone] = (new, asked)
        run.folder.write_json(run.folder.path("embedded.json"), counts)
