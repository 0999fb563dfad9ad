"""What is trained or asked in the benchmark: networks of exact configuration with random weights, and their steps.

Speed does not depend on what a network knows. Every step is a whole one: forward, backward, clipping, optimizer.
"""

import dataclasses
from collections.abc import Callable

import peft
import torch
import transformers
from torch import nn

from pyro_blora import adapters
from pyro_blora.config import RunConfig
from pyro_blora.gates import Gates
from pyro_blora.guides import build_guide
from pyro_blora.layout import AdapterLayout
from pyro_blora.machine import release_freed_memory
from pyro_blora.posterior import draw
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import get_task
from pyro_blora.training import make_optimizer
from pyro_blora.training.gradients import Gradients
from pyro_blora.training.natural_gradient import NaturalGradient, is_natural

N_TRAIN = 2000
CLASSES = 2


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of the benchmark: network, batch (sentences x tokens, without padding), adapter and machine."""

    backbone: str = "minilm"
    layers: int | None = None  # none: the network's own
    batch: int = 32
    length: int = 64
    rank: int = 8
    scope: str = "adapted"
    target_modules: str | None = None  # none: query, key and value
    device: str = "cpu"
    precision: str = "float32"

    def network(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return _BACKBONES[self.backbone](self).to(self.device)

    def examples(self) -> tuple[dict, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1000, 20000, (self.batch, self.length), generator=generator)
        labels = torch.randint(0, CLASSES, (self.batch,), generator=generator)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return {key: value.to(self.device) for key, value in inputs.items()}, labels.to(self.device)

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


def minilm(setting: Setting) -> nn.Module:
    config = transformers.AutoConfig.for_model(
        "bert", vocab_size=30522, hidden_size=384, num_hidden_layers=setting.layers or 6, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=512, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def deberta(setting: Setting) -> nn.Module:
    config = transformers.AutoConfig.for_model(
        "deberta-v2", vocab_size=128100, hidden_size=768, num_hidden_layers=setting.layers or 12,
        num_attention_heads=12, intermediate_size=3072, max_position_embeddings=512, max_relative_positions=-1,
        position_buckets=256, pooler_hidden_size=768, type_vocab_size=0, relative_attention=True,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        pooler_hidden_act="gelu", layer_norm_eps=1e-7, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.DebertaV2ForSequenceClassification(config)


def flashdeberta(setting: Setting) -> nn.Module:
    """The same with the attention of the package flashdeberta where it is on a GPU; that one has no dropout."""
    from flashdeberta import FlashDisentangledSelfAttention

    class Attention(FlashDisentangledSelfAttention):
        def forward(self, hidden_states, *arguments, **settings):
            kind = FlashDisentangledSelfAttention if hidden_states.is_cuda else plain
            return kind.forward(self, hidden_states, *arguments, **settings)

    plain, model = transformers.models.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention, deberta(setting)
    for module in model.modules():
        if type(module) is plain:
            module.__class__ = Attention
    return model


_BACKBONES = {"minilm": minilm, "deberta": deberta, "flashdeberta": flashdeberta}


def program_of(
    setting: Setting, prior: str = "bops", estimator: str = "gauss_newton", **attached
) -> BayesianLoRA:  # fmt: skip
    """The gated network with undecided gates, so that every grid takes part."""
    net = adapters.attach(
        setting.network(), rank=setting.rank, alpha=2.0 * setting.rank, scope=setting.scope,
        target_modules=setting.target_modules, sequence_length=setting.length, **attached,
    )  # fmt: skip
    net.autocast = torch.bfloat16 if setting.precision == "bf16" else None
    prior = build_prior(prior, net.layout)
    guide = build_guide("mean_field", net.layout, prior, {"open_logit": 1.0})
    likelihood = get_task("sst2").likelihood
    program = BayesianLoRA(net, prior, guide, likelihood, n_train=N_TRAIN, estimator=estimator).to(setting.device)
    adapters.calibrate(net, [setting.examples()[0]])
    return program


def gated_step(setting: Setting, *, compiled: bool = False, graphs: bool = True, **attached) -> Callable[[], None]:
    """A step of the training loop. compiled: the network as a whole, by torch.compile. graphs: as in `Gradients`."""
    program, (inputs, labels) = program_of(setting, **attached), setting.examples()
    net, optimizer = program.net, make_optimizer(program, RunConfig())
    if compiled:
        net.peft_model.compile()
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    natural = NaturalGradient(program) if is_natural(program, RunConfig()) else None
    learning += natural.parameters if natural else []
    gradients = Gradients(program, learning, graphs=graphs and not compiled)
    clipped = [*net.adapter_parameters(), *net.head_parameters()]
    program.train()
    if natural:
        adapters.without_dropout(net)
    left_out = torch.zeros((), dtype=torch.bool, device=setting.device)
    release_freed_memory()  # as the loop does

    def step():
        gradients(inputs, labels, 0.3, 1.0)
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        if natural:
            natural.step(left_out)
        optimizer.zero_grad()

    return step


def lora_model(setting: Setting, config: peft.LoraConfig | None = None) -> peft.PeftModel:
    network = setting.network()
    layout = AdapterLayout.of(network, target_modules=setting.target_modules, sequence_length=setting.length)
    targets = [p.name for p in layout.projections]
    config = config or peft.LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank)
    config.task_type, config.target_modules = "SEQ_CLS", targets
    return peft.get_peft_model(network, config)


def lora_step(setting: Setting, *, compiled: bool = False) -> Callable[[], None]:
    """PEFT's LoRA on the same projections, in the loop that its documentation shows."""
    model = lora_model(setting)
    if compiled:
        model.compile()
    return _peft_step(setting, model)


def adalora_step(setting: Setting) -> Callable[[], None]:
    """PEFT's AdaLoRA with the same rank at the end, and the usual half more at the start."""
    config = peft.AdaLoraConfig(
        init_r=setting.rank * 3 // 2, target_r=setting.rank, lora_alpha=2 * setting.rank, tinit=0, tfinal=10,
        deltaT=1, total_step=1_000_000,
    )  # fmt: skip
    model = lora_model(setting, config)
    return _peft_step(setting, model, allocate=model.base_model.update_and_allocate)


def _peft_step(setting: Setting, model: peft.PeftModel, allocate: Callable | None = None) -> Callable[[], None]:
    inputs, labels = setting.examples()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer, done = torch.optim.AdamW(learning, lr=1e-3, fused=True), iter(range(1, 1 << 60))
    model.train()

    def step():
        with setting.autocast():
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if allocate is not None:
            allocate(next(done))
        optimizer.zero_grad()

    return step


def plain_forward(setting: Setting) -> Callable[[], None]:
    """PEFT's LoRA, asked once."""
    model, (inputs, _) = lora_model(setting).eval(), setting.examples()

    @torch.no_grad()
    def forward():
        with setting.autocast():
            model(**inputs)

    return forward


def some_draws(program: BayesianLoRA, count: int, distinct: int | None = None) -> Gates:
    """Draws of the guide's gates; of the first `distinct` only, over and over, where that is given."""
    drawn = draw(program, distinct or count)
    which = torch.arange(count) % (distinct or count)
    return Gates(*(x[which] for x in drawn))
