"""Composition: all that a composed model is whatever its anchor: its parts, connections and hooks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel

from calm_fast.core.checks import bad_value
from calm_fast.core.compatibility import require
from calm_fast.hf.aligned_text import Aligner
from calm_fast.hf.cache import ComposedCache, Identity
from calm_fast.hf.config import ComposedConfig
from calm_fast.hf.encoders import Encoder, describe_encoder, encoder_from_config, encoder_signature
from calm_fast.hf.hooks import Checkpoint, Frame, install
from calm_fast.hf.inputs import WHERE, AugmenterCall, Signature, Tokens, check_vocabulary
from calm_fast.hf.introspection import CompositionIntrospection
from calm_fast.hf.layers import device_of, find_layers, headless_path, hidden_size, submodule, truncated_view
from calm_fast.hf.quantised import keep_4bit_layout
from calm_fast.hf.reading import read_augmenters
from calm_fast.hf.saving import CompositionFiles
from calm_fast.hf.training import CompositionTraining
from calm_fast.modules.cross_attention import CrossAttention


class Composition(CompositionIntrospection, CompositionFiles, CompositionTraining):
    """A frozen anchor with frozen augmenters, and the connections between them; its subclasses run it.

    where: the name of the subclass, in errors. encoder_decoder: True if the anchor is one. encoders: how each
    bidirectional augmenter is called, None for the others. aligned: True if the model makes an augmenter's text, for
    another tokenizer or a bidirectional augmenter.
    """

    anchor: PreTrainedModel
    augmenters: nn.ModuleList
    where: ClassVar[str] = WHERE
    encoder_decoder: ClassVar[bool] = False
    encoders: list[Encoder | None]
    aligned: bool
    _aligners: list[Aligner | None]
    frozen_parts: list[str] | None = None  # of a `frozen_copy`: the names of its parts' parameters
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: ComposedConfig,
        anchor: PreTrainedModel | None = None,
        augmenters: list[PreTrainedModel] | None = None,
    ) -> None:
        require("transformers", GenerationMixin, "_prepare_cache_for_generation", "_validate_model_kwargs")
        require("transformers", GenerationMixin, "_expand_inputs_for_generation")
        require("transformers", PreTrainedModel, "_set_gradient_checkpointing", "enable_input_require_grads")
        require("transformers", PreTrainedModel, "_is_stateful")
        require("torch", nn.Module, "_replicate_for_data_parallel")
        super().__init__(config)
        if anchor is None:
            kind = AutoModelForSeq2SeqLM if self.encoder_decoder else AutoModelForCausalLM
            anchor = cast(PreTrainedModel, kind.from_config(config.anchor_config))
        if augmenters is None:
            subs = zip(config.augmenter_configs, config.bidirectional, strict=True)
            augmenters = [
                AutoModelForCausalLM.from_config(sub) if mode is None else encoder_from_config(sub)
                for sub, mode in subs
            ]
        self.unproven = False  # True if a part could not be tried at compose time
        self.separates = False  # True once all parts have shown that they separate the documents of a packed row
        self.mixing = ""  # the error for packed rows once a part has shown that it does not
        self.pairs = [(i, a, b) for i, pairs in enumerate(config.connections) for a, b in pairs]
        self.depths = [max(1, 1 + max(a for a, _ in pairs)) for pairs in config.connections]

        config.anchor_layers, anchor_layers = find_layers(
            anchor, config.anchor_layers, where=self.where, argument="anchor_layers"
        )
        named = zip(augmenters, config.augmenter_layers, strict=True)
        found = [find_layers(model, path, where=self.where, argument="augmenter_layers") for model, path in named]
        config.augmenter_layers = [path for path, _ in found]
        for argument, model in (("anchor", anchor), *(("augmenters", model) for model in augmenters)):
            keep_4bit_layout(self.where, argument, model)
            model.requires_grad_(False).eval()
        self.anchor = anchor
        views = [
            truncated_view(model, path, depth)
            for model, (path, _), depth in zip(augmenters, found, self.depths, strict=True)
        ]
        self.augmenters = nn.ModuleList(views)
        self.tokenizers = [None] * (1 + len(views))
        self.headless = [headless_path(view, path) for view, (path, _) in zip(views, found, strict=True)]
        called = [submodule(view, names) for view, names in zip(views, self.headless, strict=True)]
        self.encoders = [
            None if mode is None else describe_encoder(view, inner, mode)
            for view, inner, mode in zip(views, called, config.bidirectional, strict=True)
        ]
        self.aligners = [None] * len(views)
        self.signatures = [
            Signature.of(anchor, where=self.where, argument="anchor", encoder_decoder=self.encoder_decoder),
            *(
                encoder_signature(augmenter)
                if encoder is not None
                else Signature.of(augmenter, inner, where=self.where, argument="augmenters")
                for augmenter, inner, encoder in zip(augmenters, called, self.encoders, strict=True)
            ),
        ]
        self.connections = nn.ModuleList(self._connection(i, anchor_layers[max(b, 0)]) for i, _, b in self.pairs)
        self.first_of = [next(c for c, p in enumerate(self.pairs) if p[0] == i) for i in range(len(self.augmenters))]
        self.by_layer = {b: [c for c, pair in enumerate(self.pairs) if pair[2] == b] for _, _, b in self.pairs}
        self.identity = Identity()
        self.checkpoints: dict[nn.Module, Checkpoint] = {}
        self.hooks = install(self.pairs, anchor_layers, [layers for _, layers in found])

        self._describe_parts(anchor, augmenters)
        self.generation_config = copy.deepcopy(getattr(anchor, "generation_config", self.generation_config))
        # set on the composition's own config only: the parts keep their attention implementation
        config._attn_implementation_internal = anchor.config._attn_implementation
        self.post_init()
        own, kept = {f"connections.{name}" for name in self.connections.state_dict()}, self.state_dict()
        self._keys_to_ignore_on_save = {name for name in kept if name not in own}
        self.all_tied_weights_keys = {name: to for name, to in self.all_tied_weights_keys.items() if name in kept}

    @property
    def aligners(self) -> list[Aligner | None]:
        """The StreamAligner of each augmenter with another tokenizer than the anchor's; None for the others.

        Set the whole list. A setter raises ValueError for a list of another length.
        """
        return list(self._aligners)

    @aligners.setter
    def aligners(self, aligners: Sequence[Aligner | None]) -> None:
        if len(aligners) != len(self.augmenters):
            expected = f"a list with a StreamAligner or None for each of {len(self.augmenters)} augmenters"
            raise bad_value(self.where, "aligners", expected, f"{len(aligners)} entries")
        self._aligners = list(aligners)
        self.aligned = any(one is not None for one in (*aligners, *self.encoders))

    def _augmenter(self, index: int) -> PreTrainedModel:
        return cast(PreTrainedModel, self.augmenters[index])

    def _connection(self, augmenter: int, anchor_layer: nn.Module) -> CrossAttention:
        widths = hidden_size(self.anchor), hidden_size(self._augmenter(augmenter))
        module = CrossAttention(*widths, **self.config.cross_attention)
        dtype = getattr(torch, self.config.composition_dtype)
        places = ((anchor_layer, self.anchor), *((part, part) for part in self.augmenters))
        devices = (device_of(module, model) for module, model in places)
        device = next((device for device in devices if device.type != "meta"), torch.device("meta"))
        return module.to(device=device, dtype=dtype)

    def init_weights(self) -> None:
        """Do nothing: the parts come initialised, and CrossAttention initialises itself."""

    initialize_weights = init_weights

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the parts come tied, and an augmenter's view has no LM head. Trainer calls this on resuming."""

    def get_input_embeddings(self) -> nn.Module:
        return self.anchor.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return cast("nn.Module | None", self.anchor.get_output_embeddings())

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Refuse: replicas would share the layers' hooks, the folded weights and the parts' devices."""
        raise ValueError(
            "DataParallel: a composition cannot be replicated over the GPUs of one process; start one process per GPU "
            "(torchrun, accelerate launch), or make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the parts embed the tokens."""
        raise ValueError(
            "resize_token_embeddings: a composition cannot be resized, because its parts embed the tokens and are "
            "shared with the caller; resize the anchor and the augmenters, then compose them"
        )

    def names_of_parts(self) -> list[str]:
        """Return the names of the parameters of all parts. Raises ValueError for one that trains."""
        names = []
        for part in (self.anchor, *self.augmenters):
            for name, parameter in part.named_parameters():
                if parameter.requires_grad:
                    got = f"{name} of {type(part).__name__}, which trains. Take copy.deepcopy(model) as reference"
                    raise bad_value(
                        "frozen_copy", "model", "one whose parts never change, because they are shared", got
                    )
                names.append(name)
        return names

    def _check_callable(self, kwargs: dict[str, Any]) -> None:
        """Refuse what no composition can do: to be traced, and to read embeddings. Drops an empty inputs_embeds.

        Of a frozen copy also parts that train or have adapters since it was made; in training, offloaded connections.
        """
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.check_connections_stay(self.where)
        if self.frozen_parts is not None and self.names_of_parts() != self.frozen_parts:
            expected = "one whose parts never change, because they are shared"
            got = "parts with other parameters than when it was copied, as adapters make them. "
            do = "Take copy.deepcopy(model), or no ref_model: TRL switches adapters off for it"
            raise bad_value("frozen_copy", "model", expected, got + do)
        if torch.jit.is_tracing():  # type: ignore[attr-defined]  # public, but not re-exported
            raise ValueError(
                f"torch.jit.trace: a {self.where} cannot be traced, because the trace would keep which tokens the "
                "example's masks hide; use torch.export or torch.compile"
            )
        if kwargs.pop("inputs_embeds", None) is not None:
            got = "a value. Pass `input_ids`: every part embeds the tokens itself"
            raise bad_value(self.where, "inputs_embeds", "None", got)

    def _check_vocabularies(self, calls: list[AugmenterCall], inputs: Tokens, anchor: bool = True) -> None:
        """Raise ValueError unless every part embeds the token ids that it gets.

        anchor: also check the ids that the anchor reads.
        """
        shared = [self.anchor]
        for index, call in enumerate(calls):
            if call.reading is not None and call.reading.own:
                check_vocabulary("augmenter_input_ids", call.reading.ids, [self._augmenter(index)])
            elif call.inputs is inputs:
                shared.append(self._augmenter(index))
            else:
                check_vocabulary("augmenter_input_ids", call.inputs["input_ids"], [self._augmenter(index)])
        if anchor:
            check_vocabulary("input_ids", inputs["input_ids"], shared)

    def _read_augmenters(
        self,
        frame: Frame,
        calls: list[AugmenterCall],
        cache: ComposedCache | None,
        past: int,
        shared: dict[str, Any],
        given: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Run every augmenter up to its last connected layer; the hooks leave its states in the frame.

        given: see `read_augmenters`.
        """
        read_augmenters(self, frame, calls, cache, past, shared, given)
