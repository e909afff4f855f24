"""What a fused step and a fused prompt share: all of a layer that looks at one row of hidden states at a time.

Every kernel of ours may overlap with the one in front on a GPU that can; what is done in torch in between just waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onegpu.decoder.cache import KVCache
from onegpu.decoder.fused.plan import FusedPlan, LayerPlan, Norm
from onegpu.decoder.fused.recognise import finish
from onegpu.errors import ArgumentError

__all__ = ["FusedLayers"]


class FusedLayers:
    """The rows of a recognised model; its products are joined here if they are not yet.

    Raises:
        ArgumentError: the cache has another number of layers.
    """

    def __init__(self, plan: FusedPlan, kv: KVCache) -> None:
        if len(kv.layers) != len(plan.layers):
            raise ArgumentError(f"the model has {len(plan.layers)} layers, the cache {len(kv.layers)}")
        self.plan, self.kv = plan, kv
        self.overlap = plan.device.type == "cuda"
        plan.join()

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids [B] to [B, hidden]."""
        hidden: Tensor = self.plan.embed(tokens)
        multiplier = self.plan.embedding_multiplier
        return hidden if multiplier == 1.0 else hidden * multiplier

    def qkv(self, layer: LayerPlan, hidden: Tensor) -> Tensor:
        """[B, hidden] to queries, keys and values [B, (Hq + 2 Hkv) * D], normed over all heads where that is so."""
        assert layer.products is not None
        qkv = layer.products.qkv(self.normed(layer.input_norm, hidden), overlap=self.overlap)
        return qkv if layer.head_norm else self.norm_all_heads(layer, qkv)

    def after_attention(self, layer: LayerPlan, x: Tensor, hidden: Tensor) -> Tensor:
        """Heads x [B, Hq * D] back to the hidden states, added to them."""
        assert layer.products is not None
        if layer.post_attention_norm is None and layer.residual_multiplier == 1.0:
            return layer.products.o(x, residual=hidden, overlap=self.overlap)
        y = layer.products.o(x, overlap=self.overlap)
        return self.add(hidden, y, layer.post_attention_norm, layer.residual_multiplier)

    def mlp(self, layer: LayerPlan, hidden: Tensor) -> Tensor:
        """The second half of a layer: [B, hidden] to [B, hidden]."""
        assert layer.products is not None
        x = self.normed(layer.mlp_norm, hidden)
        if layer.products.gate_up is None or layer.products.down is None:
            return self.add(hidden, self.own_mlp(layer, x), layer.post_mlp_norm, layer.residual_multiplier)
        x = layer.products.gate_up(x, activation=layer.activation, gated=True, overlap=self.overlap)
        if layer.post_mlp_norm is None and layer.residual_multiplier == 1.0:
            return layer.products.down(x, residual=hidden, overlap=self.overlap)
        y = layer.products.down(x, overlap=self.overlap)
        return self.add(hidden, y, layer.post_mlp_norm, layer.residual_multiplier)

    def own_mlp(self, layer: LayerPlan, x: Tensor) -> Tensor:
        """[B, hidden] through the module's own forward, which knows [B, S, hidden]."""
        out = layer.mlp(x[:, None])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result.view_as(x)

    def norm_all_heads(self, layer: LayerPlan, qkv: Tensor) -> Tensor:
        """Queries and keys normed over all heads at once, as OLMo 2 has it."""
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        sizes = [layer.num_heads * layer.head_dim, *(2 * [layer.num_kv_heads * layer.head_dim])]
        q, k, v = torch.split(qkv, sizes, dim=-1)
        return torch.cat((layer.q_norm(q, self.overlap), layer.k_norm(k, self.overlap), v), dim=-1)

    def normed(self, norm: Norm | None, x: Tensor) -> Tensor:
        """x through a norm that may not be there."""
        return x if norm is None else norm(x, self.overlap)

    def add(self, hidden: Tensor, branch: Tensor, norm: Norm | None, multiplier: float) -> Tensor:
        """The residual sum where a norm or a factor stands before it."""
        return torch.add(hidden, self.normed(norm, branch), alpha=multiplier)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, hidden] to [B, V]."""
        plan = self.plan
        assert plan.joined_head is not None
        out = plan.joined_head(plan.norm(hidden, self.overlap), overlap=self.overlap)
        return finish(out, plan.logits_divisor, plan.logits_softcap)
