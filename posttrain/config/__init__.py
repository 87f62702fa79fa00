"""The run file: YAML in, frozen and validated sections out. Nothing heavy is imported."""

from posttrain.config.cleaning import Probe, Removal
from posttrain.config.data import Data, Noise
from posttrain.config.environment import Ray, Results, Run, Tracking
from posttrain.config.job import Gate, Job
from posttrain.config.model import Augment, Model, Pretrain, Refine, Training
from posttrain.config.run_file import JobFile, RunFile, differences, dump, load, load_either, load_job, schema
from posttrain.config.search import SEARCHED, Distribution, Search
from posttrain.config.secrets import without_credentials, without_marks, without_secrets
from posttrain.config.section import Section

__all__ = [
    "SEARCHED",
    "Augment",
    "Data",
    "Distribution",
    "Gate",
    "Job",
    "JobFile",
    "Model",
    "Noise",
    "Pretrain",
    "Probe",
    "Ray",
    "Refine",
    "Removal",
    "Results",
    "Run",
    "RunFile",
    "Search",
    "Section",
    "Tracking",
    "Training",
    "differences",
    "dump",
    "load",
    "load_either",
    "load_job",
    "schema",
    "without_credentials",
    "without_marks",
    "without_secrets",
]
