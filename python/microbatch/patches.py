"""Known modules of Hugging Face models whose forward is replaced by the library's fused operators."""

import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from microbatch import _core


class Patch:
    """Replaces a module's forward until undo(). Its attributes have names that recompute's wrapper does not have."""

    attribute = "forward"
    what = ""
    fuses_no_dropout = False

    def __init__(self, module: nn.Module) -> None:
        self.patched = module
        self.patch_active = True

    @property
    def own(self) -> Callable[..., Any]:
        return type(self.patched).forward.__get__(self.patched)  # type: ignore[no-any-return]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.own  # for inspect.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.patch_active or not is_eager():
            return self.own(*args, **kwargs)
        result = self.fused(self.patched, *args, **kwargs)
        return self.own(*args, **kwargs) if result is None else result

    def fused(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """None if the call is not supported."""
        raise NotImplementedError

    def undo(self) -> None:
        self.patch_active = False  # even where another patch is on top of this one
        if self.patched.__dict__.get(self.attribute) is self:
            object.__delattr__(self.patched, self.attribute)


class _Block(Patch):
    """A block of a transformer."""

    what = "one fused operation"
    fuses_no_dropout = True
    #: arguments that do not change what a block computes
    ignored = frozenset({"use_cache", "position_ids", "cache_position", "num_items_in_batch", "output_hidden_states"})

    def fused(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        given = _named(module, args, kwargs)
        x, mask = given.pop("hidden_states", None), given.pop("attention_mask", None)
        positions = given.pop("position_embeddings", None)
        if any(value is not None and value is not False for name, value in given.items() if name not in self.ignored):
            return None
        if not _is_fp32(x) or x.dim() != 3 or x.numel() == 0:
            return None
        run = self.prepared(module, mask, positions)
        if run is None:
            return None
        if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
            return module._gradient_checkpointing_func(run, x)
        return run(x)

    def prepared(self, module: Any, mask: Any, positions: Any) -> Callable[[Tensor], Tensor] | None:
        """The block as a function of its input; None if the call is not supported."""
        raise NotImplementedError


class _Gpt2Block(_Block):
    def prepared(self, module: Any, mask: Any, positions: Any) -> Callable[[Tensor], Tensor] | None:
        attention, mlp = module.attn, module.mlp
        linears = [attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj]
        norms = [module.ln_1, module.ln_2]
        dropouts = [attention.attn_dropout, attention.resid_dropout, mlp.dropout]
        size = attention.head_dim
        if not (
            all(is_plain(one, "transformers.pytorch_utils.Conv1D") for one in linears)
            and all(is_plain(one, nn.LayerNorm) and one.weight is not None and one.bias is not None for one in norms)
            and not any(_drops(one) for one in dropouts)
            and is_plain(mlp.act, *_GELUS)
            and is_plain(attention, "transformers.models.gpt2.modeling_gpt2.GPT2Attention")
            and is_plain(mlp, "transformers.models.gpt2.modeling_gpt2.GPT2MLP")
            and norms[0].eps == norms[1].eps
            and attention.scaling == size**-0.5
        ):
            return None
        supported, lengths = _lengths(attention, mask)
        if not supported:
            return None
        weights = [norms[0].weight, norms[0].bias, linears[0].weight, linears[0].bias, linears[1].weight,
                   linears[1].bias, norms[1].weight, norms[1].bias, linears[2].weight, linears[2].bias,
                   linears[3].weight, linears[3].bias]  # fmt: skip
        heads, epsilon = attention.num_heads, norms[0].eps
        return lambda x: _core.gpt2_block(x, weights, heads, epsilon, True, lengths)


class _LlamaBlock(_Block):
    def prepared(self, module: Any, mask: Any, positions: Any) -> Callable[[Tensor], Tensor] | None:
        attention, mlp = module.self_attn, module.mlp
        norms = [module.input_layernorm, module.post_attention_layernorm]
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        unbiased = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        size = attention.head_dim
        family = name_of(module).removesuffix("DecoderLayer")
        biases = [one.bias for one in projections if one.bias is not None] if _are_linear(projections) else []
        if not (
            _are_linear(projections + unbiased)
            and len(biases) in (0, 3)
            and all(one.bias is None for one in unbiased)
            and all(is_plain(one, f"{family}RMSNorm") for one in norms)
            and norms[0].variance_epsilon == norms[1].variance_epsilon
            and is_plain(attention, f"{family}Attention")
            and is_plain(mlp, f"{family}MLP")
            and is_plain(mlp.act_fn, nn.SiLU, "transformers.activations.SiLUActivation")
            and not (attention.training and attention.attention_dropout > 0.0)
            and attention.scaling == size**-0.5
            and _are_positions(positions, size)
        ):
            return None
        supported, lengths = _lengths(attention, mask)
        if not supported:
            return None
        cosines, sines = positions
        weights = [norms[0].weight, *(one.weight for one in projections), unbiased[0].weight, norms[1].weight,
                   *(one.weight for one in unbiased[1:]), *biases]  # fmt: skip
        heads, kv_heads = projections[0].out_features // size, projections[1].out_features // size
        epsilon = norms[0].variance_epsilon
        return lambda x: _core.llama_block(x, cosines, sines, weights, heads, kv_heads, epsilon, lengths)


class _BertAttention(Patch):
    what = "fused attention"
    fuses_no_dropout = True
    ignored = _Block.ignored

    def fused(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        given = _named(module, args, kwargs)
        x, mask = given.pop("hidden_states", None), given.pop("attention_mask", None)
        if any(value is not None and value is not False for name, value in given.items() if name not in self.ignored):
            return None
        if not _is_fp32(x) or x.dim() != 3 or x.numel() == 0 or _drops(module.dropout) or _is_recorded():
            return None
        supported, lengths = _lengths(module, mask)
        if not supported:
            return None
        q, k, v = module.query(x), module.key(x), module.value(x)
        heads = module.num_attention_heads
        if q.shape != k.shape or not _is_fp32(q):
            return None
        return _core.attention(q, k, v, heads, heads, bool(module.is_causal), lengths), None


class _Base(Patch):
    """A decoder, which makes a cache of keys and values in every call, also where nobody wants one."""

    what = "no cache while training"

    def fused(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return None
        given = _named(module, args, kwargs)
        # Without a cache, `transformers` takes positions that begin anew for samples that are packed into one.
        if any(given.get(name) is not None for name in ("use_cache", "cache", "past_key_values", "position_ids")):
            return None
        return self.own(**(given | {"use_cache": False}))


class _Gelu(Patch):
    what = "fused GELU"

    def fused(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not _is_fp32(args[0]):
            return None
        if getattr(getattr(module, "act", None), "__name__", "") == "_gelu_tanh_python":
            return None
        return _core.gelu_tanh(args[0])


class Head(Patch):
    """Marks a model whose loss functions may compute the head by themselves."""

    attribute = "microbatch_head"
    what = "head and loss at once, in mb.losses"


_MODELS = "transformers.models"
_GELUS = ("transformers.activations.NewGELUActivation", "transformers.activations.GELUTanh")
BASES = {
    f"{_MODELS}.gpt2.modeling_gpt2.GPT2LMHeadModel": "transformer",
    f"{_MODELS}.llama.modeling_llama.LlamaForCausalLM": "model",
    f"{_MODELS}.mistral.modeling_mistral.MistralForCausalLM": "model",
    f"{_MODELS}.qwen2.modeling_qwen2.Qwen2ForCausalLM": "model",
    f"{_MODELS}.bert.modeling_bert.BertForMaskedLM": "bert",
}
KINDS: dict[str, type[Patch]] = {
    f"{_MODELS}.gpt2.modeling_gpt2.GPT2Model": _Base,
    f"{_MODELS}.llama.modeling_llama.LlamaModel": _Base,
    f"{_MODELS}.mistral.modeling_mistral.MistralModel": _Base,
    f"{_MODELS}.qwen2.modeling_qwen2.Qwen2Model": _Base,
    f"{_MODELS}.gpt2.modeling_gpt2.GPT2Block": _Gpt2Block,
    f"{_MODELS}.llama.modeling_llama.LlamaDecoderLayer": _LlamaBlock,
    f"{_MODELS}.mistral.modeling_mistral.MistralDecoderLayer": _LlamaBlock,
    f"{_MODELS}.qwen2.modeling_qwen2.Qwen2DecoderLayer": _LlamaBlock,
    f"{_MODELS}.bert.modeling_bert.BertSelfAttention": _BertAttention,
    f"{_MODELS}.roberta.modeling_roberta.RobertaSelfAttention": _BertAttention,
    **dict.fromkeys(_GELUS, _Gelu),
    **dict.fromkeys(BASES, Head),
}


def name_of(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def patch_of(module: nn.Module) -> "Patch | None":
    """The patch that is active on this module, also below that of recompute."""
    found = module.__dict__.get("microbatch_head") or module.__dict__.get("forward")
    found = getattr(found, "before", found)
    return found if isinstance(found, Patch) and found.patch_active else None


def is_eager() -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # inside torch.func's transforms
        return False
    return not torch.is_autocast_enabled("cpu")


def _is_fp32(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float32 and x.device.type == "cpu" and x.layout == torch.strided


def is_plain(module: Any, *classes: type | str) -> bool:
    """Exactly of one of these classes, and nothing observes or replaces its forward."""
    if type(module) not in classes and name_of(module) not in classes:
        return False
    forward = module.__dict__.get("forward")
    if forward is not None and not isinstance(forward, Patch):
        return False
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return not module._forward_hooks or (all(map(_is_recorder, module._forward_hooks.values())) and not _is_recorded())


def _is_recorder(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _is_recorded() -> bool:
    """True if `transformers` collects what attention or a module inside a block returns, in this call."""
    recording = sys.modules.get("transformers.utils.output_capturing")
    if recording is None:
        return False
    collector = getattr(recording, "_active_collector", None)
    if collector is None:
        return True  # another version, in which it is not known
    wanted = collector.get() or {}
    return any(key != "hidden_states" and not key.startswith("_") for key in wanted)


def _are_linear(modules: list[Any]) -> bool:
    return all(is_plain(one, nn.Linear) for one in modules)


def _drops(module: Any) -> bool:
    return not is_plain(module, nn.Dropout) or (module.training and module.p > 0.0)


def has_dropout(module: Any) -> bool:
    rates = [one.p if isinstance(one, nn.Dropout) else getattr(one, "attention_dropout", 0.0) for one in module.modules()]
    return any(isinstance(rate, float) and rate > 0.0 for rate in rates)


def _are_positions(positions: Any, size: int) -> bool:
    if not isinstance(positions, tuple) or len(positions) != 2:
        return False
    return all(_is_fp32(one) and one.dim() == 3 and one.shape[-1] == size and not one.requires_grad for one in positions)


_parameters: dict[type, list[str]] = {}


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the class's forward by name."""
    names = _parameters.get(type(module))
    if names is None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        _parameters[type(module)] = names
    return {**dict(zip(names, args, strict=False)), **kwargs}


# The lengths of the last mask: all blocks of a model are given the same one.
_last_mask: tuple[Any, int, bool, Tensor | None] | None = None


def _lengths(attention: Any, mask: Any) -> tuple[bool, Tensor | None]:
    """Whether fused attention supports the mask, and the lengths of the samples if some are padded at their end."""
    global _last_mask
    implementation = getattr(attention.config, "_attn_implementation", None)
    if not getattr(attention.config, "is_causal", True):
        return False, None
    if mask is None:
        return implementation == "sdpa", None
    if implementation not in ("sdpa", "eager") or not isinstance(mask, Tensor):
        return False, None
    causal = bool(attention.is_causal)
    last = _last_mask
    if last is not None and last[0]() is mask and last[1:3] == (mask._version, causal):
        lengths = last[3]
    else:
        lengths = _core.padding_lengths(mask, causal)
        _last_mask = (weakref.ref(mask), mask._version, causal, lengths)
    return lengths is not None, lengths
