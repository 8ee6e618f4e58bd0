#!/usr/bin/env bash
# llama.cpp with weights and cache of float32 computes attention in less, unless told otherwise.
#
# Guess, before running: the cache's type is what keeps logits from being those of float32 (it is
# float16 as it comes). With weights of float32, a cache of float32 and no GPU all is computed in
# float32: flash attention on the CPU is another order of the same sums, and logits agree with
# PyTorch's to about 1e-6 with it and without.
#
# Seen: flash attention as it comes (-1, for the library to decide) is on, and with it logits are
# bit for bit those of a float16 cache, off by about 1e-3. They agree with PyTorch's to about 1e-6
# only with a float32 cache and flash_attn_type = 0, both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" "transformers==5.23.0" \
  "gguf==0.19.0" "cyllama==0.2.18"
cat > "$folder/flash.py" <<'PYTHON'
import sys
from importlib.metadata import version

import cyllama.llama.llama_cpp as cpp
import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

F32, F16 = 0, 1
TOKENS = [3, 10, 17, 24, 31, 38, 8, 15]
torch.manual_seed(0)
config = LlamaConfig(
    num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=40, max_position_embeddings=64,
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    wanted = model(torch.tensor([TOKENS])).logits[0].numpy()
    double = model.double()(torch.tensor([TOKENS])).logits[0].numpy()
model.float()


def pairs(weight):
    """Rows as llama.cpp rotates them: next to each other in pairs."""
    return weight.reshape(4, 2, 4, -1).transpose(1, 2).reshape(weight.shape)


def write(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(2)
    writer.add_vocab_size(40)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = pairs(weight)
        array = weight.contiguous().numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model(cpp.LlamaModel):
    n_vocab = property(lambda self: self.get_vocab().n_vocab)  # missing, and asked for


def logits(path, cache, flash):
    how = cpp.LlamaModelParams()
    how.n_gpu_layers = 0
    llama = Model(path, how)
    how = cpp.LlamaContextParams()
    how.n_ctx = how.n_batch = how.n_ubatch = 32
    how.n_threads = how.n_threads_batch = 1
    how.type_k = how.type_v = cache
    if flash is not None:
        how.flash_attn_type = flash
    context = cpp.LlamaContext(llama, how)
    batch = cpp.LlamaBatch(n_tokens=len(TOKENS), embd=0, n_seq_max=1)
    for place, token in enumerate(TOKENS):
        batch.add(token, place, [0], True)
    context.decode(batch)
    found = np.array([context.get_logits_ith(n) for n in range(len(TOKENS))], np.float32)
    context.close()
    return found


cpp.disable_logging()
path = sys.argv[1]
write(path)
print("cyllama", version("cyllama"), "gguf", version("gguf"), "torch", torch.__version__)
print("flash_attn_type as it comes:", cpp.LlamaContextParams().flash_attn_type)
print(f"PyTorch in float32 from PyTorch in float64: {np.abs(wanted - double).max():.0e}")
found = {}
off = {}
for cache in (F16, F32):
    for flash, said in ((None, "as it comes"), (1, "on"), (0, "off")):
        found[cache, flash] = logits(path, cache, flash)
        off[cache, flash] = np.abs(found[cache, flash] - wanted).max()
        kind = "float32" if cache == F32 else "float16"
        print(f"cache {kind}, flash attention {said}: off by {off[cache, flash]:.0e}")
same = np.array_equal(found[F32, None], found[F16, None])
is_on = np.array_equal(found[F32, None], found[F32, 1])
print("flash attention as it comes, bit for bit the same as on:", is_on)
print("and with either cache:", same)
sys.exit(not (off[F32, 0] < 1e-5 and off[F32, None] > 20 * off[F32, 0] and same and is_on))
PYTHON
"$folder/venv/bin/python" "$folder/flash.py" "$folder/model.gguf"
# output seen:
# cyllama 0.2.18 gguf 0.19.0 torch 2.13.0+cpu
# flash_attn_type as it comes: -1
# PyTorch in float32 from PyTorch in float64: 5e-07
# cache float16, flash attention as it comes: off by 9e-04
# cache float16, flash attention on: off by 9e-04
# cache float16, flash attention off: off by 9e-04
# cache float32, flash attention as it comes: off by 9e-04
# cache float32, flash attention on: off by 9e-04
# cache float32, flash attention off: off by 7e-07
# flash attention as it comes, bit for bit the same as on: True
# and with either cache: True
