"""What to cite for a run: the methods that its configuration uses."""

from dpo_runner.config import RunConf

_DPO = """Rafael Rafailov, Archit Sharma, Eric Mitchell, Christopher D. Manning, Stefano Ermon, Chelsea Finn: *Direct
  Preference Optimization: Your Language Model is Secretly a Reward Model*. NeurIPS 2023. arXiv:2305.18290"""
_TRL = """Leandro von Werra et al.: *TRL: Transformers Reinforcement Learning*. 2020.
  https://github.com/huggingface/trl"""
_LORA = """Edward J. Hu et al.: *LoRA: Low-Rank Adaptation of Large Language Models*. ICLR 2022. arXiv:2106.09685"""
_DORA = """Shih-Yang Liu et al.: *DoRA: Weight-Decomposed Low-Rank Adaptation*. ICML 2024. arXiv:2402.09353"""
_QLORA = """Tim Dettmers et al.: *QLoRA: Efficient Finetuning of Quantized LLMs*. NeurIPS 2023. arXiv:2305.14314"""
_APO = """Karel D'Oosterlinck et al.: *Anchored Preference Optimization and Contrastive Revisions*. arXiv:2408.06266"""
_AOT = """Igor Melnyk et al.: *Distributional Preference Alignment of LLMs via Optimal Transport*. arXiv:2406.05882"""
_LOSSES = {
    "hinge": "Yao Zhao et al.: *SLiC-HF: Sequence Likelihood Calibration with Human Feedback*. arXiv:2305.10425",
    "ipo": """Mohammad Gheshlaghi Azar et al.: *A General Theoretical Paradigm to Understand Learning from Human
  Preferences*. AISTATS 2024. arXiv:2310.12036""",
    "exo_pair": "Haozhe Ji et al.: *Towards Efficient Exact Optimization of Language Model Alignment*. "
    "arXiv:2402.00856",
    "nca_pair": "Huayu Chen et al.: *Noise Contrastive Alignment of Language Models with Explicit Rewards*. "
    "arXiv:2402.05369",
    "robust": "Sayak Ray Chowdhury et al.: *Provably Robust DPO: Aligning Language Models with Noisy Feedback*. "
    "arXiv:2403.00409",
    "bco_pair": "Seungjae Jung et al.: *Binary Classifier Optimization for Large Language Model Alignment*. "
    "arXiv:2404.04656",
    "sppo_hard": "Yue Wu et al.: *Self-Play Preference Optimization for Language Model Alignment*. arXiv:2405.00675",
    "aot": _AOT,
    "aot_unpaired": _AOT,
    "apo_zero": _APO,
    "apo_down": _APO,
    "discopop": """Chris Lu et al.: *Discovering Preference Optimization Algorithms with and for Large Language
  Models*. arXiv:2406.08414""",
}
"""By `training.loss_type`; the others are DPO's own, or have no paper."""


def list_citations(conf: RunConf) -> list[str]:
    """Return what a run's methods are to be cited by, one entry each."""
    losses = conf.training.loss_type
    named = [losses] if isinstance(losses, str) else losses
    cited = [_DPO, *(_LOSSES[loss] for loss in named if loss in _LOSSES), _TRL]
    if conf.model.adapter is not None or (conf.lora is not None and conf.lora.peft_type == "LORA"):
        cited.append(_LORA)
    if conf.lora is not None and conf.lora.use_dora:
        cited.append(_DORA)
    if conf.quant is not None and conf.quant.load_in_4bit:
        cited.append(_QLORA)
    return list(dict.fromkeys(cited))
