"""Precision, and batches that halve themselves where memory does not suffice: embedding and training."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from posttrain.cluster.devices import BatchSize, computing_in, moved
from posttrain.cluster.embedding import embed_block
from posttrain.cluster.network import Network
from posttrain.cluster.training import Training, fit_network
from posttrain.cluster.training_step import Batch
from posttrain.cluster.workers import Workers
from posttrain.config import RunFile, load
from posttrain.errors import ConfigError, StepError
from posttrain.methods import METHODS, Method
from posttrain.schema import FILE, IMAGE, LABEL, SAMPLE_ID, ImageSpec, ModelSpec, Precision
from posttrain.vision import models
from posttrain.vision.embedding import pooled
from posttrain.vision.images import normalize
from posttrain.vision.losses import Noise
from posttrain.vision.weights import to_bytes

CPU = torch.device("cpu")
IMAGES = ImageSpec(1, (8, 8), (0.5,), (0.5,), (8, 8))
RESNET = ModelSpec(
    "posttrain.vision.models:small_resnet", {"width": 8, "channels": 1}, 10, "head", IMAGES, ("input", "head"), 64
)


class ShortOfMemory:
    """Stands for a device that cannot take more than `most` samples; `sizes` are those it was asked for."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.sizes: list[int] = []

    def watch(self, model: nn.Module) -> nn.Module:
        def ask(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.sizes.append(len(inputs[0]))

        def fill(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # behind the pass: by then, statistics of batch normalisation have changed
            if len(inputs[0]) > self.most:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        model.register_forward_pre_hook(ask)
        model.register_forward_hook(fill)
        return model


class Digits:
    """Digits in memory, in batches as `LiveImages` gives them."""

    def __init__(self, count: int = 256) -> None:
        data: Any = load_digits()
        self.pixels = torch.from_numpy((data.images[:count] * 255 / 16).round().astype(np.uint8))[:, None]
        self.labels = torch.from_numpy(data.target[:count].astype(np.int64))
        self.samples = count

    def batches(self, size: int, steps: int, epoch: int) -> Iterator[Batch]:
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(size)[:steps]:
            yield Batch(self.pixels[batch], self.labels[batch], batch)

    def block(self) -> pa.Table:
        count = len(self.labels)
        return pa.table(
            {
                SAMPLE_ID: pa.array(range(count), pa.int64()),
                IMAGE: pa.array([image.numpy().tobytes() for image in self.pixels], pa.binary(64)),
                LABEL: pa.array(self.labels.numpy().astype(np.int32)),
                FILE: pa.array(["digits"] * count),
            }
        )


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return models.build(RESNET.factory, classes=10, arguments=RESNET.arguments)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return models.build("posttrain.vision.models:mlp", classes=10, arguments={})


def trained(model: nn.Module, digits: Digits, *, device: torch.device = CPU, **options: Any) -> dict[str, Any]:
    training = Training(
        epochs=options.pop("epochs", 4),
        batch_size=64,
        optimizer="adamw",
        learning_rate=3e-3,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="constant",
        augment="crop",
        method=options.pop("method", "cross_entropy"),
        ema=options.pop("ema", None),
    )
    return fit_network(
        model,
        digits,  # pyright: ignore[reportArgumentType]  the same method, without Ray
        training,
        spec=IMAGES,
        live=len(digits.labels),
        world=1,
        device=device,
        seed=0,
        progress=lambda done, total: None,
        classes=10,
        **options,
    )


def features(digits: Digits, **options: Any) -> dict[str, np.ndarray]:
    model = options.pop("model", None) or resnet()
    shard, quarantined = embed_block(model.eval(), RESNET, digits.block(), np.empty(0, np.int32), CPU, **options)
    assert quarantined == []
    return shard.features


# -- a batch that halves itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 37])
def test_a_size_is_halved_until_memory_suffices_and_stays_so(most: int) -> None:
    asked: list[int] = []

    def work(size: int) -> int:
        asked.append(size)
        if size > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return size

    batch = BatchSize(100)
    halves = [100 >> n for n in range(8)]
    fits = next(size for size in halves if size <= most)
    assert batch.reduced is None
    assert batch.run(work) == batch.reduced == fits
    assert asked == halves[: halves.index(fits) + 1]
    assert batch.run(work) == fits == asked[-1]
    assert len(asked) == halves.index(fits) + 2


def test_below_one_image_at_a_time_there_is_an_error_that_says_what_to_do() -> None:
    def work(size: int) -> int:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nOf the allocated ...")

    with pytest.raises(StepError, match=r"one image at a time \(CUDA out of memory\. Tried to allocate 9 GiB\.\); use"):
        BatchSize(8).run(work)


def test_other_errors_do_not_halve_anything() -> None:
    def work(size: int) -> int:
        raise RuntimeError("the model cannot take this")

    batch = BatchSize(8)
    with pytest.raises(RuntimeError, match="cannot take this"):
        batch.run(work)
    assert batch.reduced is None


def test_embedding_goes_on_with_half_the_images_and_remembers_it(digits: Digits) -> None:
    memory, batch = ShortOfMemory(70), BatchSize(256)
    model = memory.watch(resnet())
    found = features(digits, model=model, batch=batch)
    assert memory.sizes == [256, 128, 64, 64, 64, 64]
    features(digits, model=model, batch=batch)
    assert memory.sizes[6:] == [64, 64, 64, 64]
    assert batch.reduced == 64
    whole = features(digits)
    assert found.keys() == whole.keys() == {"input", "head"}
    for layer, matrix in whole.items():
        # another number of images per pass may take another order of the same sums
        np.testing.assert_allclose(found[layer], matrix, rtol=2e-3, atol=1e-4)


def test_a_training_step_stays_the_same_in_parts(digits: Digits) -> None:
    whole, parted, memory = mlp(), mlp(), ShortOfMemory(20)
    one = trained(whole, digits)
    other = trained(memory.watch(parted), digits)
    assert memory.sizes[:8] == [64, 32, 16, 16, 16, 16, 16, 16]
    assert one["part"] is None and other["part"] == 16
    assert one["steps"] == other["steps"] == 16
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parted.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_pass_that_ran_out_of_memory_leaves_no_trace_in_the_statistics(digits: Digits) -> None:
    def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
        return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    before = resnet()
    model = ShortOfMemory(32).watch(copy.deepcopy(before))
    found = trained(model, digits, epochs=1)
    assert found["part"] == 32
    # two parts of 32 in each of four steps, and nothing of the first attempt
    assert {int(norm.num_batches_tracked or 0) for norm in batch_norms(model)} == {8}


def test_training_that_cannot_take_one_sample_ends_with_one_error(digits: Digits) -> None:
    with pytest.raises(StepError, match="one image at a time"):
        trained(ShortOfMemory(0).watch(mlp()), digits)


RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed
from torch.nn.parallel import DistributedDataParallel
import test_devices as t

rank, short, rendezvous, out = int(sys.argv[1]), sys.argv[2] == "short", sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=2)
model = t.mlp()
if short and rank == 1:
    t.ShortOfMemory(10).watch(model)
class Half(t.Digits):
    def batches(self, size, steps, epoch):
        for batch in super().batches(2 * size, steps, epoch):
            yield batch.at(slice(rank, None, 2))
digits = Half()
training = t.Training(3, 64, "sgd", 0.05, 0.9, 0.0, "constant", "none")
found = t.fit_network(DistributedDataParallel(model), digits, training, spec=t.IMAGES, live=256, world=2,
                      device=t.CPU, seed=0, progress=lambda done, total: None, classes=10)
torch.save({{"weights": model.state_dict(), "part": found["part"], "loss": found["loss"]}}, out)
torch.distributed.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.slow
def test_when_one_rank_runs_out_of_memory_all_halve_and_the_result_is_the_same(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parent)))
    found: dict[str, list[dict[str, Any]]] = {}
    for memory in ("enough", "short"):
        outs = [tmp_path / f"{memory}{rank}.pt" for rank in range(2)]
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), memory, str(tmp_path / f"{memory}.sync"), str(out)]
            )
            for rank, out in enumerate(outs)
        ]
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
        found[memory] = [torch.load(out, weights_only=True) for out in outs]
    # 32 samples on each rank: halved to 16 and to 8, on the one that had enough, too
    assert [rank["part"] for rank in found["enough"]] == [None, None]
    assert [rank["part"] for rank in found["short"]] == [8, 8]
    for name, tensor in found["enough"][0]["weights"].items():
        assert torch.equal(found["short"][0]["weights"][name], found["short"][1]["weights"][name])
        torch.testing.assert_close(found["short"][0]["weights"][name], tensor, rtol=1e-3, atol=1e-5)
    # and both are what one process makes of the same batches
    alone, digits = mlp(), Digits()
    optimizer = torch.optim.SGD(alone.parameters(), 0.05, 0.9, nesterov=True)
    for epoch in range(3):
        for batch in digits.batches(64, 4, epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(alone((batch.pixels.float() / 255 - 0.5) / 0.5), batch.labels).backward()
            optimizer.step()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(found["enough"][0]["weights"][name], tensor, rtol=1e-3, atol=1e-5)


# -- precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_features_in_16_bits_are_those_in_32_up_to_their_rounding(digits: Digits, precision: Precision) -> None:
    exact, rounded = features(digits), features(digits, precision=precision)
    # images do not go through the network
    np.testing.assert_array_equal(rounded["input"], exact["input"])
    one, other = exact["head"].astype(float), rounded["head"].astype(float)
    assert (one != other).any()
    relative = np.linalg.norm(one - other) / np.linalg.norm(one)
    # a dozen roundings to 8 (11) bits, one after the other
    assert relative < (0.02 if precision == "bfloat16" else 0.0025)
    by_norm: Any = spearmanr(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
    assert by_norm.statistic > 0.995


def test_pooling_and_projection_do_not_lose_digits_to_autocast() -> None:
    maps = torch.randn(3, 40, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = pooled(maps, 16)
    with computing_in("bfloat16", CPU):
        found = pooled(maps, 16)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


def test_features_of_another_precision_are_kept_apart() -> None:
    weights = to_bytes(resnet())
    keys = {p: Network(RESNET, weights, "key", p).backbone for p in ("float32", "bfloat16", "float16")}
    assert len(set(keys.values())) == 3
    assert keys["float32"] == Network(RESNET, weights, "key").backbone


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.long)])
def test_training_in_16_bits_keeps_weights_and_state_in_32_and_learns_the_same(
    digits: Digits, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.optim.Optimizer] = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        kept.append(self)
        return step(self, *arguments, **options)

    exact, rounded = resnet(), resnet()
    one = trained(exact, digits, epochs=8)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noting)
        other = trained(rounded, digits, epochs=8, precision=precision)
    assert {tensor.dtype for tensor in rounded.parameters()} == {torch.float32}
    state = [value for values in kept[0].state.values() for value in values.values()]
    assert {value.dtype for value in state} == {torch.float32}
    assert not torch.equal(next(rounded.parameters()), next(exact.parameters()))
    assert other["loss"] == pytest.approx(one["loss"], abs=0.1)
    assert other["accuracy"] >= one["accuracy"] - 0.05


def test_a_run_does_not_go_on_in_another_precision(tmp_path: Path) -> None:
    from posttrain.errors import RunFolderError
    from posttrain.store.folder import RunFolder
    from posttrain.store.ledger import Ledger

    ledger = Ledger(RunFolder(str(tmp_path / "run")))
    before = RunFile.model_validate({"run": {"path": str(tmp_path / "run")}})
    ledger.start(before, {})
    started = ledger.started()
    assert started is not None

    def with_ray(override: str) -> RunFile:
        return before.model_copy(update={"ray": load(None, [override]).ray})

    with pytest.raises(RunFolderError, match=r"ray\.precision: \"float32\" -> \"bfloat16\""):
        ledger.refuse_other_settings(
            started, before.model_copy(update={"ray": load(None, ["ray.precision=bfloat16"]).ray})
        )
    ledger.refuse_other_settings(started, before.model_copy(update={"ray": load(None, ["ray.workers=7"]).ray}))


@pytest.mark.parametrize("key", ["gpus_per_worker", "gpus_per_train_worker"])
def test_gpus_are_a_share_of_one_or_whole_ones(key: str) -> None:
    assert [getattr(load(None, [f"ray.{key}={gpus}"]).ray, key) for gpus in (0, 0.25, 1, 2)] == [0, 0.25, 1, 2]
    with pytest.raises(ConfigError, match=rf"ray\.{key} = 1\.5: should be a whole number, or a fraction below 1"):
        load(None, [f"ray.{key}=1.5"])


def workers(monkeypatch: pytest.MonkeyPatch, there: float, **options: Any) -> Workers:
    """The pool where Ray shows so many GPUs, and 8 CPUs; no actor is started."""
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, **({"GPU": there} if there else {})})
    monkeypatch.setattr("ray.nodes", list)
    return Workers(**{"count": None, "cpus": 1, "gpus": None, "on_cluster": False, **options})


@pytest.mark.parametrize(
    ("there", "options", "count", "each"),
    [
        (0, {"count": 2}, 2, 0),
        (4, {}, 4, 1),
        # two on one GPU: with 2/3 of a GPU each, the third would never start
        (2, {"count": 3}, 3, 1 / 2),
        (1, {"count": 49}, 49, 1 / 49),
        (2, {"gpus": 0.4}, 4, 0.4),
        (1, {"gpus": 0}, 8, 0),
        # a cluster may grow
        (0, {"count": 4, "gpus": 1, "on_cluster": True}, 4, 1),
    ],
)
def test_workers_share_the_gpus_that_there_are(
    monkeypatch: pytest.MonkeyPatch, there: float, options: dict[str, Any], count: int, each: float
) -> None:
    found = workers(monkeypatch, there, **options)
    assert (found.count, found.gpus_per_worker) == (count, pytest.approx(each))


@pytest.mark.parametrize(
    ("there", "options", "named"),
    [
        (0, {"gpus": 1}, "= 1 is too much for 1 worker: this machine shows 0 GPUs"),
        (2, {"gpus": 0.6, "count": 3}, "= 0.6 is too much for 3 workers: this machine shows 2 GPUs"),
    ],
)
def test_workers_whose_gpus_would_never_come_are_refused(
    monkeypatch: pytest.MonkeyPatch, there: float, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"ray\.gpus_per_worker {named}; leave it out"):
        workers(monkeypatch, there, **options)


@pytest.mark.parametrize(
    ("there", "train_workers", "gpus", "refused"),
    [(0, 0, 1, True), (1, 2, 0.5, False), (2, 3, 0.6, True)],
)
def test_training_workers_whose_gpus_would_never_come_are_refused(
    monkeypatch: pytest.MonkeyPatch, there: float, train_workers: int, gpus: float, refused: bool
) -> None:
    from rich.console import Console

    from posttrain.report.progress import StepLog
    from posttrain.runs.open import make_workers

    workers(monkeypatch, there)
    config = load(None, [f"ray.train_workers={train_workers}", f"ray.gpus_per_train_worker={gpus}"])
    with (
        pytest.raises(ConfigError, match=rf"ray\.gpus_per_train_worker = {gpus:g} is too much for")
        if refused
        else nullcontext()
    ):
        make_workers(config, StepLog(Console(quiet=True)), on_cluster=False)


@pytest.mark.parametrize(
    ("there", "options", "processes", "each"),
    [
        (0, {}, 1, 0),
        (1, {}, 2, 1 / 2),
        # whoever embeds on the CPU trains there
        (1, {"gpus": 0}, 1, 0),
        (1, {"on_cluster": True}, 4, 1),
    ],
)
def test_training_workers_share_the_gpus_that_there_are(
    monkeypatch: pytest.MonkeyPatch, there: float, options: dict[str, Any], processes: int, each: float
) -> None:
    assert workers(monkeypatch, there, **options).gpus_to_train(processes) == pytest.approx(each)


# -- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_gpu_gives_the_features_of_the_cpu(digits: Digits, precision: Precision) -> None:
    gpu = torch.device("cuda")
    model = resnet().to(gpu).to(memory_format=torch.channels_last).eval()
    shard, _ = embed_block(model, RESNET, digits.block(), np.empty(0, np.int32), gpu, precision=precision)
    exact = features(digits)["head"].astype(float)
    # float32: convolutions may take tensor cores, which round to 10 bits
    bound = {"float32": 0.002, "bfloat16": 0.02, "float16": 0.0025}[precision]
    assert np.linalg.norm(shard.features["head"] - exact) / np.linalg.norm(exact) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_gpu_learns_what_the_cpu_learns(digits: Digits, precision: Precision) -> None:
    on_cpu = trained(resnet(), digits, epochs=8)
    gpu = torch.device("cuda")
    on_gpu = trained(
        resnet().to(gpu).to(memory_format=torch.channels_last), digits, epochs=8, device=gpu, precision=precision
    )
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], abs=0.1)


@pytest.mark.gpu
def test_memory_that_really_does_not_suffice_halves_the_batch() -> None:
    gpu = torch.device("cuda")
    most = torch.cuda.get_device_properties(gpu).total_memory // 2**20

    def work(size: int) -> int:
        # mebibytes, each of `size` samples asking for a hundredth of all
        torch.empty(size * most // 100, 2**20, dtype=torch.uint8, device=gpu)
        return size

    assert BatchSize(256).run(work) <= 64


@pytest.mark.gpu
def test_a_batch_goes_to_the_gpu_unchanged() -> None:
    batch = torch.arange(300).reshape(3, 100)
    assert torch.equal(moved(batch, torch.device("cuda")).cpu(), batch)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "co_teaching"])
def test_every_method_learns_the_digits(digits: Digits, method: Method) -> None:
    model = mlp()
    noise = Noise(0.1, 0.9 * torch.eye(10) + 0.01 * torch.ones(10, 10))
    found = trained(model, digits, epochs=12, method=method, noise=noise)
    assert found["steps"] == 12 * 4
    with torch.inference_mode():
        logits = model.eval()(normalize(digits.pixels, IMAGES.mean, IMAGES.std))
    assert float((logits.argmax(dim=1) == digits.labels).double().mean()) > 0.9


def test_training_leaves_the_moving_average_of_its_weights_behind(digits: Digits) -> None:
    decay, seen = 0.9, []
    averaged, last = mlp(), mlp()

    def weight(model: nn.Module) -> torch.Tensor:
        return model.state_dict()["hidden.weight"].clone()

    averaged.register_forward_pre_hook(lambda module, inputs: seen.append(weight(module)))
    trained(averaged, digits, epochs=2, ema=decay)
    trained(last, digits, epochs=2)
    # the first update takes the weights as they are
    average = seen[1]
    for after_step in [*seen[2:], weight(last)]:
        average = decay * average + (1 - decay) * after_step
    assert torch.allclose(weight(averaged), average, atol=1e-6)
