"""Costs in bytes and seconds: equal to enumeration and to the packed file; and priors that ask by them."""

import dataclasses
import itertools
import json

import pytest
import torch
from models import tiny_bert

from pyro_blora.bops import expected_bops
from pyro_blora.config import RunConfig
from pyro_blora.cost_table import Times
from pyro_blora.costs import Cost, Term, latency, packed_bytes
from pyro_blora.gates import Gates
from pyro_blora.layout import BASE, HIDDEN, INPUT, LORA_A, LORA_B, AdapterLayout, Projection
from pyro_blora.priors import build_prior

WIDTHS = [2, 4, 8, 16, 32]


def projection(name, adapted, m=6, n=4):
    return Projection(name=name, type=name, layer=0, in_features=n, out_features=m, tokens=8.0, adapted=adapted)


def small(ladder=(2, 8, 32), **settings):
    """One adapted and one plain projection: few enough allocations to enumerate those of each."""
    return AdapterLayout(architecture="none", projections=(projection("query", True), projection("dense", False, 4, 6)),
                         rank=2, alpha=4, scope="encoder", sequence_length=8, model_macs=1e4, ladder=ladder,
                         **settings)  # fmt: skip


def table_of(layout, seed=0):
    """A table of random seconds for every shape of a layout."""
    random = torch.Generator().manual_seed(seed)
    shapes = {(p.out_features, p.in_features) for p in layout.projections}
    shapes |= {(layout.rank, p.in_features) for p in layout.projections} | {
        (p.out_features, layout.rank) for p in layout.projections}  # fmt: skip

    def seconds(*shape):
        return torch.rand(shape, generator=random).double().tolist()

    return {
        "schema": "costs", "version": 1, "machine": {"processor": "none", "threads": 1}, "rows": 8, "widths": WIDTHS,
        "rounding": [{"in": n, "seconds": seconds(5)} for n in sorted({n for _, n in shapes})],
        "products": [{"out": m, "in": n, "seconds": seconds(5, 5)} for m, n in sorted(shapes)],
    }  # fmt: skip


def marginals(layout, seed=0):
    random = torch.Generator().manual_seed(seed)
    return Gates(*(torch.rand(shape, generator=random).double().cumprod(-1)
                   for shape in (layout.z_shape, layout.g_shape)))  # fmt: skip


def of_depths(depths, most):
    return (torch.arange(most) < torch.as_tensor(depths)[..., None]).double()


def enumerated(cost, layout, means):
    """Mean of the cost of every allocation, by its probability; the projections' terms do not mix, so one by one."""
    L, T, K = layout.z_shape
    p_z = torch.nn.functional.pad(means.z, (1, 1)).clone()
    p_z[..., 0] = 1
    p_z = -p_z.diff(dim=-1)
    p_g = torch.nn.functional.pad(means.g, (1, 1)).clone()
    p_g[..., 0] = 1
    p_g = -p_g.diff(dim=-1)
    total = torch.zeros(L, dtype=torch.float64)
    states = [*itertools.product(*[range(K + 1)] * T, range(layout.rank))]
    depths, ranks = torch.tensor([s[:T] for s in states]), torch.tensor([s[T] for s in states])
    z, g = of_depths(depths, K)[:, None].expand(-1, L, -1, -1), of_depths(ranks, layout.rank - 1)[:, None]
    each = cost(z, g.expand(-1, L, -1))  # (S, L)
    for i in range(L):
        weight = torch.stack([p_z[i, t, depths[:, t]] for t in range(T)]).prod(0) * p_g[i, ranks]
        assert float(weight.sum()) == pytest.approx(1.0)
        total[i] = (weight * each[:, i]).sum()
    return total


@pytest.mark.parametrize("granularity", ("tensor", "channel"))
def test_an_expected_cost_is_that_of_every_allocation_by_its_probability(granularity):
    layout = small(granularity=granularity)
    means = marginals(layout)
    for cost in (packed_bytes(layout), latency(layout, Times(table_of(layout)))):
        torch.testing.assert_close(cost(*means), enumerated(cost, layout, means))


def test_bit_operations_have_the_same_form():
    layout = AdapterLayout.of(tiny_bert(), rank=3, scope="encoder", sequence_length=10, share_inputs=True)
    bits, macs, means = torch.tensor(layout.ladder).double(), layout.product_macs(), marginals(layout)
    products = {"W x": (INPUT, BASE, False), "A x": (INPUT, LORA_A, True), "B h": (HIDDEN, LORA_B, True)}
    cost = Cost(layout, "bytes", [
        Term(one, other, macs[name][:, None, None] * torch.outer(bits, bits), by_rank)
        for name, (one, other, by_rank) in products.items()
    ])  # fmt: skip
    value, ratio = cost.of(*means, "adapted")
    expected = expected_bops(layout, *means)
    torch.testing.assert_close((value, ratio), (expected.adapted, expected.adapted_ratio))


def test_bytes_are_those_of_a_packed_file(tmp_path):
    pytest.importorskip("peft")
    from packed_models import allocated
    from safetensors import safe_open

    from pyro_blora.deploy.packed import WEIGHTS
    from pyro_blora.deploy.packing import pack
    from pyro_blora.posterior import deployed

    for granularity in ("tensor", "channel"):
        program = allocated(tiny_bert, scope="encoder", granularity=granularity)
        layout, folder = program.layout, pack(program, tmp_path / granularity)
        on_disk = 0
        with safe_open(folder / WEIGHTS, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if any(name.startswith(f"{p.name}.") and not name.endswith((".weight", ".bias")) for p in
                       layout.projections):  # fmt: skip
                    on_disk += file.get_tensor(name).nbytes
        tensors = sum(5 if p.adapted else 2 for p in layout.projections)
        assert 0 <= on_disk - float(packed_bytes(layout)(*deployed(program)).sum()) < tensors  # a last byte each


@pytest.mark.parametrize("cost", ("bytes", "latency"))
def test_the_budget_of_another_cost_is_met(cost):
    layout = AdapterLayout.of(tiny_bert(), rank=3, scope="encoder", sequence_length=8)
    settings = {"times": rising(layout)} if cost == "latency" else {}
    prior = build_prior("budget", layout, {"cost": cost, "target": 0.4, "denominator": "gated", **settings})
    for _ in range(500):
        prior.adapt(Gates(*(q.mean[None] for q in prior())))
    spent = prior.spent(Gates(*(q.mean[None] for q in prior())))
    assert spent.ratio == pytest.approx(0.4, rel=0.02) and (spent.cost, spent.denominator) == (cost, "gated")
    assert not [name for name in prior.state_dict() if name.startswith("cost.")]


def tilted(prior, nats):
    """Marginals of the prior times a likelihood that loses so many nats for each width or rank that is closed."""
    logits = (q.depth_log_probs for q in prior())
    logits = [x - nats * torch.arange(x.shape[-1] - 1, -1, -1) for x in logits]
    return Gates(*(x.softmax(-1).flip(-1).cumsum(-1).flip(-1)[None, ..., 1:] for x in logits))


@pytest.mark.parametrize("nats", (0.0, 1.0, 30.0))
def test_pairs_of_gates_close_that_alone_would_save_nothing(nats):
    """From all gates open, where an input at 8 bit with a weight at 32 takes longer than both at 32."""
    layout = AdapterLayout.of(tiny_bert(), rank=3, scope="encoder", sequence_length=8)
    settings = {"cost": "latency", "target": 0.4, "denominator": "gated", "times": rising(layout)}
    prior = build_prior("budget", layout, settings)
    opened = Gates(*(torch.ones(1, *shape) for shape in (layout.z_shape, layout.g_shape)))
    prior.adapt(opened)
    for _ in range(500):
        means = tilted(prior, nats)
        prior.adapt(means)
    spent = prior.spent(means)
    assert spent.ratio == pytest.approx(0.4, rel=0.02) and prior.missed(means) is None
    assert prior.report()["rate"] < 1e5
    assert "was asked for 40.00% of the seconds" in prior.missed(opened)


def test_a_joint_price_is_the_mean_one_on_the_way_from_all_gates_closed():
    layout = small()
    prior = build_prior("budget", layout, {"cost": "latency", "target": 0.4, "denominator": "gated",
                                           "times": rising(layout)})  # fmt: skip
    means = marginals(layout)
    prior._follow(Gates(*(x[None] for x in means)))
    way = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    at = [(way.view(-1, *[1] * x.dim()) * x).requires_grad_() for x in means]
    each = torch.autograd.grad(prior._ratio(*at).sum(), at)
    for price, expected in zip((prior.z_price, prior.g_price), each, strict=True):
        torch.testing.assert_close(price, expected.mean(0).float())
    saved = prior._ratio(*means) - prior._ratio(*(torch.zeros_like(x) for x in means))
    paid = sum((p.double() * x).sum() for p, x in zip((prior.z_price, prior.g_price), means, strict=True))
    torch.testing.assert_close(paid, saved, rtol=1e-5, atol=1e-7)  # nothing is paid twice


def rising(layout):
    """A table as a machine has it: integer products where both have 8 bit or fewer."""
    table = table_of(layout)
    for each in table["rounding"]:
        each["seconds"] = [0.1, 0.1, 0.1, 0.5, 0.0]
    for each in table["products"]:
        each["seconds"] = [[1.0 if i < 3 and j < 3 else 4.0 for j in range(5)] for i in range(5)]
    return table


def test_bit_operations_stay_the_default_and_tell_no_other_cost():
    layout = small()
    prior = build_prior("budget", layout, {})
    assert prior.spent(marginals(layout)) is None and prior.cost is None and prior.target == 0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    (
        ({"cost": "watts"}, "one of bops, bytes, latency"),
        ({"cost": "bytes"}, "--prior.target"),
        ({"cost": "bytes", "target": 0.5, "denominator": "model"}, "'adapted' or 'gated'"),
        ({"cost": "bytes", "target": 0.001}, "target must be between"),
        ({"target": 0.5}, "--prior.bops"),
        ({"cost": "latency", "target": 0.5}, "measure-costs"),
        ({"cost": "bytes", "target": 0.5, "times": {}, "costs": "x.json"}, "drop one"),
        ({"cost": "latency", "target": 0.5, "costs": "nowhere.json"}, "no file nowhere.json"),
        ({"cost": "latency", "target": 0.5, "times": {"version": 2}}, "its version is 2"),
    ),
)
def test_what_does_not_fit_ends_in_a_sentence(settings, said):
    with pytest.raises(ValueError, match=said):
        build_prior("budget", small(), settings)


def test_a_table_of_another_model_or_ladder_is_refused():
    layout = small(ladder=tuple(WIDTHS))
    for change, said in (
        ({"products": []}, "products"), ({"widths": [2, 4]}, "seconds for its 2 widths"),
        ({"rows": "many"}, "rows"), ({"rounding": [{"in": 4, "seconds": [-1.0, 1.0]}]}, "rounding/0/seconds/0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Times({**table_of(layout), **change})
    others = Times(table_of(small()))
    with pytest.raises(ValueError, match="no 6 bit"):
        latency(small(ladder=(2, 6, 32)), others)
    with pytest.raises(ValueError, match="no product of 10 x 4"):
        latency(dataclasses.replace(layout, projections=(projection("key", True, 10),)), others)


def test_a_table_of_a_file_takes_its_place_in_the_configuration(tmp_path):
    path, table = tmp_path / "costs.json", table_of(small())
    path.write_text(json.dumps(table))
    settings = {"cost": "latency", "target": 0.5, "costs": str(path)}
    config = RunConfig(task="acceptability", prior="budget", prior_settings=settings)
    assert config.prior_settings == {"cost": "latency", "target": 0.5, "times": table}
    path.write_text("{}")
    with pytest.raises(ValueError, match="measure-costs"):
        RunConfig(task="acceptability", prior="budget", prior_settings=settings)
