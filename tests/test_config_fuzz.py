"""Whatever is given as a run file: it is one, or ConfigError says in one sentence why not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.config import RunFile, dump, load, load_job
from posttrain.config import yaml as our_yaml
from posttrain.errors import ConfigError

CHECKS = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
    HealthCheck.function_scoped_fixture,
]
"""Not of interest: hard cases are slow and large."""

KEYS = [(section, key) for section, kind in RunFile() for key in type(kind).model_fields]

scalars: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.dates()
    | st.binary(max_size=6)
    | st.sampled_from(["5 %", "1e-3", "s3://a:b@c/d", "~", "models:/", "../..", "\x1b[2J", "!!python/name:os.system"])
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.integers() | st.none() | st.booleans(), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def run_files(draw: st.DrawFn) -> dict[Any, Any]:
    """A mapping in which some of a run file's keys have values of any kind, and some keys are none."""
    raw: dict[Any, Any] = {}
    for section, key in draw(st.lists(st.sampled_from(KEYS), max_size=4)):
        raw.setdefault(section, {})[key] = draw(values)
    return {
        **raw,
        **draw(st.dictionaries(st.text(max_size=8) | st.sampled_from([k for k, _ in KEYS]), values, max_size=2)),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


def taken_or_refused(file: Path) -> None:
    began = time.perf_counter()
    for read in (load, load_job):
        try:
            config = read(file)
        except ConfigError as error:
            # the way that it is shown: halves of surrogate pairs are written out
            said = str(error)
            assert said.startswith(str(file)) and "\n" not in said.removeprefix(str(file)).strip(), said
        else:
            assert type(config).model_validate(our_yaml.load(dump(config), where="dump")) == config
    assert time.perf_counter() - began < 20


@given(run_files())
@settings(max_examples=100, deadline=None, suppress_health_check=CHECKS)
def test_any_mapping_is_a_run_file_or_is_refused_in_one_sentence(file: Path, raw: dict[Any, Any]) -> None:
    file.write_bytes(yaml.safe_dump(raw, allow_unicode=True).encode("utf-8", "surrogatepass"))
    taken_or_refused(file)


WORDS = """
run data model removal path seed arguments : - [ ] { } , & * a &a *a << ? | > ! !!binary !!set !!omap !!timestamp !!bool
!!python/tuple !!float !!int !!null ' " # % @ ` ~ 0x1F 1e3 .inf .nan 2020-01-01 1:30 --- ... \\e \\0
"""
PIECES = st.sampled_from([*WORDS.split(), "\n", "\n  ", "\n    ", ": ", "- ", " ", "\t"])


@given(st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=60) | st.binary(max_size=60))
@settings(max_examples=300, deadline=None, suppress_health_check=CHECKS)
def test_any_text_is_a_run_file_or_is_refused_in_one_sentence(file: Path, text: str | bytes) -> None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    taken_or_refused(file)


@given(st.sampled_from(KEYS), values)
@settings(max_examples=60, deadline=None, suppress_health_check=CHECKS)
def test_any_override_is_taken_or_refused_in_one_sentence(key: tuple[str, str], value: Any) -> None:
    override = f"{'.'.join(key)}={yaml.safe_dump(value, default_flow_style=True, width=10_000)}"
    try:
        load(None, [override])
    except ConfigError as error:
        assert str(error).startswith("--set")


@pytest.mark.parametrize("of", ["[{}]", "{{<<: [{}]}}"], ids=["aliases", "merge keys"])
def test_a_billion_laughs_are_refused_at_once(file: Path, of: str) -> None:
    lines = ["a: &a {x: 1}"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} " + of.format(", ".join([f"*{before}"] * 10)))
    file.write_text("\n".join(lines))
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=f"at most {our_yaml.MAX_VALUES:,}"):
        load(file)
    assert time.perf_counter() - began < 5


def test_a_run_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match=r"/dev/zero: is larger than 1,048,576 bytes"):
        load("/dev/zero")
