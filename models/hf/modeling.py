"""The classes that transformers registers, so that its Auto classes, `generate` and lm-eval run any model of the zoo.

Importing this module registers them. Training through them sees pure cross-entropy: parts' own losses and model memory
belong to the training loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from models.config import model_config
from models.folder import load_tables, save_tables
from models.hf.exchange import loci_config, write_shim
from models.lm import LM, LMState
from models.state import select_rows
from models.types import Batch


class LociConfig(PreTrainedConfig):
    """``model`` is the resolved model section of our config, as plain data."""

    model_type = "loci"

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any) -> None:
        derived = {} if model is None else loci_config(model_config(model))
        derived = {k: v for k, v in derived.items() if k not in ("model", "model_type")}
        merged = {**derived, **kwargs}
        self.use_cache = bool(merged.pop("use_cache", True))  # transformers would drop it as an option of generation
        super().__init__(**merged)
        self.model = model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: the checkpoint's shim imports this module, so no code is ever copied into a checkpoint."""


class LociCache(Cache):
    """The model's state behind transformers' interface.

    Transformers asks for a cache without saying how long it will get, our states have a capacity: when it is used up,
    the tokens so far are replayed into a state of at least twice the room (exact for every part, and rare).
    """

    def __init__(self, max_len: int | None = None) -> None:
        super().__init__(layers=[])
        self.max_len = max_len  # a bound that the caller knows; saves room and replays
        self.capacity = 0
        self.reset()

    def reset(self) -> None:
        self.state: LMState | None = None
        self.tokens: Tensor | None = None  # [B, columns seen], padding included
        self.valid: Tensor | None = None

    def extend(self, lm: LM, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """Continue every sequence by tokens [B, T]. -> final hidden states [B, T, D]."""
        needed = self.get_seq_length() + tokens.shape[1]
        if self.state is None or needed > self.capacity:
            self._grow(lm, tokens, needed)
        hidden, self.state, _ = lm.features(Batch(tokens, valid=valid), self.state, donate=not torch.is_grad_enabled())
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        self.valid = valid if self.valid is None else torch.cat((self.valid, valid), dim=1)
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), dim=1)
        return hidden

    def _grow(self, lm: LM, tokens: Tensor, needed: int) -> None:
        room = needed + max(needed, 1024)
        bounds = (self.max_len, lm.cfg.max_seq_len if lm.cfg.learned_positions else None)
        self.capacity = min([room, *(bound for bound in bounds if bound and bound >= needed)])
        self.state = lm.init_state(tokens.shape[0], self.capacity)
        if self.tokens is not None:
            _, self.state, _ = lm.features(Batch(self.tokens, valid=self.valid), self.state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.tokens is None else self.tokens.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:  # the older name of the same
        return -1

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a recurrent state cannot be taken back; keep a copy of the cache instead")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        held = (self.state, self.tokens, self.valid)
        self.state, self.tokens, self.valid = select_rows(held, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tokens is not None:
            self.reorder_cache(torch.arange(self.tokens.shape[0]).repeat_interleave(repeats))


class LociForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LociConfig
    _is_stateful = True  # no method that takes tokens back, such as assisted decoding

    def __init__(self, config: LociConfig) -> None:
        super().__init__(config)
        self.lm = LM(model_config(config.model or {}))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LociCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids [B, T], attention_mask [B, T or all columns so far] -> logits [B, T or fewer, V].

        ``labels`` [B, T], -100 where none: the mean cross-entropy of predicting each from the tokens before it.
        Positions follow from the mask. With a cache these tokens continue what it holds; it is changed in place.
        """
        self._refuse(kwargs, attention_mask, past_key_values)
        valid = _valid(attention_mask, input_ids.shape[1])
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and labels is None and not self.training
        if use_cache and past_key_values is None:
            past_key_values = LociCache()
        if past_key_values is None:
            hidden, _, _ = self.lm.features(Batch(input_ids, valid=valid))
        else:
            hidden = past_key_values.extend(self.lm, input_ids, valid)
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.lm.logits(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return output.to_tuple() if return_dict is False else output

    def _refuse(self, kwargs: dict[str, Any], attention_mask: Tensor | None, cache: Any) -> None:
        for name in ("inputs_embeds", "position_ids"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} is not supported: parts read token ids, and positions follow the mask")
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is not supported")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be [B, T], got {tuple(attention_mask.shape)}")
        if not isinstance(cache, LociCache | None):
            raise ValueError(f"past_key_values must be a LociCache, got {type(cache).__name__}")

    # -- what transformers asks of a model

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """``input_ids`` may hold the whole sequence or only what is new; the mask, where there is one, is whole."""
        new = next_sequence_length
        if new is None and past_key_values is not None and attention_mask is not None:
            new = attention_mask.shape[1] - past_key_values.get_seq_length()
        return {
            "input_ids": input_ids if new is None else input_ids[:, -new:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": bool(kwargs.get("use_cache")),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A hint of the length saves replays; where transformers no longer calls this, the cache grows by itself."""
        done = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LociCache(getattr(generation_config, "max_length", None))
        return done

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        mine = {id(p) for p in module.parameters(recurse=False)} | {id(b) for b in module.buffers(recurse=False)}
        tensors = [*self.lm.named_parameters(), *self.lm.named_buffers()]
        loaded = {name for name, t in tensors if getattr(t, "_is_hf_initialized", False)}
        missing = [name for name, t in tensors if id(t) in mine and name not in loaded]
        if loaded and missing:
            raise ValueError(f"the checkpoint has no tensor '{missing[0]}'")
        if isinstance(module, LM) and not loaded:
            generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
            module.reset_parameters(generator)

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.lm.embed = value

    def get_output_embeddings(self) -> nn.Module | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.lm.head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the vocabulary is part of the model's config")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """See `LociConfig.register_for_auto_class`."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        save_tables(self.lm, Path(save_directory))
        write_shim(Path(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.lm.tables():  # transformers made them on meta and does not know of them
            device = model.lm.embed.weight.device
            model.lm._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
            load_tables(model.lm, Path(pretrained_model_name_or_path))
        for addressing in model.lm.addressing.values():
            addressing.after_loading()  # pyright: ignore[reportCallIssue]
        return loaded


def _valid(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """The mask of the newest ``length`` columns [B, T]; None when nothing is masked."""
    if attention_mask is None:
        return None
    valid = attention_mask[:, -length:].bool()
    return None if bool(valid.all()) else valid


AutoConfig.register("loci", LociConfig, exist_ok=True)
AutoModelForCausalLM.register(LociConfig, LociForCausalLM, exist_ok=True)
