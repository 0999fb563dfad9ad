"""`pyro-blora serve`: the answers of `pyro-blora predict` over HTTP, within limits, and a page that shows them."""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import requests
import torch
from forked import ended, started
from tiny import save_tiny_backbone, save_tiny_decoder, tiny_config

from pyro_blora import export
from pyro_blora.__main__ import main
from pyro_blora.build import build
from pyro_blora.config.serve_flags import Serving
from pyro_blora.deploy import pack
from pyro_blora.deploy.onnx_file import export_onnx
from pyro_blora.deploy.opening import load_to_predict
from pyro_blora.tasks import MultiLabel, MultipleChoice, Spans, Task, TokenLabels, get_task, register_task
from pyro_blora.training.trained import Trained

for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason=f"no {needed}: pip install 'pyro-blora[serve]'")
from pyro_blora.serve import Desk  # noqa: E402 (what it imports is there)
from pyro_blora.serve.desk import Asked  # noqa: E402 (as above)
from pyro_blora.serve.server import bound, server_of  # noqa: E402 (as above)

pytestmark = pytest.mark.usefixtures("eager")
LIMITS = {"max_texts": 4, "max_characters": 100, "max_bytes": 2000}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def folders(backbone, tmp_path_factory):
    """An untrained posterior, its deployed model packed, and the same as ONNX."""
    made = tmp_path_factory.mktemp("made")
    config = tiny_config(backbone, scope="encoder", guide_settings={"open_logit": 0.0}, draws=6)
    parts = build(config)
    torch.manual_seed(0)
    for p in parts.program.net.adapter_parameters():
        torch.nn.init.normal_(p, std=0.2)
    head = parts.program.net.backbone.classifier.modules_to_save["default"]
    head.weight.data.mul_(5.0), head.bias.data.copy_(torch.tensor([-2.4, 0.0]))  # both labels, with doubt
    settings = {"config": config, "tokenizer": parts.tokenizer}
    found = {
        "posterior": export(parts.program, made / "posterior", **settings),
        "packed": pack(parts.program, made / "packed", **settings),
    }
    with contextlib.suppress(ImportError):  # without the extra `onnx`
        found["onnx"] = export_onnx(parts.program, made / "onnx", **settings)
    return found


@pytest.fixture(scope="module")
def desk(folders, backbone):
    return Desk(load_to_predict(folders["posterior"], backbone=backbone), "films", confidence=0.6)


@pytest.fixture(scope="module")
def texts():
    return list(get_task("acceptability").load(n_train=64)["eval"]["sentence"][:30])


@contextlib.contextmanager
def served(desk, **limits):
    """The address of a server in a thread."""
    with bound(Serving(port=0)) as address:
        address.listen()  # before the thread does
        server = server_of(desk, Serving(**limits))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [address]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{address.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(desk):
    with served(desk, **LIMITS) as address:
        yield address


def as_predict(row):
    """A row of /predict as `pyro-blora predict` writes it."""
    row = {**row, **{f"p_{name}": p for name, p in row.get("probabilities", {}).items()}}
    return {name: x for name, x in row.items() if name not in ("probabilities", "draws", "disagree")}


@pytest.mark.parametrize("form", ["posterior", "packed", "onnx"])
def test_answers_are_those_of_predict_on_the_same_folder(folders, backbone, texts, form, tmp_path):
    if form not in folders:
        pytest.skip("no onnx and onnxscript: pip install 'pyro-blora[onnx]'")
    table, out = tmp_path / "texts.jsonl", tmp_path / "answers.jsonl"
    table.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts))
    own = [] if form == "onnx" else ["--backbone", str(backbone)]
    model = load_to_predict(folders[form], backbone=None if form == "onnx" else backbone)
    p = model.predict(list(texts))["p_acceptable"]
    level = float(np.maximum(p, 1 - p).median())  # half of them are answered
    argv = ["predict", str(folders[form]), str(table), "--out", str(out), "--confidence", str(level), "--quiet", *own]
    assert main(argv) == 0
    expected = [{k: x for k, x in json.loads(line).items() if k != "line"} for line in out.read_text().splitlines()]
    with served(Desk(model, "films", confidence=level)) as address:
        found = requests.post(f"{address}/predict", json={"texts": texts, "draws": True}).json()["answers"]
        info = requests.get(f"{address}/info").json()
    assert [as_predict(row) for row in found] == expected
    assert {row["answered"] for row in found} == {True, False}
    assert (len(info["draws"]), info["columns"], info["labels"]) == (
        6 if form == "posterior" else 0, ["sentence"], ["unacceptable", "acceptable"],
    )  # fmt: skip
    if form == "packed":  # and those of the run's deployed allocation
        deployed = Desk(
            load_to_predict(folders["posterior"], backbone=backbone), "films", deployed=True, confidence=level
        )
        (rows,) = deployed.answer([Asked([(text,) for text in texts], draws=True)])
        assert rows == found and all("draws" not in row for row in rows)
        assert (info["form"], deployed.about()["form"]) == ("packed", "deployed")


def test_draws_are_those_whose_average_answers(desk, texts):
    (rows,) = desk.answer([Asked([(text,) for text in texts], draws=True)])
    for row in rows:
        each = np.array([draw["probabilities"]["acceptable"] for draw in row["draws"]])
        assert len(each) == 6 and np.isclose(each.mean(), row["probabilities"]["acceptable"], atol=1e-6)
        assert row["disagree"] == [i for i, draw in enumerate(row["draws"]) if draw["label"] != row["label"]]
        assert [draw["label"] == "acceptable" for draw in row["draws"]] == [*(each > 0.5)]
    assert any(row["disagree"] for row in rows) and not all(len(row["disagree"]) == 6 for row in rows)
    costs = [draw["bops"] for draw in desk.about()["draws"]]
    assert len(set(costs)) > 1 and all(0 < cost < 1 for cost in costs)


KINDS = {
    "several": (Task(name="served_several", text_columns=("text",), kind=MultiLabel(("a", "b")), metric_name="micro_f1",
                     load=lambda **_: rows(text="The soldier", label=[1, 0])), "the dog", "half"),
    "stars": (Task(name="served_stars", text_columns=("one", "other"), label_range=(0.0, 5.0), metric_name="pearson",
                   load=lambda **_: rows(one="The soldier", other="The lawyer", label=1.5)), ["a", "b"], ["a", " "]),
    "words": (Task(name="served_words", text_columns=("words",), kind=TokenLabels(("O", "X")), metric_name="f1",
                   load=lambda **_: rows(words=["The", "soldier"], label=[0, 1])), ["the", "dog"], "the dog"),
    "choice": (Task(name="served_choice", text_columns=("question", "options"), kind=MultipleChoice(("A", "B", "C")),
                    metric_name="accuracy", load=lambda **_: rows(question="who", options=["a", "b"], label=1)),
               ["who", ["the dog", "a"]], ["who", []]),
    "spans": (Task(name="served_spans", text_columns=("question", "text"), kind=Spans(stride=2, longest=2, best=4),
                   metric_name="same_span", load=lambda **_: rows(question="who", text="a dog", label=[0, 2, 0, 1])),
              ["who", " the dog"], ["who", " "]),
}  # fmt: skip


def rows(**row):
    table = datasets.Dataset.from_list([row] * 32)
    return {"train": table, "eval": table}


@pytest.fixture
def desk_of(folders, backbone, tmp_path, forget):
    """A desk of an untrained posterior of a kind, by name, and what it is called.

    folders: built before, so that the parts of the package are registered by then, which `forget` leaves.
    """

    def made(name, called):
        task, changes, folder = KINDS[name][0], {}, backbone
        if name == "choice":
            folder = save_tiny_decoder(tmp_path, "qwen3", head_dim=8)
            changes = {"target_modules": ("q_proj", "v_proj"), "scope": "encoder", "max_length": 64}
        if name == "spans":
            folder = save_tiny_backbone(tmp_path, letters=True)
        register_task(task)
        return Desk(Trained(build(tiny_config(folder, task=task.name, **changes)), [], 0.0), called)

    return made


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_outcome_is_json(desk_of, name):
    _, text, wrong = KINDS[name]
    desk = desk_of(name, name)
    limits = {"max_texts": 2, "max_characters": 20}
    if name != "several":
        with pytest.raises(ValueError, match=r"text 0 \(from 0\).* is no text"):
            desk.read([wrong], **limits)
    (found,) = desk.answer([Asked(desk.read([text], **limits), draws=True)])
    (row,) = json.loads(json.dumps(found, allow_nan=False))
    assert len(row["draws"]) == 3 and desk.about()["words"] == (name == "words")
    if name == "stars":
        assert row["low"] < row["mean"] < row["high"] and row["std"] > 0 and "disagree" not in row
        assert np.isclose(np.mean([draw["mean"] for draw in row["draws"]]), row["mean"])
    elif name == "spans":
        assert row["answer"] == row["n_best"][0] and len(row["n_best"]) == len(row["probabilities"]) == 4
    else:
        assert {*row["probabilities"]} == {*desk.about()["labels"]} and row["disagree"] is not None
    if name == "words":
        assert len(row["labels"]) == 2 and all(len(p) == 2 for p in row["probabilities"].values())


def test_a_text_that_cannot_be_read_is_refused_alone_and_with_its_reason(desk_of, caplog):
    desk = desk_of("spans", "answers")
    texts = [["who", "the dog"], ["who " * 40, "the dog"], ["who", "\u200b\tthe dog"]]
    with served(desk, wait_ms=200.0) as address, ThreadPoolExecutor(3) as pool:
        found = [*pool.map(lambda x: requests.post(f"{address}/predict", json={"text": x}), texts)]
    assert [each.status_code for each in found] == [200, 422, 200]
    assert re.match(r"the question 'who who .* leaves no room for a text", found[1].json()["error"])
    assert "could not be answered" not in caplog.text and "Traceback" not in caplog.text


def test_requests_that_come_together_share_passes(desk, texts):
    with served(desk, wait_ms=200.0) as address, ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda x: requests.post(f"{address}/predict", json={"text": x}).json(), texts[:8])]
        told = requests.get(f"{address}/metrics").text
    expected = [desk.answer([Asked([(text,)], draws=False)])[0][0] for text in texts[:8]]
    for each, row in zip(found, expected, strict=True):
        assert np.isclose(each["answers"][0]["confidence"], row["confidence"], atol=0.05)

    def value(name):
        return float(re.search(rf"^{name} (\S+)$", told, re.MULTILINE)[1])

    assert value("pyro_blora_texts_total") == value("pyro_blora_batch_texts_sum") == 8
    assert value("pyro_blora_batch_texts_count") < 8 and value("pyro_blora_batch_seconds_sum") > 0
    assert value("pyro_blora_waiting_texts") == 0 and 0 <= value("pyro_blora_texts_abstained_total") <= 8
    assert value(r'pyro_blora_requests_total\{code="200",path="/predict"\}') == 8
    assert 'pyro_blora_model{form="posterior",model="films",task="acceptability"} 1.0' in told


def test_the_load_test_measures_a_server_and_writes_a_page(desk, texts, tmp_path):
    from experiments import serve_load

    with served(desk, rate=0) as address:
        loads = [asyncio.run(serve_load.measured(address, texts, clients, 0.5)) for clients in (1, 4)]
        with pytest.raises(RuntimeError, match=r"422: .* is no text"):
            asyncio.run(serve_load.measured(address, [3], 1, 0.5))
    assert loads[0].texts == 1.0 < loads[1].texts <= 4.0
    assert all(load.per_second > 0 and 0 < load.percentiles[0] <= load.percentiles[2] for load in loads)
    server = serve_load.Server("posterior: films", "shared", "")
    found = {(server, clients): [load, load] for clients, load in zip((1, 4), loads, strict=True)}
    options = argparse.Namespace(threads=1, folders=[tmp_path], rounds=2, seconds=0.5, busy=1.0)
    page = serve_load.page(found, 7.0, options)
    assert f"| shared | 4 | {loads[1].per_second:.1f} [" in page and "## posterior: films" in page
    serve_load.draw(found, tmp_path / "figures" / "serving.png")
    assert (tmp_path / "figures" / "serving.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("body", "code", "sentence"),
    [
        ("{", 400, "the body is no JSON: "),
        ("[" * 900, 400, "the body is no JSON: "),
        ("[]", 422, "the body: Input should be a valid dictionary"),
        ("{}", 422, 'give one of "text" and "texts": {"texts": ["a good film"]}'),
        ('{"text": "a", "texts": ["a"]}', 422, 'give one of "text" and "texts"'),
        ('{"text": "a", "more": 1}', 422, "more: Extra inputs are not permitted"),
        ('{"text": "a", "draws": "yes"}', 422, "draws: Input should be a valid boolean"),
        ('{"texts": "a"}', 422, "texts: Input should be a valid list"),
        ('{"texts": []}', 422, "there are no texts to predict"),
        ('{"texts": ["a", 3]}', 422, "text 1 (from 0): 3 is no text"),
        ('{"text": " "}', 422, "text 0 (from 0): ' ' is no text"),
        ('{"text": ["a", "b"]}', 422, "text 0 (from 0): ['a', 'b'] is no text"),
        ('{"texts": [{"sentense": "a"}]}', 422, "row 0 (from 0) has no column 'sentence': did you mean"),
        ('{"texts": [{"\\ud800": "a"}]}', 422, "row 0 (from 0) has no column 'sentence': Known: \ud800"),
        ('{"text": "a \\ud800"}', 422, "text 0 (from 0): 'a \\ud800' is no text"),
        ('{"texts": ["a", "a", "a", "a", "a"]}', 413, "5 texts are more than the 4 of a request"),
        (json.dumps({"text": "a" * 101}), 413, "text 0 (from 0) has 101 characters, at most 100 are read"),
        (json.dumps({"text": "a" * 2000}), 413, "the body has more than 2,000 bytes"),
    ],
)  # fmt: skip
def test_a_request_that_is_wrong_gets_a_sentence(url, body, code, sentence):
    found = requests.post(f"{url}/predict", data=body, headers={"content-type": "application/json"})
    assert found.status_code == code and found.headers["content-type"] == "application/json"
    (said,) = found.json().values()
    assert said.startswith(sentence) and "\n" not in said and len(said) < 300


def test_what_no_request_may_be(url):
    ask = {"data": '{"text": "a"}', "headers": {"content-type": "application/json"}}
    assert requests.post(f"{url}/predict", **ask).status_code == 200
    for found, code, sentence in (
        (requests.post(f"{url}/predict", data='{"text": "a"}'), 415, "the body must be JSON, got 'no content type'"),
        (requests.get(f"{url}/predict"), 405, "GET is not for this place"),
        (requests.get(f"{url}/../etc/passwd"), 404, "there is nothing here"),
        (requests.get(url, headers={"host": "evil.example:80"}), 421, "this server is not 'evil.example'"),
        (
            requests.post(f"{url}/predict", data=iter([b"x" * 1500] * 2), headers=ask["headers"]),
            413,
            "the body has more",
        ),
    ):
        assert found.status_code == code and found.json()["error"].startswith(sentence)
        assert found.headers["x-content-type-options"] == "nosniff" and "server" not in found.headers
    assert requests.get(f"{url}/health").json() == {"status": "ok", "waiting": 0}
    asked = requests.head(f"{url}/health")  # as load balancers do
    assert asked.status_code == 200 and asked.content == b""
    assert {"/predict", "/health"} <= {*requests.get(f"{url}/openapi.json").json()["paths"]}


def test_a_rate_a_slow_body_and_a_slow_model_are_refused(desk, monkeypatch):
    with served(desk, rate=2, timeout=0.3) as address:
        held = threading.Event()
        answer = desk.answer
        monkeypatch.setattr(desk, "answer", lambda asked: held.wait(30) and answer(asked))
        with served(desk, timeout=0.3) as slow:
            late = requests.post(f"{slow}/predict", json={"text": "a"})
            held.set()
        assert (late.status_code, late.json()["error"]) == (
            504,
            "no answer within 0.3 s: ask again, or for fewer texts",
        )
        codes = [requests.post(f"{address}/predict", data=b"") for _ in range(3)]
        assert [found.status_code for found in codes] == [415, 415, 429] and int(codes[-1].headers["retry-after"]) > 1
    with served(desk, timeout=0.3) as address, socket.create_connection(address[7:].split(":")) as line:
        line.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 99\r\n\r\n{")  # fmt: skip
        assert b" 408 " in line.recv(1000)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_signal_ends_it_when_what_has_come_is_answered(folders, backbone, tmp_path):
    """In a process of its own, which is a copy of this one."""
    output = tmp_path / "said.txt"
    output.touch()
    argv = ["serve", str(folders["packed"]), "--port", "0", "--host", "0.0.0.0", "--wait_ms", "700", "--quiet"]
    process = started(lambda: main(argv), output)
    try:
        while "http://" not in output.read_text():
            assert ended(process) is None, output.read_text()
            time.sleep(0.05)
        address = output.read_text().splitlines()[-1].replace("0.0.0.0", "127.0.0.1")
        assert requests.get(f"{address}/health").status_code == 200
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(requests.post, f"{address}/predict", json={"text": "the dog"})
            while not requests.get(f"{address}/health").json()["waiting"]:
                time.sleep(0.01)
            os.kill(process, signal.SIGTERM)
            assert answer.result().json()["answers"][0]["label"] in ("unacceptable", "acceptable")
        while (code := ended(process)) is None:
            time.sleep(0.05)
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    said = output.read_text().splitlines()
    assert code == 0 and len(said) == 2 and said[0].startswith("pyro-blora: 0.0.0.0 can be reached from other machines")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["nowhere"], "nowhere is not a finished run"),
        (["packed", "--draws", "3"], "is a packed model, of one allocation: drop --draws and --seed"),
        (["packed", "--abstain", "0.9"], "has no held-out rows, which abstain and coverage are calibrated on"),
        (["packed", "--confidence", "1.5"], "confidence must be a share between 0 and 1, got 1.5"),
        (["packed", "--port", "70000"], "--port must be at most 65535"),
        (["packed", "--rate", "-1"], "--rate must be at least 0, got -1.0"),
        (["packed", "--host", "no.such.host.invalid"], "no.such.host.invalid, port 8000: "),
        (["packed", "--prot", "1"], "unknown argument '--prot': did you mean '--port'?"),
        (["packed", "--revision", "main"], "is a folder, and a revision is of a name on the hub"),
    ],
)
def test_a_mistake_on_the_line_is_a_sentence(folders, capsys, argv, sentence):
    argv = [str(folders.get(word, word)) for word in argv]
    assert main(["serve", *argv, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1


def test_a_port_that_is_taken_and_a_missing_library_are_sentences(folders, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(folders["packed"]), "--port", port, "--quiet"]) == 2
    assert f"127.0.0.1, port {port}: Address already in use: give another --port" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "uvicorn" else object())
    assert main(["serve", str(folders["packed"]), "--quiet"]) == 2
    assert "serve needs uvicorn: pip install 'pyro-blora[serve]'" in capsys.readouterr().err


# --- the page ---------------------------------------------------------------------------------------------------------


def opened(chromium, url, **settings):
    """The page, and what the console and requests to elsewhere said."""
    page, said = chromium.new_context(**settings).new_page(), []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((url, "data:")) else said.append(request.url))
    page.goto(url)
    page.wait_for_selector("textarea")
    return page, said


def ask(page, *texts):
    for area, text in zip(page.locator("textarea").all(), texts, strict=True):
        area.fill(text)
    page.locator("#ask").click()
    page.wait_for_selector("#ask:enabled")


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_the_page_shows_bars_uncertainty_and_draws(chromium, desk, url, texts, width, scheme):
    (rows,) = desk.answer([Asked([(text,) for text in texts], draws=True)])
    text, row = next((text, row) for text, row in zip(texts, rows, strict=True) if row["disagree"])
    (row,) = desk.answer([Asked([(text,)], draws=True)])[0]
    page, said = opened(chromium, url, viewport={"width": width, "height": 800}, color_scheme=scheme)
    ask(page, text)
    assert page.locator("#answer strong").inner_text() == row["label"]
    assert page.locator(".abstains").count() == (not row["answered"])
    found = page.locator(".bars").first.inner_text().split()
    expected = [(name, f"{100 * p:.1f}", "%") for name, p in row["probabilities"].items()]
    assert found == [word for triple in expected for word in triple]
    shown = page.locator("#answer").inner_text()
    assert f"{row['mutual_information']:.3f} of it is disagreement of the draws" in shown
    assert page.locator(".dot").count() == 6 and page.locator(".dot.differs").count() == len(row["disagree"])
    assert len(row["disagree"]) == page.locator(".disagree li").count()
    for i, line in zip(row["disagree"], page.locator(".disagree li").all(), strict=True):
        cost = desk.about()["draws"][i]["bops"]
        assert line.inner_text().startswith(f"draw {i}: {row['draws'][i]['label']} (")
        assert f"{100 * cost:.1f} % of the bit operations" in line.inner_text()
    page.locator("summary").click()
    assert page.locator("tbody tr").count() == 6
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    style = "getComputedStyle(document.body)"
    ink, paper = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (bright[0] > bright[1]) == (scheme == "dark") and abs(bright[0] - bright[1]) > 400
    assert said == []


def test_the_page_takes_text_as_text_and_says_what_is_wrong(chromium, url):
    page, said = opened(chromium, url)
    ask(page, "<img src=x onerror=alert(1)>")
    assert page.locator("#answer").is_visible() and page.locator("img").count() == 0
    ask(page, " ")
    assert (
        page.locator("#error").inner_text() == "text 0 (from 0): ' ' is no text" and page.locator("#answer").is_hidden()
    )
    assert all("422" in line for line in said)  # the browser's own word on it
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    page.wait_for_timeout(100)
    assert page.title() == "films" and any("Content Security Policy" in line for line in said)


@pytest.mark.parametrize("name", KINDS)
def test_the_page_of_every_kind_of_outcome(chromium, desk_of, name):
    label = "<b>a</b>"
    desk = desk_of(name, label)
    with served(desk) as url:
        page, said = opened(chromium, url, viewport={"width": 390, "height": 800})
        assert page.locator("h1").inner_text() == label
        given = ("who", " a dog \n\nthe dog") if name == "choice" else ("The soldier",) * len(desk.columns)
        ask(page, *given)
        shown = page.locator("#answer").inner_text()
        text = {"words": (["The", "soldier"],), "choice": ("who", ["a dog", "the dog"])}.get(name, given)
        (row,) = desk.answer([Asked([text], draws=True)])[0]
        if name == "stars":
            assert f"{row['mean']:.3f}" in shown and f"± {row['std']:.3f}" in shown and "94 %" in shown
            assert page.locator(".dot").count() == 3 and page.locator(".band").count() == 1
        if name == "words":
            assert page.locator("tbody tr").count() == 2 and "soldier" in shown
        if name == "several":
            assert f"{100 * row['probabilities']['a']:.1f} %" in shown
        if name == "choice":
            assert page.locator("strong").inner_text() == row["label"] and page.locator(".dot").count() == 3
            assert all(f"{100 * p:.1f} %" in shown for p in row["probabilities"].values())
            page.locator("textarea").last.press("End")
            page.locator("textarea").last.press("Enter")  # the next option, no question
            assert page.locator("textarea").last.input_value().count("\n") == 3
        if name == "spans":
            bars = zip(row["n_best"], row["probabilities"], strict=True)
            found = page.locator(".bars .name, .bars .value").all_inner_texts()
            assert found == [cell for text, p in bars for cell in (text, f"{100 * p:.1f} %")]
            assert page.locator("strong").inner_text() == row["answer"] and page.locator(".fill.first").count() == 1
            assert f"is {row['entropy']:.3f} nats" in shown and "at most" not in shown
            assert page.locator(".strip, .dot").count() == 0
            page.locator("summary").click()
            assert page.locator("tbody tr").count() == 3
        assert "draws" in shown.lower() and said == []
        page.close()


def test_an_answers_body_does_not_wait_for_the_acknowledgement_of_its_head():
    """Which takes 40 ms where TCP_NODELAY is not set on the connection."""

    async def delays() -> int:
        found = asyncio.get_running_loop().create_future()

        def connected(reader, writer):
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=bound(Serving(port=0))) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.close()
            return await found

    with ThreadPoolExecutor(1) as aside:  # a browser of this thread has a loop that runs
        assert aside.submit(lambda: asyncio.run(delays())).result() == 1
