"""The W&B workspace of a pipeline, with a section for each stage (`cpt-merge dashboard`).

`layout` says what is charted and needs no library; `as_workspace` turns it into W&B's definition
with `wandb-workspaces`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.tracking.config import TrackingConfig
from cpt_merge.tracking.events import STEP, TOKENS

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

INSTALL = "pip install -c constraints.txt -e '.[dashboard]'"


@dataclass(frozen=True)
class Panel:
    """One panel. `keys` are names as the stages log them; a dot leads into a mapping."""

    title: str
    kind: Literal["curves", "chart", "bars", "table", "images"]  # chart: lines not over steps
    keys: list[str]
    unit: str = ""  # of the y axis, or of the bars; of a chart, the x axis
    x: str = STEP  # curves only
    needs: str = ""  # the condition under which the keys are logged; empty: always


@dataclass(frozen=True)
class PanelSection:
    """Panels under a heading."""

    name: str
    panels: list[Panel]
    columns: int = 3
    is_open: bool = False


@dataclass(frozen=True)
class ReplyMetric:
    """A metric of replies: eval/MODEL/LANGUAGE/NAME, in a preview preview/LANGUAGE/NAME."""

    name: str
    title: str
    unit: str
    languages: Sequence[str]


@dataclass(frozen=True)
class Pipeline:
    """What the names of a pipeline's metrics depend on."""

    group: str
    languages: Sequence[str]  # of the text
    metrics: Sequence[ReplyMetric] = ()  # empty: the evaluation generates no replies
    figures: Sequence[str] = ("bits_per_byte",)  # pictures of the evaluation
    models: Sequence[str] = ("base", "chat", "cpt", "merged")
    previewed: Sequence[ReplyMetric] = ()  # empty: no previews during training
    swept: Mapping[str, str] = field(default_factory=dict)  # metric -> title; empty: no sweep


def layout(pipeline: Pipeline) -> list[PanelSection]:
    """Every section, in the order of the stages."""
    return [
        _tokenizer(pipeline.languages),
        _embeddings(),
        _data(),
        _training(pipeline.languages),
        *([_preview(pipeline.previewed)] if pipeline.previewed else []),
        _throughput(),
        _merge(),
        _evaluation(pipeline),
        *([_sweep(pipeline.swept)] if pipeline.swept else []),
    ]


def _tokenizer(languages: Sequence[str]) -> PanelSection:
    fertility = [
        f"tokenizer/{language}/tokens_per_character{when}"
        for language in languages
        for when in ("_before", "")
    ]
    rows = ["tokenizer/base_rows", "tokenizer/new_pieces", "tokenizer/rows"]
    gain, tables = ["tokenizer/gain curve"], ("fertility", "pieces", "examples", "drift", "proofs")
    panels = [
        Panel("Tokens per character, before and after", "bars", fertility, "tokens per character"),
        Panel("Rows of the vocabulary", "bars", rows),
        Panel("What each further piece brings", "chart", gain, "new pieces"),
        Panel("Fertility and gain", "images", ["tokenizer/report"]),
        *(Panel(f"Tokenizer: {name}", "table", [f"tokenizer/{name}"]) for name in tables),
    ]
    return PanelSection("Tokenizer", panels, columns=2)


def _embeddings() -> PanelSection:
    rows = [f"embeddings/{name}" for name in ("old", "new", "chat", "padding")]
    norms = [f"embeddings/embed_norms.{name}" for name in ("old", "new")]
    panels = [
        Panel("Rows by role", "bars", rows),
        Panel("Mean norm of embedding rows, old and new", "bars", norms),
        Panel("Norms", "table", ["embeddings/norms"]),
    ]
    return PanelSection("Embeddings", panels, columns=2)


def _data() -> PanelSection:
    left_out = [f"left_out.{reason}" for reason in ("bad_rows", "empty", "duplicates")]
    counts = ("documents", "heldout_documents", *left_out)
    documents, lengths = [f"data/{name}" for name in counts], ["data/document lengths"]
    panels = [
        Panel("Sources", "table", ["data/sources"]),
        Panel("Documents: kept, held out, left out", "bars", documents, "documents"),
        Panel("What was left out and changed", "table", ["data/preparation"]),
        Panel("Size", "bars", ["data/tokens", "data/bytes"]),
        Panel("Document lengths by source", "chart", lengths, "log2 of tokens"),
    ]
    return PanelSection("Data", panels)


EXPERTS = "a mixture of experts"


def _training(languages: Sequence[str]) -> PanelSection:
    bits = [f"valid/{language}/bits_per_byte" for language in languages]
    loss = [f"valid/{language}/loss" for language in languages]
    rates = ["train/learning_rate", "train/learning_rate_vocabulary"]
    against_base = [
        Panel(
            f"Validation bits per byte, {language}, and of the base with its own tokenizer",
            "curves",
            [f"valid/{language}/bits_per_byte", f"valid/{language}_base/bits_per_byte"],
            "bits per byte",
        )
        for language in languages
    ]
    panels = [
        Panel("Loss", "curves", ["train/loss"], "nats per token"),
        Panel("Validation bits per byte", "curves", bits, "bits per byte"),
        Panel("Gradient norm", "curves", ["train/gradient_norm"]),
        *against_base,
        Panel("Held-out loss", "curves", loss, "nats per token"),
        Panel("Learning rates", "curves", rates),
        Panel("Phase", "curves", ["train/phase"]),
        Panel(
            "Routing entropy",
            "curves",
            ["train/router_entropy"],
            "of its largest value",
            needs=EXPERTS,
        ),
        Panel(
            "Busiest expert", "curves", ["train/busiest_expert"], "share of choices", needs=EXPERTS
        ),
        Panel("Auxiliary loss", "curves", ["train/router_loss"], needs=EXPERTS),
        Panel("Loss by tokens", "curves", ["train/loss"], "nats per token", x=TOKENS),
        Panel("Validation bits per byte by tokens", "curves", bits, "bits per byte", x=TOKENS),
        Panel("Tokens and bytes seen", "curves", [TOKENS, "train/bytes"]),
        Panel("Continuations of held-out text", "table", ["train/continuations"]),
    ]
    return PanelSection("Training", panels, is_open=True)


def _preview(metrics: Sequence[ReplyMetric]) -> PanelSection:
    curves = []
    for one in metrics:
        names = [f"preview/{language}/{one.name}" for language in one.languages]
        curves.append(Panel(one.title, "curves", names, one.unit))
    replies = Panel("Replies", "table", ["preview/replies"])
    seconds = Panel("Time of a preview", "curves", ["preview/seconds"], "s")
    name = "Training: preview of the chat model"
    return PanelSection(name, [*curves, replies, seconds], is_open=True)


def _throughput() -> PanelSection:
    rates = ["train/tokens_per_second", "train/tokens_per_second_per_device"]
    steps = ["train/step_seconds_median", "train/step_seconds_max"]
    stall = ["train/checkpoint_stall_seconds"]
    panels = [
        Panel("Throughput", "curves", rates, "tokens per second"),
        Panel("MFU", "curves", ["train/mfu"], "share of peak", needs="a GPU whose peak is known"),
        Panel("Time of a step: median process and slowest", "curves", steps, "s"),
        Panel("Peak memory", "curves", ["train/peak_memory_gb"], "GB"),
        Panel("Data wait", "curves", ["train/data_wait_share"], "share of the time"),
        Panel("Stalled by checkpoints", "curves", stall, "s"),
    ]
    return PanelSection("Training: throughput", panels, is_open=True)


def _merge() -> PanelSection:
    norms = [f"merge/overall.{name}" for name in ("vector", "change")]
    cosine = [f"merge/overall.{name}" for name in ("cosine", "contained")]
    norms_title = "Norm of the chat vector and of the CPT change"
    panels = [
        Panel("Norms by layer", "chart", ["merge/length by layer"], "layer"),
        Panel("Cosine by layer", "chart", ["merge/cosine by layer"], "layer"),
        Panel("Layers", "table", ["merge/layers"]),
        Panel(norms_title, "bars", norms, "of the base's norm"),
        Panel("Cosine, and share of the vector that CPT contains", "bars", cosine),
        Panel("Ratio", "bars", ["merge/ratio"]),
        Panel("Rules", "table", ["merge/rules"]),
        Panel("Rows by role", "table", ["merge/rows"]),
    ]
    return PanelSection("Merge", panels, columns=2)


def _evaluation(pipeline: Pipeline) -> PanelSection:
    def of(metric: str, *languages: str) -> list[str]:
        models = pipeline.models
        return [f"eval/{model}/{one}/{metric}" for one in languages for model in models]

    rates = [f"eval/{model}/tokens_per_second" for model in pipeline.models]
    more, failed = "a suite with more than form", "a metric that could not be measured"
    replies = [
        *(
            Panel(metric.title, "bars", of(metric.name, *metric.languages), metric.unit)
            for metric in pipeline.metrics
        ),
        Panel("Generation", "bars", rates, "tokens per second"),
        Panel("Sample replies", "table", ["eval/samples"]),
        Panel("Turns, kinds of checks, categories", "table", ["eval/breakdowns"], needs=more),
    ]
    panels = [
        Panel("Figures", "images", [f"eval/{name}" for name in pipeline.figures]),
        *(
            Panel(
                f"Held-out bits per byte, {one}", "bars", of("bits_per_byte", one), "bits per byte"
            )
            for one in pipeline.languages
        ),
        *(replies if pipeline.metrics else []),
        Panel("Scores with their 95 % intervals", "table", ["eval/scores"]),
        Panel("Differences to the baseline", "table", ["eval/differences"]),
        Panel("What the metrics mean", "table", ["eval/metrics"]),
        Panel("What could not be measured", "table", ["eval/not_run"], needs=failed),
    ]
    return PanelSection("Evaluation", panels, is_open=True)


def _sweep(titles: Mapping[str, str]) -> PanelSection:
    ratio, within = ["sweep/recommended_ratio"], "a ratio within the limits"
    panels = [
        *(
            Panel(f"{title} over the ratio", "chart", [f"sweep/{name}"], "ratio")
            for name, title in titles.items()
        ),
        Panel("Recommended ratio", "bars", ratio, needs=within),
        Panel("Metrics of the rule, means over the new languages", "table", ["sweep/ratios"]),
        Panel("Curves with their intervals", "images", ["sweep/curves"]),
        Panel("Every metric of every ratio", "table", ["sweep/points"]),
    ]
    return PanelSection("Ratio sweep", panels, is_open=True)


def dashboard(config: TrackingConfig, pipeline: Pipeline, name: str, dry_run: bool) -> None:
    """Save the workspace under `name`, replacing an earlier one, and print its address.

    With `dry_run`, print it as JSON instead, without key or network. Raises `UserError` if
    `wandb-workspaces` or the key is missing, and for errors of W&B.
    """
    if find_spec("wandb_workspaces") is None:
        raise UserError(f"dashboards need wandb-workspaces, which is not installed; run {INSTALL}")
    if dry_run:
        print(as_json(as_workspace(config.entity or "", config.project, pipeline, name)))
        return
    from cpt_merge.tracking.wandb_compat import find_key, wandb

    if not find_key():
        raise UserError(
            "a dashboard is saved at W&B and there is no API key; run `wandb login` or set "
            "WANDB_API_KEY, or look at it with --dry-run."
        )
    try:
        entity = config.entity or wandb.Api().default_entity
        url = save(as_workspace(entity, config.project, pipeline, name))
    except (wandb.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"W&B did not accept the dashboard of project {config.project} ({reason})."
        ) from error
    say(f"dashboard: {url}")


def as_workspace(entity: str, project: str, pipeline: Pipeline, name: str) -> Workspace:
    """W&B's definition, restricted to the runs of the pipeline's group."""
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws

    sections = [
        ws.Section(
            name=section.name,
            panels=[_as_panel(panel) for panel in section.panels],
            is_open=section.is_open,
            layout_settings=ws.SectionLayoutSettings(columns=section.columns),
            panel_settings=ws.SectionPanelSettings(x_axis=STEP),
        )
        for section in layout(pipeline)
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(filters=[expr.Metric("Group") == pipeline.group]),
    )


def _as_panel(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2 as wr

    title, keys = panel.title, list(panel.keys)
    match panel.kind:
        case "curves":
            return wr.LinePlot(title=title, x=panel.x, y=keys, title_y=panel.unit or None)
        case "bars":
            return wr.BarPlot(title=title, metrics=keys, title_x=panel.unit or None)
        case "chart":  # made by wandb.plot.line_series
            fields = dict.fromkeys(("id", "name", "_defaultColorIndex"))
            return wr.CustomChart(
                query={**fields, "summaryTable": {"tableKey": f"{keys[0]}_table"}},
                chart_name="wandb/lineseries/v0",
                chart_fields={name: name for name in ("step", "lineKey", "lineVal")},
                chart_strings={"title": title, "xname": panel.unit},
            )
        case "images":
            return wr.MediaBrowser(title=title, media_keys=keys)
        case "table":
            return wr.WeavePanelSummaryTable(table_name=keys[0])


def as_json(workspace: Workspace) -> str:
    """What is sent to W&B."""
    view = workspace._to_model()
    spec = view.spec.model_dump_json(by_alias=True, exclude_none=True)
    names = {"entity": view.entity, "project": view.project, "name": view.display_name}
    return json.dumps({**names, "spec": json.loads(spec)}, indent=2, ensure_ascii=False)


def save(workspace: Workspace) -> str:
    """Save at W&B, replacing one that was saved under the same name. Returns its address."""
    from wandb_workspaces.workspaces import internal

    # the library draws a random name, so that every call would leave one more view
    names = f"{workspace.entity}/{workspace.project}/{workspace.name}"
    digest = sha256(names.encode()).hexdigest()[:11]
    workspace._internal_name = internal._url_query_str_to_internal_name(digest)
    try:
        earlier = type(workspace).from_url(workspace.url)
    except ValueError:  # there is none
        pass
    else:
        workspace._internal_id = earlier._internal_id
    workspace.save()
    return str(workspace.url)
