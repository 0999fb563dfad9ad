"""A weight's codes at their own width in MatMulNBits: the packed model's numbers, and the bytes they should take."""

import pytest
import torch
from models import tiny_bert
from packed_models import allocated

from pyro_blora.deploy import load, pack
from pyro_blora.deploy.low_bit import OnGrid, Weight
from pyro_blora.deploy.onnx_modules import in_onnx_operators
from pyro_blora.deploy.onnx_narrow import NarrowWeight, form_of
from pyro_blora.quantizer.packing import Scale

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def weight_of(bits, m, n, rows=False):
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(bits))
    scale = Scale.of(x.abs().amax(1, keepdim=True) if rows else x.abs().max(), bits)
    return Weight(OnGrid(scale.rounded(x), scale.step, bits))


def as_run(narrow, x):
    """W x by onnxruntime's own operator."""
    helper, of = onnx.helper, onnx.numpy_helper.from_array
    m, n = narrow.codes.shape[0], narrow.columns
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "steps"], ["y"], domain="com.microsoft", K=n, N=m, bits=narrow.bits,
        block_size=narrow.block, accuracy_level=0,
    )  # fmt: skip
    given, found = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy")
    stored = [of(narrow.codes.numpy(), "codes"), of(narrow.steps.numpy(), "steps")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "product", [given], [found], stored), opset_imports=opsets, ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("rows", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7, 8])
def test_its_numbers_are_those_of_the_packed_model(bits, rows):
    for m, n in ((5, 33), (3, 64), (7, 300)):
        weight = weight_of(bits, m, n, rows)
        narrow = NarrowWeight(weight, form_of(weight))
        assert narrow.bits == {2: 2, 3: 4, 4: 4}.get(bits, 8)
        assert torch.equal(as_run(narrow, torch.eye(n)).T, weight().numbers)  # one summand each


@pytest.mark.parametrize(
    ("bits", "n", "block", "row"),
    [
        (4, 384, 128, 3 * (64 + 4)),  # 256 columns would leave half of the second block empty
        (4, 1536, 256, 6 * (128 + 4)),
        (2, 384, 128, 3 * (32 + 4)),
        (8, 384, 128, 3 * (128 + 4)),
        (4, 8, 32, 16 + 4),
    ],
)
def test_its_form_is_the_smallest(bits, n, block, row):
    weight = weight_of(bits, 3, n)
    form = form_of(weight)
    assert form == (bits, block, row)
    narrow = NarrowWeight(weight, form)
    assert narrow.codes.numel() + 4 * narrow.steps.numel() == 3 * row


def test_what_float32_has_in_as_few_bytes_or_has_no_such_codes_stays():
    assert form_of(weight_of(8, 3, 8)) is None  # a block of 32 bytes for 8 columns
    assert form_of(weight_of(16, 3, 384)) is None


def test_a_model_without_such_weights_says_that_small_changes_nothing(caplog, tmp_path):
    program = allocated(tiny_bert)
    gates = program.gate_guide.deployed()
    gates.z[..., program.layout.ladder.index(8) :] = 0.0
    in_onnx_operators(load(pack(program, tmp_path / "packed")), small=True)
    assert "--small changes nothing: no weight of up to 8 bit is read by an input of more" in caplog.text
    caplog.clear()
    in_onnx_operators(load(pack(allocated(tiny_bert), tmp_path / "wider")), small=True)
    assert not caplog.text
