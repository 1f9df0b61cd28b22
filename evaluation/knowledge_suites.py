"""Suites of lm-eval's tasks by name, with the few-shot examples that others use.

Names are those of the pinned lm-eval: `tests/evaluation/test_knowledge_suites.py` compares them
with its index.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LmEvalTask:
    """A task, group or tag of lm-eval. `few_shot` None: the task's own number of examples."""

    name: str
    language: str
    few_shot: int | None = None


def _suite(language: str, **few_shot: int | None) -> tuple[LmEvalTask, ...]:
    named = {name.replace("__", "-"): count for name, count in few_shot.items()}
    return tuple(LmEvalTask(name, language, count) for name, count in named.items())


KNOWLEDGE_SUITES: dict[str, tuple[LmEvalTask, ...]] = {
    "knowledge-zh_tw": _suite(
        "zh_tw", tmmluplus=5, tmlu=5, belebele_zho_Hant=0, global_piqa_parallel_cloze_cmn_hant=0
    ),
    "knowledge-zh_cn": _suite(
        "zh_cn", ceval__valid=5, cmmlu=5, include_base_44_chinese=5, global_mmlu_zh=5,
        mmlu_prox_lite_zh=5, belebele_zho_Hans=0,
    ),
    "language-zh": _suite(
        "zh_cn", zhoblimp=0, xcopa_zh=0, xstorycloze_zh=0, xwinograd_zh=0, xnli_zh=0, paws_zh=0,
        truthfulqa_zh_mc2=0,
    ),
    "knowledge-ko": _suite(
        "ko", kmmlu=5, haerae=5, kobest=5, click=0, include_base_44_korean=5, global_mmlu_ko=5,
        mmlu_prox_lite_ko=5, belebele_kor_Hang=0,
    ),
    "hard-ko": _suite("ko", kmmlu_direct=5, kmmlu_hard=5),
    "domain-ko": _suite("ko", kormedmcqa=5, kbl=0, hrm8k=0, paws_ko=0),
    "knowledge-ja": _suite(
        "ja", include_base_44_japanese=5, global_mmlu_ja=5, mmlu_prox_lite_ja=5,
        belebele_jpn_Jpan=0,
    ),
    "knowledge-en": _suite(
        "en", mmlu=5, hellaswag=10, arc_challenge=25, winogrande=5, gsm8k=5, truthfulqa_mc2=0
    ),
}  # fmt: skip

# their data sets are scripts, which datasets 4 and later do not run
LEFT_OUT = ("csatqa", "mgsm_direct_zh", "mgsm_en_cot_zh", "mgsm_native_cot_zh")
