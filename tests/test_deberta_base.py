"""DeBERTaV3-base of exact configuration, in bfloat16: trained, killed, resumed, exported, loaded and asked."""

import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import save_tiny_backbone

from pyro_blora import RunConfig, load, predict
from pyro_blora.build import build
from pyro_blora.data import by_length, on_device
from pyro_blora.run import train_run

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


@pytest.fixture(params=["tiny_deberta(vocab_size=600)", "deberta_v3_base()"], ids=["tiny", "base"])
def config(request, tmp_path):
    """Three steps on two sentences of a few words; the gates start after the first."""
    folder = tmp_path / "SST-2"
    folder.mkdir()
    lines = [f"a {word} film\t{i % 2}" for i, word in enumerate(("good", "bad"))]
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    tokenizer = save_tiny_backbone(tmp_path / "tokenizer", letters=True)
    own = tmp_path / "own.py"
    own.write_text(OWN.format(tests=str(Path(__file__).parent), build=request.param, tokenizer=str(tokenizer)))
    return RunConfig(
        task="sst2", glue_dir=str(tmp_path), backbone=f"{own}:model", precision="bf16", epochs=3, batch_size=2,
        kl_warmup=0.4, rank=2, draws=1, max_length=8, logging_steps=1, checkpoint_steps=1,
        output_dir=str(tmp_path / "runs"),
    )  # fmt: skip


def test_it_is_killed_resumed_exported_and_predicts(config):
    partial = config.folder.with_name(f".{config.folder.name}.partial")
    child = os.fork()
    if child == 0:
        try:
            train_run(config)
        finally:
            os._exit(0)
    log = partial / "metrics.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not config.folder.exists() and list((partial / "checkpoints").iterdir())
    folder = train_run(config)
    program, parts = load(folder, allow_code=[config.backbone]), build(config)
    batches, order = by_length(parts.tokens["eval"], parts.tokenizer, 4)
    found = predict(program, on_device(batches, torch.device("cpu"))).restored(order)
    table = pd.read_parquet(folder / "predictions.parquet")
    assert found.log_score.numpy() == pytest.approx(table["deployed_log_likelihood"].to_numpy(), abs=1e-6)
    assert program.net.layout.architecture == "deberta-v2" and program.net.autocast is torch.bfloat16
