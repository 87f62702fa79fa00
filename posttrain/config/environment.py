"""The sections `run`, `ray`, `tracking` and `results` of a run file: where the run works, and what it leaves behind."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from posttrain.config.section import Section, Text


class Run(Section):
    """Where the run is kept, and the seed of its random choices."""

    path: Text = "runs/digits"
    """Run folder: a local path or a URI that pyarrow opens (s3://, gs://). Starting again with the same folder
    continues the run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of every random choice: initial weights, order of samples, splits. Same seed, same removed samples."""


class Ray(Section):
    """Machines and workers: this machine by default, a Ray cluster where an address is given."""

    address: Text | None = None
    """Address of a Ray cluster (auto, host:port, ray://...). null: Ray is started on this machine."""
    workers: int | None = Field(default=None, ge=1)
    """Number of workers that embed and score. null: as many as the GPUs allow, or one per CPU if there is no GPU."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs per worker; workers with a fraction share a GPU. null: 1 if there is a GPU, or an equal share on a single
    machine with fewer GPUs than workers."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs per worker."""
    train_workers: int | None = Field(default=None, ge=0)
    """Number of Ray Train workers; 0 trains in the process of the command. null: 0, or 1 if an address is set."""
    gpus_per_train_worker: float | None = Field(default=None, ge=0)
    """GPUs per Ray Train worker; with train_workers 0, anything above 0 trains on the GPU. null: 1 if the other
    workers have GPUs, else 0, or an equal share on a single machine with fewer GPUs than training workers. Training
    workers that share a GPU exchange gradients with Gloo, others with NCCL."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the network's activations when it embeds and trains: bfloat16 and float16 are faster on GPUs.
    Weights, losses, sums, and everything computed from the features stay in float32 or float64."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs for a Ray started on this machine. null: all."""
    object_store_gb: float | None = Field(default=None, gt=0)
    """Object store memory, in GB (10^9 bytes), of a Ray started on this machine. null: Ray's default."""

    @field_validator("gpus_per_worker", "gpus_per_train_worker")
    @classmethod
    def _a_share_of_one_gpu_or_whole_ones(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("should be a whole number, or a fraction below 1")
        return gpus

    @model_validator(mode="after")
    def _a_cluster_has_its_size(self) -> Self:
        for key in ("num_cpus", "object_store_gb"):
            if self.address not in (None, "local") and getattr(self, key) is not None:
                raise ValueError(
                    f"ray.{key} is for a Ray that posttrain starts itself, and ray.address is "
                    f"{self.address}: remove one of them"
                )
        return self


class Tracking(Section):
    """What is logged to MLflow, and where."""

    uri: Text | None = None
    """URI of the tracking server or database. null: an SQLite file in the run folder."""
    experiment: Text = "posttrain"
    """Name of the MLflow experiment."""
    log_model: bool = True
    """Whether the refined model is logged when the run ends."""


class Results(Section):
    """What is written when the run ends."""

    cleaned: Literal["both", "parquet", "manifest", "none"] = "both"
    """How the cleaned data set is written. parquet: the kept samples, as Parquet files. manifest: their ids alone.
    both, or none."""
