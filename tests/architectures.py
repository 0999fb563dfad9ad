"""One row for each architecture of transformers of which a small random model is taken through the package.

Random weights of ten times the usual size, as in models.py.
"""

import dataclasses

import torch
import transformers

VOCABULARY = 100
EOS = 4  # ends every row, as a tokenizer of an encoder-decoder has it


@dataclasses.dataclass(frozen=True)
class Row:
    """limit: the longest input that a forward accepts, tokens; None where positions are relative only. targets: the
    linear maps to adapt, None for the preset."""

    name: str
    settings: dict
    targets: tuple[str, ...] | None
    limit: int | None
    prefix: str = ""  # of the classes, where transformers spells them otherwise

    def config(self, *, num_labels: int = 2, **changes):
        usual = {"vocab_size": VOCABULARY, "pad_token_id": 1, "num_labels": num_labels, "initializer_range": 0.2}
        settings = {key: value for key, value in {**usual, **self.settings, **changes}.items() if value is not None}
        return getattr(transformers, f"{self.prefix or self.name}Config")(**settings)

    def build(self, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(transformers, f"{self.prefix or self.name}ForSequenceClassification")(self.config(**changes))


QKV = ("query", "key", "value")
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "max_position_embeddings": 64}  # fmt: skip
_DEBERTA = {**_BERT, "type_vocab_size": 0, "relative_attention": True, "pooler_hidden_size": 32}
_V3 = {**_DEBERTA, "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_buckets": 8,
       "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "eos_token_id": EOS,
       "decoder_start_token_id": 1, "initializer_factor": 1.0}  # fmt: skip
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
         "eos_token_id": EOS, "bos_token_id": 0, "decoder_start_token_id": EOS, "forced_eos_token_id": EOS,
         "init_std": 0.2}  # fmt: skip
_XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "n_langs": 1, "embed_init_std": 0.2,
        "init_std": 0.2}  # fmt: skip

ROWS = (
    Row("Bert", _BERT, None, 64),
    Row("Roberta", _BERT, None, 62),
    Row("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
        None, 64),
    Row("DebertaV2", {**_DEBERTA, "position_biased_input": True, "pos_att_type": ["p2c", "c2p"]}, None, 64),
    Row("DebertaV3", _V3, None, None, "DebertaV2"),
    Row("Deberta", {**_DEBERTA, "pos_att_type": ["c2p", "p2c"]}, None, 64),
    Row("XLMRoberta", _BERT, None, 62),
    Row("Albert", {**_BERT, "embedding_size": 16}, None, 64),
    Row("BigBird", {**_BERT, "attention_type": "original_full"}, None, 64),
    Row("BigBirdSparse", {**_BERT, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1,
                          "max_position_embeddings": 96}, None, 96, "BigBird"),
    Row("Camembert", _BERT, None, 62),
    Row("Canine", {**_BERT, "downsampling_rate": 4, "upsampling_kernel_size": 4, "num_hash_buckets": 64,
                   "num_hash_functions": 2, "local_transformer_stride": 16, "vocab_size": None}, QKV, 64),
    Row("ConvBert", {**_BERT, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3}, None, 64),
    Row("Data2VecText", _BERT, None, 62),
    Row("Electra", {**_BERT, "embedding_size": 16}, None, 64),
    Row("Ernie", _BERT, None, 64),
    Row("Esm", {**_BERT, "position_embedding_type": "absolute", "mask_token_id": 5}, None, 62),
    Row("Esmc", {**_BERT, "mask_token_id": 5, "bos_token_id": 0, "eos_token_id": 2}, None, None),
    Row("EuroBert", {**_BERT, "mask_token_id": 5, "bos_token_id": 0, "eos_token_id": 2}, None, None),
    Row("Gte", _BERT, None, None),
    Row("JinaEmbeddingsV3", {**_BERT, "bos_token_id": 0, "eos_token_id": 2}, None, None),
    Row("EsmRotary", {**_BERT, "position_embedding_type": "rotary", "mask_token_id": 5}, None, None, "Esm"),
    Row("Flaubert", _XLM, None, 64),
    Row("Funnel", {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8,
                   "d_inner": 64, "initializer_std": 0.2}, None, None),
    Row("FNet", {**_BERT, "tpu_short_seq_length": 10}, ("intermediate.dense",), 64),
    Row("LayoutLM", _BERT, QKV, 64),
    Row("Longformer", {**_BERT, "attention_window": 8}, None, 62),
    Row("Luke", {**_BERT, "entity_vocab_size": 10, "entity_emb_size": 16}, QKV, 62),
    Row("MegatronBert", _BERT, None, 64),
    Row("MobileBert", {**_BERT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32,
                       "num_feedforward_networks": 1}, None, 64),
    Row("ModernBert", {**_BERT, "global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 0,
                       "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}, None, None),
    Row("MPNet", _BERT, None, 62),
    Row("NomicBert", _BERT, None, None),
    Row("Nystromformer", {**_BERT, "segment_means_seq_len": 8, "num_landmarks": 8}, None, 64),
    Row("RemBert", {**_BERT, "input_embedding_size": 16}, None, 64),
    Row("RobertaPreLayerNorm", _BERT, None, 62),
    Row("XLMRobertaXL", _BERT, None, 62),
    Row("RoFormer", {**_BERT, "embedding_size": 32}, None, 64),
    Row("XLM", _XLM, None, 64),
    Row("XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, ("layer_1",), None),
    Row("Xmod", {**_BERT, "languages": ["en_XX"], "default_language": "en_XX"}, QKV, 62),
    Row("Yoso", {**_BERT, "use_expectation": True}, QKV, 64),
    Row("Bart", _BART, ("q_proj", "k_proj", "v_proj"), 64),
    Row("MBart", _BART, ("q_proj", "k_proj", "v_proj"), 64),
    Row("T5", _T5, None, None),
    Row("MT5", _T5, None, None),
    Row("UMT5", _T5, None, None),
    Row("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 2},
        None, 64),
    Row("Llama", _LLAMA, None, None),
    Row("Mistral", {**_LLAMA, "sliding_window": 8}, None, None),
    Row("Qwen2", _LLAMA, None, None),
    Row("Qwen3", {**_LLAMA, "head_dim": 8}, None, None),
    Row("OPT", {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2, "bos_token_id": 0,
                "eos_token_id": EOS}, None, 64),
    Row("GPTNeoX", _BERT, None, None),
    Row("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": EOS}, None, None),
)  # fmt: skip


def inputs_of(size: int, length: int, *, seed: int = 0) -> dict:
    """Rows that end in EOS, padding in the last one."""
    tokens = torch.randint(6, VOCABULARY, (size, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    tokens[:, -1] = EOS
    if size > 1:
        mask[-1, length // 2 :], tokens[-1, length // 2 :] = 0, 1
        tokens[-1, length // 2 - 1] = EOS
    return {"input_ids": tokens, "attention_mask": mask}
