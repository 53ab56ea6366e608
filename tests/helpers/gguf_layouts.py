"""Small models in the layouts that llama.cpp has, for what is written as GGUF and read back."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4MoeConfig,
    GlmConfig,
    GptOssConfig,
    Llama4TextConfig,
    Ministral3Config,
    NemotronHConfig,
    Olmo3Config,
    OlmoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)  # fmt: skip

from helpers.tiny_models import make_base
from helpers.tokenizers import bpe_tokenizer
from lit_gpt.conversion import hf, hf_shards

LAYOUTS = [
    ("llama", "llama"), ("llama", "llama3"), ("llama", "linear"), ("llama", "yarn"), ("llama", "biased"),
    ("llama", "smollm2"), ("llama", "mistral"), ("falcon", "7b"), ("falcon", "40b"), ("falcon", "11b"),
    ("gpt_neox", "pythia"), ("gpt_neox", "redpajama"), ("qwen", "qwen2"), ("qwen", "qwen3"), ("gemma", "gemma"),
    ("gemma", "gemma2"), ("gemma", "gemma3"), ("phi3", "phi3"), ("olmo2", "olmo2"), ("granite", "granite"),
    ("smollm3", "smollm3"),
]  # fmt: skip
SIZE = dict(
    vocab_size=320, hidden_size=64, intermediate_size=112, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, pad_token_id=None, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
TWO = dict(SIZE, num_hidden_layers=2)
WINDOW = dict(SIZE, head_dim=24, sliding_window=5, query_pre_attn_scalar=24)
THREE_IN_FOUR = dict(
    SIZE, num_hidden_layers=4, sliding_window=5, layer_types=["sliding_attention"] * 3 + ["full_attention"]
)
EXPERTS = dict(TWO, moe_intermediate_size=24, num_experts_per_tok=2, head_dim=24)
GEMMA_4 = dict(
    SIZE, num_hidden_layers=4, sliding_window=5, head_dim=16, global_head_dim=32, final_logit_softcapping=30.0,
    layer_types=2 * ["sliding_attention", "full_attention"], hidden_size_per_layer_input=0,
)  # fmt: skip
GEMMA_4_LARGE = dict(attention_k_eq_v=True, num_global_key_value_heads=1)
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": PLAIN_ROPE,
}
LATENT = dict(
    TWO, num_hidden_layers=3, num_key_value_heads=4, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8,
    v_head_dim=16, moe_intermediate_size=24, n_routed_experts=6, num_experts_per_tok=2, routed_scaling_factor=1.5,
    first_k_dense_replace=1, n_shared_experts=2,
)  # fmt: skip
DELTA_NET = dict(
    SIZE, num_hidden_layers=4, head_dim=256, partial_rotary_factor=0.25, linear_key_head_dim=16,
    linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, full_attention_interval=2,
)  # fmt: skip
SHARED_EXPERT = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=32)
AS_LLAMA_CPP_HAS_THEM = {  # where it takes something for granted
    "gemma2": lambda: Gemma2Config(
        **WINDOW, num_hidden_layers=2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**WINDOW, num_hidden_layers=6, rope_parameters=ROPES),
    "smollm3": lambda: SmolLM3Config(**SIZE, num_hidden_layers=4),
    "cohere2": lambda: Cohere2Config(**THREE_IN_FOUR),
    "olmo3": lambda: Olmo3Config(
        **THREE_IN_FOUR, rope_parameters={"full_attention": YARN, "sliding_attention": PLAIN_ROPE}
    ),
    "exaone4": lambda: Exaone4Config(**TWO, sliding_window=None, layer_types=["full_attention"] * 2),
    "glm": lambda: GlmConfig(**TWO, head_dim=16),
    "olmoe": lambda: OlmoeConfig(**TWO | dict(num_key_value_heads=4), num_experts=6, num_experts_per_tok=3),
    "qwen3_moe": lambda: Qwen3MoeConfig(**EXPERTS, num_experts=5, norm_topk_prob=True),
    "glm4_moe": lambda: Glm4MoeConfig(
        **EXPERTS, n_routed_experts=6, n_group=1, topk_group=1, routed_scaling_factor=1.5, attention_bias=True,
        use_qk_norm=True, num_nextn_predict_layers=0,
    ),
    "large": lambda: Gemma4TextConfig(**GEMMA_4 | GEMMA_4_LARGE),
    "experts": lambda: Gemma4TextConfig(
        **GEMMA_4 | GEMMA_4_LARGE, enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=24
    ),
    "small": lambda: Gemma4TextConfig(
        **GEMMA_4 | dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=320), num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    ),
    "llama4": lambda: Llama4TextConfig(
        **TWO | dict(num_hidden_layers=4, intermediate_size=24), intermediate_size_mlp=40, num_local_experts=5,
        head_dim=16, interleave_moe_layer_step=2,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **TWO | dict(intermediate_size=32), head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=5,
        rope_parameters=YARN | {"truncate": False},
    ),
    "deepseek_v2": lambda: DeepseekV2Config(**LATENT | dict(num_hidden_layers=26), q_lora_rank=None),
    "deepseek_v3": lambda: DeepseekV3Config(
        **LATENT, q_lora_rank=32, n_group=2, topk_group=1, num_nextn_predict_layers=0,
        rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
    ),
    "ministral3": lambda: Ministral3Config(
        **TWO, head_dim=16, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    ),
    "falcon_h1": lambda: FalconH1Config(
        **TWO, head_dim=16, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=1,
        embedding_multiplier=3.0, lm_head_multiplier=0.3, key_multiplier=0.6, attention_in_multiplier=1.2,
        attention_out_multiplier=0.7, ssm_in_multiplier=1.5, ssm_out_multiplier=0.4, mlp_multipliers=[0.8, 0.5],
        ssm_multipliers=[0.7, 0.9, 1.3, 0.6, 0.8], mamba_rms_norm=True, mamba_norm_before_gate=False,
    ),
    "nemotron_h_moe": lambda: NemotronHConfig(
        **SIZE, head_dim=16, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=16, n_routed_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32,
        routed_scaling_factor=1.5, layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
    ),
    "qwen3_next": lambda: Qwen3NextConfig(**DELTA_NET | SHARED_EXPERT),
    "qwen3_5": lambda: Qwen3_5TextConfig(**DELTA_NET, tie_word_embeddings=True),
    "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(**DELTA_NET | SHARED_EXPERT),
}  # fmt: skip
FURTHER = [  # of the newer families, through what is quick
    ("arcee", "arcee"), ("bloom", "bloom"), ("cohere", "cohere"), ("cohere", "cohere2"), ("ernie", "ernie4_5"),
    ("deepseek", "deepseek_v2"), ("deepseek", "deepseek_v3"), ("glm4_moe_lite", "glm4_moe_lite"),
    ("ministral", "ministral3"), ("gemma4", "large"), ("gemma4", "experts"), ("gemma4", "small"), ("llama4", "llama4"),
    ("exaone4", "exaone4"), ("falcon_h1", "falcon_h1"), ("falcon_mamba", "falcon_mamba"),
    ("glm4", "glm"), ("glm4", "glm4"), ("glm4_moe", "glm4_moe"), ("gpt2", "gpt2"),
    ("gpt_bigcode", "multi-head"), ("gpt_bigcode", "multi-query"), ("gpt_oss", "gpt_oss"),
    ("granite_hybrid", "granite_hybrid"), ("granite_hybrid", "granite_hybrid-experts"),
    ("granite_hybrid", "granite_hybrid-rope"), ("granite_moe", "granitemoe"), ("nemotron_h", "nemotron_h"),
    ("nemotron_h", "nemotron_h_moe"), ("qwen3_next", "qwen3_next"), ("qwen3_5", "qwen3_5"),
    ("qwen3_5_moe", "qwen3_5_moe"),
    ("hunyuan", "hunyuan"), ("lfm2", "lfm2"), ("mixtral", "mixtral"), ("mpt", "mpt"), ("olmo", "clipped"),
    ("olmo3", "olmo3"), ("olmoe", "olmoe"), ("phi", "phi2"), ("qwen_moe", "qwen3_moe"), ("qwen2_moe", "qwen2_moe"),
    ("seed_oss", "seed_oss"), ("stablelm", "1_6b"), ("stablelm", "12b"), ("starcoder2", "starcoder2"),
]  # fmt: skip
RECURRENT = [names for names in FURTHER if names[0] in (
    "falcon_h1", "falcon_mamba", "granite_hybrid", "lfm2", "nemotron_h", "qwen3_5", "qwen3_next"
)]  # fmt: skip
LATENT_TOO = [names for names in FURTHER if names[0] in ("deepseek", "glm4_moe_lite", "ministral", "qwen3_5_moe")]
NAMES = ["-".join(names) for names in LAYOUTS + FURTHER]
READ_BY_TRANSFORMERS = [
    "llama", "llama3", "linear", "yarn", "smollm2", "mistral", "7b", "qwen2", "gemma3", "bloom", "lfm2", "starcoder2",
]  # fmt: skip


def make(folder: Path, family: str, layout: str) -> Path:
    if layout not in AS_LLAMA_CPP_HAS_THEM:
        return make_base(folder, family, layout)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AS_LLAMA_CPP_HAS_THEM[layout]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    bpe_tokenizer(folder)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    return folder
