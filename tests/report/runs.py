"""Runs as their stages leave them on disk, and the page that the report makes of them."""

import math
import time
from dataclasses import asdict
from html.parser import HTMLParser

from cpt_merge.core.artifact import StageRecord, write_json, write_record
from cpt_merge.report.page import OWN_PLACE
from cpt_merge.report.view import title_of
from cpt_merge.tracking import TrackingConfig, read_log, start_tracker

LOCAL = TrackingConfig(mode="disabled")
TRAINING = {"tokens": 6400, "sequence_length": 16, "global_batch_size": 4}  # 100 steps
SCORES = ["model", "language", "metric", "value", "low", "high", "n"]


def start(run, stage):
    sources = [{"language": "ko"}, {"language": "zh_tw"}]
    recipe = {
        "name": "demo",
        "models": {"base": "b&b", "chat": "c"},
        "corpus": {"sources": sources},
        "training": TRAINING,
    }
    settings = {"recipe": recipe, "origin": {"commit": "abc1234", "command": "cpt-merge run"}}
    return start_tracker(
        LOCAL, stage, f"demo-{stage}", "demo-abc", run / stage / "log", settings, f"id-{stage}"
    )


def finish(run, stage, results):
    write_record(
        run / stage, StageRecord(stage, "0" * 16, {}, {}, results=results), time.time() - 75
    )


def train(run, steps=60, every=2):
    """The log of a training whose step 30 was not finite."""
    training = start(run, "training")
    for step in range(0, steps, every):
        loss = math.nan if step == 30 else 9 - step / 10
        metrics = {"train/loss": loss, "train/learning_rate": 1e-4, "train/tokens": step * 64.0}
        training.log(
            {**metrics, "train/tokens_per_second": 640.0, "train/oddity": float(step)}, step=step
        )
    bits = {
        "valid/ko/bits_per_byte": 2.5,
        "valid/ko_base/bits_per_byte": 18.5,
        "valid/zh_tw/bits_per_byte": 3.5,
    }
    for step in (0, steps - 1):
        training.log({**bits, "train/tokens": step * 64.0}, step=step)
    return training


def record(run, stage, key, inputs, finished="2026-11-27T10:00:00+00:00"):
    write_json(
        run / stage / "stage.json", asdict(StageRecord(stage, key, {}, inputs, 1.0, finished))
    )


class Page(HTMLParser):
    """Tags, their attributes and the text of a page."""

    def __init__(self, run):
        super().__init__()
        self.source = (run / "report.html").read_text(encoding="utf-8")
        self.tags, self.pieces = [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.pieces.append(data)

    @property
    def text(self):
        return " ".join(self.pieces)

    @property
    def words(self):
        return " ".join(self.text.split())

    def chart(self, label):
        """The SVG of that label."""
        return next(
            part for part in self.source.split("<svg")[1:] if f'aria-label="{label}"' in part
        ).split("</svg>")[0]


def assert_everything_is_shown(run, stages):
    page = Page(run)
    for stage in stages:
        log = read_log(run / stage / "log")
        names = (
            {name for row in log.rows for name in row if name != "time"}
            | set(log.tables)
            | set(log.images)
        )
        names |= {name.partition("/")[2] for name in log.summary}
        names -= {"eval/samples", "train/continuations"}  # shown by prompt
        scores = {
            f"{m}/{language}/{f}"
            for m, language, f, *_ in (
                log.tables["eval/scores"].rows if stage == "evaluation" else []
            )
        }
        for name in names:
            shown = title_of(name) if name in log.tables and name not in OWN_PLACE else name
            assert shown in page.text or name.removeprefix("eval/") in scores, name
        for table in log.tables.values():
            words = {
                " ".join(cell.split())
                for row in table.rows
                for cell in row
                if isinstance(cell, str)
            }
            assert all(word in page.words for word in words)
        for said in (
            log.run["run_id"],
            *log.files,
            *(one.digest for one in log.artifacts),
            *(one["text"] for one in log.alerts),
        ):
            assert said in page.text
    return page
