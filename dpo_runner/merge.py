"""An SFT adapter merged into the unquantized base, once, and kept in the cache.

Merging into a quantized base would round the merged weights, and move policy and reference with them.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from dpo_runner.artifacts import cache_dir
from dpo_runner.cached_folder import write_folder_once
from dpo_runner.locations import explain_missing
from dpo_runner.model_config import ModelConf


def load_merged_path(conf: ModelConf, base: str, adapter: str, load_base: Callable[[], PreTrainedModel]) -> Path:
    """Return the folder of the base with the adapter merged into it, made on first use.

    Args:
        conf: the `model` group.
        base: the base's folder or hub id.
        adapter: the adapter's folder.
        load_base: loads the unquantized base, its embeddings of the adapter's size.
    """
    digest = hashlib.sha256(repr((base, conf.revision, conf.dtype)).encode())
    sources = [*Path(adapter).glob("adapter_*"), *(Path(base).glob("*") if Path(base).is_dir() else ())]
    for path in sorted(path for path in sources if path.is_file()):
        stat = path.stat()
        digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
        if path.name.startswith("adapter_"):
            digest.update(path.read_bytes())
    folder = cache_dir() / f"merged-{digest.hexdigest()[:16]}"
    if not folder.exists():
        with torch.random.fork_rng():  # PEFT draws weights before it loads them, on the first use only
            beneath = load_base()
            with explain_missing(str(conf.adapter), "model.adapter"):
                model = PeftModel.from_pretrained(beneath, adapter)
            model = model.merge_and_unload()
        revision = conf.revision if base == conf.model_name_or_path else None
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=conf.trust_remote_code)

        def fill(staging: Path) -> None:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)

        write_folder_once(folder, fill)
    return folder
