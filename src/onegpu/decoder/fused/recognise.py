"""Whether a model is one that the fused step can run: a plan with every number in it, or the reason why not.

Known by structure and by what the parts compute: the modules' names say where to look; which norm stands where, what
positions do to queries and keys, which window and scale a layer asks for, is read off a probe of the plain model.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from typing import Any, Final

import torch
from torch import Tensor, nn

from onegpu.decoder.fused.parts import activation_of, all_close, close, each_close, gated_mlp, norm_of, qkv_of
from onegpu.decoder.fused.plan import FusedPlan, LayerPlan, Norm, Rotary, is_touched
from onegpu.decoder.fused.probe import AttentionCall, ModuleCall, Probe, watch
from onegpu.kernels.decode_ops import MAX_DECODE_HEAD_DIM
from onegpu.kernels.decode_reference import rotate
from onegpu.nn.joined import is_plain_linear

__all__ = ["recognise"]

# How angles are given, and whether they turn pairs side by side.
ANGLES: Final = ((False, "halves"), (True, "halves"), (True, "pairs"), (False, "once"), (True, "once"))
FLOATS: Final = (torch.bfloat16, torch.float16, torch.float32)


class Unrecognised(Exception):  # noqa: N818  (it never leaves this file)
    """The reason why not, on its way up."""


def recognise(model: nn.Module) -> FusedPlan | str:
    """The plan of a fused decode step for a Transformers causal language model, or why there is none.

    Runs the plain model once, on one token at two positions; changes nothing.
    """
    try:
        return Reader(model).plan()
    except Unrecognised as reason:
        return str(reason)


class Reader:
    """Reads one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        config = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
            raise Unrecognised(f"{type(model).__name__} is no decoder-only Transformers model")
        self.config = config.get_text_config()
        try:
            self.decoder: Any = model.get_decoder()
            self.embed = model.get_input_embeddings()
            self.head = model.get_output_embeddings()
        except NotImplementedError as error:
            raise Unrecognised(f"{type(model).__name__} does not say which its embeddings are") from error
        self.rotaries: list[Rotary] = []
        self.norm_kinds: dict[Hashable, tuple[float, float]] = {}

    def plan(self) -> FusedPlan:
        """The plan, or `Unrecognised`."""
        layers, final_norm = self.skeleton()
        device, dtype = self.placement()
        self.untouched()
        watched: list[nn.Module] = [self.embed, final_norm, self.head]
        for layer in layers:
            watched += [layer, *layer.children()]
        # The last place there is: what changes from some position on shows there too.
        last = max(1, int(getattr(self.config, "max_position_embeddings", None) or 1024) - 1)
        rotary_limit = self.length_dependent()
        last = last if rotary_limit is None else min(last, rotary_limit - 1)
        try:
            probe = watch(self.model, watched, 1, (0, last), device)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
            raise Unrecognised(f"its forward could not be followed: {type(error).__name__}: {error}") from error
        if len(probe.attention) != len(layers):
            raise Unrecognised(
                f"{len(layers)} layers called attention {len(probe.attention)} times through the interface"
            )
        self.dtype = probe.attention[0].query.dtype
        if self.dtype not in FLOATS or self.dtype != dtype:
            raise Unrecognised(f"it computes in {self.dtype} on embeddings in {dtype}")
        plans = [self.layer(index, layer, probe) for index, layer in enumerate(layers)]
        for found, rotary in zip(plans, self.rotations(layers, probe, last, device), strict=True):
            found.rotary = rotary
        plan = FusedPlan(
            model=self.model,
            embed=self.embed,
            layers=plans,
            rotaries=self.rotaries,
            norm=self.norm(final_norm, self.config.hidden_size),
            head=self.head,
            dtype=dtype,
            device=device,
            vocab_size=int(self.head.out_features),
        )
        self.ends(plan, layers, final_norm, probe)
        own = [layer for layer in plans if layer.down is None]
        if own:
            plan.experts_configs = tuple(configs_with_experts(self.model))
        modules: list[Any] = [self.embed, self.head, final_norm]
        for layer in layers:
            modules += [part for part in layer.modules() if part in self.names]
        plan.names = {self.names[module]: module for module in modules}
        return plan

    def skeleton(self) -> tuple[list[Any], Any]:
        """The layers in use, and the norm behind them."""
        layers, norm = getattr(self.decoder, "layers", None), getattr(self.decoder, "norm", None)
        if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
            raise Unrecognised(f"{type(self.decoder).__name__} has no `layers` with a `norm` behind them")
        if not isinstance(self.embed, nn.Embedding):
            raise Unrecognised(f"its input embedding is {type(self.embed).__name__}, not an nn.Embedding")
        if self.head is None or not is_plain_linear(self.head):
            raise Unrecognised(f"its head is {type(self.head).__name__}, not a plain linear layer")
        used = list(layers)[: int(getattr(self.config, "num_hidden_layers", len(layers)))]
        for layer in used:
            for name in ("self_attn", "mlp"):
                if not isinstance(getattr(layer, name, None), nn.Module):
                    raise Unrecognised(f"{self.named(layer)} has no `{name}`")
        return used, norm

    def placement(self) -> tuple[torch.device, torch.dtype]:
        """Device of everything and dtype of the embedding."""
        if self.model.training:
            raise Unrecognised("it is in training mode")
        tensors = [*self.model.parameters(), *self.model.buffers()]
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1:
            raise Unrecognised(f"it is spread over {', '.join(sorted(str(device) for device in devices))}")
        device = devices.pop()
        if device.type == "meta":
            raise Unrecognised("its weights are on the meta device, not loaded or offloaded")
        return device, self.embed.weight.dtype

    def untouched(self) -> None:
        """Nobody's hook or forward would be passed over."""
        for module in self.model.modules():
            if module is not self.model and is_touched(module):
                raise Unrecognised(f"{self.named(module)} has hooks or a forward of its own")
            if type(module).__module__.startswith("peft."):
                raise Unrecognised(f"{self.named(module)} is an adapter")

    def layer(self, index: int, layer: Any, probe: Probe) -> LayerPlan:
        """One layer, its attention, its order; `rotations` are read of all layers at once."""
        attention, mlp = layer.self_attn, layer.mlp
        call = probe.attention[index]
        num_heads, head_dim = call.query.shape[1], call.query.shape[3]
        num_kv_heads = call.key.shape[1]
        if call.value.shape != call.key.shape or call.key.shape[3] != head_dim or head_dim > MAX_DECODE_HEAD_DIM:
            raise Unrecognised(
                f"{self.named(attention)} has heads of {head_dim} and values of {call.value.shape[3]}; expected one "
                f"size of at most {MAX_DECODE_HEAD_DIM}"
            )
        self.visible(index, attention, call)
        parts = qkv_of(attention, num_heads * head_dim, num_kv_heads * head_dim)
        if isinstance(parts, str):
            raise Unrecognised(f"{self.named(attention)}: {parts}")
        q_norm, k_norm, by_head = self.head_norms(attention, num_heads, num_kv_heads, head_dim)
        gated = gated_mlp(mlp)
        activation = None
        if gated is not None:
            activation = activation_of(gated.activation)
            gated = None if activation is None else gated
        order = self.order(layer, probe)
        return LayerPlan(
            name=self.names[layer],
            qkv=parts,
            o=attention.o_proj,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            sinks=call.sinks,
            rotary=None,
            q_norm=q_norm,
            k_norm=k_norm,
            head_norm=by_head,
            input_norm=order["input_norm"],
            post_attention_norm=order["post_attention_norm"],
            mlp_norm=order["mlp_norm"],
            post_mlp_norm=order["post_mlp_norm"],
            mlp=mlp,
            gate_up=() if gated is None else gated.gate_up,
            down=None if gated is None else gated.down,
            activation=activation,
            residual_multiplier=float(getattr(layer, "residual_multiplier", 1.0)),
        )

    def visible(self, index: int, attention: Any, call: AttentionCall) -> None:
        """Each token sees itself and what is before it, or a window of that, and nothing is clipped on the way."""
        if not getattr(attention, "is_causal", True):
            raise Unrecognised(f"{self.named(attention)} is not causal")
        if getattr(self.config, "clip_qkv", None) is not None:
            raise Unrecognised(f"{self.named(attention)} clips queries, keys and values")
        types = getattr(self.config, "layer_types", None)
        kind = types[index] if types and index < len(types) else None
        expected = {None: None, "full_attention": False, "sliding_attention": True}.get(kind, "neither")
        if expected not in (None, call.window is not None):
            raise Unrecognised(f"{self.named(attention)} is of type {kind}, but asks for window {call.window}")

    def head_norms(
        self, attention: Any, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> tuple[Norm | None, Norm | None, bool]:
        """The norms of queries and keys, and whether they are of each head alone."""
        q, k = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        if q is None and k is None:
            return None, None, True
        sizes = [getattr(getattr(norm, "weight", None), "numel", lambda: 0)() for norm in (q, k)]
        by_head = sizes == [head_dim, head_dim]
        if not by_head and sizes != [num_heads * head_dim, num_kv_heads * head_dim]:
            raise Unrecognised(f"{self.named(attention)} has a q_norm and k_norm of {sizes[0]} and {sizes[1]} weights")
        q_norm, k_norm = self.norm(q, sizes[0]), self.norm(k, sizes[1])
        if (q_norm.eps, q_norm.offset) != (k_norm.eps, k_norm.offset):
            raise Unrecognised(f"{self.named(attention)} norms queries and keys differently")
        return q_norm, k_norm, by_head

    def norm(self, module: Any, size: int) -> Norm:
        """An RMSNorm over `size` elements; tried once for all that differ in nothing but their weights."""
        kind = kind_of_norm(module, size)
        if kind in self.norm_kinds:
            return Norm(module, *self.norm_kinds[kind])
        found = norm_of(module, size, getattr(self, "dtype", torch.float32))
        if isinstance(found, str):
            raise Unrecognised(f"{self.named(module)}: {found}")
        self.norm_kinds[kind] = found.eps, found.offset
        return found

    def order(self, layer: Any, probe: Probe) -> dict[str, Norm | None]:
        """Which norm stands where, by what each module was given."""
        whole = self.once(layer, probe)
        attention, mlp = self.once(layer.self_attn, probe), self.once(layer.mlp, probe)
        others = [
            (child, self.once(child, probe))
            for child in layer.children()
            if child not in (layer.self_attn, layer.mlp) and not isinstance(child, (nn.Dropout, nn.Identity))
        ]
        multiplier = float(getattr(layer, "residual_multiplier", 1.0))
        places: dict[str, Norm | None] = {}

        def pick(role: str, given: Tensor) -> Tensor:
            for child, call in others:
                if call.given.shape == given.shape and torch.equal(call.given, given):
                    places[role] = self.norm(child, given.shape[-1])
                    others.remove((child, call))
                    return call.output
            places[role] = None
            return given

        def add(stream: Tensor, branch: Tensor) -> Tensor:
            return stream + branch * multiplier

        normed = pick("input_norm", whole.given)
        branch = pick("post_attention_norm", attention.output)
        middle = add(whole.given, branch)
        mlp_input = pick("mlp_norm", middle)
        out = add(middle, pick("post_mlp_norm", mlp.output))
        pairs = [(attention.given, normed), (mlp.given, mlp_input), (whole.output, out)]
        for what, is_so in zip(("its attention", "its MLP", "the next layer"), all_close(pairs), strict=True):
            if not is_so:
                raise Unrecognised(f"{self.named(layer)} gives {what} something else than a residual layer does")
        if others:
            raise Unrecognised(f"{self.named(others[0][0])} has no place in a residual layer")
        return places

    def rotations(self, layers: list[Any], probe: Probe, position: int, device: torch.device) -> list[int | None]:
        """For each layer the rotary embedding that turns its queries and keys, None if positions don't."""
        groups: dict[Hashable, list[int]] = {}
        types = getattr(self.config, "layer_types", None) or []
        for index, call in enumerate(probe.attention):
            own = types[index] if index < len(types) else None
            groups.setdefault((own, call.query.shape, call.key.shape), []).append(index)
        found: dict[int, int | None] = {}
        for (own, *_), members in groups.items():  # type: ignore[misc]
            found.update(self.rotations_of(members, own, probe, position, device))
        for index, layer in enumerate(layers):
            if index not in found:
                raise Unrecognised(
                    f"{self.named(layer.self_attn)}: no rotary embedding of the model does what positions do to it"
                )
        return [found[index] for index in range(len(layers))]

    def rotations_of(
        self, members: list[int], own: str | None, probe: Probe, position: int, device: torch.device
    ) -> dict[int, int | None]:
        """The same of layers of one type and size; those that none fits are left out."""
        calls = [probe.attention[index] for index in members]
        # Each is of layers, rows, heads, D.
        q, k = torch.stack([c.query[:, :, 0] for c in calls]), torch.stack([c.key[:, :, 0] for c in calls])
        is_still = each_close([(t[:, 0], t[:, 1]) for t in (q, k)])
        found: dict[int, int | None] = {index: None for index, still in zip(members, is_still, strict=True) if still}
        for candidate in self.candidates(own):
            left = [place for place, index in enumerate(members) if index not in found]
            if not left:
                break
            cos, sin = candidate.cos_sin(torch.tensor([0, position], device=device), self.dtype)
            size = cos.shape[-1]
            if size > q.shape[-1] or size % 2:
                continue
            pairs = []
            for tensor in (q[left], k[left]):
                # At position 0 the rotated part is only scaled, by what YaRN and its kin scale attention with.
                start = tensor[:, 0].float()
                start[..., :size] /= cos[0].float()
                pairs.append((tensor[:, 1], rotate(start, cos[1:].float(), sin[1:].float(), candidate.interleaved)))
            fits = [members[place] for place, fit in zip(left, each_close(pairs), strict=True) if fit]
            if fits:
                found.update(dict.fromkeys(fits, self.remember(candidate)))
        return found

    def candidates(self, own: str | None) -> list[Rotary]:
        """Every way in which the model's rotary embeddings could be applied, those for layers of type `own` first."""
        types = getattr(self.config, "layer_types", None) or []
        found = []
        for module in self.decoder.children():
            names = list(inspect.signature(module.forward).parameters)
            if names[:2] != ["x", "position_ids"]:
                continue
            kinds = sorted(set(types), key=lambda kind: kind != own) if "layer_type" in names[2:] else [None]
            kinds = [kind for kind in kinds if kind is None or hasattr(module, f"{kind}_inv_freq")] or [None]
            for kind in kinds:
                for interleaved, given in ANGLES:
                    found.append(Rotary(module, kind, interleaved, given, self.length_dependent()))
        return found

    def remember(self, rotary: Rotary) -> int:
        """The index of a rotary embedding in the plan, once for all layers that share it."""
        key = (rotary.module, rotary.layer_type, rotary.interleaved, rotary.given)
        for index, known in enumerate(self.rotaries):
            if (known.module, known.layer_type, known.interleaved, known.given) == key:
                return index
        self.rotaries.append(rotary)
        return len(self.rotaries) - 1

    def length_dependent(self) -> int | None:
        """From how many positions on Transformers recomputes frequencies by the length; None for never."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
        limits = [
            int(kind.get("original_max_position_embeddings") or self.config.max_position_embeddings)
            for kind in kinds
            if "dynamic" in str(kind.get("rope_type")) or kind.get("rope_type") == "longrope"
        ]
        return min(limits) if limits else None

    def ends(self, plan: FusedPlan, layers: list[Any], final_norm: Any, probe: Probe) -> None:
        """Before the first layer and behind the last."""
        embed, head = self.once(self.embed, probe), self.once(self.head, probe)
        norm = self.once(final_norm, probe)
        plan.embedding_multiplier = float(getattr(self.decoder, "embedding_multiplier", 1.0))
        plan.logits_divisor = float(getattr(self.config, "logits_scaling", None) or 1.0)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        plan.logits_softcap = None if softcap is None else float(softcap)
        first, last = self.once(layers[0], probe), self.once(layers[-1], probe)
        if not close(first.given, embed.output * plan.embedding_multiplier):
            raise Unrecognised("its first layer gets something else than the embedding")
        if not close(norm.given, last.output) or not close(head.given, norm.output):
            raise Unrecognised("between its last layer and its head is more than a norm")
        logits = finish(head.output[:, -1], plan.logits_divisor, plan.logits_softcap)
        if logits.shape != probe.logits.shape or not close(probe.logits, logits):
            raise Unrecognised("its logits are not what the head gives, divided and capped as its config says")

    def once(self, module: nn.Module, probe: Probe) -> ModuleCall:
        """The one call of a module."""
        call = probe.of(module)
        if call is None:
            raise Unrecognised(f"{self.named(module)} is not called once in a forward")
        return call

    def named(self, module: Any) -> str:
        """A module's name and class, for a reason."""
        return f"{self.names.get(module) or 'the model'} ({type(module).__name__})"


def kind_of_norm(module: Any, size: int) -> Hashable:
    """Equal for norms of one class whose plain attributes are equal: they compute the same of their weights."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, type(None)))}
    weight = getattr(module, "weight", None)
    return type(module), size, getattr(weight, "shape", None), getattr(weight, "dtype", None), tuple(plain.items())


def finish(logits: Tensor, divisor: float, softcap: float | None) -> Tensor:
    """What some models do to the head's output."""
    if divisor != 1.0:
        logits = logits / divisor
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def configs_with_experts(model: nn.Module) -> list[Any]:
    """The configs that experts modules look into, each once."""
    found = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    return [config for config in found.values() if getattr(config, EXPERTS, None) is not None]


EXPERTS: Final = "_experts_implementation_internal"
