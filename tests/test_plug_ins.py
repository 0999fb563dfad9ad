"""A run all of whose parts are functions in a user's file: it trains, is kept, loaded again and reported."""

import json

import pytest
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import load
from pyro_blora.__main__ import main
from pyro_blora.report import RunFiles, sections_of
from pyro_blora.run import train_run
from pyro_blora.testing import check_adapter, check_elbo, check_guide, check_prior, check_task, check_weights

pytestmark = pytest.mark.usefixtures("eager", "drawn")

OWN = '''
import datasets
import torch
from torch import nn

from pyro_blora import Gates, NestedBernoulli
from pyro_blora.adapters import gated
from pyro_blora.adapters.layers import GatedLinear
from pyro_blora.elbos import StraightThrough
from pyro_blora.guides import MeanField
from pyro_blora.registries import register_section
from pyro_blora.report import Section
from pyro_blora.tasks import Task
from pyro_blora.tasks.glue_metric import GlueScore
from pyro_blora.weights import Gaussian


def prior(layout, *, rate: float = 1.0):
    z, g = (torch.full(shape, rate) for shape in (layout.z_shape, layout.g_shape))
    return Gates(NestedBernoulli.from_rate(z), NestedBernoulli.from_rate(g))


class Even(nn.Module):
    """A prior that shares no code with the package's, and adapts."""

    def __init__(self, layout):
        super().__init__()
        self.shapes = layout.z_shape, layout.g_shape
        self.register_buffer("steps", torch.zeros(()))

    def forward(self):
        rates = ((1.0 + 0.01 * self.steps).expand(shape) for shape in self.shapes)
        return Gates(*(NestedBernoulli.from_rate(rate, validate_args=False) for rate in rates))

    def adapt(self, means):
        self.steps += 1

    def report(self):
        return {"steps_adapted": self.steps.item()}


def adapting(layout):
    return Even(layout)


def guide(layout, prior):
    return MeanField(layout, prior, 1.0)


class Scaled(GatedLinear):
    def start(self, *, first):
        self.lora_scale = nn.Parameter(torch.full((self.r["default"],), first))

    def low_rank(self):
        down, up = super().low_rank()
        return down, up * self.lora_scale


def adapter(backbone, layout, head, *, first: float = 1.0):
    return gated(backbone, layout, head, Scaled, start={"first": first})


def weights(weights, head, *, std: float = 0.01):
    return Gaussian({key: p for key, p in weights.items() if key[1] == "lora_A"}, head, None, std, 1.0)


class Averaged(StraightThrough):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def expected_nll(self, at):
        return sum(at.nll(gates) for gates in (at.gates, *(at.gates_of(0) for _ in range(self.count - 1)))) / self.count


def estimator(*, draws: int = 2):
    return Averaged(draws)


def load(*, glue_dir=None, seed=0, n_train=None):
    rows = [{"sentence": f"film {i} is {'fine' if i % 2 else 'dull'}", "label": i % 2} for i in range(60)]
    table = datasets.Dataset.from_list(rows)
    training = table.select(range(40)).shuffle(seed=seed).select(range(n_train or 40)).flatten_indices()
    return {"train": training, "eval": table.select(range(40, 60))}


def films(*, good: str = "fine"):
    return Task(name="films", text_columns=("sentence",), labels=("dull", good), metric_name="accuracy",
                make_metric=lambda: GlueScore("sst2"), load=load)


@register_section("What mine cost", place=15)
def cost(run, title):
    return Section(title, [f"It took {run.summary['seconds']['training']} seconds."])


def plain_section(run, title):
    return Section(title, ["Without a decorator."])
'''
KINDS = ("prior", "guide", "adapter", "weights", "estimator")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(OWN, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def config(own, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plug_ins")
    settings = {f"{kind}_settings": value for kind, value in (
        ("adapter", {"first": 2}), ("estimator", {"draws": 1}), ("task", {"good": "good"}), ("weights", {"std": 0.02}),
    )}  # fmt: skip
    named = {kind: f"{own}:{kind}" for kind in KINDS} | {"prior": f"{own}:adapting", "task": f"{own}:films"}
    backbone = save_tiny_backbone(folder / "backbone", letters=True)
    return tiny_config(backbone, **named, **settings, max_train=32, output_dir=str(folder / "runs"))


@pytest.fixture(scope="module")
def run(config):
    return train_run(config)


def test_the_parts_keep_what_they_must(own):
    check_prior(f"{own}:prior", settings={"rate": 2})
    check_prior(f"{own}:adapting")
    check_guide(f"{own}:guide")
    check_adapter(f"{own}:adapter", {"first": 3.0})
    check_weights(f"{own}:weights")
    assert check_elbo(f"{own}:estimator", {"draws": 3}).count == 3
    check_task(f"{own}:films")


def test_it_trains_and_every_part_is_in_use(run, own):
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert run.name.startswith("own.py_films-backbone-own.py_adapting-")
    assert summary["prior_state"]["steps_adapted"] == 4 - 1  # from the opening on, which is at the second step
    assert summary["weights"]["random"] > 0 and summary["task"] == f"{own}:films"
    kept = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert kept["adapter_settings"] == {"first": 2} and kept["estimator_settings"] == {"draws": 1}


def test_it_is_loaded_where_its_code_is_named_again(run, own):
    with pytest.raises(ValueError, match=r"names code, .*own.py.*code never runs because a file names it"):
        load(run)
    program = load(run, allow_code=[f"{own}:{name}" for name in (*KINDS, "adapting", "films")])
    layer = program.net.layers()[0]
    assert layer.lora_scale.shape == (4,) and bool((layer.lora_scale != 2.0).any()), "learned, and restored"
    assert type(program.prior).__name__ == "Even" and program.prior.adapts and program.prior.steps == 3
    assert program.likelihood.names == ("dull", "good")


def test_the_digest_is_that_of_the_files_content(config, own, tmp_path):
    import dataclasses

    other = tmp_path / "own.py"
    for kind in (*KINDS, "task"):
        other.write_text(OWN, encoding="utf-8")
        here = dataclasses.replace(config, **{kind: f"{other}:{getattr(config, kind).rpartition(':')[2]}"})
        before = here.digest
        other.write_text(OWN + "\n# edited\n", encoding="utf-8")
        assert here.digest != before, kind


def test_a_section_stands_at_its_place_of_the_page(run, own, forget, capsys):
    titles = [section.title for section in sections_of(RunFiles(run), [f"{own}:cost", f"{own}:plain_section"])]
    assert titles[:3] == ["In plain words", "What mine cost", "Gate map"]
    assert titles[-3:] == ["Plain section", "Repeat this run", "Glossary"]
    assert main(["report", str(run), "--section", f"{own}:cost"]) == 0
    assert "What mine cost" in (run / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(run), "--section", f"{own}:costs"]) == 2
    assert "has no 'costs': did you mean 'cost'?" in capsys.readouterr().err


def test_a_wrong_setting_of_any_kind_is_refused_before_anything_is_loaded(config, capsys):
    for kind in (*KINDS, "task"):
        argv = ["train", f"--{kind}", getattr(config, kind), f"--{kind}.other", "1"]
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert "unknown setting 'other'" in said, said
        assert said.splitlines()[-1].startswith(f"pyro-blora: error: {kind} "), said
