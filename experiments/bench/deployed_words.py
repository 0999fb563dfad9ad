"""What the page of `deploy_benchmark.py` says beside its numbers."""

EMBEDDINGS = """\
Embeddings are 47.7 of MiniLM's 90.9 MB. The packed model is of a run that had them at 8 bit from the start
(`--embedding_bits 8`); the others have them at 32 bit, with which no packed model of MiniLM has .30 of the bytes.
"""

SCORES = """\
Disk: weights and their description, without the tokenizer. Resident: of a fresh process after one batch of 8 x 128
tokens, in brackets what its imports take of it. Load: from the files to what can be called, in that process, median
of three. `gated model`: the run that the system was made of, with its deployed gates. `differ`: decisions that are
not those. onnxruntime's own int8 models have their embeddings at 8 bit, too; in our ONNX files they are at 32.
"""

TIMES = """\
All systems in turn in one process, every second round backwards. onnxruntime's threads do not spin after a call, as
they would run beside the next system.
"""

WHERE = """\
A product of codes takes an eighth to a fifth of the time of one in fp32; what is left of a forward is not quantized:
attention, sums, norms, GELU, and what puts inputs onto their grids. Dynamic shapes (any number of texts and tokens) add
some twenty small operations for the mask, a few tenths of a millisecond. The tables are profiles, which take time too.

`exact` is what `export --format onnx` writes by default: all but the integer products in float64, so that its logits
are those of the packed model to the bit, in any library and any batch. The other rows of ours are by `--fast`, and so
is what follows.

What `--fast` does about it, which brought W8A8 from .64 to .41 of fp32's time at 8 x 128 tokens:

- torch.onnx writes scaled-dot-product attention with a test for NaN and two selections over all pairs of tokens:
  attention is exported as two products and a softmax;
- onnxruntime 1.32 fuses a residual sum with its LayerNorm into a kernel that takes about four times as long as both:
  the sum is written as `Sum`, which is not fused;
- clipping an input to its range in float32 moves four bytes a number: codes are clipped, one byte each. The product
  with lora_A is then fused with the rounding of its result, too;
- alpha / R is a part of lora_B's step.

`our graph` is the first two of these with onnxruntime's own fp32 and int8, so that what is compared there is the
quantization alone. onnxruntime's static int8 also quantizes sums, softmax and attention's products, which costs NLL.
torchao runs without torch.compile, which takes minutes for a model on two cores; without it, it is slower than fp32.
bf16 is PyTorch's.
"""

PROXIES = """\
Below 8 x 8 bit fewer bits save disk and nothing else on this processor; a factor of 16 bit is two bytes, of a product
each, and a product with a factor at 32 bit has no integer kernel. So `--prior budget` takes a cost, `--prior.cost
latency` or `bytes`: [what it should cost](../docs/how-to/deploy.md#what-it-should-cost).
"""

GPU = """\
## On a GPU

Nothing of this page. torchao's 8 bit were tried there by module, against bfloat16, both compiled and in CUDA graphs:
at 32 tokens they are slower (benchmarks/gpu/low_bit.md, by experiments/low_bit_products.py). Not tried: larger
batches, and gemlite module by module (weights of 1, 2, 4 and 8 bit with activations of 16 or 8).
"""
