"""The GRIFFIN draft head in vLLM's layers.

The maths is the paper's (arXiv 2502.11018, section 3): Token-Guided Fusion in front, one decoder
layer with a dual head behind it. The shape of the classes follows vLLM's
``model_executor/models/llama_eagle.py``, so every runner that serves EAGLE serves this model too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsEagle
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.utils import get_draft_quant_config

from griffin_vllm.checkpoint import DRAFT_TO_TARGET, EMBEDDINGS, TARGET_TO_DRAFT
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving import fixed_depth

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.layers.quantization import QuantizationConfig

# Checkpoint tensor -> (vLLM's fused parameter, shard of it). The fusion's up_proj stands alone.
_FUSED = {
    "layers.0.self_attn.q_proj": ("layers.0.self_attn.qkv_proj", "q"),
    "layers.0.self_attn.k_proj": ("layers.0.self_attn.qkv_proj", "k"),
    "layers.0.self_attn.v_proj": ("layers.0.self_attn.qkv_proj", "v"),
    "layers.0.mlp.gate_proj": ("layers.0.mlp.gate_up_proj", 0),
    "layers.0.mlp.up_proj": ("layers.0.mlp.gate_up_proj", 1),
}


def _dual_head_in_two(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        if name == "layers.0.mlp.down_proj.weight":
            predict, regress = tensor.chunk(2)
            yield name.replace("down_proj", "predict_proj"), predict
            yield name.replace("down_proj", "regress_proj"), regress
        else:
            yield name, tensor


class FusionMLP(nn.Module):
    """``W_down SiLU(W_up [RMSNorm(h); RMSNorm(e)])``, one norm weight for both halves."""

    def __init__(
        self, config: PreTrainedConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.up_proj = ColumnParallelLinear(
            2 * config.hidden_size,
            config.intermediate_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.up_proj",
        )
        self.act_fn = nn.SiLU()
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )

    def forward(self, hidden_states: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        fused = self.input_layernorm(torch.stack((hidden_states, embeds), dim=-2))
        fused, _ = self.up_proj(fused.flatten(-2))
        fused, _ = self.down_proj(self.act_fn(fused))
        return fused


class TokenGuidedFusion(nn.Module):
    """Merges the token's embedding into the target's feature, twice: linearly, then gated by a norm."""

    def __init__(
        self, config: PreTrainedConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.fc = ReplicatedLinear(
            2 * config.hidden_size,
            config.hidden_size,
            bias=True,
            quant_config=quant_config,
            prefix=f"{prefix}.fc",
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FusionMLP(config, quant_config, f"{prefix}.mlp")

    def forward(self, embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        hidden_states, _ = self.fc(torch.cat((embeds, features), dim=-1))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), embeds)


class DualHeadMLP(nn.Module):
    """A gated MLP with two outputs: one to predict from, one to feed back.

    Checkpoints hold both as one projection. Here they are two, for nothing is fed back from the last draft step.
    """

    def __init__(
        self, config: PreTrainedConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.act_fn = SiluAndMul()
        self.predict_proj, self.regress_proj = (
            RowParallelLinear(
                config.intermediate_size,
                config.hidden_size,
                bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.{name}",
            )
            for name in ("predict_proj", "regress_proj")
        )

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict (N, d), and what ``regress`` takes (N, I)."""
        hidden_states, _ = self.gate_up_proj(hidden_states)
        activations = self.act_fn(hidden_states)
        predict, _ = self.predict_proj(activations)
        return predict, activations

    def regress(self, activations: torch.Tensor) -> torch.Tensor:
        regress, _ = self.regress_proj(activations)
        return regress


class GriffinDecoderLayer(nn.Module):
    """A Llama decoder layer without the norm before attention and with the dual head behind it."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: PreTrainedConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            # The head drafts at the target's positions, whatever lengths its own config tells of.
            max_position_embeddings=vllm_config.model_config.max_model_len,
            quant_config=quant_config,
            bias=config.qkv_bias,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DualHeadMLP(config, quant_config, f"{prefix}.mlp")

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict (N, d), and of what regress is made: the residual (N, d) and activations (N, I)."""
        hidden_states = hidden_states + self.self_attn(positions=positions, hidden_states=hidden_states)
        predict, activations = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + predict, hidden_states, activations

    def write_cache(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Put the keys and values of ``hidden_states`` into the KV cache, and attend to nothing."""
        attention = self.self_attn
        qkv, _ = attention.qkv_proj(hidden_states)
        q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        _, k = attention.rotary_emb(positions, q, k)
        heads = (-1, attention.num_kv_heads, attention.head_dim)
        torch.ops.vllm.unified_kv_cache_update(k.view(heads), v.view(heads), attention.attn.layer_name)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0})
class GriffinModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", start_layer_id: int = 0) -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        quant_config = get_draft_quant_config(vllm_config)
        # Only until vLLM puts the target's own module here, see GriffinForCausalLM.has_own_embed_tokens.
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.fc = TokenGuidedFusion(config, quant_config, f"{prefix}.fc")
        # vLLM keys KV caches by layer name: the head's layer counts on from the target's last one.
        self.layers = nn.ModuleList(
            [GriffinDecoderLayer(vllm_config, config, quant_config, f"{prefix}.layers.{start_layer_id}")]
        )

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states = self.fc(self.embed_tokens(input_ids), hidden_states)
        return self.layers[0](positions, hidden_states)

    def regress(self, residual: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layers[0]
        return residual + layer.mlp.regress(activations)

    def write_cache(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Only what later tokens attend to; returns something of the right shape."""
        hidden_states = self.fc(self.embed_tokens(input_ids), hidden_states)
        layer: Any = self.layers[0]
        layer.write_cache(positions, hidden_states)
        return hidden_states


class DraftVocabulary(nn.Module):
    """The tokens that a head can draft, and their rows of the target's ``lm_head``.

    The mapping is EAGLE-3's (``model_executor/models/llama_eagle3.py``), but the rows are the target's own,
    so no checkpoint holds them.
    """

    target_ids: torch.Tensor

    def __init__(self, config: PreTrainedConfig, prefix: str) -> None:
        super().__init__()
        self.target_vocab_size = config.vocab_size
        self.lm_head = ParallelLMHead(config.draft_vocab_size, config.hidden_size, prefix=f"{prefix}.lm_head")
        self.register_buffer("target_ids", torch.arange(config.draft_vocab_size), persistent=False)

    def load(self, offsets: torch.Tensor) -> None:
        """``offsets`` (draft vocabulary,): target id minus draft id of each token."""
        self.target_ids.copy_(torch.arange(len(offsets)) + offsets)

    def take_rows(self, lm_head: VocabParallelEmbedding) -> None:
        """Fill this ``lm_head`` from the target's, which must be loaded.

        Raises:
            GriffinError: the target's is quantized or packed, so it has no rows to take.
        """
        method = lm_head.quant_method
        if not isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
            raise GriffinError.at(
                "target",
                "lm_head",
                type(method).__name__,
                "no quantization (the draft vocabulary takes rows)",
            )
        if lm_head.weight.ndim != 2:
            raise GriffinError.at(
                "target",
                "lm_head",
                f"packed by {type(method).__name__}",
                "rows as in its checkpoint (the draft vocabulary takes some); serve a head with the whole vocabulary",
            )
        shard = lm_head.shard_indices
        here = self.target_ids >= shard.org_vocab_start_index
        here &= self.target_ids < shard.org_vocab_end_index
        rows = lm_head.weight[torch.where(here, self.target_ids - shard.org_vocab_start_index, 0)]
        # Each row lies on one rank only; the others add zeros to it.
        rows = tensor_model_parallel_all_reduce(torch.where(here[:, None], rows, 0))
        self.lm_head.weight_loader(self.lm_head.weight, rows)
        # On CPU this packs the weight for the matrix product; what was packed before had no rows yet.
        self.lm_head.quant_method.process_weights_after_loading(self.lm_head)

    def to_target(self, tokens: torch.Tensor) -> torch.Tensor:
        """Target ids of draft ids, both (N,)."""
        return self.target_ids[tokens]

    def widen(self, values: torch.Tensor, elsewhere: float) -> torch.Tensor:
        """(N, draft vocabulary) to (N, target vocabulary), ``elsewhere`` where nothing can be drafted."""
        wide = values.new_full((len(values), self.target_vocab_size), elsewhere)
        return wide.index_copy_(1, self.target_ids, values)

    def narrow(self, values: torch.Tensor) -> torch.Tensor:
        """(N, target vocabulary) to (N, draft vocabulary)."""
        return values.index_select(1, self.target_ids)


class GriffinForCausalLM(nn.Module, SupportsEagle):
    """What vLLM's EAGLE proposers load and call.

    Both flags below are how vLLM learns that it shall put the target's embeddings and ``lm_head``
    into ``model.embed_tokens`` and ``lm_head`` after loading (V1: ``llm_base_proposer.py``, V2:
    ``worker/gpu/spec_decode/eagle/utils.py``).
    """

    has_own_lm_head = False
    has_own_embed_tokens = False

    # Set by the proposer when nobody wants a draft; what forward returns then means nothing.
    writes_cache_only = False
    # Cleared by the proposer for the last draft step; regress is then predict once more.
    feeds_back = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        fixed_depth.warn(vllm_config)
        self.model = GriffinModel(
            vllm_config=vllm_config,
            prefix=f"{prefix}.model" if prefix else "model",
            start_layer_id=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        )
        target = vllm_config.model_config.hf_config
        self.logits_processor = LogitsProcessor(
            self.config.draft_vocab_size, soft_cap=getattr(target, "final_logit_softcapping", None)
        )
        self.draft_vocabulary: DraftVocabulary | None = None
        if self.config.draft_vocab_size < self.config.vocab_size:
            self.draft_vocabulary = DraftVocabulary(self.config, f"{prefix}.draft_vocabulary".lstrip("."))

    def __setattr__(self, name: str, value: Any) -> None:
        # Both proposers hand the target's lm_head over by assigning it, and tell nothing else.
        if name == "lm_head" and self.draft_vocabulary is not None:
            self.draft_vocabulary.take_rows(value)
            value = self.draft_vocabulary.lm_head
        super().__setattr__(name, value)

    @property
    def writes_cache_apart(self) -> bool:
        """Whether the attention backend has the cache's update apart from the attention itself."""
        backend = self.attention.attn_backend
        return not getattr(backend, "forward_includes_kv_cache_update", True)

    @property
    def attention(self) -> Attention:
        """The head's only attention layer, which owns its KV cache."""
        layer: Any = self.model.layers[0]
        return layer.self_attn.attn

    @property
    def output_embeddings(self) -> VocabParallelEmbedding:
        """The target's ``lm_head``, or its rows; Gemma 2 has no such module and uses its embeddings."""
        if not hasattr(self, "lm_head"):
            self.lm_head = self.model.embed_tokens
        return self.lm_head

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step for N tokens of any requests.

        Args:
            input_ids: (N,) the token after each feature, x_(t+1).
            positions: (N,) the feature's position t.
            hidden_states: (N, d) the target's final normalised hidden states f_t, or the regress
                output of the step before.
            inputs_embeds: unused; GRIFFIN heads are for text.

        Returns:
            predict (N, d), from which ``compute_logits`` gives the distribution of x_(t+2), and
            regress (N, d), the estimate of f_(t+1) that vLLM feeds back.
        """
        if inputs_embeds is not None:
            raise NotImplementedError("a GRIFFIN head takes token ids, not multimodal embeddings")
        if self.writes_cache_only and self.writes_cache_apart:
            written = self.model.write_cache(input_ids, positions, hidden_states)
            return written, written
        predict, residual, activations = self.model(input_ids, positions, hidden_states)
        if not self.feeds_back:
            return predict, predict
        # Outside of the compiled model, which then is one and the same for all steps.
        return predict, self.model.regress(residual, activations)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The target's logits of predict (N, d), without a norm in between: (N, vocabulary)."""
        logits = self.logits_processor(self.output_embeddings, hidden_states)
        if self.draft_vocabulary is None or logits is None:
            return logits
        return self.draft_vocabulary.widen(logits, float("-inf"))

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Greedy draft tokens (N,); builds logits of the draft vocabulary only, and gathers none of them."""
        tokens = self.logits_processor.get_top_tokens(self.output_embeddings, hidden_states)
        return tokens if self.draft_vocabulary is None else self.draft_vocabulary.to_target(tokens)

    def get_top_tokens_and_probabilities(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedy draft tokens (N,) and the head's probabilities of them (N,) float32; one rank only."""
        logits = self.logits_processor(self.output_embeddings, hidden_states).float()
        best, tokens = logits.max(dim=-1)
        probabilities = (best - logits.logsumexp(dim=-1)).exp()
        if self.draft_vocabulary is not None:
            tokens = self.draft_vocabulary.to_target(tokens)
        return tokens, probabilities

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a head's tensors (``checkpoint.tensor_shapes``); its copy of the embeddings is left out."""
        parameters = dict(self.model.named_parameters())
        # What the target brings after loading.
        loaded = {f"model.{EMBEDDINGS}", "draft_vocabulary.lm_head.weight"}
        for name, tensor in _dual_head_in_two(weights):
            if name in (EMBEDDINGS, TARGET_TO_DRAFT):
                continue
            if name == DRAFT_TO_TARGET:
                assert self.draft_vocabulary is not None
                self.draft_vocabulary.load(tensor)
                continue
            module, _, kind = name.rpartition(".")
            fused, shard = _FUSED.get(module, (module, None))
            name = f"{fused}.{kind}"
            parameter = parameters[name]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, tensor) if shard is None else loader(parameter, tensor, shard)
            loaded.add(f"model.{name}")
        return loaded
