"""The page of a report."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from tspin.comparison import Group
from tspin.figures import Picture


def render(groups: Sequence[Group], pictures: Mapping[str, Picture]) -> str:
    """The page as one text of HTML."""
    environment = Environment(loader=PackageLoader("tspin", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    return environment.get_template("report.html.jinja").render(groups=groups, pictures=pictures)
