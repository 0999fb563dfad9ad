"""What is killed: configurations of a tiny run, as words of the command line, and the backbones that they need."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pyro_blora.tasks import get_task

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
          "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
_WORDS = "--task acceptability --max_train 64 --epochs 3 --batch_size 16 --rank 4 --draws 3 --logging_steps 1 " \
         "--checkpoint_steps 3 --max_length 32"  # fmt: skip
_SWAG = "--weights swag --weights.rank 2 --weights.burn_in 0.5 --weights.snapshots 4"
SUBJECTS = {
    "bayesian_lora": "",
    "scope encoder": "--scope encoder",
    "B-LoRA-XS": "--adapter xs",
    "Gaussian weights": "--weights gaussian",
    "SWAG": _SWAG,
    "SWAG, XS": f"--adapter xs {_SWAG}",
    "Laplace": "--weights laplace --validation 0.25",
    "ensemble": "--weights ensemble --weights.members 2",
    "budget": "--prior budget --prior.bops 0.1",
    "budget, learned": "--prior budget --prior.bops 0.1 --settle 0.25",
    "hierarchical, mixture": "--prior hierarchical --guide mixture",
    "prior eva": "--prior eva",
    "straight-through": "--estimator straight_through",
    "AdaLoRA": "--method adalora --guide.target_rank 2",
    "full fine-tuning": "--method full",
    "restarts": "--restarts 2",
    "accumulation": "--accumulation 2 --batch_size 8",
    "by length, shared inputs": "--group_by_length --share_inputs",
    "gradient checkpointing": "--gradient_checkpointing",
    "choose_epoch": "--validation 0.25 --choose_epoch --kl_warmup 0.1",
    "tensorboard": "--tracker tensorboard",
    "DeBERTaV3, bf16": "--backbone {deberta} --precision bf16",
    "DeBERTaV3, bf16, encoder": "--backbone {deberta} --precision bf16 --scope encoder --gradient_checkpointing",
}


def words(name: str, backbones: Path, output: Path) -> list[str]:
    """The command line of a subject."""
    own = SUBJECTS[name].format(deberta=backbones / "deberta").split()
    usual = [] if "--backbone" in own else ["--backbone", str(backbones / "bert")]
    given = dict(zip(_WORDS.split()[::2], _WORDS.split()[1::2], strict=True))
    line = [word for flag, value in given.items() if flag not in own for word in (flag, value)]
    return ["train", *line, *usual, *own, "--output_dir", str(output)]


def save_backbones(folder: Path) -> None:
    """A BERT and a DeBERTaV3 of two layers with random weights, and a tokenizer of the task's words."""
    rows = get_task("acceptability").load(n_train=400)["train"]["sentence"]
    words = sorted({word for row in rows for word in row.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    relative = {
        "type_vocab_size": 0, "relative_attention": True, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "pooler_hidden_act": "gelu",
        "layer_norm_eps": 1e-7, "pooler_hidden_size": 32, "position_buckets": 8,
    }  # fmt: skip
    for name, model_type, more in (("bert", "bert", {}), ("deberta", "deberta-v2", relative)):
        config = transformers.AutoConfig.for_model(model_type, vocab_size=len(vocabulary), **_SMALL, **more)
        torch.manual_seed(0)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / name)
        _tokenizer(vocabulary).save_pretrained(folder / name)


def _tokenizer(vocabulary: dict[str, int]) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
