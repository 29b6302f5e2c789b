"""The harness asks a contender as it asks any other model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from conftest import TINY_TEXT

from longmem.contenders.contender import ContenderConfig
from longmem.data import Document
from longmem.errors import ConfigError, MissingExtraError
from longmem.model import LongMem

CONFIG = ContenderConfig(window=256, extended=512)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    made = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(made.sidenet, 0.1)
    return made


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_without_the_harness_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "longmem.harness", raising=False)
    with pytest.raises(MissingExtraError, match=r"longmem\[harness\]"):
        import longmem.harness  # noqa: F401


def test_requests(model: LongMem, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from longmem.harness import LongMemLM

    (tmp_path / "notes.txt").write_text(TINY_TEXT)
    lm = LongMemLM(model, [tmp_path / "notes.txt", Document("b", "Ada likes wax.")], config=CONFIG)
    bank = model.new_bank()
    model.write_text(bank, "Ada likes wax.", source="b")
    model.write_text(bank, TINY_TEXT, source="notes")
    ids = model.tokenizer("Ada keeps bees", add_special_tokens=False)["input_ids"]
    begun = len(model.tokenizer("Ada", add_special_tokens=False)["input_ids"])
    logits_TV = model(model.with_prefix(torch.tensor(ids))[None], bank).logits_BTV[0].log_softmax(-1)
    each = [float(logits_TV[place, token]) for place, token in enumerate(ids)]
    ((found, greedy),) = lm.loglikelihood([request("Ada", " keeps bees")])
    assert found == pytest.approx(sum(each[begun:]), abs=1e-3)
    ((whole, _),) = lm.loglikelihood([request("", "Ada keeps bees")])
    assert whole == pytest.approx(sum(each), abs=1e-3)
    assert lm.loglikelihood_rolling([request("Ada keeps bees")]) == [pytest.approx(whole, abs=1e-3)]
    assert lm.loglikelihood_rolling([request(TINY_TEXT * 3)])[0] < 0
    (said,) = lm.generate_until([request("Ada keeps", {"until": ["\n"], "max_gen_toks": 5})])
    assert "\n" not in said
    assert isinstance(greedy, bool)
    with pytest.raises(ConfigError, match="no contender 'longmen'"):
        LongMemLM(model, contender="longmen")


def test_simple_evaluate_takes_it(model: LongMem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from longmem.harness import LongMemLM

    rows = [{"question": f"Who keeps {n} bees?", "choices": ["Ada", "Ben"], "label": n % 2} for n in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bees.yaml").write_text(
        f"task: bees\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/test.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = LongMemLM(model, [Document("bees", TINY_TEXT)], config=CONFIG)
    found = simple_evaluate(model=lm, tasks=["bees"], task_manager=manager, bootstrap_iters=0)
    assert found is not None and 0 <= found["results"]["bees"]["acc,none"] <= 1
    assert len(found["samples"]["bees"]) == 3
