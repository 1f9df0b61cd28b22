"""The W&B workspace of a pipeline: a section per stage, made without clicking (`cpt-merge dashboard`).

`layout` says what is charted and needs nothing; `as_workspace` makes W&B's definition of it, with `wandb-workspaces`.
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
from cpt_merge.tracking.events import STEP

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

TOKENS = "train/tokens"
INSTALL = "pip install -c constraints.txt -e '.[dashboard]'"


@dataclass(frozen=True)
class Panel:
    """One panel. `keys` are names as the stages log them; a dot leads into a value that is a mapping."""

    title: str
    kind: Literal["curves", "chart", "bars", "table", "images"]  # chart: lines that are not by step
    keys: list[str]
    unit: str = ""  # of the y axis, or of the bars; of a chart, what its x axis is
    x: str = STEP  # curves only
    needs: str = ""  # what has to be so for the keys to be logged; empty: every run logs them


@dataclass(frozen=True)
class Section:
    """Panels side by side under a heading."""

    name: str
    panels: list[Panel]
    columns: int = 3
    is_open: bool = False


@dataclass(frozen=True)
class ReplyMetric:
    """A metric of replies; the evaluation logs eval/MODEL/LANGUAGE/NAME, a preview preview/LANGUAGE/NAME."""

    name: str
    title: str
    unit: str
    languages: Sequence[str]


@dataclass(frozen=True)
class Pipeline:
    """What the names of a pipeline's metrics depend on."""

    group: str
    languages: Sequence[str]  # of the text
    metrics: Sequence[ReplyMetric] = ()  # none: the evaluation generates no replies
    figures: Sequence[str] = ("bits_per_byte",)  # of the evaluation
    models: Sequence[str] = ("base", "chat", "cpt", "merged")
    previewed: Sequence[ReplyMetric] = ()  # none: the recipe asks for no preview while it trains
    swept: Mapping[str, str] = field(
        default_factory=dict
    )  # metrics over the ratio -> titles; none: there is no sweep


def layout(pipeline: Pipeline) -> list[Section]:
    """Every section, in the order of the stages."""
    return [
        _tokenizer(pipeline.languages),
        _embeddings(),
        _data(),
        _training(pipeline.languages),
        *([_preview(pipeline.previewed)] if pipeline.previewed else []),
        _machine(),
        _merge(),
        _evaluation(pipeline),
        *([_sweep(pipeline.swept)] if pipeline.swept else []),
    ]


def _tokenizer(languages: Sequence[str]) -> Section:
    fertility = [f"tokenizer/{language}/tokens_per_character" for language in languages]
    before_and_after = [name for after in fertility for name in (f"{after}_before", after)]
    return Section(
        "Tokenizer",
        [
            Panel(
                "Tokens per character, before and after",
                "bars",
                before_and_after,
                "tokens per character",
            ),
            Panel(
                "Rows of the vocabulary",
                "bars",
                ["tokenizer/base_rows", "tokenizer/new_pieces", "tokenizer/rows"],
            ),
            Panel(
                "What each further piece brings", "chart", ["tokenizer/gain curve"], "new pieces"
            ),
            Panel("Fertility and gain", "images", ["tokenizer/report"]),
            *(
                Panel(f"Tokenizer: {name}", "table", [f"tokenizer/{name}"])
                for name in ("fertility", "pieces", "examples", "drift", "proofs")
            ),
        ],
        columns=2,
    )


def _embeddings() -> Section:
    rows = [f"embeddings/{name}" for name in ("old", "new", "chat", "padding")]
    norms = [f"embeddings/embed_norms.{name}" for name in ("old", "new")]
    return Section(
        "Embeddings",
        [
            Panel("Rows by what they are", "bars", rows),
            Panel("Mean norm of embedding rows, old and new", "bars", norms),
            Panel("Norms", "table", ["embeddings/norms"]),
        ],
        columns=2,
    )


def _data() -> Section:
    documents = [
        f"data/{name}"
        for name in ("documents", "heldout_documents", "empty_documents", "duplicates")
    ]
    return Section(
        "Data",
        [
            Panel("Sources", "table", ["data/sources"]),
            Panel("Documents: kept, held out, left out", "bars", documents, "documents"),
            Panel("Size", "bars", ["data/tokens", "data/bytes"]),
            Panel(
                "Document lengths by source", "chart", ["data/document lengths"], "log2 of tokens"
            ),
        ],
        columns=3,
    )


def _training(languages: Sequence[str]) -> Section:
    bits = [f"valid/{language}/bits_per_byte" for language in languages]
    return Section(
        "Training",
        [
            Panel("Loss", "curves", ["train/loss"], "nats per token"),
            Panel("Held-out bits per byte", "curves", bits, "bits per byte"),
            Panel("Gradient norm", "curves", ["train/gradient_norm"]),
            *(
                Panel(
                    f"Held-out bits per byte, {language}, beside the base with its own tokenizer", "curves",
                    [f"valid/{language}/bits_per_byte", f"valid/{language}_base/bits_per_byte"], "bits per byte",
                )
                for language in languages
            ),
            Panel("Held-out loss", "curves", [f"valid/{one}/loss" for one in languages], "nats per token"),
            Panel("Learning rates", "curves", ["train/learning_rate", "train/learning_rate_vocabulary"]),
            Panel("Phase", "curves", ["train/phase"]),
            Panel("Loss by tokens", "curves", ["train/loss"], "nats per token", x=TOKENS),
            Panel("Held-out bits per byte by tokens", "curves", bits, "bits per byte", x=TOKENS),
            Panel("Tokens and bytes seen", "curves", [TOKENS, "train/bytes"]),
            Panel("Continuations of held-out text", "table", ["train/continuations"]),
        ],
        is_open=True,
    )  # fmt: skip


def _preview(metrics: Sequence[ReplyMetric]) -> Section:
    return Section(
        "Training: preview of the chat model",
        [
            *(
                Panel(
                    one.title,
                    "curves",
                    [f"preview/{language}/{one.name}" for language in one.languages],
                    one.unit,
                )
                for one in metrics
            ),
            Panel("Replies", "table", ["preview/replies"]),
            Panel("Time of a preview", "curves", ["preview/seconds"], "s"),
        ],
        is_open=True,
    )


def _machine() -> Section:
    rates = ["train/tokens_per_second", "train/tokens_per_second_per_device"]
    steps = ["train/step_seconds_median", "train/step_seconds_max"]
    return Section(
        "Training: throughput",
        [
            Panel("Throughput", "curves", rates, "tokens per second"),
            Panel(
                "MFU", "curves", ["train/mfu"], "share of peak", needs="a GPU whose peak is known"
            ),
            Panel("Time of a step: median process and slowest", "curves", steps, "s"),
            Panel("Peak memory", "curves", ["train/peak_memory_gb"], "GB"),
            Panel("Data wait", "curves", ["train/data_wait_share"], "share of the time"),
            Panel("Stalled by checkpoints", "curves", ["train/checkpoint_stall_seconds"], "s"),
        ],
        is_open=True,
    )


def _merge() -> Section:
    overall = [f"merge/overall.{name}" for name in ("vector", "change")]
    return Section(
        "Merge",
        [
            Panel("Norms by layer", "chart", ["merge/length by layer"], "layer"),
            Panel("Cosine by layer", "chart", ["merge/cosine by layer"], "layer"),
            Panel("Norms and cosine, and what lies outside the layers", "images", ["merge/norms"]),
            Panel("Layers", "table", ["merge/layers"]),
            Panel("Norm of the chat vector and of the CPT change", "bars", overall, "of the base's norm"),
            Panel("Cosine, and share of the vector that CPT contains", "bars",
                  ["merge/overall.cosine", "merge/overall.contained"]),
            Panel("Ratio", "bars", ["merge/ratio"]),
            Panel("Rules", "table", ["merge/rules"]),
            Panel("Rows by role", "table", ["merge/rows"]),
        ],
        columns=2,
    )  # fmt: skip


def _evaluation(pipeline: Pipeline) -> Section:
    def of(language: str, metric: str) -> list[str]:
        return [f"eval/{model}/{language}/{metric}" for model in pipeline.models]

    replies = [
        *(
            Panel(
                metric.title,
                "bars",
                [name for one in metric.languages for name in of(one, metric.name)],
                metric.unit,
            )
            for metric in pipeline.metrics
        ),
        Panel(
            "Generation",
            "bars",
            [f"eval/{one}/tokens_per_second" for one in pipeline.models],
            "tokens per second",
        ),
        Panel("Sample replies", "table", ["eval/samples"]),
        Panel(
            "Turns, kinds of checks, categories",
            "table",
            ["eval/breakdowns"],
            needs="a suite with more than form",
        ),
    ]
    return Section(
        "Evaluation",
        [
            Panel("Figures", "images", [f"eval/{name}" for name in pipeline.figures]),
            *(
                Panel(f"Bits per byte, {one}", "bars", of(one, "bits_per_byte"), "bits per byte")
                for one in pipeline.languages
            ),
            *(replies if pipeline.metrics else []),
            Panel("Scores with their 95 % intervals", "table", ["eval/scores"]),
            Panel("Differences to the baseline", "table", ["eval/differences"]),
            Panel("What the metrics mean", "table", ["eval/metrics"]),
            Panel(
                "What could not be had",
                "table",
                ["eval/not_run"],
                needs="something that could not be had",
            ),
        ],
        is_open=True,
    )


def _sweep(titles: Mapping[str, str]) -> Section:
    return Section(
        "Ratio sweep",
        [
            *(
                Panel(f"{title} over the ratio", "chart", [f"sweep/{name}"], "ratio")
                for name, title in titles.items()
            ),
            Panel(
                "Ratio that is recommended",
                "bars",
                ["sweep/recommended_ratio"],
                needs="one that keeps the limits",
            ),
            Panel("Metrics of the rule, means over the new languages", "table", ["sweep/ratios"]),
            Panel("Curves with their intervals", "images", ["sweep/curves"]),
            Panel("Every metric of every ratio", "table", ["sweep/points"]),
        ],
        is_open=True,
    )


def dashboard(config: TrackingConfig, pipeline: Pipeline, name: str, dry_run: bool) -> None:
    """Save the workspace under `name`, in place of an earlier one of that name, and say where it is.

    With `dry_run` it is printed as JSON instead, and neither a key nor a network is needed. Raises `UserError`
    without `wandb-workspaces`, without a key, and for what W&B answers.
    """
    if find_spec("wandb_workspaces") is None:
        raise UserError(
            f"a dashboard is made with wandb-workspaces, which is not installed; run {INSTALL}"
        )
    if dry_run:
        print(as_json(as_workspace(config.entity or "", config.project, pipeline, name)))
        return
    import wandb

    from cpt_merge.tracking.wandb_compat import find_key

    if not find_key():
        raise UserError(
            "a dashboard is saved at W&B and there is no API key; run `wandb login` or set WANDB_API_KEY, "
            "or look at it with --dry-run."
        )
    try:
        api = wandb.Api()
        url = save(
            as_workspace(config.entity or api.default_entity, config.project, pipeline, name)
        )
    except (wandb.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"W&B did not take the dashboard of project {config.project} ({reason})."
        ) from error
    say(f"dashboard: {url}")


def as_workspace(entity: str, project: str, pipeline: Pipeline, name: str) -> Workspace:
    """The definition, with the runs of the pipeline's group alone."""
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws

    sections = [
        ws.Section(
            name=section.name, panels=[_as_panel(panel) for panel in section.panels], is_open=section.is_open,
            layout_settings=ws.SectionLayoutSettings(columns=section.columns),
            panel_settings=ws.SectionPanelSettings(x_axis=STEP),
        )
        for section in layout(pipeline)
    ]  # fmt: skip
    return ws.Workspace(
        entity=entity, project=project, name=name, sections=sections, settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(filters=[expr.Metric("Group") == pipeline.group]),
    )  # fmt: skip


def _as_panel(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2 as wr

    match panel.kind:
        case "curves":
            return wr.LinePlot(
                title=panel.title, x=panel.x, y=list(panel.keys), title_y=panel.unit or None
            )
        case "bars":
            return wr.BarPlot(
                title=panel.title, metrics=list(panel.keys), title_x=panel.unit or None
            )
        case "chart":  # made by wandb.plot.line_series
            (key,) = panel.keys
            return wr.CustomChart(
                query={
                    **dict.fromkeys(("id", "name", "_defaultColorIndex")),
                    "summaryTable": {"tableKey": f"{key}_table"},
                },
                chart_name="wandb/lineseries/v0",
                chart_fields={name: name for name in ("step", "lineKey", "lineVal")},
                chart_strings={"title": panel.title, "xname": panel.unit},
            )
        case "images":
            return wr.MediaBrowser(title=panel.title, media_keys=list(panel.keys))
        case "table":
            (key,) = panel.keys
            return wr.WeavePanelSummaryTable(table_name=key)


def as_json(workspace: Workspace) -> str:
    """What W&B is sent."""
    view = workspace._to_model()
    spec = view.spec.model_dump_json(by_alias=True, exclude_none=True)
    names = {"entity": view.entity, "project": view.project, "name": view.display_name}
    return json.dumps({**names, "spec": json.loads(spec)}, indent=2, ensure_ascii=False)


def save(workspace: Workspace) -> str:
    """Save at W&B; one that this saved before under the same name is replaced. Returns its address."""
    from wandb_workspaces.workspaces import internal

    # the library draws a name at random, so that every call would leave one more view
    names = f"{workspace.entity}/{workspace.project}/{workspace.name}"
    workspace._internal_name = internal._url_query_str_to_internal_name(
        sha256(names.encode()).hexdigest()[:11]
    )
    try:
        earlier = type(workspace).from_url(workspace.url)
    except ValueError:  # there is none
        pass
    else:
        workspace._internal_id = earlier._internal_id
    workspace.save()
    return str(workspace.url)
