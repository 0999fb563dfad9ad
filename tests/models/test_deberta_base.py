"""DeBERTaV3-base of exact configuration, in bfloat16: trained, killed, resumed, exported, loaded and asked."""

import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from forked import started
from models import deberta_v3_base
from tiny import save_tiny_backbone
from transformers import AutoTokenizer

from pyro_blora import RunConfig, load, predict
from pyro_blora.run import train_run
from pyro_blora.tasks import get_task
from pyro_blora.tasks.batching import by_length, on_device, tokenize

pytestmark = pytest.mark.usefixtures("eager")

OWN = """
import sys
sys.path[:0] = [{tests!r}]
import transformers
import models


def model(num_labels):
    return models.{build}, transformers.AutoTokenizer.from_pretrained({tokenizer!r})
"""


def wait_for(condition, seconds=240):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come so far"
        time.sleep(0.05)


TINY, BASE = "tiny_deberta(vocab_size=600)", "deberta_v3_base()"


@pytest.fixture(params=[TINY, BASE], ids=["tiny", "base"])
def config(request, tmp_path):
    """A few steps on two sentences of a few words; the gates start after the first, or after two of four."""
    steps = 2 if request.param == BASE else 4
    folder = tmp_path / "SST-2"
    folder.mkdir()
    lines = [f"a {word} film\t{i % 2}" for i, word in enumerate(("good", "bad"))]
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    if request.param == BASE:
        tokenizer = request.getfixturevalue("data_dir") / "tokenizers" / "deberta-v3-fast"
    else:
        tokenizer = save_tiny_backbone(tmp_path / "tokenizer", letters=True)
    own = tmp_path / "own.py"
    own.write_text(OWN.format(tests=str(Path(__file__).parents[1]), build=request.param, tokenizer=str(tokenizer)))
    return RunConfig(
        task="sst2", glue_dir=str(tmp_path), backbone=f"{own}:model", precision="bf16", epochs=steps, batch_size=2,
        kl_warmup=0.5, rank=8, draws=1, max_length=8, logging_steps=1, checkpoint_steps=1,
        output_dir=str(tmp_path / "runs"),
    )  # fmt: skip


def test_it_is_killed_resumed_exported_and_predicts(config, request, tmp_path):
    partial = config.folder.with_name(f".{config.folder.name}.partial")
    child = started(lambda: train_run(config) and None, tmp_path / "printed.txt")
    log, checkpoint = partial / "metrics.jsonl", partial / "checkpoints" / "state.safetensors"
    wait_for(lambda: checkpoint.is_file() and log.read_text().count("\n") >= config.epochs - 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not config.folder.exists() and any(
        checkpoint.parent.glob("state*.safetensors")
    )  # between two names: the older
    folder = train_run(config)
    program, words = load(folder, allow_code=[config.backbone]), AutoTokenizer.from_pretrained(folder / "adapter")
    task = get_task("sst2")
    tokens = tokenize(task.load(glue_dir=tmp_path)["eval"], words, task, config.max_length)
    batches, order = by_length(tokens, task.likelihood.collator(words), 4)
    found = predict(program, on_device(batches, torch.device("cpu"))).restored(order)
    table = pd.read_parquet(folder / "predictions.parquet")
    assert found.log_score.numpy() == pytest.approx(table["deployed_log_likelihood"].to_numpy(), abs=1e-6)
    assert program.net.layout.architecture == "deberta-v2" and program.net.autocast is torch.bfloat16
    if "base" in request.node.name:
        with torch.device("meta"):
            assert sum(p.numel() for p in deberta_v3_base().parameters()) == 184_423_682
        assert len(program.net.layout.adapted) == 36
        assert sum(p.numel() for p in program.net.adapter_parameters()) == 442_368
