"""The running store: an immutable view (index + tail + mask), the log applied to it, maintenance, recovery."""

from .device_manager import DeviceManager
from .live_index import LiveIndex, LiveSettings
from .maintenance import Maintenance, Report
from .view import Found, View
from .worker import Worker

__all__ = ["DeviceManager", "Found", "LiveIndex", "LiveSettings", "Maintenance", "Report", "View", "Worker"]
