"""Overrides for each start of a run: quantization, adapter mode and reference."""

STARTS = {
    "new": [],
    "nf4": ["quant=nf4"],
    "int8": ["quant=int8"],
    "dora": ["lora.use_dora=true"],
    "pissa": ["lora.init_lora_weights=pissa"],
    "full": ["lora=none"],
    "full, precomputed": ["lora=none", "training.precompute_ref_log_probs=true"],
    "continue": ["model.adapter=SFT"],
    "stack": ["model.adapter=SFT", "model.adapter_mode=stack", "lora=r16"],
    "stack on nf4": ["model.adapter=SFT", "model.adapter_mode=stack", "lora=r16", "quant=nf4"],
    "against the base": ["model.adapter=SFT", "model.reference=base"],
    "against an adapter": ["model.reference=SFT"],
    "against another model": ["model.reference=MODEL"],
    "continue, against another model": ["model.adapter=SFT", "model.reference=MODEL"],
    "full, against an adapter": ["lora=none", "model.reference=SFT"],
    "merge, against an adapter": ["model.adapter=SFT", "model.adapter_mode=merge", "lora=r16", "model.reference=SFT"],
    "pissa, against an adapter": ["lora.init_lora_weights=pissa", "model.reference=SFT"],
}


def name_paths(start: list[str], **paths: str) -> list[str]:
    """Replace the placeholder names in STARTS by paths."""
    return [f"{key}={paths.get(value, value)}" for key, _, value in (text.partition("=") for text in start)]
