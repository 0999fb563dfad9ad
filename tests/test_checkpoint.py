"""Checkpoints: where their tensors go, and that only what was saved, and belongs here, is taken up."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_backbone, tiny_config
from torch import nn

from pyro_blora.checkpoint import load_checkpoint, read_tensors, save_checkpoint
from pyro_blora.tasks import get_task
from pyro_blora.training import fit
from pyro_blora.training.identity import _of_rows

pytestmark = pytest.mark.usefixtures("eager")


def optimizer_of(module):
    return torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)  # as make_optimizer's


def stepped(device="cpu"):
    """A module, and its optimizer after one step."""
    module = nn.Linear(3, 2).to(device)
    optimizer = optimizer_of(module)
    module(torch.ones(1, 3, device=device)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_every_optimizer_state_is_where_its_parameter_is(tmp_path):
    """On the meta device, in the place of a GPU: the fused step takes no state from the host."""
    save_checkpoint(tmp_path, *stepped(), 1, 8)
    module = nn.Linear(3, 2, device="meta")
    optimizer = optimizer_of(module)
    assert load_checkpoint(tmp_path, module, optimizer, 8).step == 1
    for parameter in module.parameters():
        devices = {key: x.device.type for key, x in optimizer.state[parameter].items()}
        assert devices == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), "meta")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_the_fused_step_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, device):
    module, optimizer = stepped(device)
    save_checkpoint(tmp_path, module, optimizer, 1, 8)
    other = nn.Linear(3, 2, device=device)
    again = optimizer_of(other)
    load_checkpoint(tmp_path, other, again, 8)
    for net, its in ((module, optimizer), (other, again)):
        net.zero_grad()
        (net(torch.ones(1, 3, device=device)) ** 2).sum().backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def cut(backbone, tmp_path_factory):
    """A run of eight steps that was left after six: checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("cut")
    fit(tiny_config(backbone), folder=folder, quiet=True, until=6)
    return folder


@pytest.fixture
def copy(cut, tmp_path):
    return Path(shutil.copytree(cut, tmp_path / "run"))


NAMES = ("state.safetensors", "state.previous.safetensors")


def flip(path, place=-1):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def edit_step(path):
    tensors, notes = read_tensors(path)
    raw = json.loads(metadata(path)["notes"])
    save_file(tensors, path, metadata={"notes": json.dumps(raw | {"step": str(int(notes["step"]) + 1)})})


def metadata(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-8])


DAMAGES = {"flipped byte": flip, "flipped header": lambda path: flip(path, 20), "edited step": edit_step,
           "cut short": cut_short, "empty": lambda path: path.write_bytes(b"")}  # fmt: skip


def test_the_newest_two_are_kept(copy):
    assert {path.name: read_tensors(path)[1]["step"] for path in (copy / "checkpoints").iterdir()} == dict(
        zip(NAMES, "63", strict=True)
    )


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_one_is_skipped_with_a_warning_and_without_another_refused(backbone, cut, copy, damage):
    damage(copy / "checkpoints" / NAMES[0])
    module = fit(tiny_config(backbone), quiet=True, until=1).program
    with pytest.warns(
        UserWarning, match=r"state\.safetensors is damaged .*: going on from the one before it, at step 3"
    ):
        assert load_checkpoint(copy / "checkpoints", module, torch.optim.AdamW(module.parameters()), 8).step == 3
    shutil.copy(cut / "checkpoints" / NAMES[0], copy / "checkpoints" / NAMES[0])
    for name in NAMES:
        damage(copy / "checkpoints" / name)
    with pytest.raises(
        ValueError, match=r"state\.safetensors is damaged .*: delete its folder to start this run again"
    ):
        fit(tiny_config(backbone), folder=copy, quiet=True)


def test_one_that_the_system_cannot_read_is_kept(backbone, copy):
    (copy / "checkpoints" / NAMES[0]).rename(copy / "whole")
    (copy / "checkpoints" / NAMES[0]).mkdir()  # which cannot be read, whoever reads it
    with pytest.raises(ValueError, match=r"state\.safetensors cannot be read now \(.*\): give the same command again"):
        fit(tiny_config(backbone), folder=copy, quiet=True)
    assert (copy / "checkpoints" / NAMES[0]).exists() and (copy / "checkpoints" / NAMES[1]).exists()


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(backbone, copy, tmp_path):
    flip(copy / "checkpoints" / NAMES[0])
    with pytest.warns(UserWarning, match="going on from the one before it"):
        fit(tiny_config(backbone), folder=copy, quiet=True)
    fit(tiny_config(backbone), folder=tmp_path / "whole", quiet=True)
    for name in NAMES:
        assert (copy / "checkpoints" / name).read_bytes() == (tmp_path / "whole/checkpoints" / name).read_bytes()


def test_a_kill_between_two_renames_leaves_the_one_before(backbone, copy):
    (copy / "checkpoints" / NAMES[0]).unlink()
    assert [line["step"] for line in fit(tiny_config(backbone), folder=copy, quiet=True, until=4).metrics] == [
        1,
        2,
        3,
        4,
    ]


def test_a_checkpoint_of_another_configuration_is_refused(backbone, copy):
    with pytest.raises(ValueError, match=r"state\.safetensors is of another configuration: restore that, or delete"):
        fit(tiny_config(backbone, seed=1), folder=copy, quiet=True)


def test_another_backbone_is_refused(backbone, copy, tmp_path):
    """Under the same name, with one frozen number changed."""
    shutil.copytree(backbone, tmp_path / "backbone")
    fit(tiny_config(tmp_path / "backbone"), folder=tmp_path / "mine", quiet=True, until=3)
    path = tmp_path / "backbone" / "model.safetensors"
    weights = load_file(path)
    weights["bert.embeddings.word_embeddings.weight"][5, 7] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is of another backbone: its frozen weights have changed since"):
        fit(tiny_config(tmp_path / "backbone"), folder=tmp_path / "mine", quiet=True)


@pytest.mark.parametrize("changed", ["label", "sentence"])
def test_other_training_data_are_refused(backbone, tmp_path, changed):
    data = tmp_path / "glue" / "SST-2"
    data.mkdir(parents=True)
    words = get_task("acceptability").load(n_train=40)["train"]["sentence"]  # the tokenizer knows them
    rows = [f"{sentence}\t{i % 2}\n" for i, sentence in enumerate(words)]
    for name in ("train.tsv", "dev.tsv"):
        (data / name).write_text("sentence\tlabel\n" + "".join(rows))
    config = tiny_config(backbone, task="sst2", glue_dir=str(tmp_path / "glue"), max_train=None, checkpoint_steps=1)
    fit(config, folder=tmp_path / "run", quiet=True, until=1)
    rows[3] = rows[3].replace("\t1", "\t0") if changed == "label" else rows[5]
    (data / "train.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    with pytest.raises(ValueError, match="is of other training data: texts, labels or tokenizer have changed since"):
        fit(config, folder=tmp_path / "run", quiet=True)


@pytest.mark.filterwarnings("error")
def test_a_checkpoint_of_before_there_were_hashes_is_read(tmp_path):
    module, optimizer = stepped()
    save_checkpoint(tmp_path, module, optimizer, 1, 8)
    tensors, _ = read_tensors(tmp_path / NAMES[0])
    save_file(tensors, tmp_path / NAMES[0], metadata={"step": "1", "total": "8"})
    found = load_checkpoint(tmp_path, module, optimizer, 8, {"config": "abc"})
    assert found.step == 1


def test_a_lost_best_epoch_is_missed(backbone, tmp_path):
    config = tiny_config(backbone, validation=0.25, choose_epoch=True, kl_warmup=0.1, epochs=3, checkpoint_steps=1)
    fit(config, folder=tmp_path, quiet=True, until=7)
    (tmp_path / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(ValueError, match=r"best\.safetensors is damaged \(.*No such file"):
        fit(config, folder=tmp_path, quiet=True)


def test_rows_have_one_hash_however_they_are_stored():
    rows = {"input_ids": [[1, 2, 3], [4], [5, 6]], "label": [0, 1, 0]}
    whole = datasets.Dataset.from_dict(rows)
    parts = [datasets.Dataset.from_dict({name: x[i : i + 1] for name, x in rows.items()}) for i in range(3)]
    in_chunks = datasets.concatenate_datasets(parts)
    assert in_chunks.data.column("input_ids").num_chunks == 3
    assert _of_rows({"train": in_chunks}) == _of_rows({"train": whole}) == "d00660e37cba29d3"
    other = datasets.Dataset.from_dict({**rows, "input_ids": [[1, 2], [3, 4], [5, 6]]})
    assert _of_rows({"train": other}) != _of_rows({"train": whole})
