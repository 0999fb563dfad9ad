"""`pyro-blora push` and names of the hub: what is sent comes back and predicts the same, and nothing else is sent."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, hub_server
from models import batch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_backbone, tiny_config
from transformers import AutoTokenizer

from pyro_blora import export, load
from pyro_blora.__main__ import main
from pyro_blora.build import build
from pyro_blora.deploy import pack
from pyro_blora.deploy.hub_names import folder_of
from pyro_blora.deploy.packed import MANIFEST, WEIGHTS

pytestmark = pytest.mark.usefixtures("eager")
INPUTS = batch(2, 7)[0]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def exported(backbone, tmp_path_factory):
    """An untrained posterior, and its deployed model packed."""
    made, config = tmp_path_factory.mktemp("made"), tiny_config(backbone, scope="encoder")
    parts = build(config)
    settings = {"config": config, "tokenizer": parts.tokenizer}
    return {"adapter": export(parts.program, made / "adapter", **settings),
            "packed": pack(parts.program, made / "packed", **settings)}  # fmt: skip


@pytest.fixture
def hub(tmp_path):
    with hub_server(tmp_path / "cache") as found:
        yield found


def logits(folder, **settings):
    with torch.no_grad():
        return load(folder, **settings)(**INPUTS).logits


def refused(capsys, *argv):
    capsys.readouterr()
    assert main([*map(str, argv), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and TOKEN not in err
    return err


def test_a_packed_model_goes_there_and_back(hub, exported, capsys, tmp_path):
    assert main(["push", str(exported["packed"]), "someone/tiny", "--private", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "/someone/tiny/commit/" in out and out.count("\n") == 1 and err == "" and hub.private["someone/tiny"]
    sent = hub.files("someone/tiny")
    assert {name: x for name, x in sent.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in exported["packed"].iterdir()
    }
    expected = logits(exported["packed"])
    assert torch.equal(logits("someone/tiny"), expected)
    (snapshot,) = (tmp_path / "cache").glob("models--someone--tiny/snapshots/*")
    assert ".gitattributes" not in {path.name for path in snapshot.iterdir()}  # only what an export has
    table, out = tmp_path / "texts.csv", tmp_path / "answers.csv"
    table.write_text("sentence\nThe soldier lost\n")
    assert main(["predict", "someone/tiny", str(table), "--out", str(out), "--quiet"]) == 0
    assert out.read_text().startswith("line,label,confidence")
    for method, path, body in hub.seen:
        assert TOKEN.encode() not in body and b"/tmp" not in body, (method, path)


def test_a_branch_is_a_revision_and_replaces_what_another_export_left(hub, exported, backbone, capsys):
    for folder, flags in ((exported["packed"], []), (exported["adapter"], ["--revision", "posterior"])):
        assert main(["push", str(folder), "someone/both", "--quiet", *flags]) == 0
    assert MANIFEST in hub.files("someone/both") and MANIFEST not in hub.files("someone/both", "posterior")
    model = load("someone/both", revision="posterior", backbone=backbone)
    pair = [each.predict(["The soldier lost"]) for each in (model, load(exported["adapter"], backbone=backbone))]
    assert pair[0].equals(pair[1])
    commit = hub.models["someone/both"]["main"]
    assert torch.equal(logits("someone/both", revision=commit), logits(exported["packed"]))
    with pytest.raises(ValueError, match="someone/both on the hub has no revision other: give a branch, a tag or a co"):
        load("someone/both", revision="other")
    with pytest.raises(ValueError, match="there is no folder someone/none here, and no such model on the hub"):
        load("someone/none")


def test_a_model_that_is_damaged_on_the_hub_is_refused_as_a_folder_is(hub, exported):
    main(["push", str(exported["packed"]), "someone/tiny", "--quiet"])
    files = dict(hub.files("someone/tiny"))
    hub.commit(
        "someone/tiny", "short", {**files, WEIGHTS: files[WEIGHTS][:-4] + b"oops", "code.py": b"1/0", "x.bin": b"x"}
    )
    with pytest.raises(ValueError, match="is not what was written, its hash is another"):
        load("someone/tiny", revision="short")
    assert not any(path.endswith(("x.py", "x.bin")) for _, path, _ in hub.seen)


_CHAT = "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("write", [export, pack])
@pytest.mark.parametrize("template", [_CHAT, {"default": _CHAT, "tool_use": "{{ tools }}"}], ids=["one", "several"])
def test_the_template_of_a_chat_is_sent_and_fetched(hub, backbone, write, template, tmp_path):
    config = tiny_config(backbone, scope="encoder")
    parts = build(config)
    parts.tokenizer.chat_template = template
    folder = write(parts.program, tmp_path / "model", config=config, tokenizer=parts.tokenizer)
    assert (folder / "chat_template.jinja").is_file() == isinstance(template, str)
    assert main(["push", str(folder), "someone/chat", "--quiet"]) == 0
    fetched = folder_of("someone/chat")
    assert {path.name for path in fetched.iterdir()} == {path.name for path in folder.iterdir()}
    assert AutoTokenizer.from_pretrained(fetched).chat_template == parts.tokenizer.chat_template


def test_offline_and_without_a_login_nothing_is_asked(hub, exported, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it, where there" in refused(capsys, "push", exported["packed"], "someone/tiny")
    with pytest.raises(
        ValueError, match="someone/tiny is not in the cache of the hub; HF_HUB_OFFLINE is set: unset it"
    ):
        load("someone/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    assert "a push needs a login: `hf auth login`" in refused(capsys, "push", exported["packed"], "someone/tiny")
    assert hub.seen == []
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}b")
    assert "someone/tiny was not pushed: " in refused(capsys, "push", exported["packed"], "someone/tiny")


def _with_path(copy):
    (copy / "README.md").write_text((copy / "README.md").read_text() + "\nfrom /home/someone/secret runs\n")


def _with_token(copy):
    (copy / "README.md").write_text(f"HF_TOKEN={TOKEN}")


def _with_note(copy):
    save_file(load_file(copy / "x.safetensors"), copy / "x.safetensors", {"made": f"in {copy}"})


def _with_link(copy):
    (copy / "x.json").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_with_path, "README.md names a place on this machine, '/home/someone/secret', and nothing is sent"),
        (_with_token, "README.md has a token of the hub in it, and nothing is sent: take it out, and revoke it"),
        (_with_note, "x.safetensors names a place on this machine"),
        (_with_link, "x.json is no file of an export, and nothing of it is sent: move it away"),
        (lambda copy: (copy / "notes.py").touch(), "notes.py is no file of an export"),
        (lambda copy: (copy / ".env").touch(), ".env is no file of an export"),
        (lambda copy: (copy / MANIFEST).write_text("{}"), f"{MANIFEST} is no description of a model by packed"),
        (lambda copy: (copy / "README.md").unlink(), "is neither a finished run nor a folder of `pyro-blora export`"),
    ],
)  # fmt: skip
def test_nothing_is_sent_of_a_folder_that_says_too_much_or_is_not_whole(
    hub, exported, capsys, tmp_path, change, sentence
):
    copy = shutil.copytree(exported["packed"], tmp_path / "copy")
    if change is _with_note:
        save_file({"x": torch.zeros(1)}, copy / "x.safetensors")
    change(copy)
    assert sentence in refused(capsys, "push", copy, "someone/tiny") and hub.seen == []


def test_an_adapter_of_another_export_is_not_sent(hub, exported, capsys, tmp_path):
    copy = shutil.copytree(exported["adapter"], tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    assert "the adapter in" in refused(capsys, "push", copy, "someone/tiny") and hub.seen == []
    assert "'tiny' is no name on the hub: give user/name" in refused(capsys, "push", copy, "tiny")
