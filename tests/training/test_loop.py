"""Training: one scaling rule, the same bits from the same seed, and after an interruption."""

import dataclasses
import json
import math
import shutil

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny_backbone, tiny_config

from pyro_blora.build import build
from pyro_blora.checkpoint import load_checkpoint, save_checkpoint, trainable
from pyro_blora.config import RunConfig
from pyro_blora.priors import Budget
from pyro_blora.run import train_run
from pyro_blora.tasks import from_frame, get_task, register_task
from pyro_blora.tasks.batching import epoch_order
from pyro_blora.training import Schedule, fit, make_optimizer, natural_gradient, resuming
from pyro_blora.training.gate_pictures import gate_maps
from pyro_blora.training.gradients import Gradients

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where `usual` was trained: not to be changed."""
    return tmp_path_factory.mktemp("usual")


@pytest.fixture(scope="module")
def usual(backbone, folder, eager):
    """The training of a configuration that changes nothing, beside which tests put their own: not to be changed."""
    return fit(tiny_config(backbone), folder=folder, quiet=True)


def values(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def state(trained):
    return {name: p.detach().clone() for name, p in trainable(trained.program).items()}


def test_the_same_seed_gives_the_same_lines_and_parameters(backbone, usual):
    one, two = usual, fit(tiny_config(backbone), quiet=True)
    assert values(one.metrics) == values(two.metrics)
    assert len(one.metrics) == 8 and all(math.isfinite(line["loss"]) for line in one.metrics)
    assert all(torch.equal(a, b) for a, b in zip(state(one).values(), state(two).values(), strict=True))


@pytest.mark.parametrize(("prior", "rounding"), [("fixed", 1e-4), ("bops", 0.02)])  # gates round what rounding moved
def test_numbers_are_learned_alike_in_every_unit(backbone, usual, forget, prior, rounding):
    """Labels and their range times a factor: predictions and noise times it, an NLL per example larger by its log."""
    rows = get_task("acceptability").load(n_train=64)["train"].to_pandas()
    rows["label"] += np.linspace(0, 4, 64)
    found = {}
    for unit in (1.0, 1e3, 1e-3):
        frame = rows.assign(label=rows["label"] * unit)[["sentence", "label"]]
        register_task(from_frame(f"times{unit}", frame, frame, kind="normal"))
        config = tiny_config(backbone, task=f"times{unit}", prior=prior, weight_decay=0.5, lr=0.02)
        trained = fit(config, quiet=True)
        found[unit] = (
            torch.tensor([line["nll"] - math.log(unit) for line in trained.metrics]),
            trained.program.log_scale.detach() - math.log(unit),
            torch.cat([p.detach().flatten() for p in trained.program.net.adapter_parameters()]),
        )
    one, *others = found.values()
    assert one[0][4:].min() < one[0][0] - 0.1 and abs(one[1]) > 0.01  # something is learned
    for other in others:
        for here, there in zip(one, other, strict=True):
            torch.testing.assert_close(there, here, atol=rounding, rtol=rounding)


def test_another_seed_gives_other_lines(backbone, usual):
    assert usual.metrics[0]["nll"] != fit(tiny_config(backbone, seed=1), quiet=True).metrics[0]["nll"]


def test_another_prior_changes_the_kl_at_once_and_the_fit_only_when_the_gates_start(backbone, usual):
    bops = usual
    nested = fit(tiny_config(backbone, prior="nested", prior_settings={"rate": 5.0}), quiet=True)
    opening = Schedule.of(tiny_config(backbone), 64).opening
    assert 0 < opening < 8
    for before, after in zip(bops.metrics[:opening], nested.metrics[:opening], strict=True):
        assert before["nll"] == after["nll"] and before["loss"] == after["loss"]
        assert before["kl_z"] != after["kl_z"]
    assert bops.metrics[-1]["expected_bits"] != nested.metrics[-1]["expected_bits"]


def test_the_loss_is_minus_elbo_over_n(usual):
    for line in usual.metrics[4:]:
        assert line["loss"] == pytest.approx(line["nll"] + (line["kl_z"] + line["kl_g"]) / 64, rel=1e-5)


def test_accumulated_gradients_equal_those_of_the_union_batch(tmp_path):
    """Two micro-batches of 8 give the gradient of one batch of 16: no dropout, no random gate."""
    plain = save_tiny_backbone(tmp_path / "plain", dropout=0.0)
    fixed = {"prior": "fixed", "max_train": 16, "epochs": 1, "checkpoint_steps": 1}  # 32 bit: no range plays a part
    gradients = {}
    for size, accumulation in ((16, 1), (8, 2)):
        folder = tmp_path / str(size)
        fit(tiny_config(plain, batch_size=size, accumulation=accumulation, **fixed), folder=folder, quiet=True)
        saved = load_file(folder / "checkpoints" / "state.safetensors")
        gradients[size] = {key: value for key, value in saved.items() if key.startswith("exp_avg/")}  # (1 - beta_1) g
    assert sum(".lora_B" in key and value.abs().max() > 0 for key, value in gradients[16].items()) == 6
    for key, whole in gradients[16].items():
        torch.testing.assert_close(gradients[8][key], whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item() + 1e-9)


@pytest.mark.parametrize(
    ("killed_after", "more"),
    [(3, {"estimator": "relaxed"}), (6, {"estimator": "relaxed"}), (9, {"distillation": 0.3, "smoothing": True})],
)
def test_resume_is_bitwise(backbone, tmp_path, monkeypatch, killed_after, more):
    monkeypatch.setattr(natural_gradient, "_FIRST", 2)  # of twelve steps
    config = tiny_config(backbone, epochs=3, **more)
    whole = fit(config, folder=tmp_path / "whole", quiet=True)

    def killing(folder, module, optimizer, step, total, notes):
        save_checkpoint(folder, module, optimizer, step, total, notes)
        if step == killed_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resuming, "save_checkpoint", killing)
        with pytest.raises(KeyboardInterrupt):
            fit(config, folder=tmp_path / "cut", quiet=True)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "loss": 1.0}\n{"step": 10')  # logged after the checkpoint, and cut off in a line
    resumed = fit(config, folder=tmp_path / "cut", quiet=True)
    for (name, a), b in zip(state(whole).items(), state(resumed).values(), strict=True):
        assert torch.equal(a, b), name
    written = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    assert values(written[0]) == values(written[1]) == values(whole.metrics)
    assert (written[0][-1].get("gates_moved", 0) > 0) is ("estimator" not in more)


def test_leaving_after_some_steps_and_going_on_is_bitwise(backbone, tmp_path):
    """Under a prior that adapts, before and after the gates have started."""
    config = tiny_config(backbone, epochs=3, prior="budget", settle=0.0, prior_settings={"bops": 0.1})
    opening = Schedule.of(config, 64).opening
    whole = fit(config, folder=tmp_path / "whole", quiet=True)
    for until in (opening - 1, opening, opening + 2):
        left = fit(config, folder=tmp_path / f"{until}", quiet=True, until=until)
        assert [line["step"] for line in left.metrics] == list(range(1, until + 1))
        resumed = fit(config, folder=tmp_path / f"{until}", quiet=True)
        assert values(resumed.metrics) == values(whole.metrics)
        for (name, a), b in zip(state(whole).items(), state(resumed).values(), strict=True):
            assert torch.equal(a, b), name


def test_a_budget_adapts_after_every_step_from_the_opening_on(backbone):
    """Its rate follows gates that move in every step."""
    config = tiny_config(backbone, prior="budget", prior_settings={"bops": 0.1}, estimator="relaxed")
    opening, trained = Schedule.of(config, 64).opening, fit(config, quiet=True)
    rates = [line["rate"] for line in trained.metrics]
    assert len(set(rates[:opening])) == 1 and len(set(rates[opening:])) == 8 - opening
    assert trained.program.prior.report()["rate"] == rates[-1] > 0


def test_a_budget_follows_every_component_of_a_mixture(backbone, monkeypatch):
    seen, adapt = [], Budget.adapt
    monkeypatch.setattr(Budget, "adapt", lambda prior, means: (seen.append(means.z.shape), adapt(prior, means)))
    config = tiny_config(backbone, prior="budget", settle=0.0, guide="mixture", guide_settings={"components": 3})
    trained = fit(config, quiet=True)
    shape = torch.Size([3, *trained.program.layout.z_shape])
    start = len(seen) - (8 - Schedule.of(config, 64).opening)  # before any step, the start is searched
    assert seen[start:] == [shape] * len(seen[start:])
    assert {moved[0] for moved in seen[:start]} == {1}


def test_the_weight_of_the_kl_counts_from_the_opening_on(backbone):
    config = tiny_config(backbone, kl_weight=0.25)
    opening = Schedule.of(config, 64).opening
    for i, line in enumerate(fit(config, quiet=True).metrics):
        weight = 0.25 if i >= opening else 0.0
        assert line["loss"] == pytest.approx(line["nll"] + weight * (line["kl_z"] + line["kl_g"]) / 64, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "score_function", "guide": "point"}, "'score_function' needs a guide with logits"),
        ({"estimator": "enumerate", "guide": "point"}, "'enumerate' has no gradient for a guide of one allocation"),
        ({"estimator": "gauss_newton", "guide": "point"}, "'gauss_newton' needs a guide of log Bayes factors"),
        ({"gate_optimizer": "natural", "guide": "point"}, "gate_optimizer natural needs a guide of log Bayes factors"),
        ({"gate_optimizer": "adam", "estimator": "gauss_newton"}, "drop --gate_optimizer adam"),
        ({"estimator": "enumerate"}, r"'enumerate' would take 10\^\d+ forwards a step"),
    ],
    ids=str,
)
def test_a_guide_that_an_estimator_cannot_serve_is_refused_before_anything_is_written(
    backbone, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        build(tiny_config(backbone, **changes))
    with pytest.raises(ValueError, match=message):
        fit(tiny_config(backbone, **changes), folder=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_holds_no_frozen_weight_and_no_pickle(usual, folder):
    from safetensors import safe_open

    files = [path for path in (folder / "checkpoints").iterdir()]
    assert {path.name for path in files} == {"state.safetensors", "state.previous.safetensors"}
    for path in files:
        with safe_open(path, framework="pt") as file:
            parameters = {key.partition("/")[2] for key in file.keys()}  # noqa: SIM118 (not a dict)
        assert parameters == set(trainable(usual.program))
    assert not any("base_layer" in name or "embeddings" in name for name in parameters)


def test_a_damaged_checkpoint_is_refused(backbone, usual, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"damaged.*delete its folder"):
        fit(tiny_config(backbone), folder=tmp_path, quiet=True)


def test_a_checkpoint_of_another_model_is_refused(usual, folder):
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="another model"):
        load_checkpoint(folder / "checkpoints", module, torch.optim.AdamW(module.parameters()), 8)


def test_a_checkpoint_of_another_number_of_steps_is_refused(backbone, usual, folder):
    program = build(tiny_config(backbone)).program
    optimizer = make_optimizer(program, tiny_config(backbone))
    assert load_checkpoint(folder / "checkpoints", program, optimizer, 8).step == 8
    with pytest.raises(ValueError, match="run of 8 steps, this one has 4: resume on as many processes"):
        load_checkpoint(folder / "checkpoints", program, optimizer, 4)


def test_a_checkpoint_of_another_number_of_processes_is_refused(backbone, usual, folder):
    """Also where as many steps come out: 1,000 rows make 3 steps an epoch on 8, 9 and 10 processes."""
    program = build(tiny_config(backbone)).program
    optimizer = make_optimizer(program, tiny_config(backbone))
    with pytest.raises(ValueError, match="of a run on 1 processes, this one has 2: resume on 1, or delete"):
        load_checkpoint(folder / "checkpoints", program, optimizer, 8, processes=2)


def test_the_gates_are_open_before_they_start(backbone, usual):
    """Phase one is plain LoRA: its losses are those of a prior that pins every gate open."""
    bops, lora = usual.metrics, fit(tiny_config(backbone, prior="fixed"), quiet=True).metrics
    opening = Schedule.of(tiny_config(backbone), 64).opening
    assert [line["loss"] for line in bops[:opening]] == [line["loss"] for line in lora[:opening]]
    assert bops[-1]["loss"] != lora[-1]["loss"]


def test_a_run_that_diverges_says_so_and_keeps_no_checkpoint(backbone, tmp_path):
    with pytest.raises(ValueError, match=r"diverged at step \d+.*Lower --lr"):
        fit(tiny_config(backbone, lr=1e30, warmup=0.0, checkpoint_steps=1, clip_norm=1e30), folder=tmp_path, quiet=True)
    for path in tmp_path.rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def test_a_tracker_that_is_not_installed_is_refused(backbone, tmp_path):
    with pytest.raises(ValueError, match="tracker 'wandb' is not installed: pip install wandb"):
        fit(tiny_config(backbone, tracker="wandb"), folder=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_parameter_store_of_pyro_stays_empty(backbone):
    pyro.clear_param_store()
    fit(tiny_config(backbone), quiet=True)
    assert not list(pyro.get_param_store().keys())


def test_four_groups_hold_every_trained_parameter_once(backbone):
    program = build(tiny_config(backbone, estimator="relaxed")).program
    optimizer = make_optimizer(program, tiny_config(backbone, estimator="relaxed"))
    assert [group["name"] for group in optimizer.param_groups] == ["adapter", "head", "gates", "ranges"]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainable(program).values())
    assert [group["weight_decay"] for group in optimizer.param_groups][2:] == [0, 0]


def test_gates_and_ranges_move_only_after_the_opening(backbone, usual):
    before = fit(tiny_config(backbone, lr_gates=0.0, guide_settings={"open_logit": 3.0}), quiet=True)
    still, moved = (trained.program.gate_guide.posterior().z.log_probs.exp() for trained in (before, usual))
    torch.testing.assert_close(still, torch.full_like(still, 3.0).sigmoid(), atol=1e-4, rtol=0)
    assert moved.std() > 0.1


@pytest.mark.parametrize(("warmup", "steps", "peak"), [(0.07, 100, 7), (0.14, 50, 7), (0.56, 100, 56), (0.065, 100, 7)])
def test_the_rate_peaks_when_that_share_of_the_steps_is_done(warmup, steps, peak):
    schedule = Schedule.of(RunConfig(epochs=1, batch_size=10, warmup=warmup, lr=1.0), 10 * steps)
    rates = [schedule.learning_rate("adapter", step) for step in range(steps)]
    assert schedule.steps == steps and rates.index(max(rates)) == peak - 1 and max(rates) == 1.0


def test_schedules_are_functions_of_the_step():
    schedule = Schedule.of(RunConfig(epochs=4, batch_size=10, warmup=0.1, kl_warmup=0.25, lr=1.0), 100)
    assert (schedule.steps, schedule.steps_per_epoch, schedule.opening) == (40, 10, 10)
    assert [schedule.held(step) for step in (0, 9, 10, 39)] == ["open", "open", None, None]
    assert schedule.temperature(0) == 0.5 and schedule.temperature(30) == schedule.temperature(39) == pytest.approx(0.1)
    rates = [schedule.learning_rate("adapter", step) for step in range(40)]
    assert max(rates) == 1.0 and rates[0] == 0.25 and rates[39] == pytest.approx(1 / 36)
    assert schedule.learning_rate("gates", 9) == 0 and schedule.learning_rate("gates", 10) == 0.1
    assert schedule.learning_rate("gates", 39) == pytest.approx(0.1 * 0.01 ** (29 / 30))


def test_an_epoch_visits_rows_once_in_whole_steps():
    batches = epoch_order(100, 8, 3, seed=0, epoch=0)
    rows = [row for batch in batches for row in batch]
    assert len(batches) == 12 and len(set(rows)) == len(rows) == 96
    assert batches != epoch_order(100, 8, 3, seed=0, epoch=1) != epoch_order(100, 8, 3, seed=1, epoch=1)


def test_rows_of_similar_length_share_a_batch():
    lengths = torch.randint(5, 60, (1000,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(batches: list) -> int:
        return sum(len(batch) * max(lengths[i] for i in batch) - sum(lengths[i] for i in batch) for batch in batches)

    mixed, grouped = (epoch_order(1000, 8, 2, seed=0, epoch=0, lengths=x) for x in (None, lengths))
    assert sorted(i for batch in grouped for i in batch) == sorted(i for batch in mixed for i in batch)
    assert {len(batch) for batch in grouped} == {8} and padded(grouped) < 0.1 * padded(mixed)
    longest = [max(lengths[i] for i in batch) for batch in grouped]
    assert longest != sorted(longest) and grouped != epoch_order(1000, 8, 2, seed=0, epoch=1, lengths=lengths)


def test_a_run_can_group_its_rows_by_length(backbone, usual):
    mixed, grouped = usual, fit(tiny_config(backbone, group_by_length=True), quiet=True)
    assert mixed.metrics[0]["nll"] != grouped.metrics[0]["nll"] and len(mixed.metrics) == len(grouped.metrics)


def test_too_few_examples_for_a_step_are_refused(backbone):
    with pytest.raises(ValueError, match="8 training examples do not fill one step of 16"):
        fit(tiny_config(backbone, max_train=8), quiet=True)


def test_bf16_trains(backbone, usual):
    lines, exact = fit(tiny_config(backbone, precision="bf16"), quiet=True).metrics, usual.metrics
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[0]["nll"] != exact[0]["nll"] and lines[0]["nll"] == pytest.approx(exact[0]["nll"], abs=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"scope": "encoder"},
        {"guide": "point"},
        {"guide": "mixture"},
        {"prior": "budget"},
        {"prior": "hierarchical"},
        {"estimator": "straight_through"},
        {"estimator": "score_function"},
        {"estimator": "enumerate", "prior": "fixed", "prior_settings": {"bits": 4, "rank": 2}},
        {"estimator": "gauss_newton", "guide": "mixture", "prior": "hierarchical"},
        {"estimator": "gauss_newton", "prior": "fixed", "prior_settings": {"bits": 4, "rank": 2}},
        {"gate_optimizer": "natural", "prior": "budget"},
        {"rank": 1},
        {"gradient_checkpointing": True},
        {"share_inputs": True, "gradient_checkpointing": True, "scope": "encoder"},
        {"prior": "fixed", "prior_settings": {"bits": 4, "rank": 2}},
    ],
    ids=str,
)
def test_every_choice_trains(backbone, changes):
    lines = fit(tiny_config(backbone, **changes), quiet=True).metrics
    assert all(math.isfinite(value) for line in lines for value in line.values())
    if changes.get("prior") == "fixed":
        assert lines[-1]["expected_bits"] == 4.0 and lines[-1]["expected_rank"] == 2.0 and lines[-1]["kl_z"] == 0.0


@pytest.fixture
def dropping(monkeypatch):
    """Of every step that is taken, whether any dropout is on."""
    dropping, inner = [], Gradients.__call__

    def watched(gradients, *arguments):
        dropouts = [x for x in gradients.program.modules() if isinstance(x, torch.nn.Dropout)]
        dropping.append(any(x.training for x in dropouts))
        return inner(gradients, *arguments)

    monkeypatch.setattr(Gradients, "__call__", watched)
    return dropping


def test_natural_gradients_measure_without_dropout_for_half_of_the_gated_steps_before_gates_move(
    backbone, dropping, monkeypatch
):
    monkeypatch.setattr(natural_gradient, "_FIRST", 2)  # of twelve steps
    config = tiny_config(backbone, epochs=3)
    opening = Schedule.of(config, 64).opening
    lines = fit(config, quiet=True).metrics
    assert dropping == [step < opening for step in range(12)]
    moved = [line.get("gates_moved", 0.0) > 0 for line in lines]
    assert moved == [2 * (step + 1) > opening + 12 for step in range(12)]


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({"gated_dropout": True}, True),
        ({"estimator": "relaxed"}, True),
        ({"prior": "fixed", "prior_settings": {"bits": 4}}, True),  # no gate is free
        ({"prior": "fixed", "prior_settings": {"bits": 4}, "gated_dropout": False}, False),
    ],
    ids=str,
)
def test_dropout_of_gated_steps_is_chosen(backbone, dropping, changes, kept):
    config = tiny_config(backbone, max_train=32, epochs=1, kl_warmup=0.5, **changes)
    opening = Schedule.of(config, 32).opening
    fit(config, quiet=True)
    assert 0 < opening < len(dropping) and dropping == [step < opening or kept for step in range(len(dropping))]


def test_a_tracker_gets_the_logged_numbers(backbone, tmp_path):
    fit(tiny_config(backbone, tracker="tensorboard", epochs=1), folder=tmp_path, quiet=True)
    assert any(path.name.startswith("events.out") for path in tmp_path.rglob("*"))


def test_without_a_tracker_nothing_is_sent(backbone, tmp_path):
    fit(tiny_config(backbone, epochs=1), folder=tmp_path, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "checkpoints"}


def test_the_log_has_the_gradient_of_the_gates_once_they_have_started(backbone, tmp_path):
    """Against Adam's moments in the checkpoint of the same step."""
    config = tiny_config(backbone, prior="nested", estimator="relaxed")
    opening = Schedule.of(config, 64).opening
    lines = fit(config, folder=tmp_path, quiet=True).metrics
    logged = [{"gate_gradient", "gate_noise"} <= set(line) for line in lines]
    assert logged == [False] * opening + [True] * (8 - opening)
    assert all(0 <= line["gate_noise"] <= 1 and line["gate_gradient"] > 0 for line in lines[opening:])
    saved = load_file(tmp_path / "checkpoints" / "state.safetensors")
    names = ("gate_guide.z_evidence", "gate_guide.g_evidence")
    first, second = (
        torch.cat([saved[f"{key}/{name}"].flatten() for name in names]) for key in ("exp_avg", "exp_avg_sq")
    )
    steps = 8 - opening
    mean, square = first / (1 - 0.9**steps), second / (1 - 0.999**steps)
    alive = square > 0
    assert lines[-1]["gate_gradient"] == pytest.approx(square[alive].mean().sqrt().item(), rel=1e-5)
    noise = 1 - (mean[alive].square().sum() / square[alive].sum()).item()
    assert lines[-1]["gate_noise"] == pytest.approx(max(0.0, noise), abs=1e-5)


@pytest.mark.parametrize("changes", [{"prior": "fixed"}, {"kl_warmup": 1.0}], ids=str)
def test_gates_that_do_not_learn_have_no_gradient_to_log(backbone, changes):
    for line in fit(tiny_config(backbone, **changes), quiet=True).metrics:
        assert not {"gate_gradient", "gate_noise"} & set(line)


def test_the_log_has_the_temperature_of_its_step_and_the_gradient_before_it_is_clipped(backbone):
    config = tiny_config(backbone, estimator="relaxed")
    schedule = Schedule.of(config, 64)
    loose = fit(dataclasses.replace(config, clip_norm=1e9), quiet=True).metrics
    tight = fit(tiny_config(backbone, clip_norm=1e-9), quiet=True).metrics  # whose draws have no temperature
    assert [line["temperature"] for line in loose] == [schedule.temperature(step) for step in range(8)]
    assert not any("temperature" in line for line in tight)
    assert loose[0]["grad_norm"] == tight[0]["grad_norm"] > 1e-3  # parameters are the same in the first step only


def test_pictures_are_bright_where_gates_are_open_and_grey_where_there_are_none(backbone):
    program = build(tiny_config(backbone, scope="encoder")).program
    L, T, _ = program.layout.z_shape
    with torch.no_grad():
        program.gate_guide.z_evidence.fill_(50.0), program.gate_guide.g_evidence.fill_(50.0)
        program.gate_guide.z_evidence[0, 1, 2] = -50.0
        program.gate_guide.g_evidence[0, 1] = -50.0
    maps = gate_maps(program)
    bits, rank = maps["gates/expected_bits"], maps["gates/expected_rank"]
    assert bits.shape == (1, 16 * L, 16 * T, 3) and rank.shape == (1, 16 * L, 16, 3)
    assert bits.dtype == rank.dtype == np.uint8
    viridis = matplotlib.colormaps["viridis"]
    dark, bright = (np.round(255 * np.array(viridis(x)[:3])) for x in (0.0, 1.0))

    def cell(picture, row, column):
        block = picture[0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(-1, 3)
        assert (block == block[0]).all()
        return block[0]

    for i, projection in enumerate(program.layout.projections):
        for t in range(T):
            colour = np.full(3, 128) if not program.z_mask[i, t] else dark if (i, t) == (1, 2) else bright
            assert np.abs(cell(bits, i, t) - colour.astype(float)).max() <= 1
        colour = np.full(3, 128) if not projection.adapted else dark if i == 1 else bright
        assert np.abs(cell(rank, i, 0) - colour.astype(float)).max() <= 1


def test_what_is_no_configuration_is_one_sentence():
    for trains in (fit, train_run):
        with pytest.raises(ValueError, match=r"a run is made of a RunConfig, got dict: RunConfig\(task=..., ...\)"):
            trains({"task": "acceptability"})
