"""Laws of the methods: each is what its name says, in the same loop, and its run folder is like any other."""

import copy
import json

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from kinds import Choice
from models import tiny_bert, tiny_deberta
from safetensors.torch import load_file
from tiny import save_tiny_backbone, tiny_config
from transformers import (
    AutoModelForSequenceClassification,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)

from pyro_blora import attach, draw, fit, load
from pyro_blora.adapters.input_pca import start_eva
from pyro_blora.build import build
from pyro_blora.config import METHODS, RunConfig
from pyro_blora.config.methods import left_open, require_consistent
from pyro_blora.posterior import deployed, predict
from pyro_blora.report.terminal import result_tables
from pyro_blora.run import train_run
from pyro_blora.tasks.batching import by_length, on_device
from pyro_blora.tasks.heads import SEQUENCE
from pyro_blora.tasks.spans import Spans
from pyro_blora.user_values import spelled

ONLY_PEFT = ("adalora",)  # its layers have no quantizer


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def runs(backbone, tmp_path_factory, drawn):
    """A finished run folder of every method, trained when it is asked for."""
    output, folders = tmp_path_factory.mktemp("runs"), {}

    def run(method):
        if method not in folders:
            folders[method] = train_run(tiny_config(backbone, method=method, lr=2e-2, output_dir=str(output)))
        return folders[method]

    return run


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def log(folder, key="nll"):
    return [json.loads(line)[key] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_has_its_method_its_report_and_what_is_loaded_predicts_the_same(runs, method):
    folder = runs(method)
    told = summary(folder)
    assert told["method"] == method and np.isfinite([told["nll"], told["deployed"]["nll"]]).all()
    assert all(np.isfinite(log(folder, key)).all() for key in ("loss", "kl_z", "kl_g", "bops_adapted"))
    assert result_tables(told)
    config = RunConfig.from_json(folder / "config.json")
    parts = build(config)
    rows, order = by_length(parts.tokens["eval"], parts.collate, 2 * config.batch_size)
    predicted = predict(load(folder), on_device(rows, torch.device("cpu"))).restored(order)
    table = pd.read_parquet(folder / "predictions.parquet")
    assert np.allclose(predicted.log_score.numpy(), table["deployed_log_likelihood"], atol=1e-6)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_the_adapter_is_an_ordinary_one(runs, backbone, method):
    folder = runs(method)
    model = AutoModelForSequenceClassification.from_pretrained(backbone)
    reloaded = peft.PeftModel.from_pretrained(model, folder / "adapter")
    ranks = [m.r["default"] for m in reloaded.modules() if isinstance(m, peft.tuners.lora.Linear)]
    g = deployed(load(folder)).g
    assert ranks == (1 + g.sum(-1)).int().tolist()


@pytest.mark.parametrize("method", ["adalora", "dylora", "eva", "full", "ptq"])
def test_a_run_that_is_cut_off_twice_resumes_to_the_same_bits(backbone, tmp_path, method):
    config = tiny_config(backbone, method=method, lr=2e-2)
    whole = fit(config, folder=tmp_path / "whole", quiet=True)
    for step in (3, 6, None):
        again = fit(config, folder=tmp_path / "cut", quiet=True, until=step)
    one, two = (load_file(tmp_path / name / "checkpoints/state.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert [line["loss"] for line in whole.metrics] == [line["loss"] for line in again.metrics]


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_that_is_read_back_is_the_same(method):
    config = RunConfig(method=method)
    assert RunConfig.from_json(config.to_json()) == config
    assert (config.digest == RunConfig().digest) == (method == "bayesian_lora")


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_fixes_cannot_be_contradicted(method):
    for flag in METHODS[method].fixes:
        owner, dot, setting = flag.partition(".")
        other = {
            "prior": "nested",
            "guide": "mixture",
            "estimator": "score_function",
            "kl_warmup": 0.5,
            "gated_dropout": True,
        }
        if dot or flag in other:
            wrong = {f"{owner}_settings": {setting: 4}} if dot else {flag: other[flag]}
            with pytest.raises(ValueError, match=f"--{flag} .* contradicts --method {method}"):
                RunConfig(method=method, **wrong)
        default = getattr(RunConfig(), flag, "4")  # on the line and in a file, a default can be told from nothing
        with pytest.raises(ValueError, match=f"--{flag} {spelled(default)} contradicts --method {method}"):
            require_consistent(method, {flag: default})


def test_what_a_method_fixes_may_be_said_again():
    said = [
        ("ptq", "kl_warmup", "1"),
        ("rank_gates", "prior.z", False),
        ("lora", "prior.bits", 32.0),
        ("lora", "prior", "fixed"),
        ("no_dropout", "gated_dropout", False),
        ("no_dropout", "gated_dropout", "False"),
    ]
    for method, flag, value in said:
        require_consistent(method, {flag: value})


def test_a_contradiction_is_written_as_flags_are():
    with pytest.raises(ValueError, match=r"--gated_dropout true contradicts --method no_dropout, which is .* false:"):
        RunConfig(method="no_dropout", gated_dropout=True)


def test_an_adapter_of_a_method_is_refused_without_it():
    with pytest.raises(ValueError, match="adapter 'adalora' is part of a method: give --method adalora"):
        RunConfig(adapter="adalora")
    with pytest.raises(ValueError, match="give --method full"):
        RunConfig(adapter="none", method="lora")
    with pytest.raises(ValueError, match="eva is for LoRA, which --method full does not have"):
        RunConfig(method="full", init_lora_weights="eva")


def test_a_preset_gives_way_to_the_method():
    preset = {"task": "sst2", "prior": "bops", "prior.rate": 3, "lr": 8e-4, "kl_warmup": 0.4}
    assert left_open("lora", preset) == {"task": "sst2", "lr": 8e-4, "kl_warmup": 0.4}
    assert left_open("full", preset) == {"task": "sst2", "kl_warmup": 0.4}
    assert left_open("rank_gates", preset) == left_open("unknown", preset) == preset


def test_what_a_method_proposes_can_be_changed():
    assert RunConfig(method="full").lr == 5e-5 and RunConfig(method="full", lr=1e-4).lr == 1e-4
    assert (RunConfig().lr, RunConfig(adapter="xs").lr, RunConfig(adapter="xs", lr=1e-2).lr) == (1e-3, 5e-3, 1e-2)
    assert RunConfig(method="qat_lora").prior_settings == {"bits": 8}
    assert RunConfig(method="qat_lora", prior_settings={"bits": 4}).prior_settings == {"bits": 4}
    assert RunConfig(method="dylora").kl_warmup == 0 and RunConfig(method="dylora", kl_warmup=0.3).kl_warmup == 0.3
    assert RunConfig(method="bayesian_bits", prior="nested").prior_names == ["nested", "off"]


# --- LoRA and quantization ------------------------------------------------------------------------------------------


def test_lora_is_the_fixed_prior(backbone):
    settings = {"prior": "fixed", "prior_settings": {"bits": 32}}
    one, two = (fit(tiny_config(backbone, **x), quiet=True) for x in ({"method": "lora"}, settings))
    assert [line["loss"] for line in one.metrics] == [line["loss"] for line in two.metrics]


def test_no_dropout_is_lora_up_to_the_start_of_the_gates(backbone):
    def losses(**settings):
        return [
            line["nll"] for line in fit(tiny_config(backbone, epochs=2, kl_warmup=0.5, **settings), quiet=True).metrics
        ]

    without, lora, gated = losses(method="no_dropout"), losses(method="lora"), losses(method="lora", gated_dropout=True)
    half = len(lora) // 2
    assert without[:half] == lora[:half] and without[half] != lora[half] and lora == gated
    assert RunConfig(method="no_dropout").gated_dropout is False


def test_quantization_after_training_trains_lora_and_deploys_eight_bits(runs, backbone):
    lora = fit(tiny_config(backbone, method="lora", lr=2e-2, kl_warmup=1.0), quiet=True)  # its gates draw no noise
    assert log(runs("ptq")) == [line["nll"] for line in lora.metrics]
    assert set(summary(runs("ptq"))["expected_bits"].values()) == {8.0}
    assert summary(runs("ptq"))["bops"]["adapted_ratio"] == pytest.approx(1 / 16)
    quantized = dict(load(runs("ptq")).named_parameters())
    for name, parameter in lora.program.net.peft_model.named_parameters(prefix="net.peft_model"):
        assert torch.equal(parameter, quantized[name]), name


def test_gates_may_start_when_training_has_ended(backbone):
    settings = {"prior": "budget", "prior_settings": {"bops": 0.1}, "kl_warmup": 1.0}
    after = fit(tiny_config(backbone, **settings, lr=2e-2), quiet=True)
    assert after.metrics[-1]["bops_adapted"] == pytest.approx(0.1, rel=0.02)


def test_bit_gates_alone_and_rank_gates_alone(runs):
    assert set(summary(runs("bayesian_bits"))["expected_rank"].values()) == {4.0}
    assert min(summary(runs("bayesian_bits"))["expected_bits"].values()) < 32
    assert set(summary(runs("rank_gates"))["expected_bits"].values()) == {32.0}
    assert min(summary(runs("rank_gates"))["expected_rank"].values()) < 4


# --- DyLoRA, MC dropout, EVA, full fine-tuning ----------------------------------------------------------------------


def test_dylora_draws_one_rank_for_all_and_reports_every_rank(runs):
    program = load(runs("dylora"))
    ranks = 1 + draw(program, 4000).g.sum(-1)  # (S, L)
    assert torch.equal(ranks, ranks[:, :1].expand_as(ranks))
    for rank in (1, 2, 3, 4):
        assert (ranks == rank).float().mean().item() == pytest.approx(0.25, abs=0.03)
    chains = len(program.layout.projections)  # the prior's are independent: one rank for all is rarer by this
    assert np.allclose(log(runs("dylora"), "kl_g"), (chains - 1) * np.log(4), rtol=1e-5)
    assert set(log(runs("dylora"), "kl_z")) == {0.0}
    rows = summary(runs("dylora"))["by_rank"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    shares = [row["bops"]["adapted_ratio"] for row in rows]
    assert shares == sorted(set(shares)) and shares[-1] == pytest.approx(1.0)
    assert rows[-1]["nll"] == pytest.approx(summary(runs("dylora"))["deployed"]["nll"], rel=1e-5)  # the largest
    assert summary(runs("dylora"))["expected_rank"] == pytest.approx(dict.fromkeys(("query", "key", "value"), 2.5))
    assert len({row["nll"] for row in rows}) == 4


def test_dylora_trains_truncated_adapters(backbone):
    program = build(tiny_config(backbone, method="dylora")).program
    torch.manual_seed(0)
    seen = [program.gate_guide.distributions(0.5, program.hard).g.rsample() for _ in range(20)]
    assert all(bool(((g == 0) | (g == 1)).all()) for g in seen)
    assert len({g.sum().item() for g in seen}) == 4 and all(torch.equal(g, g[:1].expand_as(g)) for g in seen)


def test_dropout_masks_differ_between_draws_and_not_in_what_is_deployed(runs, backbone):
    folder, plain = runs("mc_dropout"), runs("lora")
    tables = [pd.read_parquet(x / "predictions.parquet") for x in (folder, plain)]
    assert tables[0]["deployed_log_likelihood"].equals(tables[1]["deployed_log_likelihood"])
    assert not np.allclose(tables[0]["log_likelihood"], tables[1]["log_likelihood"])
    assert "dropout masks" in summary(folder)["averaging"]
    parts = build(RunConfig.from_json(folder / "config.json"))
    rows, _ = by_length(parts.tokens["eval"].select(range(32)), parts.collate, 16)
    program = load(folder)
    gates = draw(program, 3)
    one, two, other = (predict(program, on_device(rows, torch.device("cpu")), gates=gates, dropout_seed=s)
                       for s in (1, 1, 2))  # fmt: skip
    assert torch.equal(one.outputs, two.outputs) and not torch.equal(one.outputs, other.outputs)
    assert one.outputs.std(0).min() > 0 and not program.training


def test_eva_starts_at_the_principal_components_of_the_inputs():
    net = attach(tiny_bert(dropout=0.0), rank=4, init_lora_weights="eva", sequence_length=16)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(1, 100, (16, 12)), "attention_mask": torch.ones(16, 12).long()}
               for _ in range(4)]  # fmt: skip
    start_eva(net, batches)
    seen = {}
    layer = net.layers()[0]
    hook = layer.base_layer.register_forward_hook(lambda m, inputs, out: seen.setdefault("x", []).append(inputs[0]))
    with torch.no_grad(), net.peft_model.disable_adapter():
        for batch in batches:
            net.peft_model(**batch)
    hook.remove()
    x = torch.cat([part.flatten(0, 1) for part in seen["x"]])
    best = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
    found = torch.linalg.qr(layer.lora_A["default"].weight.T)[0].T
    explained = [((x - x.mean(0)) @ rows.T).square().sum() for rows in (found, best)]
    assert explained[0] > 0.98 * explained[1]  # its components settle to a cosine of 0.99
    assert not layer.lora_B["default"].weight.any()  # the pretrained network, at step 0


def test_eva_leaves_out_deberta_s_positions_and_padding():
    nets = []
    torch.manual_seed(0)
    ids = torch.randint(1, 100, (8, 12))
    for width in (12, 16):  # the same tokens, padded further
        batch = {"input_ids": torch.nn.functional.pad(ids, (0, width - 12)),
                 "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, width - 12))}  # fmt: skip
        net = attach(tiny_deberta(dropout=0.0), rank=4, init_lora_weights="eva", sequence_length=16)
        start_eva(net, [batch, batch])
        nets.append(net)
    weights = [net.layers()[0].lora_A["default"].weight for net in nets]  # query: called for the positions too
    assert torch.allclose(weights[0].abs(), weights[1].abs(), atol=1e-3)
    with pytest.raises(ValueError, match="EVA needs 4 tokens in a batch"):
        start_eva(nets[0], [{"input_ids": ids[:1, :3], "attention_mask": torch.ones(1, 3).long()}])


def test_eva_reads_examples_of_several_rows_as_the_rows_that_they_are():
    torch.manual_seed(0)
    ids, mask = torch.randint(1, 100, (4, 3, 12)), torch.ones(4, 3, 12).long()
    mask[3, 0, 7:] = 0
    rows = {"input_ids": ids, "attention_mask": mask}
    windows = {name: torch.nn.functional.pad(x, (0, 0, 0, 1)) for name, x in rows.items()}  # and one that is no window
    starts = []
    for model, head, inputs in (
        (BertForSequenceClassification, SEQUENCE, {name: x.flatten(0, 1) for name, x in rows.items()}),
        (BertForMultipleChoice, Choice(("a", "b", "c")).head, rows),
        (BertForQuestionAnswering, Spans().head, windows),
    ):
        plain = tiny_bert(dropout=0.0)
        built = model(plain.config)
        built.bert.load_state_dict(plain.bert.state_dict(), strict=False)  # one for parts of a text has no pooler
        net = attach(built, rank=4, init_lora_weights="eva", sequence_length=16, head=head)
        start_eva(net, [inputs, inputs])
        starts.append([layer.lora_A["default"].weight.abs() for layer in net.layers()])
    for found in starts[1:]:
        assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(found, starts[0], strict=True))


def test_eva_is_refused_where_a_layer_reads_no_token():
    net = attach(tiny_bert(dropout=0.0), rank=4, init_lora_weights="eva", sequence_length=16)
    batch = {"input_ids": torch.randint(1, 100, (4, 12)), "attention_mask": torch.ones(4, 12).long()}
    pooled = net.get_submodule("peft_model.base_model.model.bert.encoder.layer.1")
    pooled.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, :5], None, *inputs[2:]))
    with pytest.raises(ValueError, match=r"layer\.1\..* reads none of the text: drop --init_lora_weights eva"):
        start_eva(net, [batch, batch])


def test_dropout_masks_need_dropout(tmp_path):
    folder = save_tiny_backbone(tmp_path, dropout=0.0)
    with pytest.raises(ValueError, match="has no dropout to draw masks of"):
        build(tiny_config(folder, method="mc_dropout"))


def test_full_fine_tuning_frees_a_backbone_that_was_frozen():
    net = attach(tiny_bert().requires_grad_(False), adapter="none", sequence_length=16)
    assert all(p.requires_grad for p in net.parameters())
    assert len(net.adapter_parameters()) + len(net.head_parameters()) == len(list(net.backbone.parameters()))


def test_full_fine_tuning_moves_every_weight_and_is_a_folder_for_transformers(runs, backbone):
    folder = runs("full")
    before = AutoModelForSequenceClassification.from_pretrained(backbone).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(folder / "adapter").state_dict()
    still = [name for name, x in after.items() if x.dtype.is_floating_point and torch.equal(x, before[name])]
    assert before.keys() == after.keys() and still == []
    told = summary(folder)
    assert told["adapter_parameters"] == 0 and told["bops"]["adapted_ratio"] == told["bops"]["model_ratio"] == 1
    assert told["trained_parameters"] == sum(x.numel() for name, x in after.items() if "position_ids" not in name)
    assert told["expected_rank"] == {} and told["expected_bits"] == {"input": 32.0, "base": 32.0}


# --- AdaLoRA --------------------------------------------------------------------------------------------------------


def test_adalora_ends_at_its_target(runs):
    program = load(runs("adalora"))
    ranks = (1 + deployed(program).g.sum(-1)).tolist()
    opened = program.net.allocation.opened.sum(-1)
    assert opened.float().mean().item() == program.gate_guide.target_rank == 2
    assert ranks == opened.clamp(min=1).tolist()
    kinds = [p.type for p in program.layout.projections]
    expected = {kind: np.mean([r for r, k in zip(ranks, kinds, strict=True) if k == kind]) for kind in set(kinds)}
    assert summary(runs("adalora"))["expected_rank"] == pytest.approx(expected)


def test_adalora_is_what_peft_does_in_its_own_loop():
    """Twenty steps of PEFT's AdaLoRA with its own loss, and of ours, whose state goes through buffers."""
    steps, target = 20, 2
    torch.manual_seed(0)
    ours = attach(tiny_bert(dropout=0.0), adapter="adalora", rank=4, alpha=8.0, sequence_length=16)
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, target_r=target, lora_alpha=8.0, total_step=steps, tinit=2, tfinal=6, deltaT=1,
        orth_reg_weight=0.1, target_modules=[p.name for p in ours.layout.projections],
        modules_to_save=["classifier", "pooler"],
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny_bert(dropout=0.0), config)
    theirs.load_state_dict(ours.peft_model.state_dict())
    trained = [[p for n, p in m.named_parameters() if "lora_" in n] for m in (ours, theirs)]
    optimizers = [torch.optim.AdamW(parameters, lr=5e-2) for parameters in trained]
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        batch = {"input_ids": torch.randint(1, 100, (8, 12), generator=generator)}
        labels = torch.randint(2, (8,), generator=generator)
        loss = torch.nn.functional.cross_entropy(ours(**batch).logits, labels) + ours.penalty()
        loss.backward()
        theirs(**batch, labels=labels).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        ranks = ours.allocate(step, steps, target)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
    names = [n for n, _ in theirs.named_parameters() if "lora_" in n]
    for name, one, two in zip(names, *trained, strict=True):
        assert torch.allclose(one, two, atol=1e-4), name
        assert "lora_E" not in name or torch.equal(one == 0, two == 0), name
    assert ranks.float().mean().item() == target


def test_what_adalora_exports_is_its_update(backbone):
    program = fit(tiny_config(backbone, method="adalora", lr=5e-2), quiet=True).program
    net = program.net
    for projection in net.layout.projections:
        layer = net.backbone.get_submodule(projection.name)
        down, up = net.low_rank(projection.name)
        update = net.layout.alpha / net.layout.rank * up @ down
        assert torch.allclose(update, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guide_settings": {"target_rank": 4}}, "target_rank must be from 1 to 3, below the rank 4"),
        ({"guide_settings": {"target_rank": 0}}, "target_rank must be from 1 to 3"),
        ({"scope": "encoder"}, "adalora quantizes nothing"),
        ({"granularity": "channel"}, "--granularity channel is of quantized weights, --method adalora quantizes noth"),
        ({"rank": 1}, "raise --rank"),
    ],
    ids=str,
)
def test_adalora_refuses_what_it_cannot_do(backbone, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_config(backbone, method="adalora", **changes))


def test_an_adalora_network_has_no_ranges_of_channels():
    with pytest.raises(ValueError, match="adalora quantizes nothing, so it has no granularity 'channel': drop it"):
        attach(tiny_bert(), adapter="adalora", rank=4, sequence_length=16, granularity="channel")


def test_a_copy_of_adalora_allocates_for_itself():
    net = attach(tiny_bert(dropout=0.0), adapter="adalora", rank=4, alpha=8.0, sequence_length=16)
    twin = copy.deepcopy(net)
    twin(input_ids=torch.ones(2, 4, dtype=torch.long)).logits.sum().backward()
    twin.allocate(10, 10, 2)
    assert net.allocation.opened.all() and not twin.allocation.opened.all()
