"""The running store: an immutable view (body + tail + mask), the log applied to it, maintenance, recovery."""

from .live import LiveIndex
from .maintenance import Maintenance, Report
from .settings import LiveSettings
from .view import Found, View
from .worker import Worker

__all__ = ["Found", "LiveIndex", "LiveSettings", "Maintenance", "Report", "View", "Worker"]
