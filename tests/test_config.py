from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import pipelines
import posttrain
from posttrain.config import (
    Data,
    JobFile,
    Model,
    Noise,
    Removal,
    RunFile,
    Section,
    differences,
    dump,
    load,
    schema,
    yaml,
)
from posttrain.errors import ConfigError

CONFIGS = Path(pipelines.__file__).parent / "configs"
PARQUET = """
data: {source: parquet, train: train.parquet}
model: {factory: resnet18, channels: 3, image_size: 32}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def complaint(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_embedded_default_is_the_digits_run():
    assert load(None) == RunFile() == load(CONFIGS / "digits.yaml")


def keys(mapping: dict[str, object], prefix: str = "") -> set[str]:
    """All keys, dotted, down to data.noise.rate."""
    found = set()
    for key, value in mapping.items():
        found |= {prefix + key} | (keys(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    return found


def test_the_written_out_default_has_every_key_in_the_order_of_its_declaration():
    written = yaml.load((CONFIGS / "digits.yaml").read_text(), where="digits.yaml")
    declared = RunFile().model_dump()
    assert keys(written) == keys(declared)
    assert list(written) == list(declared)
    for section in ("probe", "removal"):
        assert list(written[section]) == list(declared[section])


def test_the_written_out_default_names_every_choice_of_a_key():
    lines = (CONFIGS / "digits.yaml").read_text().splitlines()
    for section, default in RunFile():
        start = lines.index(next(line for line in lines if line.startswith(f"{section}:")))
        for key, rule in schema()["$defs"][type(default).__name__]["properties"].items():
            line = next(line for line in lines[start:] if line.startswith(f"  {key}:"))
            choices = [choice for branch in (rule, *rule.get("anyOf", ())) for choice in branch.get("enum", ())]
            # the optimizer and the like are explained once, for pre-training
            assert (section == "refine" and key != "scope") or all(str(choice) in line for choice in choices), line


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_that_is_shipped_is_valid(path: Path):
    load(path)


def test_what_dump_writes_load_takes_back_unchanged(write):
    config = load(
        write(PARQUET),
        [
            'model.arguments={norm: "1e-3", text: "no", rate: 1e-3, list: [1, [2.5, null]], empty: {}}',
            "model.mean=[0.4914, 0.4822, 0.4465]",
            "data.train=[a.parquet, 's3://b/ü c.parquet']",
            "data.classes=[cat, 'no', '7']",
            "probe.l2=[1e-5, 1]",
        ],
    )
    again = load(write(dump(config)))
    assert again == config
    assert again.model.arguments["norm"] == "1e-3" and again.model.arguments["rate"] == 0.001


@given(st.dictionaries(st.text(min_size=1), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6),
    max_size=3))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_any_argument_of_the_factory_survives_writing_and_reading(tmp_path_factory, arguments):
    config = RunFile(model=Model(arguments=arguments))
    path = tmp_path_factory.getbasetemp() / "arguments.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


def test_digits_are_noisy_unless_the_user_says_otherwise(write):
    assert RunFile().data.noise == Noise(kind="pair", rate=0.3)
    assert load(None, ["data.noise.rate=0.4"]).data.noise == Noise(rate=0.4)
    assert load(None, ["data.noise=null"]).data.noise is None
    assert load(write("data: {noise: null}")).data.noise is None
    assert load(write(PARQUET)).data.noise is None


def test_a_transition_matrix_takes_the_place_of_the_rate_and_is_written_out_whole(write):
    config = load(write("data: {noise: {kind: matrix, matrix: [[0.9, 0.1], [0, 1]]}}"))
    assert config.data.noise == Noise(kind="matrix", rate=None, matrix=((0.9, 0.1), (0.0, 1.0)))
    assert load(write(dump(config))) == config
    thirds = ", ".join(["[0.3333333, 0.3333333, 0.3333334]"] * 3)
    assert load(None, [f"data.noise={{kind: matrix, matrix: [{thirds}]}}"]).data.noise is not None


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        ("{kind: matrix}", "data.noise.kind = matrix needs data.noise.matrix, one row for each class"),
        ("{kind: matrix, matrix: [[1]]}", "data.noise.matrix has 1 rows: give one for each class, at least two"),
        ("{kind: matrix, matrix: [[1, 0], [1]]}", "data.noise.matrix has 2 rows, and row 1 has 1 values: give as many"),
        ("{kind: matrix, matrix: [[1, 0], [0.5, 0.4]]}", "data.noise.matrix: row 1 sums to 0.9: give probabilities"),
        ("{kind: matrix, matrix: [[1.5, -0.5], [0, 1]]}", "data.noise.matrix has -0.5 in row 0: give probabilities"),
        ("{kind: matrix, matrix: [[1, 0], [.nan, 1]]}", "data.noise.matrix = [[1, 0], [NaN, 1]]: should be a finite"),
        ("{kind: matrix, matrix: 3}", "data.noise.matrix = 3: should be a valid tuple"),
        (
            "{kind: matrix, rate: 0.1, matrix: [[1, 0], [0, 1]]}",
            "data.noise.rate = 0.1 does not go with data.noise.kind = matrix, whose rows say how many labels are "
            "flipped: leave data.noise.rate out, or set it to null",
        ),
        (
            "{matrix: [[1, 0], [0, 1]]}",
            "data.noise.matrix is for data.noise.kind = matrix only, and data.noise.kind is",
        ),
        ("{rate: null}", "data.noise.rate = null is for data.noise.kind = matrix only"),
    ],
)
def test_noise_that_contradicts_itself_is_refused_with_what_to_do(noise, expected):
    assert expected in complaint(None, f"data.noise={noise}")


def test_sections_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        RunFile().removal.budget = 0.5  # type: ignore[misc]


def test_an_override_wins_over_the_run_file(write):
    path = write("removal: {budget: 0.1, max_rounds: 3}")
    assert load(path, ["removal.budget=3e-2"]).removal == Removal(budget=0.03, max_rounds=3)


def test_of_two_overrides_the_last_wins():
    assert load(None, ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.001", "+1e-3"])
def test_a_number_with_an_exponent_is_a_number_with_or_without_a_dot(write, text):
    assert load(write(f"model: {{arguments: {{rate: {text}}}}}")).model.arguments == {"rate": 0.001}


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "y", "1:30", "0o", "1_a"])
def test_a_word_is_text_and_no_boolean_or_number_of_another_yaml(write, text):
    config = load(write(f"model: {{arguments: {{word: {text}}}}}"))
    assert config.model.arguments == {"word": text}
    assert load(write(dump(config))) == config


def test_layers_are_a_word_or_a_list_of_names():
    assert load(None).probe.layers == "auto"
    assert load(None, ["probe.layers=last"]).probe.layers == "last"
    assert load(None, ["probe.layers=[input, layer2.0, '1']"]).probe.layers == ("input", "layer2.0", "1")


def test_the_share_is_estimated_or_a_number():
    assert load(None).removal.max_share == "estimated"
    for share in (0, 0.25, 1):
        assert load(None, [f"removal.max_share={share}"]).removal.max_share == share


@pytest.mark.parametrize(
    "override",
    [
        "probe.layers=[layer2.0, fc]",
        "probe.max_features=8",
        "probe.exact_limit=0",
        "removal.max_share=0.25",
        "removal.action=relabel",
        "removal.relabel_above=1",
        "removal.score=loo_margin",
    ],
)
def test_a_new_setting_survives_writing_and_reading_and_is_a_difference(write, override):
    config = load(None, [override])
    assert load(write(dump(config))) == config
    [line] = differences(RunFile(), config)
    assert line.startswith(override.split("=")[0] + ": ")
    assert Draft202012Validator(schema()).is_valid(yaml.load(dump(config), where="dump"))


def test_one_l2_needs_no_list():
    assert load(None, ["probe.l2=0.5"]).probe.l2 == (0.5,)
    assert load(None, ["probe.l2=[0.5, 1]"]).probe.l2 == (0.5, 1.0)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("removal.budget=3", "removal.budget = 3: should be less than 1"),
        ("removal.budget=.nan", "removal.budget = NaN: should be a finite number"),
        ("removal.max_rounds=true", "removal.max_rounds = true: should not be a boolean"),
        ("data.source=pq", "data.source = \"pq\": should be 'digits', 'parquet', 'folder' or 'torchvision'"),
        ("model.image_size=big", 'model.image_size = "big": should be a valid integer'),
        ("model.image_size=0", "model.image_size = 0: should be greater than or equal to 1"),
        ("probe.l2=[0.1, 0]", "probe.l2 = [0.1, 0]: should be greater than 0"),
        ("probe.l2=[]", "probe.l2 = []: should hold at least 1 value"),
        ("probe.l2=-1", "probe.l2 = -1: should be greater than 0"),
        ("probe.layers=[]", "probe.layers = []: should hold at least 1 value or should be 'auto' or 'last'"),
        ("probe.max_features=7", "probe.max_features = 7: should be greater than or equal to 8"),
        ("probe.exact_limit=-1", "probe.exact_limit = -1: should be greater than or equal to 0"),
        ("probe.layers=3", "probe.layers = 3: should be a valid tuple or should be 'auto' or 'last'"),
        ("probe.layers=[fc, 2]", 'probe.layers = ["fc", 2]: should be a valid string'),
        ("probe.layers=['']", 'probe.layers = [""]: '),
        ("removal.action=drop", "removal.action = \"drop\": should be 'remove' or 'relabel'"),
        ("removal.relabel_above=0", "removal.relabel_above = 0: should be greater than 0"),
        ("removal.relabel_above=1.1", "removal.relabel_above = 1.1: should be less than or equal to 1"),
        ("removal.max_share=1.1", "removal.max_share = 1.1: should be less than or equal to 1 or should be "),
        ("removal.max_share=-0.1", "removal.max_share = -0.1: should be greater than or equal to 0"),
        ("removal.max_share=half", 'removal.max_share = "half": should be a valid number'),
        ("removal.max_share=true", "removal.max_share = true: should not be a boolean"),
        ("removal.score=entropy", "removal.score = \"entropy\": should be 'mislabel_odds', 'loo_margin', "),
        ("data.noise.rate=2", "data.noise.rate = 2: should be less than or equal to 1"),
        ("data.noise.kind=pairs", "data.noise.kind = \"pairs\": should be 'symmetric', 'pair', 'instance' or 'matrix'"),
        (
            "pretrain={method: gce, method_arguments: {q: 0}}",
            'pretrain.method_arguments = {"q": 0}: q should be above 0 and at most 1 with method = gce',
        ),
        (
            "refine={method: elr, method_arguments: {q: 1}}",
            'refine.method_arguments = {"q": 1}: q is no argument of method = elr, which has strength and momentum',
        ),
        ("removal=3", "removal = 3: should be a mapping"),
        ("model.arguments=[1]", "model.arguments = [1]: should be a mapping"),
        ("model.weights=model.bin", '= "model.bin": should be a .pt, .pth or .safetensors file'),
        ("model.weights=gs://bucket/x.safetensors", '= "gs://bucket/x.safetensors": should be a path on the machine'),
        ("model.weights=s3://bucket/x.pt", '= "s3://bucket/x.pt": should be a path on the machine'),
        ("model.mean=[0.5, 0.5]", "model.mean has 2 values, and model.channels is 1"),
        ("model.std=[0]", "model.std = [0]: should be greater than 0"),
        ("data.classes=[cat, cat]", "data.classes names a class twice"),
        ("data.train=x.parquet", "data.train is for data.source = parquet or folder only"),
        ("data.image_shape=[8, 8]", "data.image_shape is for data.source = parquet only"),
        ("data.id=label", "data.id, data.image and data.label are 'label', 'image' and 'label': name three different"),
        ("data.name=MNIST", "data.name is for data.source = torchvision only"),
        ("run.path=''", 'run.path = "": '),
        ("run.path=5", "run.path = 5: should be a valid string"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_key_and_what_it_should_be(override, expected):
    assert expected in complaint(None, override)


def test_all_that_is_wrong_is_said_at_once(write):
    text = complaint(write("removal: {budget: 3, patience: 0}"), "run.seed=x")
    assert text.count("; ") == 2
    assert all(key in text for key in ("run.yaml", "removal.budget = 3", "removal.patience = 0", 'run.seed = "x"'))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("removal.budgt", "removal.budget"),
        ("budget", "removal.budget"),
        ("refine.budget", "removal.budget"),
        ("remove", "removal"),
        ("data.noise.rte", "data.noise.rate"),
        ("probe.layer", "probe.layers"),
        ("removal.relabel", "removal.relabel_above"),
        ("relabel_above", "removal.relabel_above"),
        ("pretrain.lerning_rate", "pretrain.learning_rate"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, nearest):
    assert f"{key} is not a key of a run file; did you mean {nearest}?" in complaint(None, f"{key}=1")


def test_an_unknown_key_that_is_near_to_nothing_comes_with_those_there_are():
    assert "there are run.path, run.seed" in complaint(None, "run.xyzxyz=1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("removal:\n  budget: 0.1\n  budget: 0.2\n", "line 3: found duplicate key \"budget\"; keep one of the two"),
        ("run:\n  path: x\nrun:\n  seed: 1\n", "line 3: found duplicate key \"run\"; keep one of the two"),
        ("removal: {budget: 0.1\n", "line 2: expected ',' or '}'"),
        ("run:\n\tpath: x\n", "line 2: "),
        ("- removal\n", "a run file is a mapping"),
        ("", "a run file is a mapping"),
        ("run: {path: a}\n---\nrun: {path: b}\n", "line 2: "),
        ("model:\n  arguments: &a\n    self: *a\n", "line 2: an anchor contains itself; write out what it stands for"),
        ("run: {path: !!python/object/apply:os.getcwd []}", "could not determine a constructor for the tag"),
        ("model: {arguments: {when: 2020-13-45}}", "month must be in 1..12"),
        ("model: {arguments: {when: 2020-01-01}}", "model.arguments"),
        ("run: {path: *nowhere}", "found undefined alias 'nowhere'"),
        ("run: {path: a\0b}", "special characters are not allowed"),
        ("run: {path: " + "[" * 1500, "nested too deeply; write it with fewer levels"),
        (b"run: {path: \xff}", "not UTF-8"),
    ],
    ids=range(15),
)  # fmt: skip
def test_a_file_that_is_no_run_file_is_refused_with_the_place(write, text, expected):
    assert expected in complaint(write(text))


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    assert "nowhere.yaml: there is no such run file" in complaint(tmp_path / "nowhere.yaml")
    assert f"{tmp_path}: the run file cannot be read: Is a directory" in complaint(tmp_path)


@pytest.mark.parametrize("override", ["removal.budget", "=3", ".budget=3", "removal.=3", "run.path.x=1"])
def test_an_override_that_sets_nothing_is_refused(write, override):
    assert f"--set {override}: " in complaint(write("run: {path: here}"), override)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {source: parquet}", "needs data.train"),
        ("data: {source: folder}", "needs data.train"),
        ("data: {source: torchvision}", "needs data.name"),
        (
            "data: {source: folder, train: a, true_label: t}",
            "data.true_label is for data.source = parquet only",
        ),
        (
            "data: {source: parquet, train: a}\nmodel: {factory: f, channels: 3}",
            "model.image_size has to be set",
        ),
        (
            PARQUET.replace("factory", "weights: w.pt, factory"),
            "a validation set the model has not seen is required",
        ),
        (
            PARQUET + "ray: {address: auto, num_cpus: 2}",
            "ray.num_cpus is for a Ray that posttrain starts itself",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(write, text, expected):
    assert expected in complaint(write(text))


def test_weights_with_a_validation_set_are_taken(write):
    config = load(write(PARQUET.replace("factory", "weights: models:/m/1, factory")), ["data.validation=v.parquet"])
    assert config.model.weights == "models:/m/1" and config.data.validation == "v.parquet"


def test_the_schema_takes_what_load_takes_and_refuses_what_it_refuses():
    validator = Draft202012Validator(schema())
    Draft202012Validator.check_schema(schema())
    for path in CONFIGS.glob("*.yaml"):
        assert validator.is_valid(yaml.load(path.read_text(), where=path.name))
    assert not validator.is_valid({"removal": {"budget": 3}})
    assert not validator.is_valid({"removal": {"budgt": 0.1}})


def test_every_key_says_in_the_schema_what_it_means():
    sections = [kind for kind in schema()["$defs"].values() if "properties" in kind]
    assert len(sections) == len(RunFile.model_fields) + 2  # and data.noise, and what search.space holds
    for section in sections:
        assert section["description"]
        assert all(field.get("description") for field in section["properties"].values())


def test_every_section_refuses_unknown_keys():
    assert all(kind.model_config.get("extra") == "forbid" for kind in Section.__subclasses__())


def test_differences_name_the_keys_with_old_and_new_value():
    old = load(None, ["model.arguments={width: 16}"])
    new = load(None, ["removal.budget=0.1", "data.noise=null", "model.arguments={depth: 2, width: 32}"])
    assert differences(old, new) == [
        'data.noise: {"kind": "pair", "rate": 0.3, "seed": 0, "matrix": null} -> null',
        "model.arguments.width: 16 -> 32",
        "model.arguments.depth: (not set) -> 2",
        "removal.budget: 0.05 -> 0.1",
    ]
    assert differences(old, old) == []


def test_a_section_made_in_python_is_checked_like_one_from_a_file():
    with pytest.raises(ValueError, match=r"needs data\.train"):
        Data(source="parquet")


def test_one_layer_is_a_list_of_one():
    assert load(None, ["probe.layers=hidden"]).probe.layers == ("hidden",)
    assert load(None, ["probe.layers=last"]).probe.layers == "last"


@pytest.mark.parametrize(
    ("overrides", "augment"),
    [
        ([], "none"),
        (["pretrain.augment=crop"], "crop"),
        (["pretrain.augment=crop", "refine.augment=none"], "none"),
        (["model.weights=own.pt"], "crop_flip"),
    ],
)
def test_refining_changes_images_as_pretraining_did(overrides: list[str], augment: str):
    assert load(None, overrides).refining.augment == augment


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("{removal.budgt: {uniform: [0.1, 0.2]}}", "search.space.removal.budgt: removal.budgt is not a key of "
         "a run file; did you mean removal.budget?"),
        ("{budget: {uniform: [0.1, 0.2]}}", "search.space.budget: budget is not a key of a run file; did you mean "),
        ("{run.seed: {integers: [0, 9]}}", "search.space.run.seed: a search varies keys of probe, removal, refine "
         "only; trials that differ in run could not be compared"),
        ("{data.noise.rate: {uniform: [0, 1]}}", "trials that differ in data could not be compared"),
        ("{model.head: {choice: [fc]}}", "trials that differ in model could not be compared"),
        ("{pretrain.epochs: {integers: [1, 2]}}", "trials that differ in pretrain could not be compared"),
        ("{search.trials: {integers: [1, 2]}}", "trials that differ in search could not be compared"),
        ("{removal.budget: {uniform: [0.1, 2]}}", "search.space.removal.budget: removal.budget = 2.0: should be less"),
        ("{removal.budget: {choice: [0.1, 0]}}", "search.space.removal.budget: removal.budget = 0: should be greater"),
        ("{removal.score: {choice: [loss, los]}}", "search.space.removal.score: removal.score = \"los\": should be "),
        ("{removal.max_rounds: {uniform: [1, 9]}}", "search.space.removal.max_rounds: removal.max_rounds = 4.0"),
        ("{removal.max_rounds: {integers: [0, 9]}}", "removal.max_rounds = 0: should be greater than or equal to 1"),
        ("{removal.max_rounds: {integers: [1, 4.5]}}", "search.space.removal.max_rounds.integers = [1, 4.5]: "),
        ("{removal.budget: {uniform: [0.2, 0.1]}}", "should be [lowest, highest], and 0.2 is not below 0.1"),
        ("{removal.budget: {loguniform: [0, 0.1]}}", "search.space.removal.budget.loguniform = [0, 0.1]: should be"),
        ("{removal.budget: {uniform: [0.1, x]}}", 'search.space.removal.budget.uniform = [0.1, "x"]: should be a val'),
        ("{removal.budget: {unifrm: [0.1, 0.2]}}", "search.space.removal.budget.unifrm is not a key of a run file; did "
         "you mean search.space.removal.budget.uniform?"),
        ("{removal.budget: {uniform: [0.1, 0.2], choice: [1]}}", "removal.budget = {\"uniform\": [0.1, 0.2], \"choice\""
         ": [1]}: should be exactly one of choice, uniform, loguniform, integers"),
        ("{removal.budget: {}}", "search.space.removal.budget = {}: should be exactly one of choice, uniform, "),
        ("{removal.budget: {uniform: null}}", "should be exactly one of choice, uniform, loguniform, integers"),
        ("{removal.budget: 3}", "search.space.removal.budget = 3: should be a mapping"),
        ("{}", "search.space = {}: "),
        ("3", "search.space = 3: should be a mapping"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_searched_is_refused_with_the_key(space, expected):
    assert expected in complaint(None, f"search.space={space}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.trials=0", "search.trials = 0: should be greater than or equal to 1"),
        ("search.metric=test_accuracy", "search.metric = \"test_accuracy\": should be 'validation_accuracy' or "),
        ("search.grace_rounds=0", "search.grace_rounds = 0: should be greater than or equal to 1"),
        ("search.reduction_factor=1.5", "search.reduction_factor = 1.5: should be greater than or equal to 2"),
        ("search.max_concurrent_trials=0", "search.max_concurrent_trials = 0: should be greater than or equal to 1"),
    ],
)
def test_a_search_is_checked_like_every_section(override, expected):
    assert expected in complaint(None, override)


def test_a_space_takes_the_place_of_the_default_and_survives_writing_and_reading(write):
    config = load(None, ["search.space.removal.budget={uniform: [0.1, 0.2]}", "search.trials=3"])
    assert list(config.search.space) == ["removal.budget"]
    assert load(write(dump(config))) == config
    nested = write("search: {space: {removal: {budget: {uniform: [0.1, 0.2]}}}}")
    assert load(nested, ["search.trials=3"]) == config
    assert differences(RunFile(search=config.search.model_copy(update={"trials": 8})), config) == [
        "search.trials: 8 -> 3"
    ]


def test_values_of_a_search_are_checked_and_leave_the_rest_of_the_run_file():
    before = load(None, ["removal.patience=3"])
    after = before.with_values({"removal.budget": 0.2, "probe.l2": 0.5})
    assert differences(before, after) == ["probe.l2: [1.0, 0.1, 0.01] -> [0.5]", "removal.budget: 0.05 -> 0.2"]
    with pytest.raises(ValueError, match="less than 1"):
        before.with_values({"removal.budget": 2})


def test_the_python_loader_refuses_what_the_command_refuses_and_takes_job_files(tmp_path: Path):
    large = tmp_path / "large.yaml"
    large.write_text("#" * 2**20 + "\nrun: {seed: 1}\n")
    for path, says in ((tmp_path / "nowhere.yaml", "no such run file"), (tmp_path, "cannot"), (large, "1,048,576")):
        with pytest.raises(ConfigError, match=says):
            posttrain.load(path)
    job = tmp_path / "job.yaml"
    job.write_text("job: {name: photos}\n")
    assert isinstance(posttrain.load(), RunFile) and not isinstance(posttrain.load(), JobFile)
    found = posttrain.load(job, {"run.seed": 3})
    assert isinstance(found, JobFile) and (found.job.name, found.run.seed) == ("photos", 3)
