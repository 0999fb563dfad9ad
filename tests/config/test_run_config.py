"""Laws of the configuration: ranges, JSON there and back, a digest of what matters, presets."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_blora.__main__ import _parser, main
from pyro_blora.config import METHODS, NOT_IN_DIGEST, PRESETS, RunConfig, field_names, load_preset, preset_names
from pyro_blora.config.command_line import command_line, run_fields, take_settings
from pyro_blora.config.naming import portable

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
# One other value for every field, so that a law can be asked of each.
OTHER = {
    "task": "sst2", "backbone": "bert-base-uncased", "backbone_revision": "v1", "glue_dir": "/glue", "prior": "nested",
    "prior_settings": {"rate": 2}, "guide": "other", "guide_settings": {"scale": 0.1},
    "method": "rank_gates", "init_lora_weights": "eva", "average_over": "dropout",
    "estimator": "straight_through", "adapter": "lora", "rank": 4, "alpha": 8.0, "target_modules": ("query",),
    "scope": "encoder", "max_train": 64, "epochs": 1, "batch_size": 8, "accumulation": 2, "lr": 1e-4, "lr_head": 1e-3,
    "lr_gates": 1e-2, "lr_ranges": 1e-4, "weight_decay": 0.1, "warmup": 0.1, "kl_warmup": 0.5, "kl_weight": 0.5,
    "temperature_start": 0.4, "temperature_end": 0.2, "clip_norm": 0.5, "precision": "bf16",
    "group_by_length": True, "gradient_checkpointing": True, "share_inputs": True, "max_length": 64, "seed": 1,
    "data_seed": 3, "restarts": 2, "draws": 30, "output_dir": "other",
    "logging_steps": 1, "checkpoint_steps": 7, "checkpoint_minutes": 1.5, "max_skipped_steps": 3,
    "tracker": "tensorboard",
    "adapter_settings": {"svd": "randomized"}, "weights": "gaussian", "weights_settings": {"prior_std": 0.1},
    "validation": 0.1, "choose_epoch": True, "ood_task": "rte", "task_settings": {"column": "text"},
    "estimator_settings": {"draws": 2}, "gate_optimizer": "natural", "gated_dropout": False,
    "bit_widths": "2,3,4,6,8,16,32", "granularity": "channel",
    "distillation": 0.5, "rest": 0.1, "settle": 0.25, "smoothing": True, "embedding_bits": 8,
}  # fmt: skip
NEEDED = {"choose_epoch": {"validation": 0.1}}  # what else a field needs


def test_every_field_says_what_it_is():
    assert all(field.metadata["help"] for field in dataclasses.fields(RunConfig))


def test_every_field_is_in_the_table_of_this_test():
    assert set(OTHER) == set(field_names())


@pytest.mark.parametrize("values", [{}, OTHER], ids=["defaults", "others"])
def test_json_there_and_back_is_the_same_configuration(values):
    config = RunConfig(**values)
    back = RunConfig.from_json(config.to_json())
    assert back == config and back.digest == config.digest


def test_json_is_read_from_a_run_folder_and_its_versions_are_left_alone(tmp_path):
    config = RunConfig(seed=3)
    written = config.to_json(versions={"torch": "2.13.0"}, threads=2)
    (tmp_path / "config.json").write_text(written, encoding="utf-8")
    assert json.loads(written)["versions"] == {"torch": "2.13.0"} and json.loads(written)["threads"] == 2
    assert RunConfig.from_json(tmp_path / "config.json").digest == config.digest  # the machine is not the configuration
    assert RunConfig.from_json(tmp_path / "config.json") == config


def test_an_unknown_json_field_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown configuration field 'ranks': did you mean 'rank'"):
        RunConfig.from_json('{"ranks": 4}')


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "must be a JSON object, got list")])
def test_json_that_is_no_configuration_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_json(text)


@pytest.mark.parametrize(
    "name", [name for name in OTHER if RunConfig.__dataclass_fields__[name].default != OTHER[name]]
)
def test_the_digest_depends_on_what_changes_results_and_on_nothing_else(name):
    needed = NEEDED.get(name, {})
    changed = RunConfig(**{name: OTHER[name]}, **needed).digest != RunConfig(**needed).digest
    assert changed == (name not in NOT_IN_DIGEST)


def test_fields_that_came_later_leave_the_folders_of_older_runs_their_names():
    """With the estimator that was the default then."""
    assert RunConfig(estimator="relaxed").digest == "14745926"
    assert RunConfig(estimator="relaxed", task="sst2", method="lora", seed=3).digest == "4bbf442d"


@pytest.mark.parametrize(
    "changes, estimator",
    [
        ({}, "gauss_newton"),
        ({"guide": "mixture"}, "gauss_newton"),
        ({"guide": "point"}, "relaxed"),
        ({"guide": "mine.py:guide"}, "relaxed"),
        ({"method": "adalora"}, "relaxed"),
        ({"method": "dylora"}, "straight_through"),
        ({"gate_optimizer": "adam"}, "relaxed"),
        ({"estimator": "relaxed"}, "relaxed"),
    ],
)
def test_the_estimator_is_the_guides_own_unless_one_is_named(changes, estimator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def guide(layout, prior):\n    ...\n", encoding="utf-8")
    assert RunConfig(**changes).estimator == estimator


def test_a_task_proposes_what_a_user_can_refuse():
    e2e = {"task": "e2e", "task_settings": {"e2e_dir": "x"}}
    assert RunConfig(task="squad").max_length == 384 and RunConfig(task="squad", max_length=128).max_length == 128
    assert RunConfig(**e2e).group_by_length is True and RunConfig(**e2e, group_by_length=False).group_by_length is False
    assert (RunConfig().max_length, RunConfig().group_by_length) == (128, False)
    assert "--group_by_length false" in command_line(RunConfig(**e2e, group_by_length=False))
    assert "--group_by_length" not in command_line(RunConfig(**e2e))


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({"prior": "nested"}, (0.3, 0.0, 0.0)),
        ({}, (0.4, 0.0, 0.6)),
        ({"kl_warmup": 0.7}, (0.7, 0.0, 0.3)),  # a longer start
        ({"kl_warmup": 1.0}, (1.0, 0.0, 0.0)),
        ({"settle": 0.0}, (0.4, 0.0, 0.0)),
        ({"settle": 0.3}, (0.4, 0.0, 0.3)),
        ({"rest": 0.3}, (0.4, 0.3, 0.0)),  # who says how gates learn wants them to
        ({"rest": 0.3, "settle": 0.1}, (0.4, 0.3, 0.1)),
        ({"gate_optimizer": "adam"}, (0.4, 0.0, 0.0)),
        ({"estimator": "relaxed"}, (0.4, 0.0, 0.0)),
        ({"lr_gates": 0.05}, (0.4, 0.0, 0.0)),
        ({"lr_gates": 0.1}, (0.4, 0.0, 0.0)),  # who says what is the default has said it
        ({"gate_optimizer": "auto"}, (0.4, 0.0, 0.0)),
        ({"rest": 0.0}, (0.4, 0.0, 0.0)),
        ({"method": "bayesian_bits"}, (0.4, 0.0, 0.6)),
        ({"guide_settings": {"open_logit": 2.0}}, (0.4, 0.0, 0.0)),  # gates that do not start from the data
        ({"prior": "bops", "prior_settings": {"z": "budget"}}, (0.4, 0.0, 0.6)),
        ({"prior_settings": {"z": "nested", "g": "nested"}}, (0.3, 0.0, 0.0)),  # which leave nothing of it
    ],
    ids=str,
)
def test_a_budget_rests_where_its_gates_start_unless_told_otherwise(changes, phases):
    config = RunConfig(**{"prior": "budget", **changes})
    assert (config.kl_warmup, config.rest, config.settle) == phases
    again = RunConfig.from_json(config.to_json(versions={"torch": "2"}))
    assert again == config and again.digest == config.digest


def test_gates_of_a_run_from_before_they_rested_learned_from_start_to_end():
    config = RunConfig(prior="budget", rest=0.0, settle=0.0)
    written = json.loads(config.to_json(versions={"torch": "2"}))
    del written["rest"], written["settle"]
    assert RunConfig.from_json(json.dumps(written)) == config
    exported = portable(written)
    assert RunConfig.from_json(json.dumps(exported)).digest == config.digest  # which an adapter is held to


def test_the_digest_is_eight_hexadecimal_digits_of_the_value_not_of_its_spelling():
    one = RunConfig(lr=1, alpha=16, rank="8", prior_settings={"a": 1, "b": 2}, target_modules=["query", "value"])
    two = RunConfig(lr=1.0, alpha="16.0", rank=8.0, prior_settings={"b": 2.0, "a": 1.0}, target_modules="query, value")
    assert one.digest == two.digest and len(one.digest) == 8 and int(one.digest, 16) >= 0


def test_whole_numbers_become_floats_where_floats_are_meant():
    for field in dataclasses.fields(RunConfig):
        value = getattr(RunConfig(lr_head=1, weight_decay=0, clip_norm=1), field.name)
        assert field.type is not float or type(value) is float, field.name


@given(
    lr=st.floats(1e-8, 10),
    rank=st.integers(1, 512),
    settings=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False) | st.none()),
)
def test_any_valid_values_survive_json(lr, rank, settings):
    config = RunConfig(lr=lr, rank=rank, prior_settings=settings)
    assert RunConfig.from_json(config.to_json()) == config


@given(name=st.text(min_size=1, max_size=40))
def test_a_folder_name_is_a_file_name_on_every_system(name):
    parts = RunConfig(backbone=name, prior=name).folder_name.split("-")
    assert len(parts) == 4
    allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._"
    assert all(part and set(part) <= set(allowed) for part in parts)


def test_a_folder_name_shows_the_last_part_of_a_path():
    config = RunConfig(task="sst2", backbone="microsoft/deberta-v3-base", prior="laws/my_priors.py:late")
    assert config.folder_name == f"sst2-deberta_v3_base-my_priors.py_late-{config.digest}"
    assert RunConfig(backbone="/models/mine/").folder_name.split("-")[1] == "mine"
    assert RunConfig(backbone="..").folder_name.split("-")[1] == "local"


def test_a_folder_name_says_the_method(tmp_path):
    names = {method: RunConfig(method=method).folder_name for method in METHODS}
    assert all(
        name.startswith(f"acceptability-demo-{method}") for method, name in names.items() if method != "bayesian_lora"
    )
    assert names["bayesian_lora"].startswith("acceptability-demo-bops-")
    assert names["lora"] == f"acceptability-demo-lora-{RunConfig(method='lora').digest}"
    assert names["bayesian_bits"].startswith("acceptability-demo-bayesian_bits.bops+off-")


@pytest.mark.parametrize("left", ["{}", ".{}.partial"], ids=["finished", "interrupted"])
def test_a_run_of_an_older_version_is_found_by_the_name_it_has(tmp_path, left):
    config = RunConfig(method="lora", output_dir=str(tmp_path))
    older = f"acceptability-demo-fixed-{config.digest}"
    assert config.folder == tmp_path / config.folder_name
    (tmp_path / left.format(older)).mkdir()
    assert config.folder == tmp_path / older
    assert RunConfig(method="lora", seed=1, output_dir=str(tmp_path)).folder.name.startswith("acceptability-demo-lora-")
    (tmp_path / config.folder_name).mkdir()
    assert config.folder == tmp_path / config.folder_name


def test_a_home_that_nobody_has_is_a_name_like_any_other():
    assert RunConfig(prior="~nobody0/own.py:late").folder_name.split("-")[2] == "own.py_late"


def test_sites_with_priors_of_their_own_are_in_the_name(tmp_path):
    mixed = RunConfig(prior="bops", prior_settings={"g": "laws/own.py:late"})
    assert mixed.folder_name == f"acceptability-demo-bops+own.py_late-{mixed.digest}"
    assert RunConfig(prior="bops", prior_settings={"g": "bops", "z": "bops"}).prior_names == ["bops"]
    file = tmp_path / "own.py"
    config = RunConfig(prior_settings={"z": f"{file}:late"})
    digests = [file.write_text(text) and config.digest for text in ("late = 1", "late = 2")]
    assert digests[0] != digests[1]  # the law is what the file says


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank must be from 1 to 65,536, got 0: "),
        ({"rank": 2.5}, "rank must be a whole number, got 2.5"),
        ({"rank": True}, "rank must be a whole number, got True"),
        ({"rank": None}, "rank must be a whole number, got None"),
        ({"alpha": 0}, "alpha must be a positive number, got 0.0"),
        ({"max_train": 0}, "max_train must be at least 1, got 0"),
        ({"max_train": "x"}, "max_train must be a whole number or none, got 'x'"),
        ({"epochs": 0}, "epochs must be from 1 to 100,000"),
        ({"batch_size": -1}, "batch_size must be from 1 to 65,536"),
        ({"accumulation": 0}, "accumulation must be from 1 to 65,536"),
        ({"lr": 0}, "lr must be a positive number"),
        ({"lr": float("inf")}, "lr must be a positive number"),
        ({"lr": float("nan")}, "lr must be a number or none, got nan"),
        ({"lr": "fast"}, "lr must be a number or none, got 'fast'"),
        ({"lr_head": 0}, "lr_head must be a positive number"),
        ({"lr_gates": -1}, "lr_gates must be 0 or a positive number"),
        ({"lr_ranges": -1}, "lr_ranges must be 0 or a positive number"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or a positive number"),
        ({"warmup": 100}, "warmup must be between 0 and 1, got 100.0: it is a fraction"),
        ({"kl_warmup": -0.1}, "kl_warmup must be between 0 and 1"),
        ({"estimator": "enumerate", "distillation": 0.5}, "has no draw at which a teacher answers: drop one"),
        ({"kl_weight": 0}, "kl_weight must be a positive number, got 0.0: 1 is the ELBO"),
        ({"temperature_end": 0}, "temperature_end must be a positive number"),
        ({"temperature_start": 0.05}, "temperature_end must be at most temperature_start"),
        ({"clip_norm": 0}, "clip_norm must be a positive number"),
        ({"max_length": 3}, "max_length must be from 4 to 131,072"),
        ({"seed": -1}, "seed must be between 0 and 4294967295"),
        ({"seed": 2**32}, "seed must be between 0 and 4294967295"),
        ({"draws": 0}, "draws must be from 1 to 100,000"),
        ({"logging_steps": 0}, "logging_steps must be at least 1"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be at least 1"),
        ({"task": ""}, "task must be a name"),
        ({"backbone": 3}, "backbone must be a word, got 3"),
        ({"gradient_checkpointing": "maybe"}, "gradient_checkpointing must be true or false"),
        ({"scope": "encoders"}, "unknown scope 'encoders': did you mean 'encoder'"),
        ({"precision": "bf1"}, "unknown precision 'bf1': did you mean 'bf16'"),
        ({"prior_settings": {"rate": {1, 2}}}, "prior_settings must hold plain numbers"),
        ({"prior_settings": {"rate": float("nan")}}, "prior_settings must hold plain numbers"),
        ({"prior_settings": 3}, "prior_settings must be a table of settings"),
        ({"target_modules": ["query", 3]}, "target_modules must be names of modules"),
        ({"target_modules": ()}, "target_modules must be names of modules"),
        ({"target_modules": "(query"}, "is no regular expression"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(values, message):
    with pytest.raises(ValueError) as error:
        RunConfig(**values)
    assert message in str(error.value)


WORDS = [f.name for f in dataclasses.fields(RunConfig) if "str" in str(f.type)]


@pytest.mark.parametrize("name", WORDS)
def test_a_word_that_is_empty_is_refused(name):
    """It is what a shell makes of a variable that is not set."""
    with pytest.raises(ValueError, match=f"{name}.* ''"):
        RunConfig(**{name: ""}).require_known()


@pytest.mark.parametrize("name", ["fp16", "float16", "half"])
def test_half_precision_is_refused_with_the_remedy(name):
    with pytest.raises(ValueError, match=r"is refused: .* use bf16"):
        RunConfig(precision=name)


@pytest.mark.parametrize("values", [{"rank": 1}, {"seed": 2**32 - 1}, {"warmup": 1}, {"lr_gates": 0}, {"max_length": 4},
                                    {"temperature_start": 0.1, "temperature_end": 0.1}])  # fmt: skip
def test_the_edge_of_a_range_is_in_it(values):
    config = RunConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("given_value", "stored"),
    [
        ("query", ("query",)),
        ("query, value", ("query", "value")),
        (["query", "layer.0.value"], ("query", "layer.0.value")),
        (r".*\.(query|value)", r".*\.(query|value)"),
        (r".*layer\.\d{1,2}.*", r".*layer\.\d{1,2}.*"),
        (None, None),
    ],
)
def test_target_modules_are_names_or_one_regular_expression(given_value, stored):
    assert RunConfig(target_modules=given_value).target_modules == stored


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"estimator": "relax"}, "unknown estimator 'relax': did you mean 'relaxed'"),
        ({"adapter": "dora"}, "unknown adapter 'dora': did you mean 'lora'"),
        ({"prior": "bop"}, "unknown prior 'bop': did you mean 'bops'"),
        ({"prior_settings": {"g": "dept"}}, "unknown prior 'dept': did you mean 'depth'"),
        ({"guide": "meanfield"}, "unknown guide 'meanfield': did you mean 'mean_field'"),
        ({"weights": "swagg"}, "unknown weights 'swagg': did you mean 'swag'"),
        ({"task": "sst"}, "unknown task 'sst': did you mean 'sst2'"),
    ],
)
def test_a_part_that_nobody_registered_is_refused_with_the_nearest(values, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**values).require_known()


def test_parts_in_files_and_closed_sites_are_known():
    RunConfig(prior="own.py:late", prior_settings={"g": "off"}, estimator="own.py:mine").require_known()


def test_settings_are_copied_in():
    settings = {"rate": 3}
    config = RunConfig(prior_settings=settings)
    settings["rate"] = 4
    assert config.prior_settings == {"rate": 3}


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().rank = 4


def test_there_is_a_preset_for_the_demo_and_for_every_glue_task():
    assert preset_names() == sorted([*GLUE, "demo", "blora_xs", "choice", "protein_pairs"])


@pytest.mark.parametrize("name", ["demo", *GLUE])
def test_a_preset_is_a_valid_configuration_and_explains_itself(name):
    config = RunConfig(**load_preset(name))
    assert config.task == ("acceptability" if name == "demo" else name)
    assert config.backbone == ("demo" if name == "demo" else "microsoft/deberta-v3-base")
    lines = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert all("# " in line for line in lines)
    assert any("Expected" in line or "Published, not measured here" in line for line in lines)
    assert any("Hardware" in line for line in lines)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_preset_file_speaks_the_flags(tmp_path):
    path = write(tmp_path / "mine.yaml", "task: rte\nprior.rate: 3\nlr: 1e-3\nguide.scale: 0.1\nmax_train: null\n")
    fields = load_preset(path)
    assert fields["prior_settings"] == {"rate": 3} and fields["guide_settings"] == {"scale": 0.1}
    assert RunConfig(**fields).lr == 1e-3


def test_a_preset_file_speaks_the_flags_of_tasks(tmp_path):
    fields = load_preset(write(tmp_path / "mine.yaml", "data: reviews.csv\ntext: '#1'\ntask.kind: normal\n"))
    config = RunConfig(**fields)
    assert config.task == "files"
    assert config.task_settings == {"data": "reviews.csv", "text": "#1", "kind": "normal"}
    for more, sentence in (
        ("task: sst2\n", "data is of task files, not of 'sst2': drop one"),
        ("task.data: a.csv\n", "data and task.data are one setting: give it once"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_preset(write(tmp_path / "mine.yaml", f"data: reviews.csv\n{more}"))


def test_an_empty_preset_sets_nothing(tmp_path):
    assert load_preset(write(tmp_path / "empty.yaml", "# nothing yet\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: rte\nranks: 4\n", r"mine\.yaml, line 2: unknown key 'ranks': did you mean 'rank'"),
        ("task: rte\nrank: 4\nrank: 8\n", r"mine\.yaml, line 3: 'rank' is given twice"),
        ("task: [rte\n", r"mine\.yaml is not YAML"),
        ("- rte\n", r"mine\.yaml must be a table"),
        ("adapters.rate: 3\n", r"line 1: unknown key 'adapters\.rate'"),
        ("task: !!python/object/apply:os.getcwd []\n", r"mine\.yaml, line 1: could not determine a constructor"),
    ],
)
def test_a_preset_that_is_wrong_is_refused_by_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_preset(write(tmp_path / "mine.yaml", text))


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown preset 'colla': did you mean 'cola'"):
        load_preset("colla")


def test_the_digest_sees_the_file_of_a_users_law(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def law(layout): ...")
    first = RunConfig(prior=f"{file}:law").digest
    assert RunConfig(prior=f"{file}:law").digest == first
    file.write_text("def law(layout): return None")
    assert RunConfig(prior=f"{file}:law").digest != first


def test_a_field_that_was_taken_out_is_read_where_it_did_nothing(tmp_path):
    config = RunConfig()
    older = {**dataclasses.asdict(config), "attention": "softmax"}
    assert RunConfig.from_dict(older) == config
    written = tmp_path / "config.json"
    written.write_text(json.dumps({**older, "versions": {"torch": "2"}}), encoding="utf-8")
    assert RunConfig.from_json(written) == config and RunConfig(**load_preset(str(written))) == config
    with pytest.raises(ValueError, match="attention 'softmax1' was taken out, as it did not pay"):
        RunConfig.from_dict({**older, "attention": "softmax1"})


def test_a_flag_that_was_taken_out_says_so(capsys):
    assert main(["train", "--attention", "softmax1"]) == 2
    assert "unknown argument '--attention': it was taken out, as it did not pay" in capsys.readouterr().err


def test_a_run_is_repeated_by_its_own_file_where_the_line_would_be_long(tmp_path):
    widths = {f"{i}.query": {"input": 8, "base": 4, "rank": 8} for i in range(30)}
    config = RunConfig(prior="allocation", prior_settings={"widths": widths}, seed=3)
    written = tmp_path / "config.json"
    written.write_text(config.to_json(versions={"torch": "2"}, threads=2), encoding="utf-8")
    assert RunConfig(**load_preset(str(written))) == config
    again = dataclasses.replace(config, seed=4)
    assert command_line(again, written) == f"pyro-blora train --preset {written} --seed 4"
    assert command_line(RunConfig(prior="budget"), written) == command_line(RunConfig(prior="budget"))


def test_a_tilde_of_output_dir_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunConfig(output_dir="~/runs").folder.parent == tmp_path / "runs"


GIVEN = [
    {"prior": "budget", "settle": 0.0}, {"prior": "budget", "kl_warmup": 0.3}, {"prior": "budget", "rest": 0.2},
    {"adapter": "xs", "lr": 1e-3}, {"gate_optimizer": "adam"}, {"gate_optimizer": "adam", "estimator": "gauss_newton"},
    {"guide": "point"}, {"guide": "point", "estimator": "gauss_newton"}, {"method": "full", "lr": 1e-3},
    {"method": "dylora", "kl_warmup": 0.3}, {"method": "ptq"}, {"prior_settings": {"z": "off"}}, {"backbone": "none"},
    {"weights": "ensemble", "weights_settings": {"members": 3}}, {"target_modules": "all-linear"}, {"settle": 0.3},
]  # fmt: skip


def read_back(line):
    settings, rest = take_settings(shlex.split(line)[1:])
    arguments, left = _parser().parse_known_args(rest)
    assert not left
    return RunConfig(**run_fields(arguments, settings))


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_the_line_of_a_configuration_makes_it_again(given):
    """Also where a value is the default of other parts than it has."""
    config = RunConfig(**given)
    assert read_back(command_line(config)) == config


def test_a_line_leaves_out_what_its_parts_propose():
    line = command_line(RunConfig(prior="budget"))
    assert "--prior budget" in line and "settle" not in line and "kl_warmup" not in line
    assert "estimator" not in command_line(RunConfig(guide="uniform_rank"))


@pytest.mark.parametrize(
    ("before", "line", "same"),
    [
        ({"method": "mc_dropout"}, "--method lora", {"method": "lora"}),
        ({"method": "eva"}, "--method lora", {"method": "lora"}),
        ({"method": "no_dropout", "rank": 4}, "--method lora", {"method": "lora", "rank": 4}),
        ({"method": "lora"}, "--method bayesian_lora", {}),
        ({"method": "dylora", "seed": 3}, "--method bayesian_lora", {"seed": 3}),
        ({"prior_settings": {"rate": 3}}, "--method lora", {"method": "lora"}),
        ({"prior": "budget"}, "--prior bops", {}),
        ({"prior": "budget", "settle": 0.25}, "--prior bops", {"settle": 0.25}),
        ({"adapter": "xs"}, "--adapter lora", {}),
        ({"weights": "dropout"}, "--weights point", {}),
        ({"guide": "uniform_rank"}, "--guide mean_field", {}),
        ({"prior": "budget"}, "--rank 4", {"prior": "budget", "rank": 4}),
    ],
    ids=str,
)
def test_a_run_with_another_part_has_nothing_of_the_one_that_it_had(tmp_path, before, line, same):
    (tmp_path / "config.json").write_text(RunConfig(**before).to_json(), encoding="utf-8")
    found = read_back(f"pyro-blora train --preset {tmp_path / 'config.json'} {line}")
    assert found == RunConfig(**same)


def test_whole_numbers_beyond_a_float_have_digests_of_their_own():
    of = [RunConfig(prior="random", prior_settings={"seed": 2**53 + i}).digest for i in range(2)]
    assert of[0] != of[1]
    assert RunConfig(prior_settings={"rate": 3}).digest == RunConfig(prior_settings={"rate": 3.0}).digest


def test_an_empty_preset_is_refused(capsys):
    assert main(["train", "--preset", ""]) == 2
    assert "unknown preset ''" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [
    {"prior": "budget"}, {"adapter": "xs"}, {"guide": "fixed_rank"}, {"gate_optimizer": "adam"}, {"method": "adalora"},
    {"prior": "budget", "kl_warmup": 0.7}, {"method": "bayesian_lora", "prior": "nested"},
])  # fmt: skip
@pytest.mark.parametrize("first", [{}, {"seed": 3, "lr": 2e-3}, {"prior": "budget"}, {"prior_settings": {"rate": 2}}])
def test_what_is_replaced_is_as_if_it_had_been_given_at_once(first, changes):
    """Of another prior other settings are wrong, so they go with it."""
    changes |= {"prior_settings": {}} if "prior_settings" in first and "prior" in changes else {}
    if "prior" in first and "method" in changes and "prior" not in changes:
        return  # a method that has a prior of its own
    config = RunConfig(**first)
    assert config.replace(**changes) == RunConfig(**first | changes) and config == RunConfig(**first)
    assert config.replace(**changes).replace(seed=9) == RunConfig(**first | changes | {"seed": 9})


def test_numbers_of_numpy_and_paths_are_numbers_and_texts(tmp_path):
    of_numpy = RunConfig(
        rank=np.int64(4), epochs=np.int32(3), lr=np.float64(1e-3), share_inputs=np.bool_(True),
        prior_settings={"rate": np.int64(2)}, task="files", task_settings={"data": tmp_path / "x.csv"},
    )  # fmt: skip
    plain = RunConfig(
        rank=4, epochs=3, lr=1e-3, share_inputs=True, prior_settings={"rate": 2}, task="files",
        task_settings={"data": str(tmp_path / "x.csv")},
    )  # fmt: skip
    assert of_numpy == plain and of_numpy.to_json() == plain.to_json() and type(of_numpy.rank) is int
    for wrong in (np.array([1, 2]), object()):
        with pytest.raises(ValueError, match="prior_settings must hold plain numbers, words and lists"):
            RunConfig(prior_settings={"rate": wrong})
