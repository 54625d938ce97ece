"""The running store: an immutable view (body + tail + mask), the log applied to it, maintenance, recovery."""

from .desk import DeviceDesk
from .live import LiveIndex
from .maintenance import Maintenance, Report
from .settings import LiveSettings
from .view import Found, View
from .worker import Worker

__all__ = ["DeviceDesk", "Found", "LiveIndex", "LiveSettings", "Maintenance", "Report", "View", "Worker"]
