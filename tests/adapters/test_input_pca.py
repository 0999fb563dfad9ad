"""Explained variances of the layers' inputs, against scikit-learn's principal components."""

import pytest
import torch
from models import tiny_bert
from sklearn.decomposition import PCA

from pyro_blora.adapters import attach
from pyro_blora.adapters.input_pca import _Moments, explained_variances
from pyro_blora.layout import INPUT

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def net(eager):
    return attach(tiny_bert(), rank=4, scope="encoder", sequence_length=10)


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(2, 100, (8, 10), generator=generator)} for _ in range(count)]


def test_they_are_those_of_the_principal_components(net):
    found = explained_variances(net, batches())
    inputs = []
    name = next(p.name for p in net.layout.projections if p.adapted)
    layer = net.peft_model.base_model.model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, x: inputs.append(x[0].detach().flatten(0, -2)))
    try:
        explained_variances(net, batches())
    finally:
        handle.remove()
    expected = PCA(4).fit(torch.cat(inputs).numpy()).explained_variance_ratio_
    place = next(i for i, p in enumerate(net.layout.projections) if p.name == name)
    torch.testing.assert_close(found[place], torch.tensor(expected), atol=1e-4, rtol=1e-3)


def test_every_adapter_has_a_row_and_nothing_else(net):
    found = explained_variances(net, batches())
    assert found.shape == (len(net.layout.projections), 4)
    assert bool((found[net.layout.g_mask] > 0).all()) and bool((found[~net.layout.g_mask] == 0).all())
    assert bool((found.diff() <= 0).all()) and bool((found.sum(-1) <= 1 + 1e-5).all())


def test_inputs_that_projections_share_have_the_same(net):
    torch.manual_seed(0)
    shared = attach(tiny_bert(), rank=4, scope="encoder", sequence_length=10, share_inputs=True)
    torch.manual_seed(0)
    alone = attach(tiny_bert(), rank=4, scope="encoder", sequence_length=10)
    torch.testing.assert_close(explained_variances(shared, batches()), explained_variances(alone, batches()))


def test_projections_that_read_one_tensor_have_one_matrix(net, monkeypatch):
    """Query, key and value of 2 layers: 6 rows from 2 matrices, equal within a layer and not between them."""
    seen, ratios = [], _Moments.ratios
    monkeypatch.setattr(_Moments, "ratios", lambda self, r: seen.append([*self.products]) or ratios(self, r))
    found = explained_variances(net, batches())[net.layout.g_mask]
    assert [len(each) for each in seen] == [2] and found.shape == (6, 4)
    first, second = found.view(2, 3, 4)
    assert torch.equal(first, first[:1].expand(3, 4)) and torch.equal(second, second[:1].expand(3, 4))
    assert not torch.allclose(first, second)


def test_half_precision_of_the_backbone_does_not_blur_them(net):
    exact = explained_variances(net, batches())
    net.autocast = torch.bfloat16
    try:
        found = explained_variances(net, batches())
    finally:
        net.autocast = None
    adapted = net.layout.g_mask
    torch.testing.assert_close(found[adapted], exact[adapted], atol=0, rtol=0.03)


def test_a_large_mean_does_not_hide_them():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 6, generator=generator) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.1]) + 3000
    moments = _Moments({0})
    for part in rows.split(100):
        moments.activation(0, INPUT, part[None])
    expected = PCA(4).fit(rows.double().numpy()).explained_variance_ratio_
    torch.testing.assert_close(moments.ratios(4)[0], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_without_data_they_are_refused(net):
    with pytest.raises(ValueError, match="at least one batch"):
        explained_variances(net, [])
