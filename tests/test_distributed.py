"""Two processes on one machine, as torchrun starts them: gradients, draws, log, checkpoint, evaluation, sharding."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import pandas as pd
import pytest
import torch
from forked import in_two
from models import batch, tiny_bert
from tiny import save_tiny_backbone

from pyro_blora import adapters, attach, draw, fit, load
from pyro_blora.__main__ import main
from pyro_blora.bops import expected_bits
from pyro_blora.build import build
from pyro_blora.checkpoint import read_tensors
from pyro_blora.config import RunConfig
from pyro_blora.distributed import AnyOf, average_gradients, gathered, leave, on_main, shard
from pyro_blora.gates import Gates
from pyro_blora.guides import build_guide
from pyro_blora.posterior import predict
from pyro_blora.posterior.arviz_compat import read
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.run import train_run
from pyro_blora.tasks import get_task
from pyro_blora.tasks.batching import by_length, on_device

pytestmark = pytest.mark.usefixtures("eager", "as_shipped")  # processes that torchrun starts know no fixture
ROOT = Path(__file__).resolve().parents[1]

DECODER = '''
import torch
import transformers


def decoder(num_labels):
    """Llama of 2 layers, hidden size 32."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained("TOKENIZER")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=num_labels, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=64,
        initializer_range=0.2,
    )
    return transformers.LlamaForSequenceClassification(config), tokenizer
'''


def print_gradient_gaps():
    """How far the mean gradients of two halves of a batch are from those of the whole batch, by process."""
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    net = attach(tiny_bert(dropout=0.0), rank=4, sequence_length=32)
    for parameter in net.adapter_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    prior = build_prior("bops", net.layout)
    guide = build_guide("mean_field", net.layout, prior, {"open_logit": 1.0})
    program = BayesianLoRA(net, prior, guide, get_task("sst2").likelihood, n_train=100)
    inputs, labels = batch(size=8)
    distributions = guide.distributions(0.5, False)
    drawn = Gates(*(distribution.rsample() for distribution in distributions))  # the same everywhere, differentiable
    learning = [p for p in program.parameters() if p.requires_grad]

    def gradients(rows, average):
        nll = program.nll({key: x[rows] for key, x in inputs.items()}, labels[rows], *drawn)
        slopes = torch.autograd.grad(nll, learning, retain_graph=True, allow_unused=True)
        for parameter, slope in zip(learning, slopes, strict=True):
            parameter.grad = slope
        if average:
            average_gradients(learning, accelerator)
        return [None if p.grad is None else p.grad.clone() for p in learning]

    union = gradients(slice(None), False)
    mine = gradients(slice(accelerator.process_index, None, 2), True)
    both = zip(mine, union, strict=True)
    gap = max((a - b).norm() / b.norm() for a, b in both if b is not None and b.norm() > 0)
    found = sum(b is not None for b in union)
    assert [a is None for a in mine] == [b is None for b in union] and found == 17  # LoRA, head, ranges, z, g
    gaps = gathered(float(gap))
    if accelerator.is_main_process:
        print(*gaps)
    leave()


def print_draws(config):
    """Whether two processes of a training draw gates of their own, share the rows and learn the same."""
    seen, losses, examples, inner, forward = [], [], [], adapters.use_gates, BayesianLoRA.forward

    def watched(net, z, g, *theta, **more):
        if torch.is_grad_enabled():  # else distributions are checked
            seen.append(z.detach().clone())
        return inner(net, z, g, *theta, **more)

    def weighed(program, inputs, *arguments):
        loss, elbo = forward(program, inputs, *arguments)
        if torch.is_grad_enabled():
            examples.extend(tuple(row[row != 0].tolist()) for row in inputs["input_ids"])
            losses.append(loss.item())
        return loss, elbo

    adapters.use_gates, BayesianLoRA.forward = watched, weighed
    trained = fit(config, quiet=True)
    z = gathered(torch.stack([x for x in seen if 0 < x.mean() < 1]))
    each, shares = gathered(losses), gathered(examples)
    parameters = gathered([p.detach() for p in trained.program.parameters() if p.requires_grad])
    if accelerate.PartialState().is_main_process:
        logged = [line["loss"] for line in trained.metrics]
        print("draws", [not torch.equal(a, b) for a, b in zip(*z, strict=True)].count(True), len(z[0]))
        rows = [tuple(row) for row in trained.parts.tokens["train"]["input_ids"]]
        print(
            "examples", *map(len, shares), sorted(row for share in shares for row in share) == sorted(rows)
        )  # each once
        print("logged", logged == pytest.approx([sum(pair) / 2 for pair in zip(*each, strict=True)], rel=1e-5))
        print("same", all(torch.equal(a, b) for a, b in zip(*parameters, strict=True)))
    leave()


def refuse():
    state = accelerate.PartialState(cpu=True)

    def check():
        assert state.is_main_process, "the other process has nothing to check"
        raise ValueError("it cannot be exported")

    on_main(lambda: None)
    try:
        on_main(check)
    except ValueError as error:
        print(f"process {state.process_index}: {error}")
    leave()


def torchrun(*arguments: str, **variables: str) -> str:
    """What two processes print.  Fails with what they say where they fail."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
             "PYRO_BLORA_COMPILE": "0", "HF_HUB_OFFLINE": "1", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def backbone(folder):
    return save_tiny_backbone(folder / "tiny")


@pytest.fixture(scope="module")
def decoder(folder, backbone):
    path = folder / "small.py"
    path.write_text(DECODER.replace("TOKENIZER", str(backbone)))
    return f"{path}:decoder"


def settings(backbone, output_dir, **changes) -> dict:
    """A run of four steps of 2 x 8 examples."""
    return {
        "task": "acceptability", "backbone": str(backbone), "max_train": 64, "epochs": 1, "batch_size": 8, "rank": 4,
        "kl_warmup": 0.25, "draws": 3, "logging_steps": 1, "checkpoint_steps": 2, "max_length": 32, "seed": 1,
        "output_dir": str(output_dir), **changes,
    }  # fmt: skip


def flags(config: dict) -> list[str]:
    return ["train", *(part for key, value in config.items() for part in (f"--{key}", str(value)))]


def folder_of(config: dict) -> Path:
    (found,) = Path(config["output_dir"]).glob("[!.]*")
    return found


def train(config: dict, folder: Path, **variables: str) -> Path:
    """The folder of a run that two processes train."""
    in_two(lambda: main(flags(config)), folder, **variables)
    return folder_of(config)


@pytest.fixture(scope="module")
def run(folder, backbone):
    """As a user starts it."""
    config = settings(backbone, folder / "runs", tracker="tensorboard")
    torchrun("-m", "pyro_blora", *flags(config))
    return folder_of(config)


def test_two_processes_have_the_gradients_of_the_union_of_their_batches(folder):
    gaps = [float(word) for word in in_two(print_gradient_gaps, folder).split()]
    assert len(gaps) == 2 and max(gaps) <= 1e-5


def print_means_of_missing():
    """Mean gradients of three parameters, of which the second has one on process 1 alone, the third on none."""
    accelerator = accelerate.Accelerator(cpu=True)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (1 + accelerator.process_index)
    if accelerator.process_index == 1:
        parameters[1].grad = torch.tensor([4.0, 6.0])
    average_gradients(parameters, accelerator)
    print([None if p.grad is None else p.grad.tolist() for p in parameters])
    leave()


def test_a_gradient_that_one_process_lacks_is_zero_there(folder):
    said = in_two(print_means_of_missing, folder).splitlines()
    assert said == ["[[1.5, 3.0], [2.0, 3.0], None]"] * 2


def print_when_it_is_said(every):
    """Process 1 is the slow one, and has a number from step 20 on; of all: the number, its step, steps that asked."""
    accelerator, asked, number = accelerate.Accelerator(cpu=True), set(), 0
    any_of = AnyOf(accelerator, every=every)
    for step in range(40):
        time.sleep(0.002 * (1 + accelerator.process_index))
        number = any_of(15 if accelerator.process_index == 1 and step >= 20 else 0, step)
        asked.add(any_of.last)
        if number:
            break
    print(number, step, *sorted(asked))
    leave()


@pytest.mark.parametrize("every", [0.0, 0.02, 1e6])
def test_a_number_of_one_process_is_found_at_the_same_step_by_all(folder, every):
    one, other = in_two(lambda: print_when_it_is_said(every), folder).splitlines()
    number, step, *asked = map(int, one.split())
    assert one == other and asked[:2] == [0, 1]  # how long a step takes is known after one
    if every == 1e6:
        assert number == 0 and asked == [0, 1]
    else:
        assert number == 15 and 20 <= step == asked[-1] and (every or asked == [*range(21)])


def test_every_process_draws_gates_of_its_own_and_learns_the_same(folder, backbone):
    config = RunConfig(**settings(backbone, folder / "unused"))
    said = in_two(lambda: print_draws(config), folder).splitlines()
    # of three steps with gates; every row on one process; the mean over processes
    assert said == ["draws 3 3", "examples 32 32 True", "logged True", "same True"]


def test_there_is_one_log_one_checkpoint_and_one_run(run):
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == "state.safetensors" and read_tensors(checkpoint)[1]["processes"] == "2"
    assert json.loads((run / "config.json").read_text())["processes"] == 2
    assert json.loads((run / "summary.json").read_text())["n_eval"] == len(pd.read_parquet(run / "predictions.parquet"))
    assert (run / "report.html").exists()


def write_page(config):
    """The second process comes when the first one could have written it."""
    time.sleep(0.5 * accelerate.PartialState(cpu=True).process_index)
    train_run(config, quiet=True)
    leave()


def test_a_page_that_is_missing_ends_no_process_that_comes_late(run, folder):
    config = dataclasses.replace(RunConfig.from_json(run / "config.json"), output_dir=str(folder / "without-page"))
    shutil.copytree(run, config.folder, ignore=shutil.ignore_patterns("report.html"))
    in_two(lambda: write_page(config), folder)
    assert (config.folder / "report.html").exists()


def test_evaluation_in_parts_is_that_of_one_process(run):
    """Every process predicts some of the batches, all under the same draws."""
    program = load(run)
    config = RunConfig.from_json(run / "config.json")
    parts = build(config)
    rows, order = by_length(parts.tokens["eval"], parts.collate, 16)
    gates = draw(program, config.draws, seed=config.seed)
    alone = predict(program, on_device(rows, torch.device("cpu")), gates=gates).restored(order)
    table, data = pd.read_parquet(run / "predictions.parquet"), read(run / "posterior.nc")
    names = [f"p_{label}" for label in parts.task.labels]
    torch.testing.assert_close(torch.tensor(table[names].to_numpy()), alone.mean, atol=1e-6, rtol=0)
    bits = torch.tensor(data["posterior"]["bits"].values)[0]  # (S, L, T)
    assert bits.unique().numel() > 1 and torch.equal(bits.float(), expected_bits(program.layout, gates.z))


@pytest.mark.parametrize("adapter", ["xs"])  # whose frozen factors are sharded, too
def test_a_sharded_decoder_trains_as_a_whole_one(folder, decoder, adapter):
    """The frozen weights are split over the processes by FSDP2; what is learned, saved and said is the same."""
    changes = {"target_modules": "q_proj,k_proj,v_proj", "scope": "encoder", "adapter": adapter}
    plain = train(settings(decoder, folder / f"plain-{adapter}", **changes), folder)
    fsdp = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }  # fmt: skip
    sharded = train(settings(decoder, folder / f"sharded-{adapter}", **changes), folder, **fsdp)
    for mine, true in zip(*((run / "metrics.jsonl").read_text().splitlines() for run in (sharded, plain)), strict=True):
        mine, true = json.loads(mine), json.loads(true)
        assert mine.keys() == true.keys()
        for key in mine.keys() - {"seconds"}:
            assert mine[key] == pytest.approx(true[key], rel=1e-4, abs=1e-6), key
    tables = [pd.read_parquet(run / "predictions.parquet")["log_likelihood"] for run in (sharded, plain)]
    assert (tables[0] - tables[1]).abs().max() < 1e-4
    weights = [dict(load(run, allow_code=[decoder]).named_parameters()) for run in (sharded, plain)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-4, rtol=1e-4)


def test_another_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="--fsdp_version 2"):
        shard(tiny_bert(), None)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="nothing is frozen"):
        shard(tiny_bert(), None)


def test_what_the_main_process_refuses_ends_them_all(folder):
    printed = in_two(refuse, folder)
    assert all(f"process {i}: it cannot be exported" in printed for i in (0, 1))
