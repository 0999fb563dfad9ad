"""An ONNX file gives the deployed predictions in plain onnxruntime, with products of codes as integers."""

import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import batch, tiny_bert, tiny_deberta, tiny_distilbert, tiny_llama, tiny_roberta
from packed_models import allocated
from tiny import save_tiny_backbone

from experiments import onnx_times
from pyro_blora.adapters import use_gates
from pyro_blora.deploy.low_bit import OnGrid, Rounded, Weight
from pyro_blora.deploy.manifest import SUM, _sum_of
from pyro_blora.deploy.opening import load_to_predict
from pyro_blora.deploy.packed import load_packed
from pyro_blora.deploy.packing import pack
from pyro_blora.models.embeddings import bits_of, round_tables
from pyro_blora.posterior import deployed

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")
from pyro_blora.deploy import onnx_file, onnx_modules  # noqa: E402 (what they import is there)
from pyro_blora.deploy.onnx_file import MANIFEST, MODEL, OPSET, answer_by, export_onnx, session_of, write_graph  # noqa: E402 (as above)
from pyro_blora.deploy.onnx_modules import OneInput  # noqa: E402 (as above)
from pyro_blora.deploy.onnx_pieces import gap_by_piece  # noqa: E402 (as above)
from pyro_blora.deploy.onnx_products import FastProduct, is_of_codes  # noqa: E402 (as above)

pytestmark = pytest.mark.usefixtures("eager")
NOT_NEEDED = ("torch", "pyro_blora")
EQUAL = 1e-6  # but for the last bit: codes are the same


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("words"))
    program = allocated(
        lambda dropout: tiny_bert(
            dropout=dropout,
            num_hidden_layers=1,
            vocab_size=transformers.AutoConfig.from_pretrained(backbone).vocab_size,
        ),
        scope="encoder",
    )
    words = transformers.AutoTokenizer.from_pretrained(backbone)
    rows = {**batch(3, 8)[0]}
    return program, export_onnx(program, tmp_path_factory.mktemp("onnx") / "model", rows=rows, tokenizer=words)


def test_logits_of_any_batch_are_those_of_the_deployed_allocation(made):
    program, folder = made
    session = onnxruntime.InferenceSession(folder / MODEL)
    for size, length in ((1, 3), (3, 8), (7, 21)):
        inputs = batch(size, length)[0]
        with torch.no_grad(), use_gates(program.net, *deployed(program), exact=True):
            expected = program.net.logits(**inputs)
        (found,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        assert np.allclose(found, expected.numpy(), rtol=0, atol=EQUAL)
    assert all(
        name not in (folder / MODEL).read_bytes() for name in (b"site-packages", b".py")
    )  # of the exporter's calls
    content = json.loads((folder / MANIFEST).read_text())
    assert content["measured"]["logit_gap_largest"] < EQUAL and content["inputs"] == ["attention_mask", "input_ids"]


def test_products_of_two_codes_are_integer_products(made, tmp_path):
    require_integer_products(*made, tmp_path)


def require_integer_products(program, folder, tmp_path):
    bits = [dict(zip(program.layout.tensors, b, strict=True)) for b in widths(program)]
    layers = [*zip(bits, program.layout.projections, strict=True)]
    both = {name: [b[x] <= 16 and b[name] <= 16 for b, p in layers if p.adapted or name == "base"]
            for x, name in (("input", "base"), ("input", "lora_A"), ("hidden", "lora_B"))}  # fmt: skip
    expected = [x for of in both.values() for x in of]
    content, graph = json.loads((folder / MANIFEST).read_text()), onnx.load(folder / MODEL).graph
    assert content["products"] == {"integer": sum(expected), "all": len(expected)} and 0 < sum(expected) < len(expected)
    table = [*program.net.backbone.get_input_embeddings().weight.shape]
    codes = [
        x for x in graph.initializer
        if x.data_type == onnx.TensorProto.INT8 and len(x.dims) == 2 and list(x.dims) != table
    ]  # fmt: skip
    assert len(codes) == sum(expected)  # of each its high byte, or its one byte
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as_run.onnx")
    onnxruntime.InferenceSession(folder / MODEL, options)
    as_run = onnx.load(tmp_path / "as_run.onnx").graph
    fused = sum(node.op_type == "MatMulIntegerToFloat" for node in as_run.node)
    one_byte = [b[x] <= 8 and b[name] <= 8 for b, p in layers for x, name in (("input", "base"), ("hidden", "lora_B"))
                if p.adapted or name == "base"]  # fmt: skip
    assert fused >= sum(one_byte) > 0
    assert not any(node.op_type == "MatMul" and "DequantizeLinear" in made_by(as_run, node) for node in as_run.node)


def require_divided_inputs(program, folder):
    """Each quantized projection's input is divided by its scales."""
    graph = onnx.load(folder / MODEL).graph
    vectors = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer if len(x.dims) == 1}
    divisors = [vectors[x] for node in graph.node if node.op_type == "Div" for x in node.input if x in vectors]
    scales = program.net.smoothing.scales()
    assert len(divisors) == len(scales)
    assert all(any(np.array_equal(scale.detach(), x) for x in divisors) for scale in scales)
    assert "**Smoothing**" in (folder / "README.md").read_text()


def made_by(graph, node):
    makers = {name: maker.op_type for maker in graph.node for name in maker.output}
    return [makers.get(name) for name in node.input]


def with_rounded_tables(model):
    round_tables(model, 8)
    return model


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (lambda dropout: tiny_roberta(num_hidden_layers=1), {"scope": "encoder", "smoothing": True}),
        (lambda dropout: with_rounded_tables(tiny_distilbert(layers=1)), {}),
        (lambda dropout: tiny_deberta(dropout=dropout, num_hidden_layers=1), {"scope": "encoder"}),
    ],
    ids=["roberta-smoothed", "distilbert-rounded-embeddings", "deberta"],
)
def test_architectures(build, settings, tmp_path):
    program = allocated(build, **settings)
    folder = export_onnx(program, tmp_path / "model")
    content, inputs = json.loads((folder / MANIFEST).read_text()), of_two_types(batch(3, 9)[0])
    inputs = {name: inputs[name] for name in content["inputs"]}
    with torch.no_grad(), use_gates(program.net, *deployed(program), exact=True):
        expected = program.net.logits(**inputs)
    found = answer_by(session_of(folder / MODEL), content["inputs"])(inputs)
    assert torch.allclose(found, expected, rtol=0, atol=EQUAL)
    require_integer_products(program, folder, tmp_path)
    if program.net.smoothing is not None:
        require_divided_inputs(program, folder)
    table = program.net.backbone.get_input_embeddings()
    kinds = {tuple(x.dims): x.data_type for x in onnx.load(folder / MODEL).graph.initializer}
    as_codes = bits_of(program.net) == 8
    assert kinds[tuple(table.weight.shape)] == (onnx.TensorProto.INT8 if as_codes else onnx.TensorProto.FLOAT)


@pytest.fixture(scope="module")
def fast(made, tmp_path_factory):
    return export_onnx(made[0], tmp_path_factory.mktemp("fast") / "model", fast=True)


def of_two_types(inputs):
    """Rows whose second half is another text."""
    types = (torch.arange(inputs["input_ids"].shape[1]) > inputs["input_ids"].shape[1] // 2).long()
    return {**inputs, "token_type_ids": types.expand_as(inputs["input_ids"])}


def test_a_file_made_without_rows_tells_two_texts_apart(fast):
    inputs = of_two_types(batch(3, 9)[0])
    answer = answer_by(session_of(fast / MODEL), json.loads((fast / MANIFEST).read_text())["inputs"])
    one = answer({**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])})
    assert not torch.allclose(answer(inputs), one, atol=1e-3)


def require_close(program, folder):
    names, inputs = json.loads((folder / MANIFEST).read_text())["inputs"], of_two_types(batch(3, 9)[0])
    inputs = {name: inputs[name] for name in names}
    with torch.no_grad(), use_gates(program.net, *deployed(program), exact=True):
        expected = program.net.logits(**inputs)
    found = answer_by(session_of(folder / MODEL), names)(inputs)
    assert torch.allclose(found, expected, atol=0.05)
    assert "sums in another order" in (folder / "README.md").read_text()


def test_a_fast_file_is_close(made, fast):
    require_close(made[0], fast)
    assert json.loads((fast / MANIFEST).read_text())["fast"]
    kinds = {x.type.tensor_type.elem_type for x in onnx.load(fast / MODEL).graph.value_info}
    assert onnx.TensorProto.DOUBLE not in kinds


@pytest.mark.parametrize(
    ("build", "settings", "operators"),
    [
        (lambda dropout: tiny_llama(), {"target_modules": ["q_proj", "v_proj"], "scope": "encoder"}, 2),  # GQA
        (lambda dropout: tiny_deberta(dropout=dropout, num_hidden_layers=1), {"scope": "encoder"}, 0),  # its own
    ],
    ids=["llama", "deberta"],
)
def test_attention_of_a_fast_file(build, settings, operators, tmp_path):
    program = allocated(build, **settings)
    folder = export_onnx(program, tmp_path / "model", fast=True)
    require_close(program, folder)
    kinds = [node.op_type for node in onnx.load(folder / MODEL).graph.node]
    assert kinds.count("MultiHeadAttention") == operators and ("Softmax" in kinds) == (not operators)


def test_attention_of_a_fast_file_reads_projections_as_they_are(made, fast):
    graph = onnx.load(fast / MODEL).graph
    assert sum(node.op_type == "MultiHeadAttention" for node in graph.node) == 1  # layer
    assert not {"Reshape", "Transpose", "Softmax"} & {node.op_type for node in graph.node}


def test_a_fast_file_whose_rounding_moves_logits_far_is_right_where_each_piece_is(made, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_file, "_GAP_FAST", 1e-12)  # as of a network that amplifies more
    folder = export_onnx(made[0], tmp_path / "model", fast=True)
    assert json.loads((folder / MANIFEST).read_text())["measured"]["logit_gap_mean"] > 1e-12


def test_a_fast_file_with_a_scale_that_is_a_little_wrong_is_refused(made, monkeypatch, tmp_path):
    scaled = onnx_modules._scaled
    monkeypatch.setattr(onnx_modules, "_scaled", lambda weight, scale: scaled(weight, 1.003 * scale))
    with pytest.raises(RuntimeError, match="a layer's values in onnxruntime differ by"):
        export_onnx(made[0], tmp_path / "model", fast=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("altered", "by", "is_right"),
    [((-1, slice(None)), 1e-3, True), ((slice(None), 3), 1e-3, False), ((slice(None), 3), math.nan, False)],
    ids=["row", "channel", "not-a-number"],
)
def test_a_channel_that_is_wrong_is_found_and_a_row_with_another_code_is_not(altered, by, is_right, made, tmp_path):
    program = made[0]
    packed, model = (load_packed(pack(program, tmp_path / name)) for name in ("packed", "model"))
    onnx_modules.in_onnx_operators(model, fast=True)
    inputs = batch(3, 9)[0]
    names = sorted(inputs)
    write_graph(
        model,
        {name: inputs[name] for name in names},
        program,
        tmp_path / MODEL,
        fast=True,
        observed=tmp_path / "observed",
    )
    session = session_of(tmp_path / "observed")
    assert len(session.get_outputs()) > len(session_of(tmp_path / MODEL).get_outputs()) == 1

    class Altered:
        def run(self, which, feed):
            *found, last = session.run(which, feed)
            y = last.reshape(-1, last.shape[-1]).copy()
            y[altered] += by * np.abs(y).max()
            return [*found, y.reshape(last.shape)]

    assert gap_by_piece(session, names, packed, program, [inputs]) < 1e-6
    assert (gap_by_piece(Altered(), names, packed, program, [inputs]) < 1e-5) == is_right


def test_products_of_a_fast_file_are_of_integers_where_that_saves_time(made, fast):
    program = made[0]
    expected = []
    for bits, p in zip(widths(program), program.layout.projections, strict=True):
        b = dict(zip(program.layout.tensors, bits, strict=True))
        read = [("input", "base", p.in_features)]
        if p.adapted:
            read += [("input", "lora_A", p.in_features), ("hidden", "lora_B", program.layout.rank)]
        expected += [b[name] <= 8 and b[x] <= (8 if n <= 64 else 16) for x, name, n in read]
    content, graph = json.loads((fast / MANIFEST).read_text()), onnx.load(fast / MODEL).graph
    assert content["products"] == {"integer": sum(expected), "all": len(expected)} and 0 < sum(expected) < len(expected)
    kinds = [node.op_type for node in graph.node]
    assert "MatMulInteger" not in kinds  # lora_A's sums are scaled where they are made
    low_bytes = [x for x in graph.initializer if x.data_type == onnx.TensorProto.UINT8 and len(x.dims) == 2]
    assert not low_bytes


@pytest.mark.parametrize("columns", (64, 65))
def test_an_input_of_two_bytes_gives_the_same_product_either_way(columns, tmp_path):
    random = torch.Generator().manual_seed(0)
    x, codes = torch.randn(5, columns, generator=random), torch.randint(-127, 128, (3, columns), generator=random)
    weight, rounded = Weight(OnGrid(codes * 0.25, torch.tensor(0.25), 8)), Rounded(16, torch.tensor(2.0))
    module = OneInput(rounded, [weight], torch.float32).eval()
    assert isinstance(module.products[0], FastProduct) == (columns > 64)
    torch.onnx.export(module, (x,), dynamo=True, opset_version=OPSET, verbose=False).save(tmp_path / "m.onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    expected = rounded(x).numbers.double() @ (codes * 0.25).double().T
    assert np.allclose(found, expected.numpy(), rtol=1e-5, atol=1e-4)


def test_a_small_file_has_narrow_weights_at_their_own_width(made, fast, tmp_path):
    program, _ = made
    folder = export_onnx(program, tmp_path / "model", fast=True, small=True)
    require_close(program, folder)
    saved, expected = 0, []
    for bits, p in zip(widths(program), program.layout.projections, strict=True):
        b, r = dict(zip(program.layout.tensors, bits, strict=True)), program.layout.rank
        shapes = {"base": ("input", p.out_features, p.in_features)}
        if p.adapted:
            shapes |= {"lora_A": ("input", r, p.in_features), "lora_B": ("hidden", p.out_features, r)}
        for name, (x, m, n) in shapes.items():
            stored = math.ceil(n / 32) * (32 * b[name] // 8 + 4)  # of a row, in blocks of 32 columns
            if b[x] > 8 and b[name] <= 8 and stored < 4 * n:
                expected.append(b[name])
                saved += m * n * (1 if is_of_codes(b[x], b[name], n, fast=True) else 4) - m * stored
    graph = onnx.load(folder / MODEL).graph
    nodes = [{a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == "MatMulNBits"]
    assert sorted(node["bits"] for node in nodes) == sorted(expected) and len({*expected}) > 1
    assert all(node["accuracy_level"] == 0 for node in nodes)
    assert matrices(onnx.load(fast / MODEL).graph) - matrices(graph) == saved > 0
    content = json.loads((folder / MANIFEST).read_text())
    assert content["version"] == 2 and content["products"]["narrow"] == len(nodes)
    assert "**not time**" in (folder / "README.md").read_text()
    assert json.loads((fast / MANIFEST).read_text())["version"] == 1


def test_sizes_and_times_are_printed(made, fast, capsys):
    arguments = [made[1], fast, "--vocabulary", 30, "--length", 8, "--seconds", 0.01]
    onnx_times.main([*map(str, arguments)])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| model | MB | resident, MB | 1 x 8, ms") and len(rows) == 2
    sizes = [f"{(folder / MODEL).stat().st_size / 1e6:.1f}" for folder in (made[1], fast)]
    assert [row.split(" | ")[1] for row in rows] == sizes and rows[0].endswith("| 1.00 |")
    with pytest.raises(ValueError, match=r"has no model\.onnx: give a folder"):
        onnx_times.main([str(made[1]), str(made[1].parent / "none")])


def matrices(graph):
    """Bytes of what has rows and columns."""
    return sum(onnx.numpy_helper.to_array(x).nbytes for x in graph.initializer if len(x.dims) > 1)


def widths(program):
    ladder = torch.tensor(program.layout.ladder)
    return ladder[deployed(program).z.sum(-1).long()].tolist()


def test_the_cards_program_needs_neither_torch_nor_this_package(made):
    program, folder = made
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace('"this folder"', repr(str(folder)))
    code += f"\nimport sys\nprint(logits(['she sings', 'she']).tolist(), *(x in sys.modules for x in {NOT_NEEDED}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("False False\n"), done.stderr
    words = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = words(["she sings", "she"], padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), use_gates(program.net, *deployed(program), exact=True):
        expected = program.net.logits(**inputs)
    found = json.loads(done.stdout.partition(" False")[0])
    assert np.allclose(found, expected.numpy(), rtol=0, atol=EQUAL)


def test_the_cards_program_pads_a_decoders_texts_as_its_graph_finds_their_ends(tmp_path):
    words = transformers.AutoTokenizer.from_pretrained(save_tiny_backbone(tmp_path / "words"))
    words.pad_token = words.sep_token  # the end of a text, as in a decoder without a token for padding
    sizes = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "num_hidden_layers": 1}
    program = allocated(lambda dropout: tiny_llama(**sizes), target_modules=["q_proj", "v_proj"], scope="encoder")
    folder = export_onnx(program, tmp_path / "model", rows=batch(3, 8)[0], tokenizer=words)
    code, names = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1], {}
    exec(code.replace('"this folder"', repr(str(folder))), names)
    texts = ["The soldier", "The lawyer lost the soldier"]
    alone = np.concatenate([names["logits"]([text]) for text in texts])
    assert words.pad_token_id != 0 and np.allclose(names["logits"](texts), alone, rtol=0, atol=1e-5)
    with torch.no_grad(), use_gates(program.net, *deployed(program), exact=True):
        expected = program.net.logits(**words(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
    assert np.allclose(alone, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (("inputs",), ["input_ids"], "model.onnx has not the inputs that onnx.json says: export it again"),
        (("task", "log_scale"), None, "does not describe its task, as older exports do not: export it again"),
        (("task", "outcome"), {"kind": "new"}, "has a kind of outcome that is not registered here"),
    ],
)
def test_a_description_that_does_not_fit_is_a_sentence(made, tmp_path, path, to, said):
    copy = shutil.copytree(made[1], tmp_path / "copy")
    content = json.loads((copy / MANIFEST).read_text())
    content.pop(SUM)
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = to
    (copy / MANIFEST).write_text(json.dumps({**content, SUM: _sum_of(content)}))
    with pytest.raises(ValueError, match=said):
        load_to_predict(copy)
