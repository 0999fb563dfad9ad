"""Laws of the layout and of its bit operations, against formulas written by hand and enumeration."""

import itertools
import json

import pytest
import torch
from models import deberta_v3_base, random_chains, tiny_bert, tiny_deberta, tiny_distilbert, tiny_roberta

from pyro_blora.adapters import open_gates
from pyro_blora.bops import expected_bits, expected_bops, expected_rank, savings
from pyro_blora.gates import NestedBernoulli
from pyro_blora.layout import LADDER, TENSORS, AdapterLayout, Projection
from pyro_blora.models import head_modules

LENGTH = 10
ENCODER_TYPES = {
    tiny_bert: ["query", "key", "value", "attention.output", "intermediate", "output"],
    tiny_roberta: ["query", "key", "value", "attention.output", "intermediate", "output"],
    tiny_deberta: ["query", "key", "value", "attention.output", "intermediate", "output"],
    tiny_distilbert: ["query", "key", "value", "attention.output", "lin1", "lin2"],
}


def layout_of(model, **settings):
    return AdapterLayout.of(model, sequence_length=LENGTH, **{"rank": 4, **settings})


@pytest.fixture(scope="module", params=[None, "encoder"], ids=["adapted", "encoder"])
def layout(request):
    return layout_of(tiny_bert(), scope=request.param or "adapted")


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        model = deberta_v3_base()
    assert sum(p.numel() for p in model.parameters()) == 184_423_682
    return model


def at_bits(layout, bits):
    chain = torch.tensor([float(b <= bits) for b in layout.ladder[1:]])
    return chain.expand(layout.z_shape), torch.ones(layout.g_shape)


# --- what carries gates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ENCODER_TYPES, ids=lambda build: build.__name__)
def test_the_preset_adapts_query_key_and_value_of_every_layer(build):
    layout = layout_of(build())
    assert [(p.type, p.layer) for p in layout.projections] == [
        (t, layer) for layer in (0, 1) for t in ("query", "key", "value")
    ]
    assert all(p.adapted and (p.in_features, p.out_features) == (32, 32) for p in layout.projections)
    assert layout.z_shape == (6, 5, 4) and layout.g_shape == (6, 3)


@pytest.mark.parametrize("build", ENCODER_TYPES, ids=lambda build: build.__name__)
def test_scope_encoder_takes_every_linear_map_but_the_head(build):
    model = build()
    layout = layout_of(model, scope="encoder")
    assert [p.type for p in layout.projections] == 2 * ENCODER_TYPES[build]
    assert [p.adapted for p in layout.projections] == 2 * [True, True, True, False, False, False]
    names = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    left = names - {p.name for p in layout.projections}
    assert left and all(any(name.startswith(head) for head in head_modules(model)) for name in left)


def test_tensors_exist_where_there_is_an_adapter(layout):
    for projection, tensors, has_ranks in zip(layout.projections, layout.z_mask, layout.g_mask, strict=True):
        existing = [t for t, exists in zip(TENSORS, tensors, strict=True) if exists]
        assert existing == (list(TENSORS) if projection.adapted else ["input", "base"])
        assert bool(has_ranks) == projection.adapted
    assert int(layout.g_mask.sum()) == len(layout.adapted) == 6


def test_targets_are_names_or_one_regular_expression():
    by_name = layout_of(tiny_bert(), target_modules=["query", "intermediate.dense"])
    assert [p.type for p in by_name.projections] == 2 * ["query", "intermediate"]
    by_regex = layout_of(tiny_bert(), target_modules=r".*layer\.1\.attention\.self\.(query|value)")
    assert [(p.type, p.layer) for p in by_regex.projections] == [("query", 1), ("value", 1)]


def test_a_regular_expression_leaves_the_head_alone():
    names = [p.name for p in layout_of(tiny_bert(), target_modules=r".*dense").projections]
    assert len(names) == 6 and "bert.pooler.dense" not in names


# --- costs ------------------------------------------------------------------------------------------------------------


def test_macs_of_a_tiny_bert_equal_the_formula(layout):
    attention_products = 2 * LENGTH * LENGTH * 32
    layer = LENGTH * (4 * 32 * 32 + 2 * 32 * 64) + attention_products
    head = 32 * 32 + 32 * 2  # pooler and classifier see one token
    assert layout.model_macs == 2 * layer + head
    for p, macs in zip(layout.projections, layout.macs, strict=True):
        assert p.tokens == LENGTH and macs == LENGTH * p.in_features * p.out_features
    expected = [[LENGTH * 32, LENGTH * 32] if p.adapted else [0, 0] for p in layout.projections]
    assert layout.rank_macs.tolist() == expected


def test_tensor_macs_are_those_of_the_products_it_takes_part_in(layout):
    for p, row in zip(layout.projections, layout.tensor_macs.tolist(), strict=True):
        down, up = (4 * LENGTH * p.in_features, 4 * LENGTH * p.out_features) if p.adapted else (0, 0)
        assert row == [p.macs + down, p.macs, down, up, up]


def test_deberta_counts_its_positional_stream():
    layout, positions = layout_of(tiny_deberta()), 2 * 8 / 32  # of each example in a batch of 32
    tokens = {p.type: p.tokens for p in layout.projections}
    assert tokens == {"query": LENGTH + positions, "key": LENGTH + positions, "value": LENGTH}
    linear = 32 * 32 * (2 * (LENGTH + positions) + 2 * LENGTH) + LENGTH * 2 * 32 * 64
    products = 2 * LENGTH * LENGTH * 32 + 2 * LENGTH * 2 * 8 * 32  # content; content by position, both ways
    assert layout.model_macs == 2 * (linear + products) + 32 * 32 + 32 * 2


def test_deberta_v3_base_has_36_adapted_projections_and_the_macs_of_the_formula(full_size):
    layout = AdapterLayout.of(full_size, rank=8)
    assert len(layout.projections) == len(layout.adapted) == 36 and layout.sequence_length == 128
    assert {(p.type, p.tokens, p.macs) for p in layout.projections} == {
        ("query", 128 + 512 / 32, 144 * 768 * 768),
        ("key", 128 + 512 / 32, 144 * 768 * 768),
        ("value", 128, 128 * 768 * 768),
    }
    linear = 768 * 768 * (2 * 144 + 2 * 128) + 128 * 2 * 768 * 3072
    products = 2 * 128 * 128 * 768 + 2 * 128 * 512 * 768
    assert layout.model_macs == 12 * (linear + products) + 768 * 768 + 768 * 2
    assert sum(8 * (p.in_features + p.out_features) for p in layout.adapted) == 442_368


def test_scope_encoder_of_deberta_v3_base_has_72_projections(full_size):
    layout = AdapterLayout.of(full_size, rank=8, scope="encoder")
    assert len(layout.projections) == 72 and len(layout.adapted) == 36


def test_a_layout_survives_json(layout):
    again = AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout and again.z_shape == layout.z_shape
    assert torch.equal(again.tensor_macs, layout.tensor_macs)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["query", "qery"], ["ery"], r"layer\.7\..*", [], ["classifier"], ["embeddings"]])
def test_targets_that_match_nothing_are_answered_with_what_exists(targets):
    with pytest.raises(ValueError, match="match no linear layer") as error:
        layout_of(tiny_bert(), target_modules=targets)
    assert "dense (6), key (2), query (2), value (2)" in str(error.value)
    assert "'query'" not in str(error.value)  # only what is missing is named


def test_a_single_name_is_said_to_be_a_regular_expression():
    with pytest.raises(ValueError, match=r"'query' .one string is a regular expression"):
        layout_of(tiny_bert(), target_modules="query")


def test_an_expression_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no regular expression"):
        layout_of(tiny_bert(), target_modules="(query")


def test_an_architecture_without_a_preset_asks_for_targets():
    model = tiny_bert()
    model.config.model_type = "novel"
    with pytest.raises(ValueError, match=r"no preset .* 'novel': pass target_modules"):
        layout_of(model)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8", None])
def test_a_rank_that_is_no_whole_number_above_zero_is_refused(rank):
    with pytest.raises(ValueError, match="rank must be a whole number"):
        layout_of(tiny_bert(), rank=rank)


def test_a_rank_above_the_size_of_a_target_is_refused():
    assert layout_of(tiny_bert(), rank=32).rank == 32
    with pytest.raises(ValueError, match=r"rank 33 exceeds .*query .*at most 32"):
        layout_of(tiny_bert(), rank=33)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="unknown scope 'all': known scopes are adapted, encoder"):
        layout_of(tiny_bert(), scope="all")


# --- bit operations ---------------------------------------------------------------------------------------------------


def test_expected_bops_equal_the_average_over_all_gate_states():
    def projection(name, n, m, adapted):
        return Projection(
            name=name, type="query", layer=0, in_features=n, out_features=m, tokens=7, adapted=adapted
        )  # fmt: skip

    layout = AdapterLayout(
        architecture="toy", projections=(projection("a", 5, 3, True), projection("b", 4, 6, False)), rank=3, alpha=1.0,
        scope="encoder", sequence_length=7, model_macs=1000, ladder=(2, 32),
    )  # fmt: skip
    torch.manual_seed(0)
    z, g = torch.rand(layout.z_shape, dtype=torch.float64), torch.rand(layout.g_shape, dtype=torch.float64)
    bit = {0: 2, 1: 32}
    adapted = model = total = 0.0
    ranks = NestedBernoulli(g[0].log()).depth_probs.tolist()
    for *gates, depth in itertools.product(*[(0, 1)] * 7, (0, 1, 2)):
        a, b = gates[:5], gates[5:]
        probs = [*z[0, :, 0].tolist(), *z[1, :2, 0].tolist()]
        weight = ranks[depth]
        for gate, p in zip(gates, probs, strict=True):
            weight *= p if gate else 1 - p
        x, base, lora_a, lora_b, hidden = (bit[gate] for gate in a)
        cost = 7 * 5 * 3 * x * base + (1 + depth) * (7 * 5 * x * lora_a + 7 * 3 * hidden * lora_b)
        adapted += weight * cost
        rest = (1000 - 7 * 5 * 3 - 7 * 4 * 6) * 32 * 32
        model += weight * (cost + 7 * 4 * 6 * bit[b[0]] * bit[b[1]] + rest)
        total += weight
    assert total == pytest.approx(1.0)
    exact = expected_bops(layout, NestedBernoulli(z.log()).mean, NestedBernoulli(g.log()).mean)
    assert exact.adapted.item() == pytest.approx(adapted, rel=1e-12)
    assert exact.model.item() == pytest.approx(model, rel=1e-12)
    adapters = 3 * 7 * (5 + 3)
    assert exact.adapted_ratio.item() == pytest.approx(adapted / (1024 * (7 * 15 + adapters)), rel=1e-12)
    assert exact.model_ratio.item() == pytest.approx(model / (1024 * (1000 + adapters)), rel=1e-12)


def test_an_open_model_is_one_of_either_denominator(layout):
    bops = expected_bops(layout, *open_gates(layout))
    assert bops.adapted_ratio == 1 and bops.model_ratio == 1


@pytest.mark.parametrize("bits", LADDER)
def test_a_uniform_width_costs_its_square_of_the_adapted_projections(layout, bits):
    bops = expected_bops(layout, *at_bits(layout, bits))
    assert bops.adapted_ratio.item() == pytest.approx(bits**2 / 1024)  # 8 bit: 6.25 %
    gated = layout.macs.sum() + 4 * layout.rank_macs.sum()
    saved = (1 - bits**2 / 1024) * gated / (layout.model_macs + 4 * layout.rank_macs.sum())
    assert bops.model_ratio.item() == pytest.approx(1 - saved.item())


def test_ranks_cost_in_proportion(layout):
    z, _ = at_bits(layout, 32)
    one, all_ranks = (expected_bops(layout, z, value(layout.g_shape)) for value in (torch.zeros, torch.ones))
    difference = (all_ranks.adapted - one.adapted).item()
    assert difference == 3 * 6 * (LENGTH * 32 + LENGTH * 32) * 1024


def test_draws_broadcast_and_average_to_the_exact_expectation(layout):
    torch.manual_seed(0)
    z = NestedBernoulli.from_rate(torch.rand(layout.z_shape))
    g = NestedBernoulli.from_rate(torch.rand(layout.g_shape))
    draws = expected_bops(layout, z.sample((4000,)), g.sample((4000,)))
    assert all(field.shape == (4000,) for field in draws)
    exact = expected_bops(layout, z.mean, g.mean)
    for sampled, mean in zip(draws, exact, strict=True):
        assert abs(sampled.mean() - mean) < 4 * sampled.std() / 4000**0.5
    single = expected_bops(layout, z.sample((2, 3)), g.sample((2, 3)))
    assert single.adapted.shape == (2, 3)


def test_moments_of_draws_are_bits_and_ranks(layout):
    z, g = random_chains(layout.z_shape), random_chains(layout.g_shape, seed=1)
    ladder = torch.tensor(LADDER)
    assert torch.equal(expected_bits(layout, z), ladder[z.sum(-1).long()].float())
    assert torch.equal(expected_rank(g), 1 + g.sum(-1))


def test_masked_gates_cost_nothing():
    layout = layout_of(tiny_bert(), scope="encoder")
    z, g = open_gates(layout)
    changed_z = torch.where(layout.z_mask[..., None], z, 0.0)
    changed_g = torch.where(layout.g_mask[..., None], g, 0.0)
    assert not torch.equal(changed_z, z) and not torch.equal(changed_g, g)
    assert expected_bops(layout, changed_z, changed_g) == expected_bops(layout, z, g)


def test_gates_of_another_layout_are_refused(layout):
    z, g = open_gates(layout)
    for bad in ((z[:-1], g), (z, g[..., :-1]), (z[:, :1], g), (z[..., 0], g)):
        with pytest.raises(ValueError, match="do not fit this layout"):
            expected_bops(layout, *bad)


# --- inputs that query, key and value share ---------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_bert, tiny_deberta, tiny_distilbert])
@pytest.mark.parametrize("scope", ["adapted", "encoder"])
def test_shared_inputs_cost_what_equal_inputs_cost(build, scope):
    model = build()
    shared, own = (layout_of(model, scope=scope, share_inputs=share) for share in (True, False))
    kinds = [p.type for p in shared.projections]
    for i, owner in enumerate(shared.input_owner.tolist()):
        same_layer = shared.projections[i].layer == shared.projections[owner].layer
        assert same_layer and kinds[owner] == ("query" if kinds[i] in ("query", "key", "value") else kinds[i])
    assert int(own.z_mask.sum() - shared.z_mask.sum()) == 2 * 2  # key and value of two layers
    z, g = random_chains(shared.z_shape), random_chains(shared.g_shape)
    equal = z.clone()
    equal[:, 0] = z[shared.input_owner, 0]
    for mine, true in zip(expected_bops(shared, z, g), expected_bops(own, equal, g), strict=True):
        assert mine == true
    z[~shared.z_mask] = 1.0  # as guides have what does not exist
    saved = savings(shared, z, g)
    spent, most = (expected_bops(shared, *gates) for gates in ((z, g), (torch.ones_like(z), torch.ones_like(g))))
    total = sum(x.sum() for x in saved)
    assert total.item() == pytest.approx((most.model - spent.model).item(), rel=1e-9)
    assert not saved.z[~shared.z_mask].any()
    of_adapted = sum(x.sum() for x in savings(shared, z, g, of_adapted=True))
    assert of_adapted.item() == pytest.approx((most.adapted - spent.adapted).item(), rel=1e-9)
    read = own.tensor_macs[:, 0]
    expected = torch.zeros_like(read).index_add(0, shared.input_owner, read)  # in all that read it
    assert torch.equal(shared.tensor_macs[:, 0], expected) and torch.equal(
        shared.tensor_macs[:, 1:], own.tensor_macs[:, 1:]
    )
    assert AdapterLayout.from_dict(json.loads(json.dumps(shared.to_dict()))) == shared
