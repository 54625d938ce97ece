"""The running store: an immutable view (body + tail + mask), the log applied to it, maintenance, recovery."""

from .device_manager import DeviceDesk
from .live_index import LiveIndex, LiveSettings
from .maintenance import Maintenance, Report
from .view import Found, View
from .worker import Worker

__all__ = ["DeviceDesk", "Found", "LiveIndex", "LiveSettings", "Maintenance", "Report", "View", "Worker"]
