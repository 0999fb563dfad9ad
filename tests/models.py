"""Small models with the architecture of the real ones, and the batches to feed them.

Random weights of ten times the usual size, so that a changed layer shows in the output.
"""

import unittest.mock

import torch
import transformers
from torch import nn
from transformers import initialization

from pyro_blora import attach
from pyro_blora.adapters import calibrate
from pyro_blora.gates import Gates
from pyro_blora.guides import build_guide
from pyro_blora.layout import AdapterLayout, Projection
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import get_task
from pyro_blora.weights import build_weights

torch.set_num_threads(1)  # tensors this small are up to ten times slower with a pool of threads on a busy machine

VOCABULARY = 100
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip


def _built(model_class, config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config)


def tiny_bert(seed=0, *, num_labels=2, dropout=0.1, **settings):
    """BERT of 2 layers and 4 heads, hidden size 32."""
    config = transformers.BertConfig(
        **{**_SMALL, **settings}, num_labels=num_labels, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return _built(transformers.BertForSequenceClassification, config, seed)


def tiny_roberta(**settings):
    config = transformers.RobertaConfig(**{**_SMALL, **settings})
    return _built(transformers.RobertaForSequenceClassification, config)


def tiny_distilbert(*, layers=2):
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=layers, n_heads=4, hidden_dim=64, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    return _built(transformers.DistilBertForSequenceClassification, config)


def _deberta_config(**sizes):
    return transformers.DebertaV2Config(
        **{
            "type_vocab_size": 0, "relative_attention": True, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "pooler_hidden_act": "gelu",
            "layer_norm_eps": 1e-7, "num_labels": 2, **sizes,
        }
    )  # fmt: skip


def tiny_deberta(*, dropout=0.1, num_labels=2, **settings):
    """DeBERTaV3 in small: disentangled attention with shared keys, which calls query and key twice a forward."""
    sizes = {"pooler_hidden_size": 32, "position_buckets": 8, "num_labels": num_labels, **_SMALL, **settings}
    return _built(
        transformers.DebertaV2ForSequenceClassification,
        _deberta_config(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout),
    )


def tiny_deberta_v2(**settings):
    """DeBERTaV2 in small: a convolution beside the first layer, and projections of positions of their own."""
    return tiny_deberta(share_att_key=False, conv_kernel_size=3, conv_act="gelu", **settings)


def tiny_llama(*, num_labels=2, **settings):
    """Llama in small, with grouped queries."""
    sizes = {"num_key_value_heads": 2, "pad_token_id": 0, "num_labels": num_labels, **_SMALL, **settings}
    return _built(transformers.LlamaForSequenceClassification, transformers.LlamaConfig(**sizes))


def tiny_language_model(**settings):
    """Llama in small with the head of a language model."""
    sizes = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **_SMALL, **settings}
    return _built(transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes))


def tiny_gpt2(*, num_labels=2, dropout=0.0):
    """GPT-2 in small: every map is a Conv1D, and one makes query, key and value."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, num_labels=num_labels, attn_pdrop=dropout, embd_pdrop=dropout,
        resid_pdrop=dropout,
    )  # fmt: skip
    return _built(transformers.GPT2ForSequenceClassification, config)


@torch.no_grad()
def _repeated_normal(tensor, mean, std, generator=None):
    """A thousand numbers are drawn and repeated: 184 million would take seconds."""
    drawn = torch.empty(1009, device=tensor.device).normal_(mean, std, generator=generator)  # prime, unlike any width
    whole, rest = divmod(tensor.numel(), len(drawn))
    tensor.view(-1)[: whole * len(drawn)].view(whole, len(drawn)).copy_(drawn)
    tensor.view(-1)[whole * len(drawn) :].copy_(drawn[:rest])
    return tensor


def deberta_v3_base():
    """DeBERTaV3-base, its exact configuration: build it under `torch.device("meta")`, it has 184 million weights."""
    config = _deberta_config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=512, max_relative_positions=-1, position_buckets=256, pooler_hidden_size=768,
    )  # fmt: skip
    skipped = dict.fromkeys(("normal_", "uniform_", "kaiming_uniform_"), lambda tensor, *_, **__: tensor)
    with (
        unittest.mock.patch.multiple(nn.init, **skipped),  # torch's own, which transformers' replace
        unittest.mock.patch.dict(initialization.TORCH_INIT_FUNCTIONS, normal_=_repeated_normal),
    ):
        return transformers.DebertaV2ForSequenceClassification(config)


def batch(size=4, length=10, *, seed=0, num_labels=2):
    """Inputs with padding in the last row, and labels: floats for one output, classes otherwise."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    inputs = {"input_ids": torch.randint(2, VOCABULARY, (size, length), generator=generator), "attention_mask": mask}
    labels = torch.randint(0, max(num_labels, 2), (size,), generator=generator)
    return inputs, labels.float() if num_labels == 1 else labels


def random_chains(shape, *, seed=0):
    """0/1 chains (..., K) whose depth is uniform."""
    depth = torch.randint(0, shape[-1] + 1, shape[:-1], generator=torch.Generator().manual_seed(seed))
    return (torch.arange(shape[-1]) < depth[..., None]).float()


def toy_layout(*, adapted=(True, False), ladder=(2, 4, 32), rank=2):
    """A layout without a model: projections of 5 x 3 and 3 x 5, adapted or not, few enough gates to enumerate."""
    projections = tuple(
        Projection(
            name=f"p{i}", type="query", layer=i, in_features=5 - 2 * (i % 2), out_features=3 + 2 * (i % 2), tokens=7,
            adapted=with_adapter,
        )
        for i, with_adapter in enumerate(adapted)
    )  # fmt: skip
    return AdapterLayout(
        architecture="toy", projections=projections, rank=rank, alpha=1.0, scope="encoder", sequence_length=7,
        model_macs=1000, ladder=ladder,
    )  # fmt: skip


def every_state(layout):
    """Every joint state of the chains that exist, the others open.  z (S, L, T, K), g (S, L, R - 1)"""
    sites = [(layout.z_mask, layout.z_shape[-1]), (layout.g_mask, layout.g_shape[-1])]
    counts = [int(mask.sum()) for mask, _ in sites]
    depths = [torch.arange(length + 1) for (_, length), count in zip(sites, counts, strict=True) for _ in range(count)]
    states = torch.cartesian_prod(*depths).split(counts, -1)  # (S, chains of a site)
    gates = []
    for (mask, length), chosen in zip(sites, states, strict=True):
        depth = torch.full((len(chosen), *mask.shape), length)
        depth[:, mask] = chosen
        gates.append((torch.arange(length) < depth[..., None]).float())
    return Gates(*gates)


def weighted_program(net, weights="gaussian", prior="nested", **settings):
    """Gates and a distribution of the weights with these settings, around a net."""
    prior = build_prior(prior, net.layout)
    guide = build_guide("mean_field", net.layout, prior, {"open_logit": 1.0})
    distribution = build_weights(weights, net.random_weights(), dict(enumerate(net.head_parameters())), settings)
    return BayesianLoRA(net, prior, guide, get_task("sst2").likelihood, n_train=100, weights=distribution).eval()


def weighted_net(adapter, build=tiny_bert, **settings):
    """A net whose adapter is not at its start, with ranges."""
    torch.manual_seed(0)
    net = attach(build(dropout=0.0), rank=4, sequence_length=10, adapter=adapter, **settings)
    for p in net.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    calibrate(net, [batch()[0]])
    return net.eval()


def headed(name):
    """A BERT of one's own whose head has this name."""

    class Own(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            setattr(self, name, nn.Linear(config.hidden_size, 2))
            self.post_init()

        def forward(self, input_ids, attention_mask=None, **_):
            pooled = self.bert(input_ids, attention_mask).pooler_output
            return transformers.modeling_outputs.SequenceClassifierOutput(logits=getattr(self, name)(pooled))

    return _built(Own, tiny_bert(dropout=0.0).config)
