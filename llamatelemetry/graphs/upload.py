"""The way of a `graphs.Graph` to a Graphistry server, through PyGraphistry (api 3, personal
keys)."""

import contextlib
import logging

from ..errors import GraphistryError
from ..files import places
from ..imports import uninterrupted
from ..network import limited
from ..secrecy import keep, redact
from ..views import theme
from ..views.graph_page import categories, is_numbers
from ..views.text import html

KEY_ID = ("Graphistry_Personal_Key_ID", "GRAPHISTRY_PERSONAL_KEY_ID")
SECRET = (
    "Graphistry_Personal_Secret_Key",
    "GRAPHISTRY_PERSONAL_SECRET_KEY",
    "GRAPHISTRY_PERSONAL_KEY_SECRET",
)
_CONNECT_S = 15
_ADD = "Add both as Kaggle secrets or environment variables, or call show(upload=False) for the offline page"


def graphistry_credentials():
    """(key id, secret) from the Kaggle secrets Graphistry_Personal_Key_ID and
    Graphistry_Personal_Secret_Key or the environment variables of the same name (or
    GRAPHISTRY_PERSONAL_KEY_ID, GRAPHISTRY_PERSONAL_SECRET_KEY); None where there are none.
    GraphistryError if only one of the two is there."""
    key, secret = places.secret(*KEY_ID), places.secret(*SECRET)
    if bool(key) != bool(secret):
        there, missing = (KEY_ID[0], SECRET[0]) if key else (SECRET[0], KEY_ID[0])
        raise GraphistryError(f"{there} is set, but {missing} is not. {_ADD}")
    return (key, secret) if key else None


class GraphistryPlot:
    """An uploaded graph: `url` opens it in any browser; in a notebook it shows itself. `saved`: the
    files here."""

    def __init__(self, url, privacy, saved, height):
        self.url, self.privacy, self.saved, self.height = url, privacy, saved, height

    def __repr__(self):
        return f"GraphistryPlot({self.url!r}, {self.privacy})"

    def _repr_html_(self):
        url = html(self.url)
        return (
            f"<iframe src='{url}' style='width:100%;max-width:{theme.WIDTH}px;height:{self.height}px;border:0' "
            f"allowfullscreen></iframe><p><a href='{url}' target='_blank' rel='noopener'>{url}</a></p>"
        )


def bind_graph(client, graph):
    """graph as a PyGraphistry plot with every binding, the layout fixed; `client`: a registered
    PyGraphistry client."""
    nodes, edges, (x, y) = graph.tables
    plot = client.bind(
        source=graph.source,
        destination=graph.target,
        node=graph.node,
        point_title=graph.label,
        point_x=x,
        point_y=y,
    )
    plot = plot.nodes(nodes).edges(edges).settings(url_params={"play": 0})
    if graph.size is not None:
        plot = plot.encode_point_size(graph.size)
    if graph.weight is not None:
        plot = plot.bind(edge_weight=graph.weight)
    if graph.edge_label is not None:
        plot = plot.bind(edge_title=graph.edge_label)
    if graph.color is not None:
        plot = plot.encode_point_color(graph.color, **_colors(nodes[graph.color]))
    if graph.edge_color is not None:
        plot = plot.encode_edge_color(graph.edge_color, **_colors(edges[graph.edge_color]))
    return plot


def _colors(values):
    """The arguments that give a column the colours it has on the offline page."""
    if is_numbers(values):
        return dict(palette=list(theme.RAMP), as_continuous=True)
    names = categories(values)[0]
    mapping = {name: color for name, color in zip(names, theme.CATEGORIES[:-1])}  # as on the page
    return dict(as_categorical=True, categorical_mapping=mapping, default_mapping=theme.MISSING)


def upload_graph(graph, credentials, privacy, server, protocol, saved, height):
    """Upload with `privacy`; returns a GraphistryPlot. GraphistryError names what failed and where
    the files are."""
    here = f"Tables and page are in {saved['page'].parent}: {', '.join(path.name for path in saved.values())}"
    if privacy not in ("private", "organization", "public"):
        raise GraphistryError(
            f"privacy must be 'private', 'organization' or 'public', not {privacy!r}. {here}"
        )
    if credentials is None:
        raise GraphistryError(
            f"no Graphistry credentials: {KEY_ID[0]} and {SECRET[0]} are not set. {_ADD}. {here}"
        )
    try:
        with uninterrupted():
            import graphistry
    except ImportError as error:
        raise GraphistryError(
            f"graphistry is not installed: pip install graphistry. {here}"
        ) from error
    key, secret = map(keep, credentials)
    step = "reaching the server"
    with _quiet(), limited():
        try:
            client = graphistry.client() if hasattr(graphistry, "client") else graphistry
            server, protocol = (
                server or client.session.hostname,
                protocol or client.session.protocol,
            )
            _reach(f"{protocol}://{server}")
            print(
                f"Graphistry: uploading {len(graph.nodes)} nodes and {len(graph.edges)} edges to {server}, {privacy}; "
                "show(upload=False) keeps them here"
            )
            step = "logging in"
            client.register(
                api=3,
                server=server,
                protocol=protocol,
                personal_key_id=key,
                personal_key_secret=secret,
            )
            step = "uploading"
            plot = bind_graph(client, graph).privacy(mode=privacy)
            url = plot.plot(render="url", name=graph.title, memoize=False)
        except Exception as error:  # the client raises plain Exception, requests' and its own types
            reason = redact(str(error))[:400]  # before it is cut: half a key is none that is known
            failed = f"Graphistry, {step}: {type(error).__name__}: {reason}"
            raise GraphistryError(f"{failed}. {_ADVICE[step]} {here}") from None
    return GraphistryPlot(url, privacy, saved, height)


def _reach(address):
    import requests

    requests.head(address, timeout=_CONNECT_S)


_ADVICE = {
    "reaching the server": "Turn the internet on (Kaggle: Settings, Internet), or check server and protocol.",
    "logging in": "Check the personal key id and secret, and that they belong to this server.",
    "uploading": "Data that arrived before this have the account's default visibility: look at your datasets there.",
}


@contextlib.contextmanager
def _quiet():
    """PyGraphistry logs a traceback for every failure before it raises; one clear error is
    enough."""
    logger = logging.getLogger("graphistry")
    loggers = [
        logging.getLogger(name)
        for name in logging.root.manager.loggerDict
        if name.startswith("graphistry")
    ]
    before = [(each, each.disabled) for each in {logger, *loggers}]
    for each, _ in before:
        each.disabled = True
    try:
        yield
    finally:
        for each, disabled in before:
            each.disabled = disabled
