"""The workspace as W&B's own library writes and reads it, alone and through a recording server."""

import http.server
import json
import sys
import threading
from dataclasses import replace

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.tracking import STEP, TrackingConfig
from cpt_merge.tracking.workspace import (
    Pipeline,
    ReplyMetric,
    as_json,
    as_workspace,
    dashboard,
    layout,
)

PLAIN = Pipeline("demo-abc123", ["ko", "en"], [ReplyMetric("chat", "Form: chat", "share", ["ko"])])
PIPELINE = replace(
    PLAIN,
    previewed=[ReplyMetric("chat", "Preview: chat", "share", ["ko", "en"])],
    swept={"bits_per_byte": "Bits/byte"},
)
ONLINE = TrackingConfig(entity="me", project="p")


@pytest.fixture
def library():
    return pytest.importorskip(
        "wandb_workspaces.workspaces", reason="the extra `dashboard` is not installed"
    )


class ViewServer(http.server.BaseHTTPRequestHandler):
    """Keeps views as W&B does: by their name within a project."""

    views: dict[str, dict]

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query, values = body["query"], body.get("variables") or {}
        if "upsertView" in query:
            known = self.views.get(values["name"])
            assert (known or {}).get("id") == values.get("id"), (
                "a view that is there is addressed by its id"
            )
            view = {**values, "id": values.get("id") or f"view{len(self.views)}"}
            self.views[values["name"]] = view
            self.answer({"upsertView": {"view": view, "inserted": known is None}})
        elif "allViews" in query:
            found = [self.views[values["viewName"]]] if values["viewName"] in self.views else []
            self.answer({"project": {"allViews": {"edges": [{"node": view} for view in found]}}})
        else:
            assert "viewer" in query, query
            self.answer(
                {
                    "viewer": {
                        "id": "u",
                        "entity": "me",
                        "username": "me",
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            )

    def answer(self, data):
        text = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def views(monkeypatch):
    """Name -> view that was saved at the server that wandb now talks to."""
    handler = type("Bound", (ViewServer,), {"views": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    yield handler.views
    server.shutdown()


def panels_of(spec):
    return [
        panel
        for section in spec["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
    ]


def test_the_library_reads_back_what_it_wrote(library):
    workspace = as_workspace("me", "p", PIPELINE, "demo")
    written = json.loads(as_json(workspace))
    spec = library.internal.WorkspaceViewspec.model_validate(written["spec"])
    view = library.internal.View(
        entity="me", project="p", display_name="demo", name="nw-x-v", id="1", spec=spec
    )
    read = library.Workspace._from_model(view)
    assert [section.name for section in read.sections] == [
        section.name for section in layout(PIPELINE)
    ]
    assert read.settings.x_axis == STEP
    assert read.runset_settings.filters == "Metric(\"Group\") == 'demo-abc123'"
    assert (
        json.loads(as_json(read))["spec"]["section"]["panelBankConfig"]
        == written["spec"]["section"]["panelBankConfig"]
    )


def test_preview_and_sweep_have_a_section_only_where_they_are_asked_for():
    plain, full = layout(PLAIN), layout(PIPELINE)
    added = [section for section in full if section not in plain]
    assert [section for section in full if section in plain] == plain
    assert [section.name for section in added] == [
        "Training: preview of the chat model",
        "Ratio sweep",
    ]
    preview, sweep = (
        {name for panel in section.panels for name in panel.keys} for section in added
    )
    assert preview >= {"preview/ko/chat", "preview/en/chat", "preview/replies"}
    assert sweep >= {
        "sweep/bits_per_byte",
        "sweep/ratios",
        "sweep/points",
        "sweep/curves",
        "sweep/recommended_ratio",
    }


def test_panels_hold_the_names_and_axes_of_the_layout(library):
    written = panels_of(json.loads(as_json(as_workspace("me", "p", PIPELINE, "demo")))["spec"])
    declared = [panel for section in layout(PIPELINE) for panel in section.panels]
    forms = {
        "chart": "Vega2",
        "curves": "Run History Line Plot",
        "bars": "Bar Chart",
        "images": "Media Browser",
        "table": "Weave",
    }
    for panel, form in zip(declared, written, strict=True):
        assert form["viewType"] == forms[panel.kind]
        config = form["config"]
        if panel.kind == "table":
            assert f'"val": "{panel.keys[0]}"' in json.dumps(config)
        elif panel.kind == "chart":
            continue  # has a test of its own
        else:
            assert config["mediaKeys" if panel.kind == "images" else "metrics"] == panel.keys
        if panel.kind == "curves":
            assert config["xAxis"] == panel.x


def test_a_chart_is_the_one_that_wandb_makes_of_the_same_lines(library):
    import wandb

    written = panels_of(json.loads(as_json(as_workspace("me", "p", PIPELINE, "demo")))["spec"])
    charts = [
        panel for section in layout(PIPELINE) for panel in section.panels if panel.kind == "chart"
    ]
    drawn = [panel["config"] for panel in written if panel["viewType"] == "Vega2"]
    for chart, config in zip(charts, drawn, strict=True):
        made = wandb.plot.line_series([[1]], [[2]], keys=["a"], title=chart.title, xname=chart.unit)
        made.set_key(chart.keys[0])
        (runs,) = config["userQuery"]["queryFields"]
        del runs["args"][1]  # the library's limit of 500 runs
        assert config == made.spec.config_value["panel_config"]


def test_saving_again_replaces_the_view(library, views, capsys):
    for languages in (["ko"], ["ko", "en"]):
        dashboard(ONLINE, Pipeline("g", languages), "demo", dry_run=False)
    (view,) = views.values()
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "p", "demo")
    expected = panels_of(
        json.loads(as_json(as_workspace("me", "p", Pipeline("g", ["ko", "en"]), "demo")))["spec"]
    )
    saved = panels_of(json.loads(view["spec"]))
    for panel in (*expected, *saved):
        del panel["__id__"]  # drawn at random
    assert saved == expected
    said = capsys.readouterr().err
    assert "dashboard: http://127.0.0.1:" in said
    assert view["name"].removeprefix("nw-").removesuffix("-v") in said


def test_without_a_key_it_says_so(library):
    with pytest.raises(UserError, match="there is no API key; run `wandb login`"):
        dashboard(ONLINE, PIPELINE, "demo", dry_run=False)


def test_a_server_that_refuses_is_one_sentence(library, monkeypatch, deaf_server):
    monkeypatch.setenv("WANDB_BASE_URL", deaf_server)
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    with pytest.raises(UserError, match="W&B did not accept the dashboard of project p"):
        dashboard(ONLINE, PIPELINE, "demo", dry_run=False)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match=r"run pip install .*\[dashboard\]"):
        dashboard(ONLINE, PIPELINE, "demo", dry_run=True)
