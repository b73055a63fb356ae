"""A dashboard made with wandb-workspaces: a saved view of the project's workspace, and a report with the same panels. Importing
this module imports wandb."""

import re
from typing import Any

from wandb_workspaces.reports.v2 import interface as reports
from wandb_workspaces.workspaces import RunsetSettings, Section, SectionLayoutSettings, Workspace, WorkspaceSettings

from launcher.report import dashboard as data

# A report's grid is 24 columns wide.
IN_A_ROW, WIDE, HIGH = 3, 8, 6


def build_workspace(dashboard: data.Dashboard, *, entity: str) -> Any:
    """Not saved yet."""
    sections = [
        Section(
            name=section.name,
            panels=[build_panel(panel) for panel in section.panels],
            is_open=section.is_open,
            layout_settings=SectionLayoutSettings(columns=IN_A_ROW, rows=-(-len(section.panels) // IN_A_ROW)),
        )
        for section in dashboard.sections
    ]
    runs = RunsetSettings(query=query_of(dashboard), regex_query=True) if dashboard.run else RunsetSettings()
    settings = WorkspaceSettings(point_visualization_method="bucketing")  # a spike of one step stays visible
    return Workspace(
        entity=entity,
        project=dashboard.project,
        name=dashboard.name,
        sections=sections,
        settings=settings,
        runset_settings=runs,
    )


def build_report(dashboard: data.Dashboard, *, entity: str) -> Any:
    """A section a heading; what is not open in the workspace stands last here too. Not saved yet."""
    runset = reports.Runset(entity=entity, project=dashboard.project, query=query_of(dashboard))
    blocks: list[Any] = []
    for section in dashboard.sections:
        grid = [build_panel(panel, place=place) for place, panel in enumerate(section.panels)]
        blocks += [reports.H2(section.name), reports.PanelGrid(runsets=[runset], panels=grid)]
    told = "Made by `phidias dashboard`; write what you found between the panels."
    return reports.Report(
        project=dashboard.project, entity=entity, title=dashboard.name, description=told, blocks=blocks, width="fluid"
    )


def query_of(dashboard: data.Dashboard) -> str:
    """The search for the run by its name; empty for all."""
    return f"^{re.escape(dashboard.run)}$" if dashboard.run else ""


def build_panel(panel: data.Panel, *, place: int = 0) -> Any:
    """`place`: its number in a report's grid."""
    layout = reports.Layout(x=place % IN_A_ROW * WIDE, y=place // IN_A_ROW * HIGH, w=WIDE, h=HIGH)
    if panel.text is not None:
        return reports.MarkdownPanel(markdown=panel.text, layout=layout)
    return reports.LinePlot(
        title=panel.title,
        title_y=panel.unit or None,
        x=panel.x,
        y=list(panel.metrics),
        metric_regex=panel.pattern,
        log_y=panel.log or None,
        plot_type=panel.kind,
        layout=layout,
    )


def save(dashboard: data.Dashboard, *, known: dict[str, str]) -> dict[str, str]:
    """Creates both, or replaces those that `known` names. What names them the next time, and where they are."""
    import wandb

    entity = str(dashboard.entity or wandb.Api().default_entity)
    workspace, report = build_workspace(dashboard, entity=entity), build_report(dashboard, entity=entity)
    if known.get("entity") == entity:
        workspace._internal_name, workspace._internal_id = known["view"], known["view_id"]
        report.id = known["report_id"]
    report.save()  # asks for the project before it saves anything
    workspace.save()
    ids = {"entity": entity, "view": workspace._internal_name, "view_id": workspace._internal_id, "report_id": report.id}
    return {**ids, "workspace": workspace.url, "report": report.url}
