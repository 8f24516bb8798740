"""Help in sections: commands in groups by what they are for, options by how often they are wanted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

USUAL, SEARCHED, HOW, MACHINE, CLUSTER, OUTPUT = (
    "Usual options",
    "What may vary",
    "How the search goes",
    "Model and machine",
    "Workers on Ray",
    "Output and help",
)
PREPARE, SEARCH, LOOK, TAKE_AWAY, JOBS = (
    "Prepare",
    "Search",
    "Look",
    "Take away",
    "Searches as jobs of a Ray cluster",
)


def _write(formatter: Any, rows: Iterable[tuple[str, tuple[str, str]]], order: Iterable[str]) -> None:
    sections: dict[str, list[tuple[str, str]]] = {name: [] for name in order}
    for section, row in rows:
        sections.setdefault(section, []).append(row)
    for section, own in sections.items():
        if own:
            with formatter.section(section):
                formatter.write_dl(own)


class Sectioned(TyperCommand):
    """A command whose help shows its options in sections, those without one last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then options by section."""
        rows = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                section = getattr(parameter, "rich_help_panel", None) or OUTPUT
                rows.append(("Arguments" if is_argument else section, record))
        named = {section for section, _ in rows}
        plain = "Options" if named <= {"Arguments", OUTPUT} else OUTPUT
        rows = [(plain if section == OUTPUT else section, record) for section, record in rows]
        _write(formatter, rows, ("Arguments", USUAL, SEARCHED, HOW, MACHINE, CLUSTER, plain))


class Grouped(TyperGroup):
    """The application, whose help shows its commands in groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands by group, in the order of a search."""
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        room = formatter.width - 6 - max(len(name) for name, _ in commands)
        rows = [
            (getattr(command, "rich_help_panel", None) or OUTPUT, (name, command.get_short_help_str(room)))
            for name, command in commands
        ]
        _write(formatter, rows, (PREPARE, SEARCH, LOOK, TAKE_AWAY, JOBS))
