"""What Ray, Parquet, MLflow and being able to go on cost: posttrain beside a plain PyTorch loop.

`python -m pipelines.benchmarks.plain_loop RUNFILE` trains the network once (`posttrain pretrain`), then runs the same
rounds twice, one after the other on the same machine, each in a process of its own: as a plain single-process
PyTorch script, and as `posttrain clean`. The plain script reads the same Parquet files, embeds, fits the probe,
scores, removes, trains on the images and evaluates; it writes nothing and knows no Ray and no MLflow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipelines.benchmarks.hardware import hardware
from posttrain.config import RunFile, dump, load, yaml


def to_remove(margin: Tensor, budget: float) -> Tensor:
    """Positions of the samples with the largest leave-one-out margins, of those that the boundary gives another label.

    The margins are logits, not calibrated to a probability: `removal.threshold` does not apply to them.
    """
    return margin.topk(min(int(budget * len(margin)), int((margin > 0).sum()))).indices


def plain(config: RunFile, weights: Path) -> dict[str, Any]:
    """Seconds of the plain loop: in all, and of each round by step."""
    import pyarrow.dataset as ds

    from posttrain.influence import curvature, probe, scores
    from posttrain.influence.probe import Standardizer
    from posttrain.schema import uniform
    from posttrain.vision import models
    from posttrain.vision.augmentation import augmentation
    from posttrain.vision.embedding import features_and_logits
    from posttrain.vision.images import decode_column, normalize
    from posttrain.vision.weights import load_weights

    began = time.perf_counter()
    data, settings, train = config.data, config.model, config.refining
    assert isinstance(settings.image_size, int)
    side, classes = settings.image_size, 10
    mean, std = settings.mean, settings.std

    def read(location: Any, label: str) -> tuple[Tensor, Tensor, np.ndarray]:
        table = ds.dataset(location, format="parquet").to_table(columns=[data.id, data.image, label])
        pixels, _, _ = decode_column(table[data.image], channels=settings.channels, size=(side, side))
        return pixels, torch.from_numpy(table[label].to_numpy().astype(np.int64)), table[data.id].to_numpy()

    pixels, labels, ids = read(data.train, data.label)
    test_pixels, test_labels, _ = read(data.test, data.test_label or data.label)
    held_out = torch.from_numpy(uniform(ids, 1) < data.validation_share)
    validation_pixels, validation_labels = pixels[held_out], labels[held_out]
    pixels, labels = pixels[~held_out], labels[~held_out]
    model = models.build(settings.factory, classes=classes, arguments=settings.arguments)
    load_weights(model, weights)
    model = model.to(memory_format=torch.channels_last)
    reading = time.perf_counter() - began

    def embed(images: Tensor) -> Tensor:
        parts = []
        for batch in images.split(256):
            inputs = normalize(batch, mean, std).contiguous(memory_format=torch.channels_last)
            parts.append(features_and_logits(model, "head", inputs)[0])
        return torch.cat(parts)

    def over(features: Tensor, targets: Tensor) -> Any:
        blocks = list(zip(features.split(2048), targets.split(2048), strict=True))

        def reduce(fn: Any, *arguments: Tensor) -> tuple[Tensor, ...]:
            totals: list[Tensor] | None = None
            for block in blocks:
                part = [t.double() for t in fn(*block, *arguments)]
                totals = part if totals is None else [a + b for a, b in zip(totals, part, strict=True)]
            return tuple(totals or [])

        return reduce

    augment = augmentation(train.augment or "none", (side, side))
    live = torch.arange(len(labels))
    rounds: list[dict[str, float]] = []
    accuracy = 0.0
    for number in range(config.removal.max_rounds):
        clock = [time.perf_counter()]
        features = embed(pixels[live])
        validation = embed(validation_pixels)
        clock.append(time.perf_counter())
        given = labels[live]
        standardizer = Standardizer.from_moments(*over(features, given)(probe.moments))
        h, held = standardizer(features), standardizer(validation)
        reduce = over(h, given)
        fits = [probe.fit(reduce, classes=classes, dim=h.shape[1], l2=l2) for l2 in config.probe.l2]
        losses = [float(cross_entropy(held @ f.weights.float().T, validation_labels)) for f in fits]
        best = fits[int(np.argmin(losses))]
        clock.append(time.perf_counter())
        found = curvature.measure(reduce, best, "exact")
        parts = []
        for block, targets in zip(h.split(2048), given.split(2048), strict=True):
            evidence = scores.evidence(block, targets, best.weights.float(), found, torch.rand(len(targets)))
            columns = {name: score(evidence) for name, score in scores.SCORES.items()}
            parts.append(columns["loo_margin"])
        margin = torch.cat(parts)
        clock.append(time.perf_counter())
        keep = torch.ones(len(live), dtype=torch.bool)
        keep[to_remove(margin, config.removal.budget)] = False
        live = live[keep]
        model.train()
        optimizer = torch.optim.SGD(
            model.parameters(), train.learning_rate, train.momentum, weight_decay=train.weight_decay, nesterov=True
        )
        generator = torch.Generator().manual_seed(number)
        for _ in range(train.epochs):
            for batch in live[torch.randperm(len(live))].split(train.batch_size):
                inputs = normalize(augment(pixels[batch], generator), mean, std)
                loss = cross_entropy(model(inputs.contiguous(memory_format=torch.channels_last)), labels[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        clock.append(time.perf_counter())
        with torch.no_grad():
            head = models.head_of(model, "head")
            accuracy = float((head(embed(test_pixels)).argmax(1) == test_labels).float().mean())
            float((head(embed(validation_pixels)).argmax(1) == validation_labels).float().mean())
        clock.append(time.perf_counter())
        names = ("embed", "fit", "curvature and score", "refine", "evaluate")
        rounds.append({name: b - a for name, a, b in zip(names, clock, clock[1:], strict=False)})
    return {"read": reading, "rounds": rounds, "seconds": time.perf_counter() - began, "accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runfile", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/plain_loop"), help="a new folder for the runs")
    parser.add_argument("--weights", type=Path, help="(inner) run the plain loop alone, print JSON")
    options = parser.parse_args()
    if options.weights:
        print(json.dumps(plain(load(options.runfile), options.weights)))
        return
    config = load(options.runfile, [f"run.path={options.folder / 'posttrain'}", "removal.max_rounds=3"])
    options.folder.mkdir(parents=True, exist_ok=True)
    runfile = options.folder / "run.yaml"
    runfile.write_text(dump(config))
    cli = [sys.executable, "-m", "posttrain.cli"]
    subprocess.run([*cli, "pretrain", str(runfile)], check=True)
    weights = options.folder / "posttrain" / "pretrained" / "model.safetensors"
    here = [sys.executable, "-m", "pipelines.benchmarks.plain_loop", str(runfile), "--weights", str(weights)]

    started = time.perf_counter()
    ours = json.loads(subprocess.run([*cli, "clean", str(runfile), "--json"], check=True, stdout=-1).stdout)
    ours_wall = time.perf_counter() - started
    started = time.perf_counter()
    bare = json.loads(subprocess.run(here, check=True, stdout=-1).stdout)
    bare_wall = time.perf_counter() - started
    report(options.folder, config, ours, ours_wall, bare, bare_wall)


def report(
    folder: Path, config: RunFile, ours: dict[str, Any], ours_wall: float, bare: dict[str, Any], bare_wall: float
) -> None:
    """Prints the table, and writes it as plain_loop.json."""
    committed = [
        json.loads((folder / "posttrain" / "rounds" / f"{n:04d}" / "round.json").read_text())["seconds"]
        for n in range(1, ours["rounds"] + 1)
    ]
    # the second and third round: a first one pays for what is done once
    later = [sum(r.values()) for r in committed[1:]]
    bare_later = [sum(r.values()) for r in bare["rounds"][1:]]
    print(f"\n{config.data.train}, {len(committed)} rounds; {hardware()}\n")
    print("| | plain PyTorch | posttrain | ratio |\n|---|---|---|---|")
    print(f"| the whole process, s | {bare_wall:.1f} | {ours_wall:.1f} | {ours_wall / bare_wall:.2f} |")
    if later:
        a, b = sum(bare_later) / len(bare_later), sum(later) / len(later)
        print(f"| a further round, s | {a:.1f} | {b:.1f} | {b / a:.2f} |")
    print(f"| test accuracy at the end | {bare['accuracy']:.3f} | {ours['test_accuracy_after']:.3f} | |")
    print("\nwhere the time goes, s (all rounds)\n\n| step | plain PyTorch | posttrain |\n|---|---|---|")
    plain_steps: dict[str, float] = {"read": bare["read"]}
    for r in bare["rounds"]:
        for name, seconds in r.items():
            plain_steps[name] = plain_steps.get(name, 0.0) + seconds
    for name in dict.fromkeys([*plain_steps, *ours["steps"]]):
        cells = [f"{steps[name]:.1f}" if name in steps else "" for steps in (plain_steps, ours["steps"])]
        print(f"| {name} | {cells[0]} | {cells[1]} |")
    started = ours_wall - sum(ours["steps"].values())
    print(f"| imports, shutting down | {bare_wall - bare['seconds']:.1f} | {started:.1f} |")
    record = {"plain": bare, "plain_wall": bare_wall, "posttrain": ours, "posttrain_wall": ours_wall}
    (folder / "plain_loop.json").write_text(json.dumps(record, indent=2))
    (folder / "config.yaml").write_text(yaml.dump(yaml.load(dump(config), where="the run file")))


if __name__ == "__main__":
    main()
